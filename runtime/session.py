"""An exported language model in ONNX Runtime, as a backend of `gdn2_ops.runtime.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime import onnxruntime_library

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class OnnxRuntimeBackend:
    """tokens [B, T] and a state to logits [B, T, vocab] and a state, one ONNX graph for both prefill and decoding.

    Inputs of the file: input_ids and the states; outputs: logits and as many states, in the same order.

    Args:
        file: an ONNX file.
        threads: of the session; 0 leaves it to ONNX Runtime.
        library: run `gdn2::GatedDeltaNet2` nodes with our kernels (`runtime.onnxruntime_library`), not their bodies.

    Raises: FileNotFoundError, ValueError: no such file, or its inputs and outputs are others. ImportError: a package or
        the library is not installed.
    """

    def __init__(self, file: str | Path, *, threads: int = 0, library: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("gdn2_ops.runtime.session needs onnxruntime: pip install 'gdn2-ops[onnx]'") from error
        if not Path(file).is_file():
            raise FileNotFoundError(f"expected an ONNX file, got {str(file)!r}; gdn2 export MODEL --to onnx writes one")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if library:
            onnxruntime_library.register(options)
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._past = self._session.get_inputs()[1:]
        names = [x.name for x in self._session.get_inputs()], [x.name for x in self._session.get_outputs()]
        if names[0][0] != "input_ids" or names[1][0] != "logits" or len(names[0]) != len(names[1]):
            raise ValueError(f"{file}: expected input_ids and states to logits and as many states, got {names}")

    def __call__(self, tokens: NDArray[np.int64], state: Any | None) -> tuple[NDArray[np.float32], Any]:
        if state is None:
            state = [self._empty(x, tokens.shape[0]) for x in self._past]
        feed = {"input_ids": tokens} | {x.name: value for x, value in zip(self._past, state)}
        logits, *state = self._session.run(None, feed)
        return logits.astype(np.float32, copy=False), state

    @staticmethod
    def _empty(x: Any, batch: int) -> NDArray:
        return np.zeros([size if isinstance(size, int) else batch for size in x.shape], _TYPES[x.type])
