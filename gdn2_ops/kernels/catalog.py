"""Every kernel of this package: what is built ahead of time and reported on."""

from __future__ import annotations

import importlib
import pkgutil

from gdn2_ops import kernels
from gdn2_ops.kernels.kernel import Kernel


def catalog() -> tuple[Kernel, ...]:
    """The `KERNELS` of every module here that has some, in the order of the modules' names."""
    found: dict[str, Kernel] = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        described = getattr(importlib.import_module(f"gdn2_ops.kernels.{module.name}"), "KERNELS", ())
        found |= {kernel.name: kernel for kernel in described}  # a module may name those of another that it launches
    return tuple(found.values())
