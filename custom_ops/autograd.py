"""How the operators are differentiated: chunk and step by chunk_backward, which recomputes and so saves inputs only.

One rule per operator serves eager and compiled code, and torch.func transforms, which may stand in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from gdn2_ops.custom_ops import contract

_AFTER = torch._C._after_autograd_keyset
_AFTER_VERSIONS = torch._C._after_ADInplaceOrView_keyset
_STEP_INPLACE, _STATE = torch.ops.gdn2.step_inplace.default, 6


def call(op, *args):
    """The operator; where nothing is recorded or transformed, without its dispatcher's detour through Python (5 us).

    In inference mode the dispatcher itself makes none, but for `step_inplace` of tensors that were not made in it.
    """
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return op(*args)
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = op(*args)
    if op is _STEP_INPLACE:
        _mark_as_written(args[_STATE])
    return result


def _save_inputs(ctx, inputs) -> None:
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


def _refuse_forward_mode(name: str, tensors: tuple) -> None:
    """Without it the tangents would be lost without a word: they require no gradient."""
    if any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"gdn2::{name}: expected reverse-mode differentiation, got a forward-mode tangent "
            "(jvp, jacfwd, hessian); use torch.func.vjp or jacrev, or gdn2_ops.reference.recurrent, which has both"
        )


@contextmanager
def _outer_transforms() -> Iterator[None]:
    """A Function's forward records nothing; a transform of torch.func that stands outside of this one still has to."""
    if torch._C._are_functorch_transforms_active():
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            yield
    else:
        yield


def _differentiable(name: str, vjp: Callable, save: Callable = _save_inputs) -> None:
    op = getattr(torch.ops.gdn2, name).default

    def forward(ctx, keyset, *args):
        save(ctx, args)
        with torch._C._AutoDispatchBelowAutograd(), _outer_transforms():
            return op.redispatch(keyset & _AFTER, *args)

    def backward(ctx, *grads):
        return None, *vjp(ctx, *grads)

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    plain: Any = type(f"gdn2_{name}", (torch.autograd.Function,), body)
    # A kernel is called where torch.func has taken one transform off already. Function.apply would look for transforms
    # again; this one does not, and the transforms further out meet the operator when it is dispatched again.
    transformed: Any = type(f"gdn2_{name}", (torch.autograd.function._SingleLevelFunction,), body)

    def rule(keyset, *args):
        if forward_ad._current_level >= 0:
            _refuse_forward_mode(name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if not torch._C._are_functorch_transforms_active():
                return plain.apply(keyset, *args)
            with enable_single_level_autograd_function():
                return transformed.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _AFTER, *args)

    contract.LIB.impl(name, rule, "Autograd", with_keyset=True)


def _step_inplace(keyset, q, k, v, g, b, w, state, slots, scale):
    if forward_ad._current_level >= 0:
        _refuse_forward_mode("step_inplace", (q, k, v, g, b, w, state))
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, g, b, w, state):
        raise RuntimeError(
            "gdn2::step_inplace: expected tensors that need no gradient, got one that does: the state before the step "
            "is overwritten; call it under torch.no_grad(), or use gdn2_ops.step or gdn2_ops.chunk"
        )
    return _written_step_inplace(keyset, q, k, v, g, b, w, state, slots, scale)


def _written_step_inplace(keyset, q, k, v, g, b, w, state, slots, scale):
    """Where the dispatcher begins in inference mode, for a tensor that was not made in it."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        o = _STEP_INPLACE.redispatch(keyset & _AFTER_VERSIONS, q, k, v, g, b, w, state, slots, scale)
    _mark_as_written(state)
    return o


def _mark_as_written(state):
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)


_differentiable("chunk", _chunk_vjp)
_differentiable("step", _step_vjp)
_differentiable("chunk_backward", _refuse_second_order, save=lambda ctx, inputs: None)
contract.LIB.impl("step_inplace", _step_inplace, "Autograd", with_keyset=True)
contract.LIB.impl("step_inplace", _written_step_inplace, "ADInplaceOrView", with_keyset=True)
