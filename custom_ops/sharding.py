"""DTensor: how each operator is split over a mesh. `gdn2_ops.parallel` imports this module, and so registers the rules.

On every mesh dimension an operator is split over the batch, over the heads or not at all; the first input that is
sharded decides and the others follow it. Key and value heads are cut alike, so that value head i meets its key head.
Inputs sharded over tokens or channels are redistributed over heads, else batch, else gathered. A state that is written
in place is never redistributed: the update would go to a temporary copy and be lost. Wrong layouts raise.

DTensor knows custom operators through its sharding propagator only; its public `register_sharding` offers every
combination of placements over the mesh dimensions and picks by cost, which cannot say "the state stays where it is".
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo

from gdn2_ops.custom_ops import contract


class _Axes(NamedTuple):
    """The axes of an argument that can be split."""

    batch: int
    heads: int


_TOKENS, _TOKEN, _STATE = _Axes(0, 2), _Axes(0, 1), _Axes(0, 1)
_SIX = ("q", "k", "v", "g", "b", "w")
_VOTERS = (*_SIX, "state", "dfinal_state", "do")  # in this order; cu_seqlens and slots are whole everywhere
_OUTPUTS = {
    "chunk": (_TOKENS, _STATE),
    "chunk_backward": (*[_TOKENS] * 6, _STATE),
    "step": (_TOKEN, _STATE),
    "step_inplace": (_TOKEN,),
}


def _axes(op: str, name: str) -> _Axes | None:
    """The axes of an argument, None where it cannot be split."""
    if name in ("state", "dfinal_state"):
        return _STATE
    if name in (*_SIX, "do"):
        return _TOKENS if op.startswith("chunk") else _TOKEN
    return None


def _strategy(op: str, names: tuple[str, ...], schema: OpSchema) -> OpStrategy:
    """The one way to split this call."""
    specs = {
        name: x.strategies[0].output_spec for name, x in zip(names, schema.args_schema) if isinstance(x, OpStrategy)
    }
    mesh = schema.get_mesh_from_args()
    kinds = [_kind(op, specs, i, mesh.size(i)) for i in range(mesh.ndim)]
    _check_heads(op, specs, mesh, kinds)

    def spec(axes: _Axes | None) -> DTensorSpec:
        return DTensorSpec(mesh, tuple(_placement(axes, kind) for kind in kinds))

    inputs = [spec(_axes(op, name)) for name in specs]
    outputs = tuple(spec(axes) for axes in _OUTPUTS[op])
    _check_state_stays(op, specs, inputs)
    return OpStrategy([OpSpec(outputs[0] if len(outputs) == 1 else outputs, inputs, [[0.0]] * len(inputs))])


def _kind(op: str, specs: dict[str, DTensorSpec], i: int, size: int) -> str:
    """What mesh dimension i splits: "batch", "heads" or "nothing"."""
    whole = [name for name in ("cu_seqlens", "slots") if name in specs]
    votes = list(_votes(op, specs, i))
    wanted = [vote for vote in votes if vote != "other"]
    if wanted:
        if wanted[0] == "batch" and whole:
            raise ValueError(
                f"gdn2::{op}: expected inputs sharded over heads or replicated together with {whole[0]}, got "
                f"{_text(specs)}; {whole[0]} counts rows of the whole batch"
            )
        return wanted[0]
    if not votes:
        return "nothing"
    q = specs["q"].shape
    if q[-2] % size == 0:
        return "heads"
    return "batch" if q[0] % size == 0 and not whole else "nothing"


def _votes(op: str, specs: dict[str, DTensorSpec], i: int) -> Iterator[str]:
    for name in _VOTERS:
        placement = specs[name].placements[i] if name in specs else Replicate()
        if isinstance(placement, (Replicate, Partial)):
            continue
        axes = _axes(op, name)
        dims: dict[Placement, str] = {} if axes is None else {Shard(axes.batch): "batch", Shard(axes.heads): "heads"}
        yield dims.get(placement, "other")  # a strided shard is other, too


def _check_heads(op: str, specs: dict[str, DTensorSpec], mesh, kinds: list[str]) -> None:
    split = [mesh.size(i) for i, kind in enumerate(kinds) if kind == "heads"]
    shards, H, HV = prod(split), specs["q"].shape[-2], specs["v"].shape[-2]
    uneven = H == HV and len(split) == 1 and (shards - 1) * -(-H // shards) < H  # every rank has a head
    if H % shards and not uneven:
        raise ValueError(
            f"gdn2::{op}: expected H, the key heads, to be a multiple of the {shards} shards of the mesh, got H = {H}, "
            f"HV = {HV}; use a smaller mesh, or shard the batch"
        )


def _check_state_stays(op: str, specs: dict[str, DTensorSpec], inputs: list[DTensorSpec]) -> None:
    if op != "step_inplace":
        return
    wanted, got = inputs[list(specs).index("state")].placements, specs["state"].placements
    if wanted != got:
        raise ValueError(
            f"gdn2::{op}: expected a state placed {_places(wanted)}, as the other inputs are, got {_places(got)}: the "
            "update of a redistributed copy would be lost; distribute the state so, or use gdn2_ops.step"
        )


def _placement(axes: _Axes | None, kind: str) -> Placement:
    return Replicate() if axes is None or kind == "nothing" else Shard(getattr(axes, kind))


def _text(specs: dict[str, DTensorSpec]) -> str:
    return ", ".join(f"{name} {_places(spec.placements)}" for name, spec in specs.items())


def _places(placements: tuple[Placement, ...]) -> str:
    return "[" + ", ".join(repr(p) for p in placements) + "]"


def _register(op: str) -> None:
    overload = getattr(torch.ops.gdn2, op).default
    names = tuple(argument.name for argument in overload._schema.arguments)

    def strategy(schema: OpSchema) -> OpStrategy:
        return _strategy(op, names, schema)

    # From q on everything is part of the cache's key: an absent state and a present one are different calls.
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.register_op_strategy(overload, strategy, RuntimeSchemaInfo(static_argnum=0))


for _name in contract.SCHEMAS:
    _register(_name)
