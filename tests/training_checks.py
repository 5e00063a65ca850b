"""examples/train.py over processes is examples/train.py in one: FSDP2, checkpoints, refusals."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import check, close, raises

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import token_shards
import train

CUT = ["vocab_size=50", "hidden_size=16", "num_layers=2", "intermediate_size=24", "num_heads=2", "head_dim=8"]
SIZES = ["--steps", "4", "--batch", "4", "--accumulate", "2", "--length", "12", "--lr", "0.01", "--log-every", "100"]


@check(2)
def training_over_processes_is_training_in_one(group):
    """Rows are split, parameters too; a resumed run ends with the same bits, one process with the same to rounding."""
    folder = [tempfile.mkdtemp() if group.rank == 0 else ""]
    dist.broadcast_object_list(folder)
    at = Path(folder[0])
    if group.rank == 0:
        rows = torch.randint(50, (200,), generator=torch.Generator().manual_seed(0))
        token_shards.write(at / "data", [rows.numpy()], vocab_size=50)
    dist.barrier()

    def run(name: str, *more: str) -> dict:
        arguments = ["--set", *CUT, "--data", str(at / "data"), "--out", str(at / name), *SIZES, *more]
        return train.full_weights(train.run(train.parser().parse_args(arguments)))

    unbroken = run("unbroken", "--fsdp")
    run("stopped", "--fsdp", "--stop-at", "2")
    dist.barrier()
    resumed = run("stopped", "--fsdp", "--resume")
    raises(ValueError, "--fsdp and torchrun together, got no --fsdp", lambda: run("none"))
    raises(ValueError, "--batch to be a multiple of the 2 processes, got 3", lambda: run("none", "--batch", "3"))
    raises(ValueError, "--compile without --fsdp", lambda: run("none", "--fsdp", "--compile"))
    dist.barrier()
    if group.rank == 0:
        assert unbroken.keys() == resumed.keys() and len(unbroken) > 20
        assert all(torch.equal(x, resumed[name]) for name, x in unbroken.items())
        for name, x in one_process(at).items():
            close(unbroken[name], x, name)


def one_process(at: Path) -> dict:
    """The same training without the group."""
    arguments = ["--set", *CUT, "--data", str(at / "data"), "--out", str(at / "one"), *SIZES]
    options = train.parser().parse_args(arguments)
    options.dtype = "float32"
    torch.manual_seed(options.seed)
    model = train.GDN2LM(train.configured(options))
    optimizer = torch.optim.AdamW(train.parameter_groups(model), lr=options.lr, betas=(0.9, 0.95))
    data = token_shards.TokenShards(at / "data", vocab_size=50, length=13)
    train.train(model, optimizer, data, options, range(options.steps), (0, 1), None)
    return dict(model.named_parameters())
