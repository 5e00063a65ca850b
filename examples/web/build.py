"""The page of this folder as a static site: python examples/web/build.py build/web, after `npm ci` in this folder.

Writes the page, the files of onnxruntime-web that it loads, one ONNX file per function body, and expected.json: what
the model writes in eager PyTorch, for the tests.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import export
from gdn2_ops.export.onnx_bodies import BODIES
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.generate import generate

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "models" / "tiny"
PAGE = ("index.html", "style.css", "icon.svg", "page.js", "state.js", "worker.js", "generate.js")
ONNXRUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PROMPTS = ("import ", "class Stack:\n    def ", 'name = "ünïcödé – 日本語"\nprint(', "─" * 40)
COUNT = 96


def main(site: Path) -> None:
    model = GDN2LM.from_pretrained(MODEL)
    (site / "models").mkdir(parents=True, exist_ok=True)
    for body in BODIES:
        export(model, site / "models" / f"{body}.onnx", body=body)
    for name in PAGE:
        shutil.copy(HERE / name, site / name)
    (site / "onnxruntime-web").mkdir(exist_ok=True)
    for name in ONNXRUNTIME:
        shutil.copy(HERE / "node_modules" / "onnxruntime-web" / "dist" / name, site / "onnxruntime-web" / name)
    expected = [{"prompt": prompt, "bytes": list(_eager(model, prompt))} for prompt in PROMPTS]
    (site / "expected.json").write_text(json.dumps(expected))


def _eager(model: GDN2LM, prompt: str) -> bytes:
    return b"".join(generate(TorchBackend(model), prompt.encode(), COUNT))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
