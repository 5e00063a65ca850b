"""How the operators are differentiated: chunk and step by chunk_backward, which recomputes and so saves inputs only."""

from __future__ import annotations

import torch

from gdn2_ops.custom_ops import contract


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _chunk_vjp(ctx, do, dfinal_state):
    q, k, v, g, b, w, state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    *grads, dstate = torch.ops.gdn2.chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens, ctx.scale)
    return *grads, None if state is None else dstate, None, None


def _step_vjp(ctx, do, dfinal_state):
    *token, state = ctx.saved_tensors
    do = torch.zeros_like(token[2]) if do is None else do
    do, *token = (x.unsqueeze(1) for x in (do, *token))
    *grads, dstate = torch.ops.gdn2.chunk_backward(do, dfinal_state, *token, state, None, ctx.scale)
    return *(x.squeeze(1) for x in grads), dstate, None


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError(
        "gdn2::chunk_backward: expected at most one derivative, got a request for a second; "
        "gdn2_ops.reference.recurrent is differentiable any number of times"
    )


def _step_inplace_below_autograd(keyset, q, k, v, g, b, w, state, slots, scale):
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, g, b, w, state):
        raise RuntimeError(
            "gdn2::step_inplace: expected tensors that need no gradient, got one that does: the state before the step "
            "is overwritten; call it under torch.no_grad(), or use gdn2_ops.step or gdn2_ops.chunk"
        )
    with torch._C._AutoDispatchBelowAutograd():
        o = torch.ops.gdn2.step_inplace.default.redispatch(
            keyset & torch._C._after_autograd_keyset, q, k, v, g, b, w, state, slots, scale
        )
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return o


torch.library.register_autograd("gdn2::chunk", _chunk_vjp, setup_context=_save_inputs, lib=contract.LIB)
torch.library.register_autograd("gdn2::step", _step_vjp, setup_context=_save_inputs, lib=contract.LIB)
torch.library.register_autograd("gdn2::chunk_backward", _refuse_second_order, lib=contract.LIB)
contract.LIB.impl("step_inplace", _step_inplace_below_autograd, "Autograd", with_keyset=True)
