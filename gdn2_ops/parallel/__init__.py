"""Models and operators over several processes; each applies in place and leaves the names of parameters as they are.

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    apply_tensor_parallel(model, mesh["tensor"])    # heads and MLP channels split, one all-reduce per mixer and MLP
    apply_fsdp(model, mesh["data"])                 # parameters sharded, gathered block by block
    apply_context_parallel(model, mesh["context"])  # the sequence split: each rank holds neighbouring tokens
    o, state = context_parallel_chunk(q, k, v, g, b, w, mesh=mesh["context"])    # the operator alone

Importing this package registers how `torch.ops.gdn2.*` split DTensors over batch and heads (custom_ops/sharding.py). It
is not part of `import gdn2_ops`, which would take a third longer with torch.distributed.tensor.
"""

from gdn2_ops.custom_ops import sharding  # noqa: F401, it registers
from gdn2_ops.parallel.context import apply_context_parallel, context_parallel_chunk
from gdn2_ops.parallel.fsdp import apply_fsdp
from gdn2_ops.parallel.tensor import apply_tensor_parallel

__all__ = ["apply_context_parallel", "apply_fsdp", "apply_tensor_parallel", "context_parallel_chunk"]
