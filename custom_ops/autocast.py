"""torch.autocast: q, k, v, b and w take its dtype, as the inputs of a matrix product would; g and states stay float32.

torch.library.register_autocast would round the decay and the states with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2_ops.custom_ops import contract

KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def lowered(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The six inputs as the operators see them under torch.autocast: what they are without it."""
    if not torch._C._is_any_autocast_enabled():
        return q, k, v, g, b, w
    device = q.device.type
    if device not in KEYS or not torch.is_autocast_enabled(device):
        return q, k, v, g, b, w
    dtype = torch.get_autocast_dtype(device)
    q, k, v, b, w = (x.to(dtype) if x.dtype in contract.DTYPES else x for x in (q, k, v, b, w))
    return q, k, v, g, b, w


def _register(name: str, device: str, key: str) -> None:
    op = getattr(torch.ops.gdn2, name).default
    only = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(q, k, v, g, b, w, *rest):
        six = lowered(q, k, v, g, b, w)
        with torch._C._ExcludeDispatchKeyGuard(only):
            return op(*six, *rest)

    contract.LIB.impl(name, rule, key)


for _device, _key in KEYS.items():
    for _name in ("chunk", "step", "step_inplace"):
        _register(_name, _device, _key)
