"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer states split over the ranks of a mesh."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from gdn2_ops.model import GDN2LM


def apply_fsdp(
    model: GDN2LM,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> GDN2LM:
    """Shards a `GDN2LM` by `torch.distributed.fsdp.fully_shard`, one group per block and one for the rest.

    After `apply_tensor_parallel`, if both are wanted. Gradients are averaged over the mesh. `prefill` and the decode
    methods work too; every rank calls them the same number of times.

    Args:
        model: on the device of the mesh; changed in place.
        mesh: of one dimension, or two: replicate, then shard.
        param_dtype: of the gathered parameters, for mixed precision; A_log and dt_bias are rounded to it too, while
            decays and states are computed and kept in float32. None is that of the parameters.
        reduce_dtype: of the reduction of gradients.
        reshard_after_forward: frees a block's parameters between forward and backward.

    Returns: the model.
    Raises: ValueError: it is sharded already.
    """
    if isinstance(model, FSDPModule):
        raise ValueError("expected a model that is not sharded yet, got one that is")
    # Inputs are left as they are: a cast would round the states that blocks are called with.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        for method in ("step", "step_inplace"):
            register_fsdp_forward_method(block, method)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for method in ("prefill", "decode", "decode_inplace"):
        register_fsdp_forward_method(model, method)
    return model
