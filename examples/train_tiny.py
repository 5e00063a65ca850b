"""Trains the byte-level `tiny` model on the source of the Python standard library and writes examples/models/tiny.

The recipe of examples/train.py scaled down; the model is compiled as one graph. Every twentieth module is held out, by
its name.

    make train      # or: python examples/train_tiny.py --steps 2400
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import token_shards
import torch
import train
from tqdm import tqdm

from gdn2_ops import corpus
from gdn2_ops.backends import TorchBackend
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.generate import bits_per_byte

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

EVALUATION_BYTES = 256 * 1024
WATCHED_BYTES = 16 * 1024
END_OF_FILE = b"\0"
RECIPE = ("--preset", "tiny", "--compile", "--warmup", "0.02", "--clip", str(math.log(2)))


def main() -> None:
    options = parse_options()
    text = END_OF_FILE.join(file.read_bytes() for file in corpus.training_files())
    held_out = corpus.held_out_text(EVALUATION_BYTES)
    print(f"{len(held_out):,} bytes held out")
    with tempfile.TemporaryDirectory() as folder:
        data = token_shards.write(Path(folder, "tokens"), [np.frombuffer(text, np.uint8)], vocab_size=256)
        sizes = [
            x for name in ("steps", "batch", "length", "lr", "seed") for x in (f"--{name}", str(vars(options)[name]))
        ]
        arguments = [*RECIPE, *sizes, "--data", str(data), "--out", str(Path(folder, "run"))]
        curve = Curve(options.steps, held_out[:WATCHED_BYTES])
        began = time.perf_counter()
        trained = train.run(train.parser().parse_args(arguments), curve)
        minutes = (time.perf_counter() - began) / 60

    trained.save_pretrained(options.out, dtype=torch.float16)
    stored = GDN2LM.from_pretrained(options.out)
    record = {
        "bits_per_byte": round(bits_per_byte(TorchBackend(stored), held_out), 4),
        "held_out": f"the first {len(held_out)} bytes of the held-out modules of Python {platform.python_version()}",
        "parameters": sum(p.numel() for p in stored.parameters()),
        "steps": options.steps,
        "tokens": options.steps * options.batch * options.length,
        "minutes": round(minutes, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "curve": curve.points,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(curve.points, options.out / "loss.png")
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


class Curve:
    """A `train.Watch`: bits per byte of the training batches (averaged) and of a piece of the held-out text."""

    def __init__(self, steps: int, text: bytes) -> None:
        self.points: list[dict] = []
        self._text, self._every, self._average = text, max(1, steps // 24), float("nan")
        self._bar = tqdm(total=steps, unit="step", smoothing=0.02)

    def __call__(self, step: int, model: GDN2LM, loss: float) -> None:
        bits = loss / math.log(2)
        self._average = bits if math.isnan(self._average) else 0.98 * self._average + 0.02 * bits
        self._bar.update()
        if step % self._every == 0:
            seen = bits_per_byte(TorchBackend(model), self._text)
            self.points.append({"step": step, "train": round(self._average, 4), "held_out": round(seen, 4)})
            self._bar.set_postfix(train=f"{self._average:.3f}", held_out=f"{seen:.3f}")


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
