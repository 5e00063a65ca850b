"""The forward kernels in Triton's interpreter: the specification, and what must hold whichever kernel made a number.

The interpreter computes in float32 what a GPU computes in tf32, and has no bfloat16: float16, which rounds at the
same places as bfloat16 does, stands for both.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from cases import CASES, Case, Inputs, assert_as_good_as, bounds, exact, inputs
from chunk_laws import assert_outputs

from benchmarks import traffic
from gdn2_ops.kernels import chunk_forward, tiles
from gdn2_ops.kernels.prepare import FOR_RECUR
from gdn2_ops.kernels.products import load_a, store_a, triangle_size

HALF = (torch.float32, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])


def chunk(x, cu_seqlens=None):
    return chunk_forward.chunk(*x, cu_seqlens, x.q.shape[-1] ** -0.5)


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunk_is_the_specification(case, dtype):
    x = inputs(case, dtype)
    assert_outputs(chunk(x, bounds(case)), case, x, bounds(case))


CUT = (Case("long", 70, H=1, HV=1), Case("steep", 40, decay="channels", H=1, HV=1, K=5, V=3, state=False))


def tokens(x: Inputs, begin: int, end: int, state: torch.Tensor | None) -> Inputs:
    return Inputs(*(y[:, begin:end] for y in x[:6]), state)


@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_cutting_anywhere_changes_nothing(case):
    x = inputs(case, torch.float32)
    for cut in [c for c in (0, 1, 15, 16, 33, 64) if c <= case.T]:
        o_before, state = chunk(tokens(x, 0, cut, x.state))
        o_after, state = chunk(tokens(x, cut, case.T, state))
        assert_outputs((torch.cat((o_before, o_after), 1), state), case, x)


@every_dtype
def test_a_sequence_sees_neither_its_batch_nor_its_heads(dtype):
    case = Case("batch", 18, B=3, H=2, HV=4)
    x = inputs(case, dtype)
    o, state = chunk(x)
    others = Inputs(*(y.clone() for y in x))
    for y in others:
        y[0], y[2] = float("nan"), 0.0
        heads = 2 if y is others.state else 3  # the axis of T is before that of heads, but in states
        y.narrow(heads - 1, y.shape[heads - 1] // 2, y.shape[heads - 1] // 2).fill_(float("nan"))
    o_others, state_others = chunk(others)
    o_alone, state_alone = chunk(Inputs(*(y[1:2] for y in x)))
    assert torch.equal(o_others[1, :, :2], o[1, :, :2]) and torch.equal(state_others[1, :2], state[1, :2])
    assert torch.equal(o_alone, o[1:2]) and torch.equal(state_alone, state[1:2])


@every_dtype
def test_the_past_does_not_see_the_future(dtype):
    """Bit for bit, also where the future decays so much that its block takes the pairwise form."""
    case = Case("causal", 70, H=1, HV=1)
    x = inputs(case, dtype)
    o, _ = chunk(x)
    future = inputs(Case("another", 70, "channels", "two", H=1, HV=1), dtype)
    for t in (0, 1, 16, 19, 33, 48, 64):
        changed = Inputs(*(torch.cat((y[:, :t], z[:, t:]), 1) for y, z in zip(x[:6], future)), x.state)
        o_changed, _ = chunk(changed)
        assert torch.equal(o_changed[:, :t], o[:, :t]), f"o before token {t} changed"
        assert not torch.equal(o_changed[:, t], o[:, t])


@every_dtype
def test_packed_sequences_are_separate_ones(dtype):
    case = Case("packed", 90, cu_seqlens=(0, 0, 65, 80, 80, 90, 90), H=1, HV=1)
    x = inputs(case, dtype)
    o, state = chunk(x, bounds(case, torch.int32))
    for n, (begin, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        o_alone, state_alone = chunk(tokens(x, begin, end, x.state[n : n + 1]))
        assert torch.equal(o_alone, o[:, begin:end]) and torch.equal(state_alone, state[n : n + 1])


@every_dtype
def test_a_group_of_value_heads_is_its_key_head_repeated(dtype):
    x = inputs(Case("group", 18, H=2, HV=6, K=33, V=40), dtype)
    q, k, v, g, b, w, state = x
    q, k, g, b = (y.repeat_interleave(3, 2) for y in (q, k, g, b))
    for got, want in zip(chunk(x), chunk(Inputs(q, k, v, g, b, w, state))):
        assert torch.equal(got, want)


@every_dtype
def test_padding_is_inert(dtype):
    case = Case("padded", 70, H=1, HV=1)
    x = inputs(case, dtype)
    for y in (x.g, x.b, x.w):
        y[:, 17:] = 0.0
    o, state = chunk(x)
    o_short, state_short = chunk(tokens(x, 0, 17, x.state))
    assert torch.equal(o[:, :17], o_short) and torch.equal(state, state_short)


@pytest.mark.parametrize("K, V", [(1, 1), (31, 33), (64, 32), (100, 130), (256, 256)])
def test_every_head_size(K, V):
    case = Case("head sizes", 20, H=1, HV=1, K=K, V=V)
    x = inputs(case, torch.float32)
    assert_outputs(chunk(x), case, x)


def test_any_strides():
    x = inputs(Case("strides", 18, B=2), torch.float32)
    other = Inputs(*(y.transpose(1, 2).contiguous().transpose(1, 2) for y in x[:6]), x.state.mT.contiguous().mT)
    assert not other.q.is_contiguous() and not other.state.is_contiguous()
    packed = torch.cat((x.q, x.k), -1)
    other = other._replace(q=packed[..., :8], k=packed[..., 8:])
    for got, want in zip(chunk(other), chunk(x)):
        assert torch.equal(got, want)


@pytest.fixture
def poisoned_empty():
    """Everything torch.empty gives out is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@every_dtype
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 5, 70, 70, 90)])
def test_nothing_is_left_uninitialised(cu_seqlens, dtype, poisoned_empty):
    case = Case("poisoned", 90, cu_seqlens=cu_seqlens, HV=4, K=5, V=3)
    x = inputs(case, dtype)
    assert torch.empty(3).isnan().all() and x.q.new_empty(3).isnan().all()
    for y in chunk(x, bounds(case)):
        assert y.isfinite().all()


@every_dtype
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 5, 350, 350, 360)])
def test_what_the_backward_pass_is_given(cu_seqlens, dtype):
    """States before each group of chunks, and R: each chunk's own tokens from its state give both again."""
    case = Case("recomputed", 360, cu_seqlens=cu_seqlens, H=1, HV=2)
    x, cu = inputs(case, dtype), bounds(case)
    prepared = chunk_forward.prepare(x.q, x.k, x.g, x.b, cu, 1.0, backward=FOR_RECUR.value)
    states, r = chunk_forward.recur_for_backward(prepared, x.v, x.w, x.state, cu, case.K)
    assert states.dtype == r.dtype == dtype and r.shape == x.v.shape
    group = chunk_forward.group(8 * dtype.itemsize)
    for n, (begin, end) in enumerate(zip(cu_seqlens or (0,), (cu_seqlens or (0, case.T))[1:])):
        first_group = begin // (group * chunk_forward.C) + n
        for c, at in enumerate(range(begin, end, chunk_forward.C)):
            before = exact(tokens(x, begin, at, x.state[n : n + 1]))[1]
            if c % group == 0:
                assert_as_good_as([before.to(dtype)], states[None, first_group + c // group], before, dtype, "states")
            want, S = [], before[0]
            for t in range(at, min(at + chunk_forward.C, end)):
                _, k, v, g, b, w, _ = (None if y is None else y.double()[0, t] for y in x.double()[:6] + (None,))
                D = g.exp()[0, :, None] * S
                want.append(w * v - ((b * k)[0, :, None] * D).sum(1))
                S = D + k[0, :, None] * want[-1][:, None]
            want_CHV = torch.stack(want)
            got = r[0, at : min(at + chunk_forward.C, end)]
            assert_as_good_as([want_CHV.to(dtype)], got, want_CHV, dtype, "r")


@every_dtype
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 130, 135, 200, 200)])
def test_the_walk_in_segments_is_the_walk(cu_seqlens, dtype, monkeypatch, poisoned_empty):
    case = Case("segments", 200, cu_seqlens=cu_seqlens, H=1, HV=2, state=cu_seqlens is None)
    x, cu = inputs(case, dtype), bounds(case)
    for segments in (2, 9):
        monkeypatch.setattr(tiles, "segments", lambda programs, chunks, P=segments: P)
        assert_outputs(chunk(x, cu), case, x, cu)


def test_the_table_of_segments_follows_its_reasoning():
    def steps(programs, chunks, P):
        waves = -(-2 * programs * P // 132) + -(-programs * P // 132)
        return waves * chunks / P + 1.5 * P

    for programs, chunks, P in tiles.SEGMENTS:
        assert tiles.segments(programs, chunks) == P
        assert steps(programs, chunks, P) == min(steps(programs, chunks, 2**n) for n in range(1, 8)) < 0.7 * chunks
    assert tiles.segments(17, 10**6) == tiles.segments(1, 31) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_of_a_token_and_head(dtype):
    """3.8 KB with float32 decay: the inputs and o once, 0.9 KB of the workspace written and read."""
    moved = traffic.for_a_token(lambda *x: chunk_forward.chunk(*x, None, 1.0), dtype)
    square = 2 * 64 * 10 / 16  # Ax, in blocks of 16 up to the diagonal
    operands = 3 * 2 * traffic.K + square + 4 * traffic.K / 64
    inputs = 3 * 2 * traffic.K + 4 * traffic.K
    assert moved["prepare_kernel"]["memory"] == pytest.approx(inputs + operands, abs=1)
    assert moved["recur_kernel"]["memory"] == pytest.approx(operands + 3 * 2 * traffic.V, abs=1)
    assert sum(kernel["memory"] for kernel in moved.values()) < 3800


@triton.jit
def round_trip_kernel(x_ptr, a_ptr, y_ptr, C: tl.constexpr):
    at_CC = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    store_a(a_ptr, tl.load(x_ptr + at_CC), tl.bfloat16)
    tl.debug_barrier()
    tl.store(y_ptr + at_CC, load_a(a_ptr, C, tl.bfloat16))


@pytest.mark.parametrize("largest", [1.0, 6e4, 7e4, 1e9, 3e38])
def test_a_of_bfloat16_has_float16_s_digits_at_any_size(largest):
    torch.manual_seed(0)
    x, a, y = largest * (torch.rand(64, 64) - 0.5).tril(), torch.empty(triangle_size(64)).half(), torch.empty(64, 64)
    x.diagonal().copy_(torch.where(torch.arange(64) % 2 == 1, largest, 1.0))
    round_trip_kernel[(1,)](x, a, y, C=64)
    least = max(largest * 2**-38, 2**-25)  # half of float16's least number
    assert y.isfinite().all() and ((y - x).abs() <= x.abs() * 2**-11 + least).all()


# Bytes that are spilled at most, by version of Triton: kernel, dtype and whether heads are between the compiled sizes,
# whose numbers have addresses and predicates of their own. Of other versions nothing is known.
SPILLS = {
    "3.6": {
        **{("gradients", "bf16", 1): 64, ("gradients", "fp16", 0): 16, ("gradients", "fp16", 1): 200},
        **{("gradients", "fp32", 1): 16, ("prepare", "fp32", 0): 24},
    },
    "3.7": {("gradients", "bf16", 1): 80, ("gradients", "fp16", 1): 120, ("gradients", "fp32", 1): 24},
    "3.9": {
        **{("gradients", "bf16", 0): 8, ("gradients", "bf16", 1): 48, ("gradients", "fp16", 1): 32},
        **{("gradients", "fp32", 0): 56, ("gradients", "fp32", 1): 72, ("prepare", "fp16", 0): 24},
    },
}
TRITON = ".".join(triton.__version__.split(".")[:2])


def known_spills(row) -> int:
    return SPILLS.get(TRITON, {}).get((row["kernel"], row["dtype"], row["options"].get("MASKED", 0)), 0)


@pytest.fixture(scope="module")
def compiled():
    """(kernel, dtype) -> what the compiler made for sm_90 with heads of 128, in a process that does not interpret."""
    code = """
import json
from benchmarks import codegen
from gdn2_ops.export.kernels import plan
wanted = {"PACKED": 0, "MASKED": 0, "STATE": 1}
builds = plan([90], [(128, 128)], ["bf16", "fp16"], ["prepare", "recur"])
builds = [b for b in builds if b.kernel == "prepare" or b.dtype == "bf16"]
builds += plan([90], [(128, 128)], ["fp32"], ["prepare", "recur", "summarise"])
builds = [b for b in builds if wanted.items() <= (wanted | dict(b.options)).items()]
print(json.dumps([codegen.our_row(b) | {"dtype": b.dtype} for b in builds]))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_spills_and_all_but_float32_use_the_tensor_cores_of_hopper(compiled):
    recur = ["recur"] * 2  # with o and for the backward pass
    assert [row["kernel"] for row in compiled] == ["prepare", "prepare", *recur, "prepare", *recur, "summarise"]
    for row in compiled:
        spilled = known_spills(row)
        assert row["stack"] <= spilled and (spilled or row["LDL"] == row["STL"] == 0), row
        assert (row["HGMMA"] > 0) == (row["dtype"] != "fp32") and row["shared"] <= 227 << 10, row
        # barriers, of prepare: 52 in bfloat16, float16 converts more; substitution row by row had 546
        assert row["BAR"] < (160 if row["dtype"] == "fp16" else 128), row
