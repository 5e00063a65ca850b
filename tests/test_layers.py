"""The layer is the equations of the paper's section 3, whatever its options; cutting a sequence changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from gdn2_ops import guard_erase, reference
from gdn2_ops.layers import GatedDeltaNet2, SlidingWindowAttention

D = 24
OPTIONS = {
    "default": {},
    "no convolution": {"use_short_conv": False},
    "value groups": {"num_v_heads": 4},
    "wide values": {"expand_v": 2.0},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "sigmoid gate": {"output_gate": "sigmoid"},
    "width 2": {"conv_size": 2},
    "guard": {"guard_erase": True},
}


def layer_of(**options) -> GatedDeltaNet2:
    torch.manual_seed(0)
    return GatedDeltaNet2(D, num_heads=2, head_dim=8, **options).double().eval()


def x_of(B: int = 2, T: int = 21) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_the_book(layer: GatedDeltaNet2, x: torch.Tensor) -> torch.Tensor:
    """Every projection, convolution, norm and gate written out; the recurrence is the specification's."""

    def convolved(y: torch.Tensor, conv: torch.nn.Conv1d) -> torch.Tensor:
        out = torch.zeros_like(y)
        for t in range(y.shape[1]):
            for lag in range(min(t + 1, layer.conv_size)):
                out[:, t] += conv.weight[:, 0, layer.conv_size - 1 - lag] * y[:, t - lag]
        return out

    def heads(y: torch.Tensor, size: int) -> torch.Tensor:
        return torch.stack(y.split(size, -1), -2)

    q, k, v = (x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.use_short_conv:
        q, k, v = convolved(q, layer.q_conv1d), convolved(k, layer.k_conv1d), convolved(v, layer.v_conv1d)
    q, k, v = (y * torch.sigmoid(y) for y in (q, k, v))
    q, k, v = heads(q, layer.head_dim), heads(k, layer.head_dim), heads(v, layer.head_v_dim)
    q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    b = heads(torch.sigmoid(x @ layer.b_proj.weight.T), layer.head_dim) * (2 if layer.allow_neg_eigval else 1)
    w = heads(torch.sigmoid(x @ layer.w_proj.weight.T), layer.head_v_dim)
    f = x @ layer.f_proj[0].weight.T @ layer.f_proj[1].weight.T + layer.dt_bias
    g = -layer.A_log.exp()[:, None] * heads(torch.log(1 + f.exp()), layer.head_dim)
    b = guard_erase(k, b, g) if layer.guard_erase else b
    o, _ = reference.recurrent(q, k, v, g, b, w)
    o = o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm.weight
    gate = heads(x @ layer.g_proj[0].weight.T @ layer.g_proj[1].weight.T + layer.g_proj[1].bias, layer.head_v_dim)
    gate = torch.sigmoid(gate) * (gate if layer.output_gate == "silu" else 1)
    return (o * gate).flatten(-2) @ layer.o_proj.weight.T


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_is_the_equations(options):
    layer, x = layer_of(**options).float(), x_of().float()
    y, state = layer(x)
    torch.testing.assert_close(y.double(), by_the_book(layer.double(), x.double()), rtol=1e-4, atol=1e-6)
    assert state.recurrent.dtype == torch.float32 and torch.isfinite(state.recurrent).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cutting_a_sequence_changes_nothing(options):
    layer, x = layer_of(**options).float(), x_of().float()
    whole, end = layer(x)
    for cut in (0, 1, 2, 5, 16, 20):
        parts, state = [], layer.initial_state(2)
        for piece in (x[:, :cut], x[:, cut:]):
            y, state = layer(piece, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state.recurrent, end.recurrent, rtol=1e-4, atol=1e-6)
    y, state = [], layer.initial_state(2)
    for token in x.unbind(1):
        out, state = layer.step(token, state)
        y.append(out)
    torch.testing.assert_close(torch.stack(y, 1), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.recurrent, end.recurrent, rtol=1e-4, atol=1e-6)


def test_gradients_reach_every_parameter():
    layer = layer_of(num_v_heads=4).float().train()
    y, _ = layer(x_of().float())
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_initial_values_are_the_papers():
    layer = GatedDeltaNet2(256, num_heads=64, head_dim=8)
    rate, step = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert rate.min() >= 1 and rate.max() <= 16 and rate.max() - rate.min() > 8
    assert step.min() >= 0.999e-3 and step.max() <= 0.1001 and step.max() / step.min() > 20
    bound = 2**-2.5 * math.sqrt(6 / (256 + 512))
    assert 0.95 * bound < layer.q_proj.weight.abs().max() <= bound
    assert layer.g_proj[1].bias.abs().max() == 0


def test_parameters_have_the_names_of_published_checkpoints():
    names = {name.removesuffix(".weight").removesuffix(".bias") for name in layer_of().state_dict()}
    linear = {f"{x}_proj" for x in "qkvbwo"} | {f"{x}_proj.{i}" for x in "fg" for i in (0, 1)}
    assert names == linear | {"q_conv1d", "k_conv1d", "v_conv1d", "A_log", "dt_bias", "o_norm"}


@pytest.mark.parametrize(
    "options, text",
    [
        ({"num_v_heads": 3}, "multiple of num_heads = 2, got 3"),
        ({"expand_v": 1.3}, "to be whole, got 8 \\* 1.3"),
        ({"output_gate": "tanh"}, "got 'tanh'"),
        ({"conv_size": 1}, "conv_size >= 2, got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        layer_of(**options)


def test_bfloat16_layer_keeps_decay_and_state_in_float32():
    layer = layer_of().to(torch.bfloat16)
    y, state = layer(x_of().to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.recurrent.dtype == torch.float32
    want = by_the_book(layer.double(), x_of().to(torch.bfloat16).double())
    assert (y.double() - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize("window", [2, 5, 64])
def test_window_attention_is_softmax_over_the_window_with_rotated_positions(window):
    torch.manual_seed(0)
    mixer = SlidingWindowAttention(D, num_heads=2, window=window).double()
    x, size = x_of(), D // 2
    q, k, v = (torch.stack((x @ p.weight.T).split(size, -1), 1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

    def rotated(y: torch.Tensor, position: int) -> torch.Tensor:
        angle = position * 1e4 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
        z = torch.complex(y[..., : size // 2], y[..., size // 2 :]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag), -1)

    out = torch.zeros_like(q)
    for t in range(x.shape[1]):
        seen = range(max(0, t - window + 1), t + 1)
        scores = torch.stack([(rotated(q[:, :, t], t) * rotated(k[:, :, j], j)).sum(-1) for j in seen], -1)
        p = torch.softmax(scores / math.sqrt(size), -1)
        out[:, :, t] = torch.einsum("bhj,bhjd->bhd", p, v[:, :, seen.start : seen.stop])
    want = out.transpose(1, 2).flatten(-2) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], want, rtol=1e-5, atol=1e-6)
    first, state = mixer(x[:, :9])
    rest, state = mixer(x[:, 9:20], state)
    last, state = mixer.step(x[:, 20], state)
    torch.testing.assert_close(torch.cat((first, rest, last[:, None]), 1), want, rtol=1e-5, atol=1e-6)
    assert state.k.shape[2] == window - 1 and state.length.tolist() == [min(21, window - 1)] * 2
