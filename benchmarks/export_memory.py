"""Memory that an export of a large model takes: python -m benchmarks.export_memory --layers 6

The preset gdn2-1.3b with fewer layers and random weights, which are more than one ONNX file holds. Prints the resident
memory before and at the peak of the export, and whether the file gives eager numbers in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import export
from gdn2_ops.model import GDN2LM, GDN2Config
from gdn2_ops.runtime.session import OnnxRuntimeBackend

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gdn2-1.3b")
    parser.add_argument("--layers", type=int, default=6, help="of the preset's")
    parser.add_argument("--folder", type=Path, help="for the file, removed afterwards; twice its size is needed")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        model = GDN2LM(dataclasses.replace(GDN2Config.preset(options.preset), num_layers=options.layers)).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = np.arange(9)[None]
    want = TorchBackend(model)(tokens, None)[0]
    before = peak()
    print(f"{weights / GB:.2f} GB of weights, {before:.2f} GB resident before the export")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        began = time.perf_counter()
        file = export(model, Path(folder) / "model.onnx")
        after = peak()
        sizes = ", ".join(f"{path.name} {path.stat().st_size / GB:.4f} GB" for path in sorted(file.parent.iterdir()))
        print(f"exported in {time.perf_counter() - began:.0f} s: {sizes}")
        print(f"{after:.2f} GB at the peak: {(after - before) * GB / weights:.2f} of the weights more than before")
        del model
        got = OnnxRuntimeBackend(file)(tokens, None)[0]
    print(f"ONNX Runtime: largest difference of logits {np.abs(got - want).max():.1e}, of {np.abs(want).max():.1f}")


def peak() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


if __name__ == "__main__":
    main()
