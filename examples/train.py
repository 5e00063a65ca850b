"""Trains a `GDN2LM` on token shards: the paper's recipe, on a CPU, a GPU, or many with FSDP2.

AdamW (0.9, 0.95), weight decay 0.1 on matrices only, clipping, a linear warm-up and a cosine to a tenth. Rows are
windows drawn by (seed, step): what a resumed run reads does not depend on where it stopped, nor on the processes.

    python examples/train.py --preset gdn2-1.3b --data TOKENS --out FOLDER --batch 8 --accumulate 16
    python examples/train.py ... --resume                                  # from FOLDER/checkpoint.pt
    torchrun --nproc-per-node 8 examples/train.py ... --fsdp               # the same batch over 8 processes

TOKENS is a folder as examples/token_shards.py describes it. On a GPU arithmetic is bfloat16 (--dtype), parameters,
decays and states float32; not run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from schedule import warm_cosine
from token_shards import TokenShards
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from gdn2_ops import parallel
from gdn2_ops.model import GDN2LM, GDN2Config

CHECKPOINT = "checkpoint.pt"
UNDECAYED = ("A_log", "dt_bias")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAME = ("tokens", "seed", "steps", "batch", "length", "accumulate", "lr", "warmup", "clip", "dtype")  # when resumed
Watch = Callable[[int, GDN2LM, float], None]  # after a step: its number, the model, the loss in nats


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    distributed = "RANK" in os.environ
    if distributed and not dist.is_initialized():
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    try:
        run(options)
    finally:
        if distributed:
            dist.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gdn2-1.3b", help="of GDN2Config")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other values for options of it")
    parser.add_argument("--data", type=Path, required=True, help="folder of token shards")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder of the model and its checkpoint")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=8, help="rows of a forward, over all processes")
    parser.add_argument("--accumulate", type=int, default=1, help="forwards of a step")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--warmup", type=float, default=0.01, help="share of the steps")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient, in nats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, help="of arithmetic: bfloat16 on a GPU, else float32")
    parser.add_argument("--compile", action="store_true", help="one graph, torch.compile(fullgraph=True)")
    parser.add_argument("--fsdp", action="store_true", help="split parameters over the processes of torchrun")
    parser.add_argument("--resume", action="store_true", help=f"go on from {CHECKPOINT} in --out")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines")
    parser.add_argument("--stop-at", type=int, help="end with a checkpoint after this step: jobs with a time limit")
    return parser


def run(options: argparse.Namespace, watch: Watch | None = None) -> GDN2LM:
    """Trains, and at the last step writes the model. Returns it, split where it was trained split.

    Raises: ValueError: options do not fit together, the data, or the checkpoint. FileNotFoundError, FileExistsError.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = configured(options)
    if options.batch % ranks:
        raise ValueError(f"expected --batch to be a multiple of the {ranks} processes, got {options.batch}")
    if options.fsdp != dist.is_initialized():
        raise ValueError(f"expected --fsdp and torchrun together, got {'one process' if options.fsdp else 'no --fsdp'}")
    if options.fsdp and options.compile:
        raise ValueError("expected --compile without --fsdp, whose hooks are no part of one graph, got both")
    checkpoint = options.out / CHECKPOINT
    if checkpoint.exists() != options.resume:
        raise FileExistsError(
            f"expected {'a' if options.resume else 'no'} checkpoint {str(checkpoint)!r}; --resume goes on from one"
        )
    device = device_of_process()
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    data = TokenShards(options.data, vocab_size=config.vocab_size, length=options.length + 1)
    options.tokens = data.tokens
    torch.manual_seed(options.seed)
    model = GDN2LM(config).to(device)
    if options.fsdp:
        mesh = init_device_mesh(device.type, (ranks,))
        parallel.apply_fsdp(model, mesh, param_dtype=DTYPES[options.dtype])
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=options.lr, betas=(0.9, 0.95))
    begin = load(checkpoint, model, optimizer, options) if options.resume else 0
    options.out.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters, {data.tokens:,} tokens to learn from, {ranks} x {device}, {options.dtype}")
    end = max(begin, min(options.steps, options.stop_at or options.steps))
    train(model, optimizer, data, options, range(begin, end), (rank, ranks), watch)
    save(checkpoint, model, optimizer, options, end)
    if end == options.steps:
        whole = full_weights(model)
        if rank == 0:
            with torch.device("meta"):
                plain = GDN2LM(config)
            plain.load_state_dict(whole, assign=True)
            plain.save_pretrained(options.out)
    return model


def train(
    model: GDN2LM,
    optimizer: torch.optim.Optimizer,
    data: TokenShards,
    options: argparse.Namespace,
    steps: range,
    place: tuple[int, int],
    watch: Watch | None,
) -> None:
    """The steps of a run; place: the rank and how many there are."""
    rank, ranks = place
    device, dtype = next(model.parameters()).device, DTYPES[options.dtype]
    forward = torch.compile(model, fullgraph=True) if options.compile else model
    mixed = dtype != torch.float32 and not options.fsdp  # FSDP casts parameters as it gathers them
    began, told = time.perf_counter(), steps.start
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warm_cosine(step, options.steps, options.warmup)
        total = torch.zeros((), device=device)
        for i in range(options.accumulate):
            if options.fsdp:
                model.set_requires_gradient_sync(i + 1 == options.accumulate)  # type: ignore[operator]
            rows = batch_of(data, options, step, i)[rank::ranks].to(device, non_blocking=True)
            with torch.autocast(device.type, dtype) if mixed else nullcontext():
                logits = forward(rows[:, :-1]).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()) / options.accumulate
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ranks > 1:
            dist.all_reduce(total, dist.ReduceOp.SUM)
        last = step + 1 == steps.stop
        if watch is not None:
            watch(step + 1, model, total.item() / ranks)
        saved = (step + 1) % options.save_every == 0 and not last
        if (step + 1) % options.log_every == 0 or last or saved:
            value, seconds = total.item() / ranks, time.perf_counter() - began
            rate = (step + 1 - told) * options.batch * options.accumulate * options.length / seconds
            say(f"step {step + 1}: loss {value:.4f}, {rate:,.0f} tokens/s, {memory(device):.2f} GiB at most")
            began, told = time.perf_counter(), step + 1
            if not math.isfinite(value):
                raise FloatingPointError(f"expected a finite loss, got {value} at step {step + 1}")
        if saved:
            save(options.out / CHECKPOINT, model, optimizer, options, step + 1)


def batch_of(data: TokenShards, options: argparse.Namespace, step: int, i: int) -> Tensor:
    """The rows of the i-th forward of a step, of all processes: [batch, length + 1] int64."""
    random = np.random.default_rng([options.seed, step, i])
    return torch.from_numpy(np.stack([data.window(at) for at in random.integers(len(data), size=options.batch)]))


def device_of_process() -> torch.device:
    """The GPU that torchrun gave this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def configured(options: argparse.Namespace) -> GDN2Config:
    """The preset with the values of --set. Raises: ValueError: there is no such option, or no such preset."""
    config, names = GDN2Config.preset(options.preset), [field.name for field in dataclasses.fields(GDN2Config)]
    pairs = [pair.partition("=") for pair in options.set]
    unknown = [name for name, _, _ in pairs if name not in names]
    if unknown:
        raise ValueError(f"expected --set with names among {names}, got {unknown}")
    return dataclasses.replace(config, **{name: json.loads(value) for name, _, value in pairs})


def parameter_groups(model: GDN2LM) -> list[dict]:
    """Weight decay on matrices; none on norms, biases, A_log and dt_bias."""
    decayed, rest = [], []
    for name, p in model.named_parameters():
        (rest if p.dim() < 2 or name.endswith(UNDECAYED) else decayed).append(p)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(file: Path, model: GDN2LM, optimizer: torch.optim.Optimizer, options: argparse.Namespace, step: int) -> None:
    """One file for any number of processes, which replaces the one before it when it is complete."""
    weights, moments = get_state_dict(model, optimizer, options=WHOLE)
    if not dist.is_initialized() or dist.get_rank() == 0:
        facts = {name: getattr(options, name) for name in SAME} | {"config": dataclasses.asdict(configured(options))}
        part = file.with_suffix(".part")
        torch.save({"model": weights, "optimizer": moments, "step": step, "options": facts}, part)
        part.replace(file)


def load(file: Path, model: GDN2LM, optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> int:
    """Puts a checkpoint into both; returns its step. Raises: ValueError: it is of a run with other options."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    facts = {name: getattr(options, name) for name in SAME} | {"config": dataclasses.asdict(configured(options))}
    other = {name: value for name, value in saved["options"].items() if facts.get(name) != value}
    if other:
        raise ValueError(f"{file}: expected the options of this run, got {other}; a run goes on as it began")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    return saved["step"]


def full_weights(model: GDN2LM) -> dict[str, Any]:
    """Every parameter whole, on the CPU of the first process."""
    return get_model_state_dict(model, options=WHOLE)


def memory(device: torch.device) -> float:
    """The most that was in use so far, in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def say(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
