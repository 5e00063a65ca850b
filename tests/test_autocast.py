"""torch.autocast rounds q, k, v, b and w, never the decay or a state; models train under it in bfloat16's budget."""

import pytest
import torch
from cases import Case, assert_as_good_as, inputs
from test_model import HYBRID, SMALL, gradients, small, tokens

import gdn2_ops

LOW = (torch.bfloat16, torch.float16)
every_low = pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: str(dtype)[6:])


def arguments(name: str) -> list:
    """Float32 throughout, as a layer outside of matrix products has it."""
    x = inputs(Case("autocast", 21 if name == "chunk" else 1, HV=4, B=2), torch.float32)
    return [*x] if name == "chunk" else [*(y[:, 0] for y in x[:6]), x.state]


def rounded(args: list, dtype: torch.dtype) -> list:
    q, k, v, g, b, w, state = args
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, b.to(dtype), w.to(dtype), state.clone()]


@every_low
@pytest.mark.parametrize("name", ["chunk", "step", "step_inplace"])
def test_functions_and_operators_take_the_dtype_of_autocast(name, dtype):
    function, op = getattr(gdn2_ops, name), getattr(torch.ops.gdn2, name)
    want = function(*rounded(arguments(name), dtype))
    plain, mixed, direct = arguments(name), arguments(name), arguments(name)
    mixed[0], mixed[4] = mixed[0].to(dtype), mixed[4].to(dtype)  # q and b, as projections leave them
    scale = plain[0].shape[-1] ** -0.5
    with torch.autocast("cpu", dtype):
        results = function(*plain), function(*mixed), op(*direct, *([] if name == "step" else [None]), scale)
    for got in results:
        for y, z in zip(got, want):
            assert y.dtype == z.dtype and torch.equal(y, z)


def test_gradients_come_back_in_the_dtype_of_the_inputs():
    args = arguments("chunk")
    leaves, low = ([x.clone().requires_grad_() for x in xs] for xs in (args, rounded(args, torch.bfloat16)))
    with torch.autocast("cpu", torch.bfloat16):
        o, state = gdn2_ops.chunk(*leaves)
    got = torch.autograd.grad(o.float().sum() + state.sum(), leaves)
    o, state = gdn2_ops.chunk(*low)
    for y, z in zip(got, torch.autograd.grad(o.float().sum() + state.sum(), low)):
        assert y.dtype == torch.float32 and torch.equal(y, z.float())


def test_a_low_precision_decay_or_state_is_still_refused():
    for position, text in ((3, "expected g of dtype float32"), (6, "expected state of dtype float32")):
        args = arguments("chunk")
        args[position] = args[position].bfloat16()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=text):
            gdn2_ops.chunk(*args)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"q of dtype float32, .* got float64"):
        gdn2_ops.chunk(*(x.double() for x in arguments("chunk")))


def test_transforms_under_autocast():
    q, k, v, g, b, w, state = arguments("chunk")
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.func.grad(lambda k: gdn2_ops.chunk(q, k, v, g, b, w, state).o.float().sum())(k)
        mapped = torch.vmap(lambda k: gdn2_ops.chunk(q, k, v, g, b, w, state).o)(k[None])
        assert torch.equal(mapped[0], gdn2_ops.chunk(q, k, v, g, b, w, state).o)
    leaf = k.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        gdn2_ops.chunk(q, leaf, v, g, b, w, state).o.float().sum().backward()
    assert got.dtype == torch.float32 and torch.equal(got, leaf.grad)


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["recurrent", "hybrid"])
def test_a_model_trains_within_the_budget_of_its_bfloat16_form(config):
    model, rows = small(config), tokens(3, 40)
    want = gradients(model, model, rows)
    low = small(config).to(torch.bfloat16)
    budget = gradients(low, low, rows)

    @torch.autocast("cpu", torch.bfloat16)
    def autocast(rows):
        return model(rows)

    compiled = torch.compile(autocast, backend="aot_eager", fullgraph=True)
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for forward in (autocast, compiled):
        for name, got, same, exact in zip(names, gradients(forward, model, rows), budget, want, strict=True):
            assert got.dtype == (torch.bfloat16 if name == "logits" else torch.float32), name
            assert_as_good_as([same.to(got.dtype)], got, exact.double(), torch.bfloat16, name)


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["recurrent", "hybrid"])
def test_decoding_under_autocast_is_its_forward(config):
    model, rows = small(config), tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(rows).logits.float()
        last, state = model.prefill(rows[:, :5])
        for t in range(5, 12):
            last, state = model.decode(rows[:, t], state)
            torch.testing.assert_close(last.float(), logits[:, t], rtol=0.03, atol=0.03 * logits.abs().max().item())
    recurrent = [layer.recurrent for layer in state if hasattr(layer, "recurrent")]
    assert recurrent and all(x.dtype == torch.float32 for x in recurrent)
