"""ONNX files in ONNX Runtime: any file, and a language model as a backend of `gdn2_ops.runtime.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime import onnxruntime_library
from gdn2_ops.runtime.runner import LanguageModel, Port, check_language_model

if TYPE_CHECKING:
    import onnxruntime

TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OnnxRuntime:
    """A `runtime.runner.Runner` in ONNX Runtime. Args: those of `open_session`, and what it raises."""

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        threads: int = 0,
        library: bool = False,
        weights_folder: Path | None = None,
        cuda: bool = False,
    ) -> None:
        self._session = open_session(model, threads=threads, library=library, weights_folder=weights_folder, cuda=cuda)
        self.inputs = [self._port(x) for x in self._session.get_inputs()]
        self.outputs = [self._port(x) for x in self._session.get_outputs()]

    def run(self, feed: dict[str, NDArray]) -> list[NDArray]:
        return self._session.run(None, feed)

    @staticmethod
    def _port(x: Any) -> Port:
        return Port(x.name, np.dtype(TYPES[x.type]).name if x.type in TYPES else x.type, tuple(x.shape))


class OnnxRuntimeBackend(LanguageModel):
    """A `runtime.runner.LanguageModel` of a file in ONNX Runtime.

    Args: those of `open_language_model`, and what it raises.
    """

    def __init__(self, file: str | Path, *, threads: int = 0, library: bool = False, cuda: bool = False) -> None:
        super().__init__(OnnxRuntime(file, threads=threads, library=library, cuda=cuda))


def open_session(
    model: str | Path | bytes,
    *,
    threads: int = 0,
    library: bool = False,
    weights_folder: Path | None = None,
    cuda: bool = False,
) -> onnxruntime.InferenceSession:
    """A session on the CPU, or on CUDA.

    Args:
        model: an ONNX file, or a serialised model.
        threads: of the session; 0 leaves it to ONNX Runtime.
        library: run `gdn2::GatedDeltaNet2` nodes with our kernels (`runtime.onnxruntime_library`), not their bodies.
        weights_folder: where a serialised model's external data is.
        cuda: with the CUDAExecutionProvider, float32 products not in TF32. The library has kernels there too.

    Raises: FileNotFoundError: no such file. ImportError: a package or the library is not installed. RuntimeError: CUDA
        cannot be used here. ONNX Runtime's own errors: it cannot run the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("gdn2_ops.runtime.session needs onnxruntime: pip install 'gdn2-ops[onnx]'") from error
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise FileNotFoundError(f"expected an ONNX file, got {str(model)!r}; gdn2 export MODEL --to onnx writes one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if weights_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
    if library:
        onnxruntime_library.register(options)
    providers: list = [("CUDAExecutionProvider", {"use_tf32": "0"})] if cuda else []
    if cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ImportError("gdn2_ops.runtime.session needs ONNX Runtime for CUDA: pip install onnxruntime-gpu instead")
    session = onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=[*providers, "CPUExecutionProvider"],
        enable_fallback=0,
    )
    if cuda and "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("expected a session on CUDA, got one on the CPU; ONNX Runtime logged what it lacks")
    return session


def open_language_model(file: str | Path, *, threads: int = 0, library: bool = False) -> onnxruntime.InferenceSession:
    """As `open_session`; inputs: input_ids and the states; outputs: logits and as many states, in the same order.

    Raises: ValueError: the inputs and outputs of the file are others.
    """
    session = open_session(file, threads=threads, library=library)
    check_language_model([x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()])
    return session


def zeros(x: Any, batch: int) -> NDArray:
    """The states before the first token, for an input of a session whose only dynamic axis is the batch."""
    return np.zeros([size if isinstance(size, int) else batch for size in x.shape], TYPES[x.type])
