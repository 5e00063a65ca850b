"""The operators `torch.ops.gdn2.*`: registration, schema, fakes, numbers, gradients, and the state in place."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    NAMES,
    OUTPUTS,
    Case,
    Inputs,
    assert_as_good_as,
    assert_chunk_as_good_as_the_specification,
    bounds,
    cotangents,
    gradient_sizes,
    gradients,
    inputs,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import gdn2_ops
from gdn2_ops import reference

OPS = torch.ops.gdn2
SCHEMAS = (
    "gdn2::chunk(Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w, Tensor? state, Tensor? cu_seqlens, "
    "float scale) -> (Tensor o, Tensor final_state)",
    "gdn2::chunk_backward(Tensor do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w, "
    "Tensor? state, Tensor? cu_seqlens, float scale) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor db, Tensor dw, Tensor dstate)",
    "gdn2::step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w, Tensor state, float scale) -> "
    "(Tensor o, Tensor final_state)",
    "gdn2::step_inplace(Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w, Tensor(a!) state, Tensor? slots, "
    "float scale) -> Tensor",
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
VARIANTS = [(name, variant) for name in ("chunk", "chunk_backward") for variant in ("state", "no state", "packed")]
VARIANTS += [("step", "state"), ("step_inplace", "state"), ("step_inplace", "slots")]
every_layout = pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides: a slice of wider rows, or the axes before the channels stored reversed."""
    if layout == "sliced":
        return torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "transposed":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    return x.clone()


def arguments(name: str, dtype: torch.dtype, layout: str = "contiguous", variant: str = "state") -> list:
    """Arguments of one op: two rows with a state, no state, packed (two sequences in one row), or slots of a pool."""
    chunked, packed = name.startswith("chunk"), variant == "packed"
    case = Case("arguments", 18 if chunked else 1, HV=4, K=4, V=6, B=1 if packed else 2, state=variant != "no state")
    case = replace(case, cu_seqlens=(0, 7, 18)) if packed else case
    x = inputs(case, dtype)
    six = [laid_out(y if chunked else y[:, 0], layout) for y in x[:6]]
    state = x.state if x.state is None or name == "step_inplace" else laid_out(x.state, layout)
    scale = 0.5
    if name == "chunk":
        return [*six, state, bounds(case), scale]
    if name == "chunk_backward":
        do, dstate = cotangents(case, dtype)
        return [
            laid_out(do, layout),
            laid_out(dstate, layout) if case.state else None,
            *six,
            state,
            bounds(case),
            scale,
        ]
    if name == "step":
        return [*six, state, scale]
    if variant == "slots":
        return [*six, torch.cat((state, -state, state)), torch.tensor([4, 1]), scale]
    return [*six, state, None, scale]


def outputs(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else result


def requiring(args: list) -> list:
    """The floating tensors as leaves that require a gradient."""
    return tree_map_only(torch.Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, args)


def test_schemas():
    for schema in SCHEMAS:
        name = schema[len("gdn2::") : schema.index("(")]
        assert str(getattr(OPS, name).default._schema) == schema
    assert set(OPS.chunk.overloads()) == {"default"}


@every_dtype
@every_layout
@pytest.mark.parametrize("name, variant", VARIANTS)
def test_opcheck(name, variant, layout, dtype):
    args = arguments(name, dtype, layout, variant)
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    op = getattr(OPS, name).default
    assert set(torch.library.opcheck(op, args, **rounding).values()) == {"SUCCESS"}
    if name in ("chunk", "step"):
        assert set(torch.library.opcheck(op, requiring(args), **rounding).values()) == {"SUCCESS"}


@every_dtype
@every_layout
@pytest.mark.parametrize("name, variant", VARIANTS)
def test_fakes_are_like_the_real_ones(name, variant, layout, dtype):
    op, args = getattr(OPS, name).default, arguments(name, dtype, layout, variant)
    with FakeTensorMode() as mode:
        fakes = op(*tree_map_only(torch.Tensor, mode.from_tensor, args))
    metas = op(*tree_map_only(torch.Tensor, lambda x: x.to("meta"), args))
    for fake, meta, real in zip(outputs(fakes), outputs(metas), outputs(op(*args))):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
        assert real.is_contiguous()


@every_case
@every_dtype
def test_chunk_is_as_good_as_the_specification(case, dtype):
    assert_chunk_as_good_as_the_specification(case, dtype)


@every_dtype
@pytest.mark.parametrize("erase", ["none", "uniform", "one", "two"])
def test_step_is_as_good_as_the_specification(erase, dtype):
    case = Case(f"step {erase}", 1, B=3, HV=4, erase=erase, decay="channels")
    x = inputs(case, dtype)
    do, dstate = cotangents(case, dtype)
    token, exact_token = Inputs(*(y[:, 0] for y in x[:6]), x.state), Inputs(*(y[:, 0] for y in x.double()[:6]), None)
    exact_token = exact_token._replace(state=x.state.double())
    want = gradients(reference.step, exact_token, do[:, 0].double(), dstate.double())
    same = gradients(reference.step, token, do[:, 0], dstate)
    got = gradients(gdn2_ops.step, token, do[:, 0], dstate)
    for name, s, y, z, size in zip((*OUTPUTS, *NAMES), same, got, want, gradient_sizes(want, token)):
        assert_as_good_as([s], y, z, dtype, name, size)


@every_layout
def test_strides_do_not_change_numbers(layout):
    for name in ("chunk", "chunk_backward", "step", "step_inplace"):
        op = getattr(OPS, name).default
        got, want = op(*arguments(name, torch.float32, layout)), op(*arguments(name, torch.float32))
        for y, z in zip(outputs(got), outputs(want)):
            torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)


def test_scale_multiplies_the_output_only():
    q, k, v, g, b, w, state, _, _ = arguments("chunk", torch.float32)
    o, final = gdn2_ops.chunk(q, k, v, g, b, w, state)
    o_2, final_2 = gdn2_ops.chunk(q, k, v, g, b, w, state, scale=2 * q.shape[-1] ** -0.5)
    torch.testing.assert_close(o_2, 2 * o)
    assert torch.equal(final, final_2)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_index_dtypes(index):
    args = arguments("chunk", torch.float32, variant="packed")
    want = OPS.chunk(*args)
    args[7] = args[7].to(index)
    assert all(torch.equal(y, z) for y, z in zip(OPS.chunk(*args), want))


def test_a_gradient_of_one_output_only():
    x = inputs(Case("one output", 20, state=False), torch.float32)
    leaves = x.leaves()
    o, state = gdn2_ops.chunk(*leaves)
    for output, form in ((o, 0), (state, 1)):
        got = torch.autograd.grad(output.sum(), leaves.tensors(), retain_graph=True, materialize_grads=True)
        again = x.leaves()
        want = torch.autograd.grad(reference.recurrent(*again)[form].sum(), again.tensors(), materialize_grads=True)
        for name, y, z in zip(NAMES, got, want):
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("name", ["chunk", "step"])
def test_second_derivatives_are_refused(name):
    args = requiring(arguments(name, torch.float32))
    o, _ = getattr(OPS, name)(*args)
    (dq,) = torch.autograd.grad(o.square().sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gdn2::chunk_backward: expected at most one derivative.*reference"):
        dq.sum().backward()


@every_dtype
def test_step_inplace_is_step(dtype):
    *six, state, scale = arguments("step", dtype)
    want_o, want_state = gdn2_ops.step(*six, state, scale=scale)
    version = state._version
    o = gdn2_ops.step_inplace(*six, state, scale=scale)
    assert torch.equal(o, want_o) and torch.equal(state, want_state)
    assert state._version > version


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [gdn2_ops.step_inplace, lambda *args: OPS.step_inplace(*args, None, 1.0)])
def test_a_state_that_is_overwritten_has_a_new_version(mode, function):
    args = arguments("step", torch.float32)[:7]
    for calls in (1, 2):
        with mode():
            function(*args)
        assert args[6]._version == calls
    compiled = torch.compile(lambda *args: gdn2_ops.step_inplace(*args), backend="eager", fullgraph=True)
    with mode():
        compiled(*args)
    assert args[6]._version == 3
    with torch.inference_mode():
        mine = [x.clone() for x in args]
        assert torch.equal(function(*mine), function(*args)) and torch.equal(mine[6], args[6])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_slots_update_their_rows_only(index):
    *six, pool, slots, scale = arguments("step_inplace", torch.float32, variant="slots")
    pool[0], pool[5] = float("nan"), float("inf")  # whatever other requests hold
    before, version = pool.clone(), pool._version
    want_o, want_rows = gdn2_ops.step(*six, pool[slots], scale=scale)
    o = gdn2_ops.step_inplace(*six, pool, slots=slots.to(index), scale=scale)
    assert torch.equal(o, want_o) and torch.equal(pool[slots], want_rows)
    others = [n for n in range(len(pool)) if n not in slots.tolist()]
    assert torch.equal(pool[others].view(torch.int32), before[others].view(torch.int32))
    assert pool._version > version


@pytest.mark.parametrize("position", range(7))
def test_step_inplace_refuses_a_gradient(position):
    args = arguments("step_inplace", torch.float32)
    args[position] = args[position].requires_grad_()
    before = args[6].detach().clone()
    with pytest.raises(
        RuntimeError, match=r"gdn2::step_inplace: expected tensors that need no gradient.*gdn2_ops.step"
    ):
        OPS.step_inplace(*args)
    assert torch.equal(args[6], before)
    with torch.no_grad():
        assert OPS.step_inplace(*args).isfinite().all()


def test_step_inplace_in_inference_mode():
    with torch.inference_mode():
        *six, state, _, scale = arguments("step_inplace", torch.float32)
        want_o, want_state = gdn2_ops.step(*six, state, scale=scale)
        assert torch.equal(gdn2_ops.step_inplace(*six, state, scale=scale), want_o)
        assert torch.equal(state, want_state)


@pytest.mark.parametrize("recording", [False, True])
def test_a_state_stepped_in_inference_mode_counts_as_written(recording):
    *six, state, _, scale = arguments("step_inplace", torch.float32)
    version = state._version
    with torch.inference_mode(), torch.set_grad_enabled(recording):
        gdn2_ops.step_inplace(*six, state, scale=scale)
    assert state._version == version + 1
