"""The backward kernels in Triton's interpreter (what that means: test_kernels_forward.py), and compiled: no spills."""

import itertools
import json
import os
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
import triton
from cases import CASES, DTYPES, NAMES, Case, Inputs, bounds, cotangents, inputs
from chunk_laws import assert_gradients
from test_kernels_forward import (  # noqa: F401, a fixture
    SPILLS,
    TRITON,
    every_dtype,
    known_spills,
    poisoned_empty,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import traffic
from gdn2_ops.kernels import chunk_backward, chunk_forward, tiles
from gdn2_ops.kernels.kernel import Kernel
from gdn2_ops.kernels.warming import warm_up


def backward(x, do, dstate, cu_seqlens=None):
    return chunk_backward.chunk_backward(do, dstate, *x, cu_seqlens, x.q.shape[-1] ** -0.5)


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_is_the_specification_s(case, dtype):
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    assert_gradients(backward(x, do, dstate, bounds(case)), case, x, do, dstate)


@every_dtype
@pytest.mark.parametrize("K, V, cu_seqlens", [(64, 64, None), (8, 6, (0, 0, 5, 200, 200, 390))])
def test_more_chunks_than_share_a_state(K, V, cu_seqlens, dtype):
    """Groups of one to five chunks, the last one of which is short; `prepare` once and twice."""
    case = Case("groups", 390, cu_seqlens=cu_seqlens, H=1, HV=2, K=K, V=V)
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    assert_gradients(backward(x, do, dstate, bounds(case)), case, x, do, dstate)


@pytest.mark.parametrize("K, V", [(1, 1), (31, 33), (64, 32), (100, 130)])
def test_every_head_size(K, V):
    """Without a gradient of the final state."""
    case = Case("head sizes", 20, H=1, HV=1, K=K, V=V)
    x, (do, _) = inputs(case, torch.float32), cotangents(case, torch.float32)
    assert_gradients(backward(x, do, None), case, x, do, None)


@every_dtype
def test_a_sequence_sees_neither_its_batch_nor_its_heads(dtype):
    """And a second run gives the same bits."""
    case = Case("batch", 20, B=2, H=2, HV=4)
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    got = backward(x, do, dstate)
    others, do_others = Inputs(*(y.clone() for y in x)), do.clone()
    for y in (*others[:6], do_others):
        y[0], y[1, :, y.shape[2] // 2 :] = -0.5, -0.25
    for y, z in zip(backward(others, do_others, dstate), got):
        heads = slice(0, z.shape[1 if z is got[6] else 2] // 2)
        at = (1, heads) if z is got[6] else (1, slice(None), heads)
        assert torch.equal(y[at], z[at]) and not torch.equal(y, z)
    assert all(torch.equal(y, z) for y, z in zip(backward(x, do, dstate), got))


@every_dtype
def test_packed_sequences_are_separate_ones(dtype):
    case = Case("packed", 90, cu_seqlens=(0, 0, 65, 80, 80, 90, 90), H=1, HV=1)
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    *got, got_state = backward(x, do, dstate, bounds(case, torch.int32))
    for n, (begin, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        alone = backward(tokens(x, begin, end, x.state[n : n + 1]), do[:, begin:end], dstate[n : n + 1])
        assert all(torch.equal(y[:, begin:end], z) for y, z in zip(got, alone[:6]))
        assert torch.equal(got_state[n : n + 1], alone[6])


def test_the_keys_of_a_group_have_the_sum_of_its_gradients():
    case = Case("group", 20, H=1, HV=3, K=33, V=40)
    x, (do, dstate) = inputs(case, torch.float32), cotangents(case, torch.float32)
    q, k, v, g, b, w, state = x
    q, k, g, b = (y.repeat_interleave(3, 2) for y in (q, k, g, b))
    got, repeated = backward(x, do, dstate), backward(Inputs(q, k, v, g, b, w, state), do, dstate)
    for name, y, z in zip(NAMES, got, repeated):
        if name in ("v", "w", "state"):
            assert torch.equal(y, z)
        else:
            z = z.unflatten(2, (1, 3)).sum(3)
            torch.testing.assert_close(y, z, rtol=0, atol=1e-6 * z.abs().max().item())


def test_any_strides():
    case = Case("strides", 18, B=2)
    x, (do, dstate) = inputs(case, torch.float32), cotangents(case, torch.float32)
    other = Inputs(*(y.transpose(1, 2).contiguous().transpose(1, 2) for y in x[:6]), x.state.mT.contiguous().mT)
    assert not other.q.is_contiguous()
    got = backward(other, do.mT.contiguous().mT, dstate.mT.contiguous().mT)
    for y, z in zip(got, backward(x, do, dstate)):
        assert torch.equal(y, z) and y.is_contiguous()


@every_dtype
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 5, 70, 70, 90)])
def test_nothing_is_left_uninitialised(cu_seqlens, dtype, poisoned_empty):  # noqa: F811
    case = Case("poisoned", 90, cu_seqlens=cu_seqlens, HV=4, K=5, V=3)
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    assert torch.empty(3).isnan().all()
    for y in backward(x, do, dstate, bounds(case)):
        assert y.isfinite().all()


@pytest.mark.parametrize(
    "dtype, a_bytes, rest_bytes, most", [(torch.bfloat16, 2, 0, 10_000), (torch.float16, 4, 2, 10_400)]
)
def test_bytes_of_a_token_and_head(dtype, a_bytes, rest_bytes, most):
    """Everything a kernel reads or writes, once; a state for three chunks."""
    moved = traffic.for_a_token(lambda *x: backward(Inputs(*x), torch.ones_like(x[2]), torch.ones_like(x[6])), dtype)
    state, square = 2 * traffic.K * traffic.V / 192, 64 * 10 / 16  # blocks of 16 up to the diagonal
    keys, values, decays, chunk = 2 * traffic.K, 2 * traffic.V, 4 * traffic.K, 4 * traffic.K / 64
    want = {
        "prepare_kernel": 6 * keys + decays + (2 + rest_bytes + a_bytes) * square + chunk,
        "recur_kernel": 2 * keys + a_bytes * square + chunk + 3 * values + state,
        "recur_back_kernel": 3 * keys + (2 + rest_bytes) * square + chunk + 2 * values + state,
        "gradients_kernel": 6 * keys + 2 * decays + 7 * values + 2 * state,
    }
    assert {name: kernel["memory"] for name, kernel in moved.items()} == pytest.approx(want, abs=1)
    assert sum(want.values()) < most


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are still alive, and the most that there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        assert not made._is_view(), f"{function} may have made a copy that is not counted"
        self.now += made.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(made, self.free, made.nbytes)
        return made

    def free(self, size):
        self.now -= size


@every_dtype
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 130, 135, 200, 200)])
def test_a_walk_in_segments_has_gradients(cu_seqlens, dtype, monkeypatch, poisoned_empty):  # noqa: F811
    case = Case("segments", 200, cu_seqlens=cu_seqlens, H=1, HV=2)
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    monkeypatch.setattr(tiles, "segments", lambda programs, chunks: 2)
    assert_gradients(backward(x, do, dstate, bounds(case)), case, x, do, dstate)


def test_warming_up_launches_all_that_a_backward_pass_may(monkeypatch):
    launched = set()
    monkeypatch.setattr(Kernel, "launch", lambda kernel, *arguments, **options: launched.add(kernel.name))
    for K in (32, 40):
        warm_up("cpu", torch.float32, K, K, ("backward",))
    kernels = {kernel.name for kernel in (*chunk_forward.KERNELS, *chunk_backward.KERNELS)}
    assert launched == kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [5, 15])
@pytest.mark.parametrize("K, V", list(itertools.product(tiles.HEAD_SIZES, tiles.HEAD_SIZES)))
def test_memory_at_most(K, V, groups, dtype, monkeypatch):
    """Less than one bfloat16 state of every chunk over the gradients, whatever the dtype: two states of a group, and
    little more where the walk is in segments."""
    T, H, HV = 3 * groups * 64, 2, 2 if K != V else 4
    monkeypatch.setattr(Kernel, "launch", lambda *arguments, **options: None)
    keys, values = torch.empty(1, T, H, K, dtype=dtype), torch.empty(1, T, HV, V, dtype=dtype)
    x = Inputs(keys, keys, values, keys.float(), keys, values, torch.empty(1, HV, K, V))

    def over_the_gradients():
        with LiveBytes() as memory:
            gradients = backward(x, values, torch.empty_like(x.state))
        return memory.most - sum(y.nbytes for y in gradients) - x.state.nbytes  # a cotangent made inside

    over, state = over_the_gradients(), HV * K * V
    assert over < state * torch.bfloat16.itemsize * T // 64
    if chunk_forward.segments_of_walk(values, None) == 1:
        assert over == 2 * state * dtype.itemsize * T // (64 * chunk_forward.group(8 * dtype.itemsize))
    for twice in (False, True):
        monkeypatch.setattr(chunk_backward, "is_prepared_twice", lambda *_, twice=twice: twice)
        assert over_the_gradients() >= over


@every_dtype
@pytest.mark.parametrize("K, cu_seqlens", [(8, None), (64, (0, 0, 5, 90))])
def test_preparing_twice_is_preparing_once(K, cu_seqlens, dtype, monkeypatch, poisoned_empty):  # noqa: F811
    case = Case("twice", 90, cu_seqlens=cu_seqlens, H=1, HV=2, K=K)
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    both = []
    for twice in (False, True):
        monkeypatch.setattr(chunk_backward, "is_prepared_twice", lambda *_, twice=twice: twice)
        both.append(backward(x, do, dstate, bounds(case)))
    assert all(torch.equal(y, z) for y, z in zip(*both))


@pytest.fixture(scope="module")
def rows():
    """What the compiler made of the kernels for Hopper, heads of 128, in a process of its own."""
    code = """
import json
from benchmarks import codegen
from gdn2_ops.export.kernels import plan
builds = plan([90], [(128, 128)], kernels=["gradients", "recur_back", "recur_back_masked"])
builds = [b for b in builds if dict(b.options).get("STATE", 1)]
print(json.dumps([codegen.our_row(build) for build in builds]))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = partial(subprocess.run, env=environment, capture_output=True, text=True, timeout=600)
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_spills(rows):
    # of each dtype, packed or not: gradients and recur_back with masks and without
    assert len(rows) == 3 * 2 * (2 + 1 + 1)
    if TRITON not in SPILLS:
        pytest.skip(f"what spills is known for Triton {', '.join(SPILLS)}, this is {triton.__version__}")
    for row in rows:
        assert row["stack"] <= known_spills(row), row
        assert (row["HGMMA"] > 0) == (row["dtype"] != "fp32"), row
