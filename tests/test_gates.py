"""Each rule of `gdn2_ops.gates` against its own recurrence, written as its paper has it, head by head, in float64."""

import math

import pytest
import torch
from cases import Case, assert_as_good_as, assert_equal_to, inputs

import gdn2_ops
from gdn2_ops import gates, reference

CASE = Case("rules", 21, B=2, H=2, HV=4, K=5, V=3)
PLAIN = Case("rules, one value head", 21, B=2, H=2, HV=2, K=5, V=3)


def scan(case: Case, q, k, v, transition, write, state, scale):
    """S_t = transition(n, t, h) S_{t-1} + k_t write(n, t, h, hv)^T, o_t = scale S_t^T q_t, with explicit matrices."""
    o, final = torch.full(v.shape, math.nan, dtype=torch.float64), state.double().clone()
    for n in range(case.B):
        for hv in range(case.HV):
            h = hv * case.H // case.HV
            S = final[n, hv].clone()
            for t in range(case.T):
                S = transition(n, t, h) @ S + torch.outer(k[n, t, h], write(n, t, h, hv))
                o[n, t, hv] = scale * S.T @ q[n, t, h]
            final[n, hv] = S
    return o, final


def check(case: Case, x, rule: gates.Gates, transition, write, q=None, k=None, v=None, scale=None):
    """The operator with the gates of a rule, in float64 (the specification) and in float32 (the operator)."""
    q, k, v = (x.q, x.k, x.v) if q is None else (q, k, v)
    scale = case.K**-0.5 if scale is None else scale
    assert rule.g.dtype == torch.float32 and rule.g.shape == rule.b.shape == k.shape and rule.w.shape == v.shape
    want = scan(case, q.double(), k.double(), v.double(), transition, write, x.state, scale)
    wide = [y.double() for y in (q, k, v, *rule, x.state)]
    specification = reference.recurrent(q, k, v, *rule, x.state, scale=scale)
    operator = gdn2_ops.chunk(q, k, v, *rule, x.state, scale=scale)
    for name, exact, same, y, z in zip("oS", reference.recurrent(*wide, scale=scale), specification, operator, want):
        assert_equal_to(exact, z, 1e-6, name)  # the rule rounds its own decay to float32
        assert_as_good_as([same], y, z, torch.float32, name)


@pytest.fixture
def x():
    return inputs(CASE, torch.float32)


@pytest.fixture
def beta():
    return torch.rand(CASE.B, CASE.T, CASE.H, generator=torch.Generator().manual_seed(1))


def test_linear_attention(x):
    I, v = torch.eye(CASE.K, dtype=torch.float64), x.v.double()
    rule = gates.linear_attention(x.k, x.v)
    check(CASE, x, rule, lambda n, t, h: I, lambda n, t, h, hv: v[n, t, hv])


def test_retnet(x):
    gamma_H = 1 - 2.0 ** (-5 - torch.arange(CASE.H, dtype=torch.float64))
    I, v = torch.eye(CASE.K, dtype=torch.float64), x.v.double()
    rule = gates.retnet(x.k, x.v, gamma_H.log())
    check(CASE, x, rule, lambda n, t, h: gamma_H[h] * I, lambda n, t, h, hv: v[n, t, hv])


def test_gla(x):
    alpha, v = x.g.double().exp(), x.v.double()
    rule = gates.gla(x.k, x.v, x.g)
    check(CASE, x, rule, lambda n, t, h: torch.diag(alpha[n, t, h]), lambda n, t, h, hv: v[n, t, hv])


def test_mamba2():
    x = inputs(PLAIN, torch.float32)
    C, B, values = x.q, x.k, x.v
    dt = 0.01 + torch.rand(PLAIN.B, PLAIN.T, PLAIN.H, generator=torch.Generator().manual_seed(2))
    A_H = torch.tensor([-1.0, -0.2])
    I = torch.eye(PLAIN.K, dtype=torch.float64)

    def transition(n, t, h):
        return torch.exp(dt[n, t, h].double() * A_H[h].double()) * I

    def write(n, t, h, hv):
        return dt[n, t, h].double() * values[n, t, h].double()

    check(PLAIN, x, gates.mamba2(B, values, dt, A_H), transition, write, C, B, values, scale=1.0)


def delta_rule(x, beta, decay):
    """(I - beta k k^T) times a decay matrix, and beta v: the delta rules differ in the decay only."""
    I, k, v, beta = torch.eye(CASE.K, dtype=torch.float64), x.k.double(), x.v.double(), beta.double()

    def transition(n, t, h):
        return (I - beta[n, t, h] * torch.outer(k[n, t, h], k[n, t, h])) @ decay(n, t, h)

    return transition, lambda n, t, h, hv: beta[n, t, h] * v[n, t, hv]


@pytest.mark.parametrize("largest", [1, 2])
def test_delta_net(x, beta, largest):
    I = torch.eye(CASE.K, dtype=torch.float64)
    rule = gates.delta_net(x.k, x.v, largest * beta)
    check(CASE, x, rule, *delta_rule(x, largest * beta, lambda n, t, h: I))


def test_gated_delta_net(x, beta):
    g_BTH = x.g[..., 0]
    I = torch.eye(CASE.K, dtype=torch.float64)
    rule = gates.gated_delta_net(x.k, x.v, g_BTH, beta)
    check(CASE, x, rule, *delta_rule(x, beta, lambda n, t, h: g_BTH[n, t, h].double().exp() * I))


def test_kda(x, beta):
    alpha = x.g.double().exp()
    rule = gates.kda(x.k, x.v, x.g, beta)
    check(CASE, x, rule, *delta_rule(x, beta, lambda n, t, h: torch.diag(alpha[n, t, h])))


def test_gates_are_views():
    k, v, g = torch.rand(1, 3, 2, 4), torch.rand(1, 3, 4, 4), torch.zeros(1, 3, 2, 4)
    beta = torch.rand(1, 3, 2)
    for rule in (gates.linear_attention(k, v), gates.delta_net(k, v, beta), gates.kda(k, v, g, beta)):
        assert rule.b.stride()[-1] == 0 and rule.w.stride()[-1] == 0


def test_tied_gates_in_low_precision():
    x = inputs(CASE, torch.bfloat16)
    rule = gates.kda(x.k, x.v, x.g, torch.rand(CASE.B, CASE.T, CASE.H))
    assert (rule.g.dtype, rule.b.dtype, rule.w.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert gdn2_ops.chunk(x.q, x.k, x.v, *rule, x.state).o.isfinite().all()


def test_dbeta_is_the_sum_of_both_gates(x, beta):
    leaf = beta.requires_grad_()
    rule = gates.kda(x.k, x.v, x.g, leaf)
    rule.b.retain_grad()
    rule.w.retain_grad()
    o, state = gdn2_ops.chunk(x.q, x.k, x.v, *rule, x.state)
    (o.square().sum() + state.square().sum()).backward()
    dw_BTHG = rule.w.grad.sum(-1).unflatten(-1, (CASE.H, CASE.HV // CASE.H))
    torch.testing.assert_close(leaf.grad, rule.b.grad.sum(-1) + dw_BTHG.sum(-1))
    wide = leaf.detach().double().requires_grad_()
    rule = gates.kda(x.k.double(), x.v.double(), x.g, wide)
    o, state = reference.recurrent(x.q.double(), x.k.double(), x.v.double(), *rule, x.state)
    (o.square().sum() + state.square().sum()).backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
