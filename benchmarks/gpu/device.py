"""How time is taken on a GPU. The rest of gpu-bench sees only this interface, so that a test can stand in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

FLUSH_BYTES = 256 << 20  # more than a second level cache


class Device(Protocol):
    """device: where tensors go. about: what the report says of it."""

    device: torch.device
    about: dict[str, object]

    def seconds(self, call: Callable[[], object], *, cold: bool, calls: int = 1) -> float:
        """Of one call, between two events; cold: after other memory went through the caches, and one call only."""
        ...

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """A function that replays the call as a CUDA graph. Raises RuntimeError where it cannot be captured."""
        ...

    def copy_rate(self) -> float:
        """Bytes a second of a copy on the device, read and written bytes counted."""
        ...

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that one call takes above what was taken before it."""
        ...


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("benchmarks.gpu: expected an NVIDIA GPU, got none; make bench-cpu runs without one")
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.about = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def seconds(self, call: Callable[[], object], *, cold: bool, calls: int = 1) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self._flushed.zero_()
        begin.record()
        for _ in range(1 if cold else calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / (1 if cold else calls)

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def copy_rate(self) -> float:
        source = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        best = min(self.seconds(lambda: target.copy_(source), cold=False, calls=5) for _ in range(4))
        return 2 * source.numel() / best

    def peak_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
