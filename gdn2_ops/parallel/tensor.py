"""Tensor parallelism: heads of the mixers and channels of the MLPs split over ranks, activations whole on each.

Parameters become DTensors, so that optimizers, checkpoints and FSDP2 see whole tensors. What a rank computes is an
ordinary smaller layer: a copy of the module with its share of the heads, called with the local parts of the parameters.
A mixer or MLP takes the same input everywhere and its outputs are summed: one all-reduce forward, one backward.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.func import functional_call

from gdn2_ops.layers import GatedDeltaNet2, SlidingWindowAttention
from gdn2_ops.model import GDN2LM

# Where a parameter of a split module is cut; those of neither list are whole, and their gradients summed.
_INPUT_SIDE = {"o_proj.weight", "down_proj.weight"}
_WHOLE = {"o_norm.weight", "f_proj.0.weight", "g_proj.0.weight"}


def apply_tensor_parallel(model: GDN2LM, mesh: DeviceMesh) -> GDN2LM:
    """Splits a `GDN2LM` over the ranks of a mesh: heads, MLP channels and, unless tied, the vocabulary.

    Inputs and logits are whole and equal on every rank. The states of mixers are this rank's heads:
    `model.initial_state` gives them so.

    Args:
        model: the same on every rank, or on the meta device; changed in place.
        mesh: of one dimension.

    Returns: the model. Before `apply_fsdp`, if both are wanted.
    Raises: ValueError: the mesh has more than one dimension; heads or channels do not divide by its size; the model is
        split already.
    """
    if mesh.ndim != 1:
        raise ValueError(f"expected a mesh of one dimension, got {mesh}; take one of its dimensions: mesh['name']")
    if any("forward" in vars(module) for module in model.modules()):
        raise ValueError("expected a model that is not split yet, got one that is")
    plan: dict[str, ParallelStyle] = {"norm": _Whole()}
    for i, block in enumerate(model.layers):
        for name in ("mixer", "mlp"):
            module = getattr(block, name)
            _local_sizes(module, mesh.size())  # before anything is changed: it may refuse
            plan[f"layers.{i}.{name}"] = _Split()
            plan[f"layers.{i}.{name}_norm"] = _Whole()
    if model.config.tie_embeddings:
        plan["embed"] = _Whole()
    else:
        plan["embed"] = RowwiseParallel(input_layouts=Replicate())
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    if model.config.tie_embeddings:
        vars(model)["_logits"] = partial(_tied_logits, model)
    return model


class _Whole(ParallelStyle):
    """Every rank computes the same: parameters replicated, gradients equal without communication."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, dict.fromkeys(dict(module.named_parameters()), Replicate()))
        vars(module)["forward"] = partial(_call, module, _Worker(module, {}), "forward")
        return module


class _Split(ParallelStyle):
    """A mixer or MLP: each rank has its heads or channels, and the sum of their outputs is the output."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        worker = _Worker(module, _local_sizes(module, device_mesh.size()))
        _distribute(module, device_mesh, {name: _placement(name) for name, _ in module.named_parameters()})
        for method in ("forward", "step", "step_inplace"):
            if hasattr(module, method):
                vars(module)[method] = partial(_summed, module, worker, method, device_mesh)
        if hasattr(module, "initial_state"):
            vars(module)["initial_state"] = partial(_call, module, worker, "initial_state")
        return module


class _Worker(nn.Module):
    """A copy of a module without storage, with this rank's sizes: called with parameters, it computes this rank's part.

    It calls methods by name, because `torch.func.functional_call` calls modules only.
    """

    def __init__(self, module: nn.Module, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).to("meta")
        vars(self.module).update(sizes)

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.module, method)(*args)


def _call(module: nn.Module, worker: _Worker, method: str, *args: Any) -> Any:
    local = {f"module.{name}": _local(name, p) for name, p in module.named_parameters()}
    return functional_call(worker, local, (method, *args))


def _summed(module: nn.Module, worker: _Worker, method: str, mesh: DeviceMesh, x: Tensor, *args: Any) -> Any:
    x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    result = _call(module, worker, method, x, *args)
    if isinstance(result, Tensor):
        return _sum(result, mesh)
    y, state = result
    return _sum(y, mesh), state


def _sum(y: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def _local(name: str, p: Any) -> Tensor:
    """The part of a parameter that this rank computes with."""
    if name not in _WHOLE:
        return p.to_local()
    return p.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _placement(name: str) -> Shard | Replicate:
    if name in _WHOLE:
        return Replicate()
    return Shard(1) if name in _INPUT_SIDE else Shard(0)


def _distribute(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Shard | Replicate]) -> None:
    for name, placement in placements.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        p = owner.get_parameter(last)
        owner.register_parameter(last, nn.Parameter(distribute_tensor(p, mesh, [placement]), p.requires_grad))


def _local_sizes(module: nn.Module, ranks: int) -> dict[str, Any]:
    """The attributes of a module that count heads or channels, as this rank has them."""
    if isinstance(module, GatedDeltaNet2):
        _divide("num_heads", module.num_heads, ranks)
        return {
            "num_heads": module.num_heads // ranks,
            "num_v_heads": module.num_v_heads // ranks,
            "channels": [n // ranks for n in module.channels],
        }
    if isinstance(module, SlidingWindowAttention):
        return {"num_heads": _divide("num_attention_heads", module.num_heads, ranks)}
    _divide("intermediate_size", module.get_parameter("gate_proj.weight").shape[0], ranks)
    return {}


def _divide(name: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise ValueError(f"expected {name} to be a multiple of the {ranks} ranks of the mesh, got {size}")
    return size // ranks


def _tied_logits(model: GDN2LM, x: Tensor) -> Tensor:
    return F.linear(model.norm(x), cast(DTensor, model.embed.weight).to_local())
