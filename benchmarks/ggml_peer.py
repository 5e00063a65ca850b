"""ggml's operator gated_delta_net with a decay for each key channel, through the C functions of libggml.

The libraries are those of an installed llama-cpp-python, or what `make bench-ggml` built from its source package.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problems import Coordinates, Inputs, Problem

BUILT = Path(__file__).resolve().parent.parent / "build/peers/ggml/src"
LIBRARIES = ("libggml-base.so", "libggml-cpu.so")
F32 = 0  # GGML_TYPE_F32
POINTER = ctypes.c_void_p


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    """ggml_cplan of ggml 0.25; the last field is room for those that later versions append."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", POINTER),
        ("n_threads", ctypes.c_int),
        ("threadpool", POINTER),
        ("abort_callback", POINTER),
        ("abort_callback_data", POINTER),
        ("use_ref", ctypes.c_bool),
    )


SIGNATURES = {
    "ggml_init": (POINTER, _InitParams),
    "ggml_free": (None, POINTER),
    "ggml_version": (ctypes.c_char_p,),
    "ggml_new_tensor_4d": (POINTER, POINTER, ctypes.c_int, *[ctypes.c_int64] * 4),
    "ggml_gated_delta_net": (POINTER, *[POINTER] * 7, ctypes.c_int64),
    "ggml_new_graph": (POINTER, POINTER),
    "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_nbytes": (ctypes.c_size_t, POINTER),
    "ggml_backend_cpu_buffer_from_ptr": (POINTER, POINTER, ctypes.c_size_t),
    "ggml_backend_tensor_alloc": (ctypes.c_int, POINTER, POINTER, POINTER),
    "ggml_backend_buffer_free": (None, POINTER),
    "ggml_cpu_init": (None,),
    "ggml_graph_plan": (_Plan, POINTER, ctypes.c_int, POINTER),
    "ggml_graph_compute": (ctypes.c_int, POINTER, ctypes.POINTER(_Plan)),
}


def _folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    installed = [Path(p) / "lib" for p in (spec.submodule_search_locations or [])] if spec else []
    return next((f for f in (*installed, BUILT) if all((f / name).is_file() for name in LIBRARIES)), None)


@cache
def _functions() -> dict[str, ctypes._CFuncPtr]:
    folder = _folder()
    assert folder is not None
    loaded = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
    found = {}
    for name, (result, *arguments) in SIGNATURES.items():
        function = next(getattr(library, name) for library in loaded if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        found[name] = function
    found["ggml_cpu_init"]()
    return found


def version() -> str | None:
    return None if _folder() is None else _functions()["ggml_version"]().decode()


class Ggml:
    """A graph of one node. It reads one state and writes another: ggml has no form in place."""

    name = "ggml gated_delta_net"
    gates = "GDN-2 by coordinates"
    ops = ("step", "chunk")

    @staticmethod
    def missing() -> str | None:
        return None if _folder() else "not installed: make bench-ggml, or pip install llama-cpp-python"

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        if problem.K != problem.V:
            raise ValueError(f"ggml gated_delta_net: expected K == V, got {problem.K} and {problem.V}")
        self.c = _functions()
        self.coordinates = c = Coordinates.of(x)
        self.shape = x.v.shape
        beta = torch.ones(problem.N, problem.T, problem.H, 1)
        # ggml counts axes from the fastest and keeps states transposed
        tensors = (c.q, c.k, c.v, c.g, beta, x.state.mT)
        self.memory = [t.contiguous() for t in tensors]
        self.out = torch.empty(x.v.numel() + x.state.numel())
        self.context = self.c["ggml_init"](_InitParams(1 << 20, None, True))
        nodes = [self.c["ggml_new_tensor_4d"](self.context, F32, *reversed(t.shape)) for t in self.memory]
        node = self.c["ggml_gated_delta_net"](self.context, *nodes, 1)
        self.buffers = [self._place(n, t) for n, t in zip((*nodes, node), (*self.memory, self.out))]
        self.graph = self.c["ggml_new_graph"](self.context)
        self.c["ggml_build_forward_expand"](self.graph, node)
        self.plan = self.c["ggml_graph_plan"](self.graph, threads, None)
        self.work = torch.empty(self.plan.work_size + 64, dtype=torch.uint8)
        self.plan.work_data = self.work.data_ptr()

    def _place(self, node: int, memory: Tensor) -> int:
        size = memory.numel() * 4
        if self.c["ggml_nbytes"](node) != size:
            raise ValueError(f"ggml: expected a tensor of {size} bytes, got {self.c['ggml_nbytes'](node)}")
        buffer = self.c["ggml_backend_cpu_buffer_from_ptr"](memory.data_ptr(), size)
        self.c["ggml_backend_tensor_alloc"](buffer, node, memory.data_ptr())
        return buffer

    def __call__(self) -> None:
        status = self.c["ggml_graph_compute"](self.graph, ctypes.byref(self.plan))
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute: expected status 0, got {status}")

    def result(self) -> tuple[Tensor, ...]:
        self()
        count = self.shape.numel()
        N, _, H, V = self.shape
        final = self.out[count:].view(N, H, V, -1).mT
        return self.out[:count].view(self.shape).clone(), self.coordinates.state(final)

    def __del__(self) -> None:
        for buffer in getattr(self, "buffers", ()):
            self.c["ggml_backend_buffer_free"](buffer)
        if getattr(self, "context", None):
            self.c["ggml_free"](self.context)
