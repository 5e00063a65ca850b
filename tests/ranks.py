"""A group of processes on gloo that runs checks: functions of a `Group`, listed in `CHECKS` with their group sizes."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Group:
    """A process of the group: its rank, how many there are, and a mesh of all of them."""

    rank: int
    size: int
    mesh: DeviceMesh


Check = Callable[[Group], None]
CHECKS: dict[str, tuple[tuple[int, ...], Check]] = {}


def check(*sizes: int) -> Callable[[Check], Check]:
    """Adds a function to `CHECKS`, to be run by groups of these sizes."""

    def add(function: Check) -> Check:
        CHECKS[function.__name__] = (sizes, function)
        return function

    return add


def run(rank: int, size: int, folder: str) -> None:
    """One process: every check of this size, its outcome in a file; empty is good.

    The first failure ends it: the ranks may be in different collectives, and later results would mean nothing.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=store, timeout=timeout)
    group = Group(rank, size, init_device_mesh("cpu", (size,)))
    for name, (sizes, function) in CHECKS.items():
        if size not in sizes:
            continue
        try:
            function(group)
        except Exception:
            (Path(folder) / f"{name}.{rank}").write_text(traceback.format_exc())
            os._exit(1)
        (Path(folder) / f"{name}.{rank}").write_text("")
    dist.barrier()
    dist.destroy_process_group()


def whole(x: Any) -> Tensor:
    """A DTensor as one tensor; tensors as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def close(got: Any, want: Tensor, what: str, size: float | None = None) -> None:
    """Equal to 1e-5 of the largest wanted number, or of `size`."""
    got = whole(got)
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel():
        error, allowed = (got - want).abs().max().item(), TOLERANCE * (size or want.abs().max().item())
        assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def raises(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    """The call raises this, with a text that matches."""
    try:
        call()
    except kind as error:
        assert re.search(text, str(error)), f"expected an error about {text!r}, got {error}"
    else:
        raise AssertionError(f"expected an error about {text!r}, got none")
