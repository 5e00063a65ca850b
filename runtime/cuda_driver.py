"""Memory, streams and graphs of a GPU through the CUDA driver alone, by ctypes: no CUDA toolkit, no PyTorch.

The context is the device's primary one, which TensorRT and PyTorch use too.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p

import numpy as np
from numpy.typing import NDArray

_HANDLE, _ADDRESS = POINTER(c_void_p), POINTER(c_uint64)
_FUNCTIONS: dict[str, tuple] = {  # of cuda.h; where it has versions, the one that CUDA 12 and later mean
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuMemAlloc_v2": (_ADDRESS, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_ulonglong),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
}
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NON_BLOCKING, _CAPTURE_OF_THREAD = 1, 1  # CU_STREAM_NON_BLOCKING, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class Driver:
    """The driver, with the first device's primary context current in this thread.

    Raises: RuntimeError: there is no driver, or no device.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"expected an NVIDIA GPU and its driver, got none: {error}") from error
        for name, types in _FUNCTIONS.items():
            if not hasattr(self._library, name):
                raise RuntimeError(f"expected a CUDA driver of 12.0 or newer, got one without {name}")
            getattr(self._library, name).argtypes = types
        count, device, context = c_int(), c_int(), c_void_p()
        try:
            self.call("cuInit", 0)
            self.call("cuDeviceGetCount", ctypes.byref(count))
        except RuntimeError as error:
            raise RuntimeError(f"expected an NVIDIA GPU and its driver, got none: {error}") from error
        if count.value == 0:
            raise RuntimeError("expected an NVIDIA GPU, got a driver without one")
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context, self._device = context, device
        self.use()

    def compute_capability(self) -> tuple[int, int]:
        """Of the device, major and minor."""
        found = c_int(), c_int()
        for value, attribute in zip(found, _COMPUTE_CAPABILITY):
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return found[0].value, found[1].value

    def use(self) -> None:
        """Makes the context current in the calling thread."""
        self.call("cuCtxSetCurrent", self._context)

    def call(self, name: str, *arguments) -> None:
        """Raises: RuntimeError: the driver's function failed."""
        status = getattr(self._library, name)(*arguments)
        if status:
            text = c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'an unknown error').decode()}")

    def free(self, name: str, handle: int | None) -> None:
        """For finalizers: what the driver says as a process ends helps nobody."""
        self._library.cuCtxSetCurrent(self._context)
        getattr(self._library, name)(handle)


class Buffer:
    """Memory of the device, at least one byte, freed with the object."""

    def __init__(self, driver: Driver, size: int) -> None:
        address = c_uint64()
        driver.call("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        self.address, self.size = address.value, size
        weakref.finalize(self, driver.free, "cuMemFree_v2", address.value)


class Stream:
    """An order of work on the device. What is copied must stay alive until `synchronize`."""

    def __init__(self, driver: Driver) -> None:
        self._driver, handle = driver, c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(handle), _NON_BLOCKING)
        self.handle: int = handle.value or 0
        weakref.finalize(self, driver.free, "cuStreamDestroy_v2", handle.value)

    def write(self, to: Buffer, array: NDArray) -> None:
        """array: contiguous, no larger than the buffer."""
        _check(array, to)
        self._driver.call("cuMemcpyHtoDAsync_v2", to.address, array.ctypes.data, array.nbytes, self.handle)

    def read(self, array: NDArray, source: Buffer) -> None:
        """The buffer's beginning into the array, which is contiguous and no larger."""
        _check(array, source)
        self._driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, source.address, array.nbytes, self.handle)

    def copy(self, to: Buffer, source: Buffer) -> None:
        """The whole of a buffer into one of the same size."""
        if to.size != source.size:
            raise ValueError(f"expected a buffer of {source.size} bytes, got {to.size}")
        self._driver.call("cuMemcpyDtoDAsync_v2", to.address, source.address, source.size, self.handle)

    def clear(self, buffer: Buffer) -> None:
        """Writes zeros over the whole of a buffer."""
        self._driver.call("cuMemsetD8Async", buffer.address, 0, buffer.size, self.handle)

    def synchronize(self) -> None:
        """Waits for all work in the stream. Raises: RuntimeError: some of it failed."""
        self._driver.call("cuStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` puts into the stream, as a graph; none of it runs yet. What `work` raises ends the capture."""
        graph = c_void_p()
        self._driver.call("cuStreamBeginCapture_v2", self.handle, _CAPTURE_OF_THREAD)
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # work that fails may have ended it
                self._driver.call("cuStreamEndCapture", self.handle, ctypes.byref(graph))
            if graph.value:
                self._driver.free("cuGraphDestroy", graph.value)
            raise
        self._driver.call("cuStreamEndCapture", self.handle, ctypes.byref(graph))
        return Graph(self._driver, graph)

    def launch(self, graph: Graph) -> None:
        self._driver.call("cuGraphLaunch", graph.handle, self.handle)


class Graph:
    """Work that was captured, made ready to run again and again with the addresses it had."""

    def __init__(self, driver: Driver, captured: c_void_p) -> None:
        handle = c_void_p()
        try:
            driver.call("cuGraphInstantiateWithFlags", ctypes.byref(handle), captured, 0)
        finally:
            driver.free("cuGraphDestroy", captured.value)
        self.handle = handle.value
        weakref.finalize(self, driver.free, "cuGraphExecDestroy", handle.value)


def _check(array: NDArray[np.generic], buffer: Buffer) -> None:
    if not array.flags.c_contiguous or array.nbytes > buffer.size:
        raise ValueError(f"expected a contiguous array of at most {buffer.size} bytes, got {array.nbytes}")
