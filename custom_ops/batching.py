"""torch.vmap of the operators: the mapped axis becomes part of the batch, or of the packed row."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2_ops.custom_ops import contract

OPS = torch.ops.gdn2


def _folded(x: Tensor, dim: int | None, rows: int) -> Tensor:
    """[.., rows, ..] -> [rows * B, ..]; a tensor that is not mapped is repeated."""
    return (x.expand(rows, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _unfolded(x: Tensor, rows: int) -> Tensor:
    return x.unflatten(0, (rows, x.shape[0] // rows))


def _map_chunk(info, in_dims, *args):
    outputs = _mapped(OPS.chunk, 6, 1, info.batch_size, in_dims, args)
    return outputs, (0,) * len(outputs)


def _map_chunk_backward(info, in_dims, do, dfinal_state, *args):
    def backward(q, k, v, g, b, w, do, state, dfinal_state, cu_seqlens, scale):
        return OPS.chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens, scale)

    six, (state, *rest), dims = args[:6], args[6:], in_dims[2:]
    outputs = _mapped(
        backward,
        7,
        6,
        info.batch_size,
        (*dims[:6], in_dims[0], dims[6], in_dims[1], *dims[7:]),
        (*six, do, state, dfinal_state, *rest),
    )
    return outputs, (0,) * len(outputs)


def _mapped(op, inputs: int, results: int, rows: int, in_dims, args) -> tuple[Tensor, ...]:
    """op(*inputs along tokens, *states, cu_seqlens, scale) -> (*results along tokens, states)."""
    *tensors, cu_seqlens, scale = args
    along_T = [_folded(x, dim, rows) for x, dim in zip(tensors[:inputs], in_dims)]
    states = [None if x is None else _folded(x, dim, rows) for x, dim in zip(tensors[inputs:], in_dims[inputs:])]
    if cu_seqlens is None:
        return tuple(_unfolded(y, rows) for y in op(*along_T, *states, None, scale))
    T = along_T[0].shape[1]
    bounds = _bounds(cu_seqlens, in_dims[-2], rows, T)
    outputs = op(*(x.flatten(0, 1).unsqueeze(0) for x in along_T), *states, bounds, scale)
    unpacked = (y.squeeze(0).unflatten(0, (rows, 1, T)) for y in outputs[:results])
    return *unpacked, *(_unfolded(y, rows) for y in outputs[results:])


def _bounds(cu_seqlens: Tensor, dim: int | None, rows: int, T: int) -> Tensor:
    """The bounds of all rows packed one after another: [rows * N + 1]."""
    each = cu_seqlens.expand(rows, -1) if dim is None else cu_seqlens.movedim(dim, 0)
    for row in each if dim is not None else each[:1]:
        contract.check_cu_seqlens_values(row, T)  # between rows a bad bound would pass for a good one
    first = T * torch.arange(rows, dtype=each.dtype, device=each.device)[:, None]
    return torch.cat(((each[:, :-1] + first).flatten(), first.new_full((1,), rows * T)))


def _map_step(info, in_dims, *args):
    *tensors, scale = args
    outputs = OPS.step(*(_folded(x, dim, info.batch_size) for x, dim in zip(tensors, in_dims)), scale)
    return tuple(_unfolded(y, info.batch_size) for y in outputs), (0, 0)


def _map_step_inplace(info, in_dims, q, k, v, g, b, w, state, slots, scale):
    rows = info.batch_size
    if in_dims[6] is None:
        raise ValueError(
            f"gdn2::step_inplace: expected a state that torch.vmap maps, got one state for {rows} results; "
            "map it (in_dims), or use gdn2_ops.step, which returns new states"
        )
    states = state.movedim(in_dims[6], 0)
    if not states.is_contiguous():
        raise ValueError(
            f"gdn2::step_inplace: expected states that are contiguous with the mapped axis first, got it as axis "
            f"{in_dims[6]} of shape {tuple(state.shape)}; map axis 0 of a contiguous tensor, or use gdn2_ops.step"
        )
    if slots is not None:
        first = states.shape[1] * torch.arange(rows, dtype=slots.dtype, device=slots.device)
        each = slots.expand(rows, -1) if in_dims[7] is None else slots.movedim(in_dims[7], 0)
        for row in each:
            contract.check_slots_values(row, states.shape[1])  # row i may not reach into the pool of row j
        slots = (each + first[:, None]).flatten()
    six = (_folded(x, dim, rows) for x, dim in zip((q, k, v, g, b, w), in_dims))
    o = OPS.step_inplace(*six, states.view(-1, *states.shape[2:]), slots, scale)
    return _unfolded(o, rows), 0


torch.library.register_vmap("gdn2::chunk", _map_chunk, lib=contract.LIB)
torch.library.register_vmap("gdn2::chunk_backward", _map_chunk_backward, lib=contract.LIB)
torch.library.register_vmap("gdn2::step", _map_step, lib=contract.LIB)
torch.library.register_vmap("gdn2::step_inplace", _map_step_inplace, lib=contract.LIB)
