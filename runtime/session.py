"""An exported language model in ONNX Runtime, as a backend of `gdn2_ops.runtime.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime import onnxruntime_library

if TYPE_CHECKING:
    import onnxruntime

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class OnnxRuntimeBackend:
    """tokens [B, T] and a state to logits [B, T, vocab] and a state, one ONNX graph for both prefill and decoding.

    Args: those of `open_language_model`, and what it raises.
    """

    def __init__(self, file: str | Path, *, threads: int = 0, library: bool = False) -> None:
        self._session = open_language_model(file, threads=threads, library=library)
        self._past = self._session.get_inputs()[1:]

    def __call__(self, tokens: NDArray[np.int64], state: Any | None) -> tuple[NDArray[np.float32], Any]:
        if state is None:
            state = [zeros(x, tokens.shape[0]) for x in self._past]
        feed = {"input_ids": tokens} | {x.name: value for x, value in zip(self._past, state)}
        logits, *state = self._session.run(None, feed)
        return logits.astype(np.float32, copy=False), state


def open_session(file: str | Path, *, threads: int = 0, library: bool = False) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        file: an ONNX file.
        threads: of the session; 0 leaves it to ONNX Runtime.
        library: run `gdn2::GatedDeltaNet2` nodes with our kernels (`runtime.onnxruntime_library`), not their bodies.

    Raises: FileNotFoundError: no such file. ImportError: a package or the library is not installed.
    """
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
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def open_language_model(file: str | Path, *, threads: int = 0, library: bool = False) -> onnxruntime.InferenceSession:
    """As `open_session`; inputs: input_ids and the states; outputs: logits and as many states, in the same order.

    Raises: ValueError: the inputs and outputs of the file are others.
    """
    session = open_session(file, threads=threads, library=library)
    names = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]
    if names[0][0] != "input_ids" or names[1][0] != "logits" or len(names[0]) != len(names[1]):
        raise ValueError(f"{file}: expected input_ids and states to logits and as many states, got {names}")
    return session


def zeros(x: Any, batch: int) -> NDArray:
    """The states before the first token, for an input of a session whose only dynamic axis is the batch."""
    return np.zeros([size if isinstance(size, int) else batch for size in x.shape], TYPES[x.type])
