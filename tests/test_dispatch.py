"""What the operators run on the tensors of a GPU, called here on CPU tensors in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch
from cases import Case, bounds, inputs

import gdn2_ops
from gdn2_ops.custom_ops import contract, dispatch


def test_every_operator_has_an_implementation_for_gpus():
    assert set(dispatch.CUDA) == set(contract.SCHEMAS)
    for name in contract.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gdn2::{name}", "CUDA")


@pytest.mark.parametrize(
    "case",
    [Case("dispatched", 5, B=2, HV=4), Case("dispatched, packed", 6, cu_seqlens=(0, 0, 4, 6), state=False)],
    ids=lambda case: case.name,
)
def test_chunk(case):
    x = inputs(case, torch.float32)
    got = dispatch.CUDA["chunk"](*x, bounds(case), 0.5)
    torch.testing.assert_close(got, tuple(gdn2_ops.chunk(*x, cu_seqlens=bounds(case), scale=0.5)))


@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 4, 6)])
def test_chunk_backward(cu_seqlens):
    x = inputs(Case("dispatched", 6, HV=4, cu_seqlens=cu_seqlens, state=cu_seqlens is None), torch.float32)
    options = None if cu_seqlens is None else torch.tensor(cu_seqlens), 0.5
    got = dispatch.CUDA["chunk_backward"](torch.ones_like(x.v), None, *x, *options)
    torch.testing.assert_close(got, torch.ops.gdn2.chunk_backward(torch.ones_like(x.v), None, *x, *options))
    with pytest.raises(ValueError, match="gdn2::chunk_backward: expected do of shape"):
        dispatch.CUDA["chunk_backward"](x.v[:, 1:], None, *x, *options)


@pytest.mark.parametrize("slots", [None, [2, 0]])
def test_step(slots):
    x = inputs(Case("dispatched", 1, B=2), torch.float32)
    six, pool = [y[:, 0] for y in x[:6]], torch.cat((x.state, -x.state)) if slots else x.state
    index = None if slots is None else torch.tensor(slots)
    state = pool if slots is None else pool[index]
    want_o, want_state = gdn2_ops.step(*six, state, scale=0.5)
    o, final = dispatch.CUDA["step"](*six, state, 0.5)
    o_inplace = dispatch.CUDA["step_inplace"](*six, pool, index, 0.5)
    torch.testing.assert_close((o, o_inplace, final), (want_o, want_o, want_state))
    torch.testing.assert_close(pool if slots is None else pool[index], want_state)


def test_what_no_check_saw_is_refused_before_a_pointer_is_read():
    x = inputs(Case("dispatched", 5), torch.float32)
    with pytest.raises(ValueError, match="gdn2::chunk: expected k of shape"):
        dispatch.CUDA["chunk"](x.q, x.k[:, :3], *x[2:], None, 0.5)
    six = [y[:, 0] for y in x[:6]]
    for name, rest in (("step", (0.5,)), ("step_inplace", (None, 0.5))):  # which their launchers would take
        with pytest.raises(TypeError, match=f"gdn2::{name}: expected state of dtype float32"):
            dispatch.CUDA[name](*six, x.state.bfloat16(), *rest)
    with pytest.raises(ValueError, match="expected k of shape"):
        dispatch.CUDA["step"](six[0], six[1][:, :1], *six[2:], x.state, 0.5)


def test_without_triton_the_error_names_the_package():
    without = "import sys; sys.modules['triton'] = None\n"
    call = "from gdn2_ops.custom_ops import dispatch\ndispatch.CUDA['step'](*[None] * 8)"
    done = subprocess.run([sys.executable, "-c", without + call], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "ImportError: gdn2_ops.kernels needs triton: pip install 'gdn2-ops[triton]'"
