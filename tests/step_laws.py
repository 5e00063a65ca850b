"""The laws of the step kernels, for a device: "cpu" in Triton's interpreter (tests/test_kernels_step.py), "cuda" on a
GPU (tests/gpu). The launchers are called directly, so that a law is about the kernels wherever it runs."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from cases import FORMS, OUTPUTS, Case, assert_as_good_as, exact, inputs
from torch import Tensor

from gdn2_ops import GatedDeltaNet2, reference
from gdn2_ops.kernels import step as kernel
from gdn2_ops.kernels.step_layer import LayerToken, LayerWeights, step_layer


def token(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """The six tensors of the first token of a case, and its state."""
    x = inputs(case, dtype)
    assert x.state is not None
    return [y[:, 0].to(device) for y in x[:6]], x.state.to(device)


def assert_scan_of_step(case: Case, dtype: torch.dtype, device: str) -> None:
    """Step after step is the specification over the whole sequence."""
    x = inputs(case, dtype)
    before = x.state if x.state is not None else torch.zeros(case.N, case.HV, case.K, case.V)
    state, outs = before.to(device), []
    for t in range(case.T):
        o, state = kernel.step(*(y[:, t].to(device) for y in x[:6]), state, case.K**-0.5)
        outs.append(o)
    got = (torch.stack(outs, 1).cpu(), state.cpu())
    for name, y, z, *same in zip(OUTPUTS, got, exact(x), *(form(*x) for form in FORMS)):
        assert_as_good_as(same, y, z, dtype, name)


def assert_one_step(case: Case, dtype: torch.dtype, device: str) -> None:
    """One token against the specification: head sizes, groups."""
    six, state = token(case, dtype, device)
    got = kernel.step(*six, state, 0.7)
    cpu = [y.cpu() for y in (*six, state)]
    want = reference.step(*(y.double() for y in cpu), scale=0.7)
    for name, y, z, same in zip(OUTPUTS, got, want, reference.step(*cpu, scale=0.7)):
        assert_as_good_as([same], y.cpu(), z, dtype, name)


def assert_in_place_is_not_in_place(dtype: torch.dtype, device: str) -> None:
    """With slots and without, in any order of the slots, bit for bit; other rows of the pool stay."""
    six, state = token(Case("in place", 1, B=3, HV=4, K=33, V=40), dtype, device)
    want_o, want_state = kernel.step(*six, state, 1.0)
    row = state.clone()
    assert torch.equal(kernel.step_inplace(*six, row, None, 1.0), want_o)
    assert torch.equal(row, want_state)
    for slots in ([4, 0, 3], [0, 4, 3]):
        at = torch.tensor(slots, device=device)
        for index in (at, at.int(), torch.stack((at, at), 1)[:, 0]):
            pool = torch.full((6, *state.shape[1:]), 7.0, device=device)
            pool[at] = state
            assert torch.equal(kernel.step_inplace(*six, pool, index, 1.0), want_o)
            assert torch.equal(pool[at], want_state)
            assert (pool[[row for row in range(6) if row not in slots]] == 7).all()


def assert_a_slot_outside_of_the_pool_touches_nothing(device: str) -> None:
    six, state = token(Case("outside", 1, B=3), torch.float32, device)
    want_o, want_state = kernel.step(*six, state, 1.0)
    pool = state.clone()
    o = kernel.step_inplace(*six, pool, torch.tensor([0, 3, -1], device=device), 1.0)
    assert torch.equal(o[0], want_o[0]) and o[1:].isnan().all()
    assert torch.equal(pool[0], want_state[0]) and torch.equal(pool[1:], state[1:])


def assert_strides_do_not_matter(device: str) -> None:
    six, state = token(Case("strides", 1, B=2, HV=4), torch.float32, device)
    want = kernel.step(*six, state, 1.0)
    strided = [torch.stack((y, -y), -1)[..., 0] for y in (*six, state)]
    assert not any(y.is_contiguous() for y in strided)
    assert all(torch.equal(y, z) for y, z in zip(kernel.step(*strided, 1.0), want))


def assert_bfloat16_state(ulp: float, device: str) -> None:
    """A bfloat16 state is the float32 one rounded: the arithmetic between is the same. ulp: of that rounding."""
    six, state = token(Case("rounded state", 1, B=2, K=40, V=64), torch.float32, device)
    rounded = state.bfloat16()
    want_o, want_state = kernel.step(*six, rounded.float(), 1.0)
    o, final = kernel.step(*six, rounded, 1.0)
    assert torch.equal(o, want_o) and final.dtype == torch.bfloat16
    assert ((final.float() - want_state).abs() <= ulp * torch.finfo(torch.bfloat16).eps * want_state.abs()).all()
    assert torch.equal(kernel.step_inplace(*six, rounded, None, 1.0), o) and torch.equal(rounded, final)


LAYERS = {
    "the paper's": {"num_heads": 2, "head_dim": 32},
    "groups, wide values, reflections": {
        "num_heads": 1,
        "num_v_heads": 2,
        "head_dim": 24,
        "expand_v": 2,
        "allow_neg_eigval": True,
        "output_gate": "sigmoid",
        "conv_size": 3,
    },
    "no convolution": {"num_heads": 1, "head_dim": 40, "use_short_conv": False},
    "heads of 256, two tiles": {"num_heads": 1, "head_dim": 256, "hidden_size": 16},
}


def layer_parts(layer: GatedDeltaNet2, x: Tensor) -> tuple[LayerToken, LayerWeights]:
    """What `step_layer` takes for x [N, hidden_size]."""
    qkv = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), -1)
    convolution = None
    if layer.use_short_conv:
        convolution = torch.cat([conv.weight for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)]).squeeze(1)
    return (
        LayerToken(qkv, layer.f_proj(x), layer.b_proj(x), layer.w_proj(x), layer.g_proj(x)),
        LayerWeights(convolution, layer.A_log, layer.dt_bias, layer.o_norm.weight),
    )


def exact_layer(layer: GatedDeltaNet2, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """y and the final state of a float64 layer from its equations (docs of `GatedDeltaNet2`), float64 throughout."""
    H, HV, T = layer.num_heads, layer.num_v_heads, x_BTD.shape[1]
    token, weights = layer_parts(layer, x_BTD)
    qkv = token.qkv
    if weights.convolution is not None:
        W = weights.convolution.shape[1]
        past = F.pad(qkv.mT, (W - 1, 0))
        qkv = F.conv1d(past, weights.convolution[:, None], groups=qkv.shape[-1]).mT
    q, k, v = F.silu(qkv).split(layer.channels, -1)
    q, k = (F.normalize(y.unflatten(-1, (H, -1)), dim=-1, eps=0) for y in (q, k))
    g = -weights.A_log.exp()[:, None] * F.softplus(token.f + weights.dt_bias).unflatten(-1, (H, -1))
    b = token.b.sigmoid().unflatten(-1, (H, -1)) * (2 if layer.allow_neg_eigval else 1)
    w = token.w.sigmoid().unflatten(-1, (HV, -1))
    o, state = reference.recurrent(q, k, v.unflatten(-1, (HV, -1)), g, b, w)
    z = token.z.sigmoid() * (1 if layer.output_gate == "sigmoid" else token.z)
    y = F.rms_norm(o, o.shape[-1:], weights.norm, layer.o_norm.eps) * z.view(*o.shape[:2], HV, -1)
    return layer.o_proj(y.reshape(len(x_BTD), T, -1)), state


@torch.no_grad()
def assert_step_layer_is_the_layer(name: str, dtype: torch.dtype, device: str, tokens: int = 3) -> None:
    """Token after token in a pool, the window of the convolution carried along, against the layer over the sequence."""
    options = {"hidden_size": 24} | LAYERS[name]
    torch.manual_seed(1)
    layer = GatedDeltaNet2(**options)
    for p in layer.parameters():  # the initial weights give outputs of 1e-3, and a norm that does nothing
        p.data.mul_(3.0) if p.dim() == 2 else p.data.add_(torch.rand_like(p) * 0.5)
    layer = layer.to(dtype)
    x_BTD = torch.randn(2, tokens, options["hidden_size"]).to(dtype)
    want = exact_layer(copy.deepcopy(layer).double(), x_BTD.double())
    same_y, same_state = layer(x_BTD)
    layer = layer.to(device)
    slots = torch.tensor([2, 0], device=device)
    window, state = layer.initial_state(3)
    outs = []
    for t in range(tokens):
        y = step_layer(
            *layer_parts(layer, x_BTD[:, t].to(device)),
            window,
            state,
            slots=slots,
            norm_eps=layer.o_norm.eps,
            allow_neg_eigval=layer.allow_neg_eigval,
            output_gate=layer.output_gate,
        )
        outs.append(layer.o_proj(y))
    got = (torch.stack(outs, 1).cpu(), state[slots].cpu())
    for what, y, z, same in zip(("y", "state"), got, want, (same_y, same_state.recurrent)):
        assert_as_good_as([same], y, z, dtype, f"{name}: {what}")
    assert (state[1] == 0).all()
    if window is not None:
        assert (window[1] == 0).all()
        seen = layer_parts(layer, x_BTD.to(device))[0].qkv[:, -window.shape[-1] :].mT
        torch.testing.assert_close(window[slots][..., -seen.shape[-1] :], seen)
