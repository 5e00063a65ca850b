"""The operators `torch.ops.gdn2.*`: importing this package registers them. Nothing here is public Python API.

The native library brings the schemas and the CPU kernels (native/); contract.py says what an operator accepts and
returns, dispatch.py which kernel runs it on other devices, autograd.py how it is differentiated, batching.py how it is
mapped, autocast.py what torch.autocast rounds. sharding.py, how DTensors are split, is imported by `gdn2_ops.parallel`.
"""

import torch

from gdn2_ops.compiled import find_library

torch.ops.load_library(find_library("libgdn2_torch.so"))  # first: the others add to its schemas

from gdn2_ops.custom_ops import autocast, autograd, batching, contract, dispatch  # noqa: E402

__all__ = ["autocast", "autograd", "batching", "contract", "dispatch"]
