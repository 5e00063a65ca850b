"""Device -> kernel. The CPU kernels are custom_ops/native, registered by the native library when it is loaded."""

from __future__ import annotations

from gdn2_ops.custom_ops import contract


def _no_kernel(op: str):
    def refuse(*args, **kwargs):
        raise NotImplementedError(
            f"gdn2::{op}: expected tensors on cpu, got cuda, for which there is no kernel yet; "
            "gdn2_ops.reference runs on any device"
        )

    return refuse


for _name in contract.SCHEMAS:
    contract.LIB.impl(_name, _no_kernel(_name), "CUDA")
