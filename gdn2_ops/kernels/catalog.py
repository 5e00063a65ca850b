"""Every kernel of this package: what is built ahead of time, reported on and warmed up."""

from __future__ import annotations

import importlib
import pkgutil

import torch

from gdn2_ops import kernels
from gdn2_ops.kernels.kernel import Kernel


def catalog() -> tuple[Kernel, ...]:
    """The `KERNELS` of every module here that has some, in the order of the modules' names."""
    found: list[Kernel] = []
    for module in pkgutil.iter_modules(kernels.__path__):
        found += getattr(importlib.import_module(f"gdn2_ops.kernels.{module.name}"), "KERNELS", ())
    return tuple(found)


def warm_up(
    device: torch.device | str, dtype: torch.dtype, K: int, V: int, modules: tuple[str, ...] = ("step",)
) -> None:
    """Compiles and loads what a first request would wait for: call it for every layer shape of a model.

    Runs the launchers of `modules` (files of this package) once, on tensors of one token. Sizes other than K and V do
    not select a kernel, so no later call of that dtype compiles. Tensors whose memory starts at no multiple of 16
    bytes do: Triton compiles narrower loads for them.

    Args:
        dtype: of q. K, V: channels of a key and of a value head.
    """
    for name in modules:
        importlib.import_module(f"gdn2_ops.kernels.{name}").warm_up(torch.device(device), dtype, K, V)
