"""Trains the byte-level `tiny` model on the source of the Python standard library and writes examples/models/tiny.

The paper's recipe scaled down: AdamW (0.9, 0.95), weight decay 0.1 on matrices only, clipping at 1, a linear warm-up
and a cosine to a tenth. The model is compiled as one graph. Every twentieth module is held out, by its name.

    make train      # or: python examples/train_tiny.py --steps 2400
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm

from gdn2_ops import corpus
from gdn2_ops.backends import TorchBackend
from gdn2_ops.model import GDN2LM, GDN2Config
from gdn2_ops.runtime.generate import bits_per_byte, tokens_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

UNDECAYED = ("A_log", "dt_bias")
EVALUATION_BYTES = 256 * 1024
END_OF_FILE = b"\0"


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    text = END_OF_FILE.join(file.read_bytes() for file in corpus.training_files())
    held_out = corpus.held_out_text(EVALUATION_BYTES)
    model = GDN2LM(GDN2Config.preset("tiny"))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(text):,} bytes to learn from, {len(held_out):,} bytes held out")

    began = time.perf_counter()
    curve = train(model, text, held_out, options)
    minutes = (time.perf_counter() - began) / 60

    model.save_pretrained(options.out, dtype=torch.float16)
    stored = GDN2LM.from_pretrained(options.out)
    record = {
        "bits_per_byte": round(bits_per_byte(TorchBackend(stored), held_out), 4),
        "held_out": f"the first {len(held_out)} bytes of the held-out modules of Python {platform.python_version()}",
        "parameters": parameters,
        "steps": options.steps,
        "tokens": options.steps * options.batch * options.length,
        "minutes": round(minutes, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "curve": curve,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(curve, options.out / "loss.png")
    print(f"{record['bits_per_byte']} bits per byte held out, {minutes:.1f} minutes; wrote {options.out}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models" / "tiny")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="bytes a sequence")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(model: GDN2LM, text: bytes, held_out: bytes, options: argparse.Namespace) -> list[dict]:
    """Returns the curve: bits per byte of the training batches (averaged) and of a piece of the held-out text."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=options.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, options.steps))
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.from_numpy(tokens_of(text))
    watched = held_out[: 16 * 1024]
    curve, average = [], float("nan")
    bar = tqdm(range(options.steps), unit="step", smoothing=0.02)
    for step in bar:
        begins = torch.randint(len(tokens) - options.length - 1, (options.batch,))
        rows = torch.stack([tokens[begin : begin + options.length + 1] for begin in begins])
        logits = compiled(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / math.log(2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % max(1, options.steps // 24) == 0:
            seen = bits_per_byte(TorchBackend(model), watched)
            curve.append({"step": step + 1, "train": round(average, 4), "held_out": round(seen, 4)})
            bar.set_postfix(train=f"{average:.3f}", held_out=f"{seen:.3f}")
    return curve


def parameter_groups(model: GDN2LM) -> list[dict]:
    """Weight decay on matrices; none on norms, biases, A_log and dt_bias."""
    decayed, rest = [], []
    for name, p in model.named_parameters():
        (rest if p.dim() < 2 or name.endswith(UNDECAYED) else decayed).append(p)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def plot(curve: list[dict], file: Path) -> None:
    steps = [point["step"] for point in curve]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, label in (("train", "training, moving average"), ("held_out", "held-out modules")):
        axes.plot(steps, [point[name] for point in curve], label=label)
    axes.set(xlabel="step", ylabel="bits per byte", title="tiny: Gated DeltaNet-2 on the standard library's source")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
