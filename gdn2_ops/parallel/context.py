"""Context parallelism: one long sequence split over ranks, each holding neighbouring tokens in the order of the mesh.

Equation (1) is affine in the state: over its tokens a rank maps the state S before them to M S + S0, with M the product
of its transitions [K, K] per key head and S0 what its own tokens leave of an empty state, and the outputs to
o + P S, with P = scale q_t^T M_t per token. All ranks compute o, S0, P and M at once: P and M are what the operator
gives for the state I and no writes. Then they exchange the pairs (M, S0), whose size does not depend on T, and each
composes those before it. A rank costs two runs of the operator over its tokens, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from gdn2_ops import functional
from gdn2_ops.functional import GDN2Output
from gdn2_ops.layers import GatedDeltaNet2, GDN2State, SlidingWindowAttention, WindowState


def context_parallel_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None = None,
    *,
    mesh: DeviceMesh,
    scale: float | None = None,
) -> GDN2Output:
    """`gdn2_ops.chunk` of one sequence whose tokens are split over the ranks of a mesh, in its order.

    Args:
        q, k, v, g, b, w: this rank's tokens, as `gdn2_ops.chunk`; any number of them, none included.
        state: [B, HV, K, V] float32 before the whole sequence; the first rank's is used. None is zeros.
        mesh: of one dimension.
        scale: of the outputs. None is K ** -0.5.

    Returns: o [B, T, HV, V] of this rank's tokens; state [B, HV, K, V] float32 after them: the last rank's is the state
        after the whole sequence.
    Raises: ValueError, TypeError: as `gdn2_ops.chunk`; the mesh has more than one dimension.
    Differentiable once; every rank asks for gradients of the same tensors and calls backward, if only of a zero.
    Source: equation (1), docs/derivation.md.
    """
    rank = _rank(mesh)
    if rank == 0:
        o, end = functional.chunk(q, k, v, g, b, w, state, scale=scale)
        M = end.new_zeros(*end.shape[:1], q.shape[2], q.shape[3], q.shape[3])  # its state is known: nothing to map
        gathered_RP = _gathered(M, end, mesh)
        return GDN2Output(*_tied(gathered_RP, o, end))
    o, S0 = functional.chunk(q, k, v, g, b, w, scale=scale)
    P, M = _response(q, k, g, b, scale)
    gathered_RP = _gathered(M, S0, mesh)
    (_, S_BHGKV), *between = (_unpacked(x_P, M, S0) for x_P in gathered_RP[:rank])
    for M_BHKK, S0_BHGKV in between:
        S_BHGKV = M_BHKK.unsqueeze(2) @ S_BHGKV + S0_BHGKV
    seen_BHGTV = P.float().transpose(1, 2).unsqueeze(2) @ S_BHGKV
    o = (o.float() + seen_BHGTV.flatten(1, 2).transpose(1, 2)).to(o.dtype)
    return GDN2Output(o, S0 + (M.unsqueeze(2) @ S_BHGKV).flatten(1, 2))


def apply_context_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Makes every mixer of a model take sequences split over the ranks of a mesh, in its order; returns the model.

    What acts on single tokens stays as it is. A convolution sees the last conv_size - 1 tokens of the rank before, an
    attention the last window - 1: each rank but the last needs as many. The state given to the first rank is used, and
    the one returned by the last rank is that of the whole sequence. Gradients of parameters are those of this rank's
    tokens: sum them over the mesh (average times ranks, with `apply_fsdp`). `step` and `decode` stay local.

    Args:
        model: with `GatedDeltaNet2` and `SlidingWindowAttention` layers, not yet split by another of these functions.
        mesh: of one dimension.

    Raises: ValueError: there is no such layer, one is already split, or the mesh has more than one dimension. In the
        forward: a rank has fewer tokens than the next one must see.
    """
    _rank(mesh)
    forwards: dict[type, Callable] = {GatedDeltaNet2: _forward, SlidingWindowAttention: _window_forward}
    layers = [layer for layer in model.modules() if type(layer) in forwards]
    if not layers or any("forward" in vars(layer) for layer in layers):
        raise ValueError(f"expected a model with layers that are not split yet, got {type(model).__name__}")
    for layer in layers:
        vars(layer)["forward"] = partial(forwards[type(layer)], layer, mesh)
    return model


def _forward(
    layer: GatedDeltaNet2, mesh: DeviceMesh, x: Tensor, state: GDN2State | None = None, padding: Tensor | None = None
) -> tuple[Tensor, GDN2State]:
    _refuse(padding)
    conv = None if state is None else state.conv
    if layer.use_short_conv:
        x, before = _with_tokens_before(x, layer.conv_size - 1, mesh)
        conv = conv if before is None else layer._qkv(before).mT
    inputs, conv = layer._inputs(x, conv)
    o, recurrent = context_parallel_chunk(*inputs, None if state is None else state.recurrent, mesh=mesh)
    return layer._output(o, x), GDN2State(conv, recurrent)


def _window_forward(
    layer: SlidingWindowAttention,
    mesh: DeviceMesh,
    x: Tensor,
    state: WindowState | None = None,
    padding: Tensor | None = None,
) -> tuple[Tensor, WindowState]:
    _refuse(padding)
    past = layer.window - 1
    x, before = _with_tokens_before(x, past, mesh)
    if before is not None:
        k, v = (layer._heads(p(before)) for p in (layer.k_proj, layer.v_proj))
        state = WindowState(k, v, torch.full((x.shape[0],), past, device=x.device))
    return type(layer).forward(layer, x, state)


def _refuse(padding: Tensor | None) -> None:
    if padding is not None:
        raise ValueError("expected rows without padding in a sequence that is split over ranks; pad on the right")


def _with_tokens_before(x: Tensor, count: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor | None]:
    """x [B, T, D] and the last `count` tokens of the rank before [B, count, D], which the first rank has none of."""
    rank, last = _rank(mesh), mesh.size() - 1
    if rank < last and x.shape[1] < count:
        raise ValueError(
            f"expected at least {count} tokens on every rank but the last, got {x.shape[1]} on rank {rank}: the "
            "convolution or attention of the next rank sees them; use fewer ranks"
        )
    send, receive = [0] * mesh.size(), [0] * mesh.size()
    if rank < last:
        send[rank + 1] = count
    if rank > 0:
        receive[rank - 1] = count
    tail_TBD = x[:, x.shape[1] - sum(send) :].transpose(0, 1).contiguous()
    arriving_TBD = collectives.all_to_all_single_autograd(tail_TBD, receive, send, mesh.get_group())
    before_TBD = collectives.wait_tensor(arriving_TBD)
    if rank > 0:
        return x, before_TBD.transpose(0, 1)
    return _tied(before_TBD, x)[0], None


def _response(q: Tensor, k: Tensor, g: Tensor, b: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """P [B, T, H, K] in the dtype of q and M [B, H, K, K] float32: the operator on the state I, writing nothing."""
    B, _, H, K = q.shape
    nothing = q.new_zeros(()).expand(q.shape)
    identity = torch.eye(K, device=q.device).expand(B, H, K, K)
    return functional.chunk(q, k, nothing, g, b, nothing, identity, scale=scale)


def _gathered(M: Tensor, S0: Tensor, mesh: DeviceMesh) -> Tensor:
    """The pairs of every rank, [R, numbers of a pair]; gradients are summed over the ranks that used them."""
    pair_1P = torch.cat((M.flatten(), S0.flatten())).unsqueeze(0)
    pairs_RP = DTensor.from_local(pair_1P, mesh, [Shard(0)], run_check=False).redistribute(placements=[Replicate()])
    return pairs_RP.to_local(grad_placements=[Partial()])


def _unpacked(pair_P: Tensor, M: Tensor, S0: Tensor) -> tuple[Tensor, Tensor]:
    M_P, S0_P = pair_P.split([M.numel(), S0.numel()])
    return M_P.view_as(M), _grouped(S0_P.view_as(S0), M.shape[1])


def _grouped(state: Tensor, H: int) -> Tensor:
    return state.unflatten(1, (H, state.shape[1] // H))


def _rank(mesh: DeviceMesh) -> int:
    if mesh.ndim != 1:
        raise ValueError(f"expected a mesh of one dimension, got {mesh}; take one of its dimensions: mesh['name']")
    return mesh.get_local_rank()


class _Tied(torch.autograd.Function):
    """Outputs as they are, tied to a collective whose result this rank does not use: its backward runs on all ranks."""

    @staticmethod
    def forward(ctx, received, *outputs):
        ctx.shape, ctx.dtype = received.shape, received.dtype
        return tuple(x.view_as(x) for x in outputs)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].new_zeros(ctx.shape, dtype=ctx.dtype), *grads


def _tied(received: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
    return _Tied.apply(received, *outputs)
