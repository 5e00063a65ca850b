"""The TensorRT plugin on tensors of torch, without TensorRT: what TensorRT does around a call is in plugin_host.cpp."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7}


class Plugin:
    """library: of `gdn2 build-plugin`. folder: where the host is compiled. sources: of `runtime/tensorrt`."""

    def __init__(self, library: Path, folder: Path, sources: Path) -> None:
        made = folder / "plugin_host.so"
        command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{sources}", HERE / "plugin_host.cpp", "-o", made]
        subprocess.run([*command, "-ldl"], check=True)
        self.host = ctypes.CDLL(str(made))
        for name in ("host_open", "host_attach"):
            getattr(self.host, name).restype = ctypes.c_void_p
        self.host.host_enqueue.argtypes = (ctypes.c_void_p,) * 4
        self.host.host_close.argtypes = (ctypes.c_void_p,)
        self._creator = ctypes.c_void_p(self.host.host_open(str(library).encode()))
        assert self._creator.value

    def attach(self, x: Sequence[Tensor], scale: float, most: tuple[int, int] | None = None) -> "Layer":
        """A layer for tensors like q k v g b w state. most: B and T that its workspace suffices for."""
        return Layer(self, x, scale, most)


class Layer:
    """As an execution context has it; `workspace` is on the device of the tensors."""

    def __init__(self, plugin: Plugin, x: Sequence[Tensor], scale: float, most: tuple[int, int] | None) -> None:
        (B, T, H, K), (HV, V) = x[0].shape, x[2].shape[2:]
        sizes, largest = (ctypes.c_int64 * 6)(B, T, H, HV, K, V), (ctypes.c_int64 * 2)(*(most or (B, T)))
        bytes_ = ctypes.c_size_t()
        self._host, types = plugin.host, ctypes.c_int32(TYPES[x[0].dtype])
        self._layer = self._host.host_attach(
            plugin._creator, ctypes.c_float(scale), sizes, largest, types, ctypes.byref(bytes_)
        )
        assert self._layer, "the plugin refuses these tensors; it says why on stderr"
        self.workspace = torch.full((max(bytes_.value, 1),), 0xFF, dtype=torch.uint8, device=x[0].device)

    def enqueue(self, x: Sequence[Tensor], o: Tensor, final_state: Tensor, stream: int) -> None:
        """Contiguous tensors; nothing is waited for. final_state may be the initial one."""
        assert all(y.is_contiguous() for y in (*x, o, final_state))
        pointers = (ctypes.c_void_p * 9)(*(y.data_ptr() for y in (*x, o, final_state)))
        assert self._host.host_enqueue(self._layer, pointers, self.workspace.data_ptr(), stream) == 0

    def __call__(self, x: Sequence[Tensor], stream: int) -> tuple[Tensor, Tensor]:
        """The outputs, in memory that was NaN before."""
        o, final_state = torch.full_like(x[2], float("nan")), torch.full_like(x[6], float("nan"))
        self.enqueue(x, o, final_state, stream)
        return o, final_state

    def __del__(self) -> None:
        if getattr(self, "_layer", None):
            self._host.host_close(self._layer)
