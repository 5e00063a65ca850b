"""The inputs and the tolerance that every test file shares.

A `Case` names one hard kind of data; `inputs` makes its tensors from a generator seeded by the name, so that a case is
the same in every file and on every machine. `assert_as_good_as` is the only tolerance for rounded arithmetic.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import gdn2_ops
from gdn2_ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The specification in its two forms. Under an erase of two, or with equal keys, (I + T)^-1 has entries that cancel, and
# chunks lose digits that the recurrence keeps: an operator may compute in either form, and have the error of either.
FORMS = (reference.recurrent, *(partial(reference.chunkwise, chunk_size=C) for C in (16, 64)))
OUTPUTS = ("o", "final state")
NAMES = ("q", "k", "v", "g", "b", "w", "state")


@dataclass(frozen=True)
class Case:
    """decay none | weak | resets | channels, erase none | uniform | one | two, keys random | equal."""

    name: str
    T: int
    decay: str = "weak"
    erase: str = "uniform"
    keys: str = "random"
    B: int = 1
    H: int = 2
    HV: int = 2
    K: int = 8
    V: int = 6
    cu_seqlens: tuple[int, ...] | None = None
    state: bool = True

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


CASES = (
    Case("no token", 0, B=2),
    Case("one token", 1, B=2, K=5, V=7),
    Case("one token, no state", 1, state=False),
    Case("15 tokens, no decay", 15, decay="none"),
    Case("16 tokens, resets", 16, decay="resets", B=2),
    Case("17 tokens, equal keys", 17, keys="equal", erase="one"),
    Case("63 tokens, channels of every decay", 63, decay="channels", erase="two", K=6, V=9),
    Case("64 tokens, equal keys, no decay", 64, decay="none", keys="equal", erase="uniform"),
    Case("65 tokens, reflections", 65, decay="none", erase="two", state=False),
    Case("65 tokens, resets, full erase", 65, decay="resets", erase="one"),
    Case("65 tokens, equal keys, resets", 65, decay="resets", keys="equal", erase="two", H=1, HV=1),
    Case("130 tokens", 130, B=2, H=1, HV=1, K=16, V=16),
    Case("130 tokens, equal keys, reflections", 130, keys="equal", erase="two", H=1, HV=1),
    Case("130 tokens, no erase", 130, erase="none", H=1, HV=1, K=12, V=4),
    Case("two values per key", 33, H=2, HV=4, B=2, K=4, V=7),
    Case("four values per key", 17, H=1, HV=4, decay="channels", state=False),
    Case("packed", 65, cu_seqlens=(0, 17, 33, 65), decay="resets"),
    Case("packed, empty ones", 64, cu_seqlens=(0, 0, 15, 15, 64, 64), H=1, HV=2, keys="equal"),
    Case("packed, empty ones, no state", 16, cu_seqlens=(0, 0, 1, 1, 16, 16), state=False),
    Case("packed, all empty", 0, cu_seqlens=(0, 0, 0)),
)


class Inputs(NamedTuple):
    """The tensors of `gdn2_ops.chunk` before cu_seqlens, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    state: Tensor | None

    def double(self) -> Inputs:
        """The same numbers in float64: what an exact result is computed from."""
        return Inputs(*(None if x is None else x.detach().double() for x in self))

    def leaves(self) -> Inputs:
        """The same numbers as leaves of a graph."""
        return Inputs(*(None if x is None else x.detach().clone().requires_grad_() for x in self))

    def tensors(self) -> list[Tensor]:
        return [x for x in self if x is not None]


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    """The tensors of a case: float64 throughout, or rounded to dtype with float32 decay and state."""
    random = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    keys_shape, values_shape = (case.B, case.T, case.H, case.K), (case.B, case.T, case.HV, case.V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64)

    q, k, v = normal(*keys_shape), normal(*keys_shape), normal(*values_shape)
    if case.keys == "equal":
        k = normal(case.B, 1, case.H, case.K) + 0.05 * k
    k = k / k.norm(dim=-1, keepdim=True)
    g = -0.1 * uniform(*keys_shape)
    if case.decay == "none":
        g = torch.zeros(keys_shape, dtype=torch.float64)
    elif case.decay == "resets":  # a whole token now and then, and single channels
        g = torch.where(uniform(case.B, case.T, 1, 1) < 0.1, -30.0, g)
        g = torch.where(uniform(*keys_shape) < 0.05, -30.0, g)
    elif case.decay == "channels":
        per_channel_K = torch.tensor([0.05, 5.0, 0.0, 30.0, 1.0, 0.3], dtype=torch.float64)
        g = -uniform(*keys_shape) * per_channel_K[torch.arange(case.K) % 6]
    b = {"none": 0.0, "one": 1.0, "two": 2.0}.get(case.erase)
    b = uniform(*keys_shape) if b is None else torch.full(keys_shape, b, dtype=torch.float64)
    w = uniform(*values_shape)
    state = normal(case.N, case.HV, case.K, case.V) if case.state else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, b, w = (x.to(dtype) for x in (q, k, v, b, w))
    return Inputs(q, k, v, g.to(wide), b, w, None if state is None else state.to(wide))


def bounds(case: Case, dtype: torch.dtype = torch.int64) -> Tensor | None:
    """cu_seqlens of a case as a tensor."""
    return None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=dtype)


def cotangents(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Gradients of o and of the final state."""
    random = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + 1)
    do = torch.randn(case.B, case.T, case.HV, case.V, generator=random, dtype=torch.float64)
    dstate = torch.randn(case.N, case.HV, case.K, case.V, generator=random, dtype=torch.float64)
    return do.to(dtype), dstate.to(torch.float64 if dtype == torch.float64 else torch.float32)


def gradients(function, x: Inputs, do: Tensor, dstate: Tensor, **options) -> list[Tensor]:
    """The outputs (o, state) and then the gradient of every tensor of x, by autograd through function."""
    leaves = x.leaves()
    outputs = function(*leaves, **options)
    grads = torch.autograd.grad(outputs, leaves.tensors(), (do, dstate), materialize_grads=True)  # T = 0 uses no q
    return [y.detach() for y in outputs] + list(grads)


def exact(x: Inputs, **options) -> tuple[Tensor, Tensor]:
    """o and final state of the specification in float64."""
    return reference.recurrent(*x.double(), **options)


def gradient_sizes(outputs_and_grads: list[Tensor], x: Inputs) -> list[float]:
    """The size one rounding is measured by: the largest number; for dg also its terms q dq and k dk, which cancel."""
    sizes = [_largest(y) for y in outputs_and_grads]
    dq, dk, dg = 2, 3, 5
    sizes[dg] = max(sizes[dg], _largest(x.q * outputs_and_grads[dq]), _largest(x.k * outputs_and_grads[dk]))
    return sizes


def assert_equal_to(got: Tensor, want: Tensor, relative: float, what: str = "", size: float | None = None) -> None:
    """For numbers without a budget: the largest error is at most `relative` times the largest wanted number."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    error, allowed = _largest(got - want), relative * (_largest(want) if size is None else size)
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def assert_as_good_as(
    specifications: Sequence[Tensor],
    got: Tensor,
    want: Tensor,
    dtype: torch.dtype,
    what: str = "",
    size: float | None = None,
) -> None:
    """error <= 2 (error of the specification in that dtype + one rounding), both against the float64 numbers `want`.

    specifications: the same numbers from every form that counts; the worst is the measure.
    dtype: of the operator's q. Float32 results of bfloat16 operands may carry one bfloat16 rounding.
    """
    assert got.dtype == specifications[0].dtype, f"{what}: {got.dtype}, expected {specifications[0].dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    rounding = torch.finfo(dtype).eps * (_largest(want) if size is None else size)
    error = _largest(got.double() - want)
    allowed = 2 * (max(_largest(y.double() - want) for y in specifications) + rounding)
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def assert_chunk_as_good_as_the_specification(case: Case, dtype: torch.dtype) -> None:
    """o, final state and every gradient of `gdn2_ops.chunk`."""
    x, options = inputs(case, dtype), {"cu_seqlens": bounds(case)}
    do, dstate = cotangents(case, dtype)
    want = gradients(reference.recurrent, x.double(), do.double(), dstate.double(), **options)
    got = gradients(gdn2_ops.chunk, x, do, dstate, **options)
    specifications = (gradients(form, x, do, dstate, **options) for form in FORMS)
    for name, y, z, size, *same in zip((*OUTPUTS, *NAMES), got, want, gradient_sizes(want, x), *specifications):
        assert_as_good_as(same, y, z, dtype, name, size)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
