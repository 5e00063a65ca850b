"""The guard keeps every token from making a state grow, moves no gate further than that needs, and travels everywhere.

The law is the spectral norm of one token's transition, by singular values in float64.
"""

from pathlib import Path

import pytest
import torch
from onnx_files import session
from test_layers import layer_of

import gdn2_ops
from gdn2_ops import corpus, guard_erase
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import export
from gdn2_ops.layers import GatedDeltaNet2
from gdn2_ops.model import GDN2LM, GDN2Config
from gdn2_ops.runtime.generate import bits_per_byte
from gdn2_ops.stability import SLOWEST

TINY = Path(__file__).parents[1] / "examples" / "models" / "tiny"
N = 200  # transitions of each kind
# The largest growth of a token with a gate in [0, 1]: what rounding the guarded gate (and the key) leaves.
GROWTH = {torch.float64: SLOWEST, torch.float32: 3e-7, torch.float16: 2e-4, torch.bfloat16: 1e-3}


def transitions(K: int, dtype: torch.dtype = torch.float64, largest: float = 1.0):
    """Unit keys, gates and decays of every kind that is hard: some channels without decay, keys along an axis."""
    random = torch.Generator().manual_seed(K)

    def uniform(*shape):
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    first = (torch.arange(K) == 0).expand(N, K)
    keys = normal(N, K), normal(N, K) * 10 ** (-5 * uniform(N, K)), first + 1e-4 * normal(N, K)
    gates = uniform(N, K), 1.0 * (uniform(N, K) < 0.5), uniform(N, K) * 10 ** (-6 * uniform(N, 1)), 0.7 + 0 * first
    decays = (
        torch.zeros(N, K, dtype=torch.float64),
        -0.1 * uniform(N, K),
        -1e-6 * uniform(N, K),
        -uniform(N, K) * 10 ** (-6 * uniform(N, 1)) * (uniform(N, K) < 0.7),
        -3 * uniform(N, K) * ~first,
        -200 * uniform(N, K),
    )
    k, b, g = (
        torch.cat(x)
        for x in zip(*((k / k.norm(dim=-1, keepdim=True), largest * b, g) for k in keys for b in gates for g in decays))
    )
    return k.to(dtype), b.to(dtype), g.to(dtype if dtype == torch.float64 else torch.float32)


def norms(k, b, g) -> torch.Tensor:
    k, b, g = k.double(), b.double(), g.double()
    erase = torch.eye(k.shape[-1], dtype=torch.float64) - k.unsqueeze(-1) * (b * k).unsqueeze(-2)
    return torch.linalg.matrix_norm(erase * g.exp().unsqueeze(-2), 2)


@pytest.mark.parametrize("largest", [1.0, 2.0])
@pytest.mark.parametrize("K", [1, 2, 8])
def test_the_guard_is_just_enough_and_no_more(K, largest):
    k, b, g = transitions(K, largest=largest)
    guarded, before = guard_erase(k, b, g), norms(k, b, g)
    after, moved = norms(k, guarded, g), (guarded != b).any(-1)
    assert (after <= 1 + SLOWEST).all()
    assert torch.equal(guarded[before < 1 - 1e-12], b[before < 1 - 1e-12])
    assert (after[moved] > 1 - 1e-9).all()  # any nearer to b, and it is above 1
    assert (moved.sum() > N) == (K > 1) and (before.max() > 1.1) == (K > 1)
    assert ((b.amin(-1) - 1e-12 <= guarded.amin(-1)) & (guarded.amax(-1) <= b.amax(-1) + 1e-12)).all()
    torch.testing.assert_close((k * k * guarded).sum(-1), (k * k * b).sum(-1), rtol=1e-12, atol=1e-12)


def test_a_step_further_back_to_the_gate_would_grow():
    k, b, g = transitions(8)
    guarded = guard_erase(k, b, g)
    moved = (norms(k, b, g) > 1.001) & (g < -1e-5).all(-1)
    nearer = guarded + 1e-3 * (b - guarded)
    assert moved.sum() > N and (norms(k, nearer, g)[moved] > 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_leaves_little_growth(dtype):
    for K in (2, 8):
        k, b, g = transitions(K, dtype)
        guarded = guard_erase(k, b, g)
        assert guarded.dtype == dtype and guarded.isfinite().all()
        assert norms(k, guarded, g).max() <= 1 + GROWTH[dtype]
        safe = norms(k, b, g) < 1 - 1e-5
        assert safe.any() and torch.equal(guarded[safe], b[safe])


def test_a_key_of_zeros_and_an_equal_gate_are_left_as_they_are():
    b, g = torch.rand(3, 4), -torch.rand(3, 4)
    assert torch.equal(guard_erase(torch.zeros(3, 4), b, g), b)
    assert torch.equal(
        guard_erase(torch.randn(3, 4).bfloat16(), torch.full((3, 4), 0.3).bfloat16(), 0 * g)[0, :2],
        torch.full((2,), 0.3).bfloat16(),
    )


def alternating(T: int, dtype: torch.dtype):
    """docs/derivation.md, Stability: two unit keys in turn, gates in [0, 1], no decay; growth by 1.118 a token."""
    k_T2 = torch.tensor([[1 / 6, 5 / 6], [5 / 6, 1 / 6]]).sqrt().repeat(T // 2, 1)
    b_T2 = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(T // 2, 1)
    k, b = (x[None, :, None].to(dtype) for x in (k_T2, b_T2))
    return k, torch.full_like(k, 4), torch.zeros(k.shape), b, torch.ones_like(k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lawful_inputs_that_overflow_stay_bounded_with_the_guard(dtype):
    k, v, g, b, w = alternating(800, dtype)
    assert not gdn2_ops.chunk(k, k, v, g, b, w).state.isfinite().all()
    k, v, g, b, w = alternating(100_000, dtype)
    guarded = guard_erase(k, b, g)
    o, state = gdn2_ops.chunk(k, k, v, g, guarded, w)
    assert o.abs().max() < 50 and state.abs().max() < 50


def test_gradients_go_straight_through():
    k, b, g = (x[:64].requires_grad_() for x in transitions(8))
    weight = torch.randn_like(b)
    db, dk, dg = torch.autograd.grad((guard_erase(k, b, g) * weight).sum(), (b, k, g), allow_unused=True)
    assert torch.equal(db, weight) and dk is None and dg is None


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4\), \(2, 3\), \(2, 4\)"):
        guard_erase(torch.rand(2, 4), torch.rand(2, 3), torch.rand(2, 4))


@torch.no_grad()
def test_the_layer_guards_in_every_way_it_runs():
    """Forward, step and step in place see one gate: that of the operator's inputs, guarded."""
    plain, layer = (layer_of(guard_erase=guard).float() for guard in (False, True))
    layer.load_state_dict(plain.state_dict())
    for one in (plain, layer):
        one.b_proj.weight.data.mul_(8)
        one.A_log.data.sub_(4)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))
    inputs, _ = plain._inputs(x, None)
    guarded, _ = layer._inputs(x, None)
    assert torch.equal(guarded.b, guard_erase(inputs.k, inputs.b, inputs.g))
    assert (guarded.b != inputs.b).float().mean() > 0.2
    y, end = layer(x)
    state, pool = layer.initial_state(2), layer.initial_state(2)
    for t in range(9):
        out, state = layer.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.step_inplace(x[:, t], pool), y[:, t], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.recurrent, end.recurrent, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pool.recurrent, end.recurrent, rtol=1e-4, atol=1e-6)


class Guarded(torch.nn.Module):
    def forward(self, k, b, g):
        guarded = guard_erase(k, b, g)
        return guarded, gdn2_ops.chunk(k, k, k, g, guarded, guarded).o


@torch.no_grad()
def test_a_graph_without_breaks_and_an_onnx_graph_of_plain_operators(tmp_path):
    k, b, g = (x[None, ::9, None] for x in transitions(8, torch.float32))
    compiled = torch.compile(Guarded(), backend="aot_eager", fullgraph=True, dynamic=True)
    file = export(Guarded().eval(), tmp_path / "guard.onnx", (k, b, g), dynamic={name: {1: "tokens"} for name in "kbg"})
    run = session(str(file))
    for T in (700, k.shape[1]):
        x = [y[:, :T] for y in (k, b, g)]
        want, got = Guarded()(*x), run.run(None, {name: y.numpy() for name, y in zip("kbg", x)})
        for guarded, o in (compiled(*x), map(torch.from_numpy, got)):
            assert norms(x[0], guarded, x[2]).max() <= 1 + GROWTH[torch.float32]
            torch.testing.assert_close(x[0] * guarded, x[0] * want[0], rtol=0, atol=2e-4)
            torch.testing.assert_close(o, want[1], rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_tiny_model_hardly_notices():
    plain = GDN2LM.from_pretrained(TINY)
    guarded = GDN2LM.from_pretrained(TINY)
    for layer in guarded.modules():
        if isinstance(layer, GatedDeltaNet2):
            layer.guard_erase = True
    text = corpus.held_out_text(32 * 1024)
    before, after = (bits_per_byte(TorchBackend(model), text) for model in (plain, guarded))
    assert before != after and abs(after / before - 1) <= 0.005


def test_the_configuration_carries_the_guard(tmp_path):
    config = GDN2Config(
        vocab_size=8, hidden_size=8, num_layers=1, intermediate_size=8, num_heads=1, head_dim=8, guard_erase=True
    )
    GDN2LM(config).save_pretrained(tmp_path)
    model = GDN2LM.from_pretrained(tmp_path)
    assert model.config.guard_erase and model.layers[0].mixer.guard_erase
