"""Every wrong argument is refused with its class and a text that says what, expected and got; nothing is computed."""

import re

import pytest
import torch

import gdn2_ops

B, T, H, HV, K, V = 2, 5, 2, 4, 3, 6


def sequence(**changes) -> dict:
    """Right arguments of chunk, with some replaced."""
    x = {name: torch.rand(B, T, H, K) for name in "qkb"} | {name: torch.rand(B, T, HV, V) for name in "vw"}
    return x | {"g": torch.zeros(B, T, H, K), "state": torch.zeros(B, HV, K, V)} | changes


def token(**changes) -> dict:
    """Right arguments of step and step_inplace, with some replaced."""
    x = {name: torch.rand(B, H, K) for name in "qkb"} | {name: torch.rand(B, HV, V) for name in "vw"}
    return x | {"g": torch.zeros(B, H, K), "state": torch.zeros(B, HV, K, V)} | changes


def row(**changes) -> dict:
    """Right arguments of chunk with two packed sequences, with some replaced."""
    x = {name: y[:1] for name, y in sequence().items() if name != "state"}
    return x | {"cu_seqlens": torch.tensor([0, 2, T])} | changes


def heads(H: int, HV: int, K: int = K, V: int = V) -> dict:
    keys, values = torch.zeros(B, T, H, K), torch.zeros(B, T, HV, V)
    return {"q": keys, "k": keys, "g": keys, "b": keys, "v": values, "w": values, "state": None}


SEQUENCE = {
    "q of rank 3": (sequence(q=torch.rand(B, T, K)), ValueError, "expected q of shape [B, T, H, K], got (2, 5, 3)"),
    "q of rank 0": (sequence(q=torch.tensor(1.0)), ValueError, "expected q of shape [B, T, H, K], got ()"),
    "k of other heads": (sequence(k=torch.rand(B, T, 1, K)), ValueError, "k of shape (2, 5, 2, 3), got (2, 5, 1, 3)"),
    "k of rank 3": (sequence(k=torch.rand(T, H, K)), ValueError, "k of shape (2, 5, 2, 3), got (5, 2, 3)"),
    "g per head": (sequence(g=torch.zeros(B, T, H)), ValueError, "g of shape (2, 5, 2, 3), got (2, 5, 2)"),
    "b like v": (sequence(b=torch.rand(B, T, HV, V)), ValueError, "b of shape (2, 5, 2, 3), got (2, 5, 4, 6)"),
    "v of other tokens": (sequence(v=torch.rand(B, 4, HV, V)), ValueError, "v of shape [2, 5, HV, V], with"),
    "v of rank 3": (sequence(v=torch.rand(B, T, V)), ValueError, "v of shape [2, 5, HV, V], with the batch and token"),
    "w per head": (sequence(w=torch.rand(B, T, HV)), ValueError, "w of shape (2, 5, 4, 6), got (2, 5, 4)"),
    "HV no multiple": (
        heads(2, 3),
        ValueError,
        "expected HV, the heads of v, to be a positive multiple of H = 2, got 3",
    ),
    "HV below H": (heads(2, 1), ValueError, "a positive multiple of H = 2, got 1"),
    "no head": (heads(0, 1), ValueError, "a positive multiple of H = 0, got 1"),
    "K of 257": (heads(1, 1, K=257), ValueError, "head sizes K and V in 1..256, got K = 257, V = 6"),
    "V of 257": (heads(1, 1, V=257), ValueError, "head sizes K and V in 1..256, got K = 3, V = 257"),
    "K of 0": (heads(1, 1, K=0), ValueError, "head sizes K and V in 1..256, got K = 0, V = 6"),
    "q in double": (
        {name: x.double() for name, x in sequence().items()},
        TypeError,
        "expected q of dtype float32, bfloat16 or float16, got float64; use q.float()",
    ),
    "q of integers": (sequence(q=torch.ones(B, T, H, K).long()), TypeError, "float16, got int64"),
    "k in half": (sequence(k=torch.rand(B, T, H, K).half()), TypeError, "k of dtype float32 (that of q), got float16"),
    "v in half": (sequence(v=torch.rand(B, T, HV, V).half()), TypeError, "v of dtype float32 (that of q), got float16"),
    "b in bfloat16": (
        sequence(b=torch.rand(B, T, H, K).bfloat16()),
        TypeError,
        "got bfloat16; use b.to(torch.float32)",
    ),
    "w in half": (sequence(w=torch.rand(B, T, HV, V).half()), TypeError, "w of dtype float32 (that of q), got float16"),
    "g in bfloat16": (
        {name: x if name == "state" else x.bfloat16() for name, x in sequence().items()},
        TypeError,
        "expected g of dtype float32 (a decay in low precision loses the state), got bfloat16; use g.to(torch.float32)",
    ),
    "k elsewhere": (sequence(k=torch.rand(B, T, H, K, device="meta")), ValueError, "k on cpu, where q is, got meta"),
    "state elsewhere": (
        sequence(state=torch.zeros(B, HV, K, V, device="meta")),
        ValueError,
        "expected state on cpu, where q is, got meta; move it there",
    ),
    "state transposed": (sequence(state=torch.zeros(B, HV, V, K)), ValueError, "(2, 4, 3, 6), got (2, 4, 6, 3)"),
    "state of key heads": (sequence(state=torch.zeros(B, H, K, V)), ValueError, "(2, 4, 3, 6), got (2, 2, 3, 6)"),
    "state of one": (sequence(state=torch.zeros(1, HV, K, V)), ValueError, "(2, 4, 3, 6), got (1, 4, 3, 6)"),
    "state of rank 3": (
        sequence(state=torch.zeros(HV, K, V)),
        ValueError,
        "state of shape (2, 4, 3, 6), got (4, 3, 6)",
    ),
    "state in bfloat16": (
        sequence(state=torch.zeros(B, HV, K, V).bfloat16()),
        TypeError,
        "expected state of dtype float32 (states are never rounded), got bfloat16; use state.to(torch.float32)",
    ),
    "bounds of floats": (
        row(cu_seqlens=torch.tensor([0.0, 5.0])),
        TypeError,
        "cu_seqlens of dtype int32 or int64, got",
    ),
    "bounds of rank 2": (row(cu_seqlens=torch.tensor([[0, 5]])), ValueError, "[N + 1] with N >= 1, got (1, 2)"),
    "one bound": (row(cu_seqlens=torch.tensor([0])), ValueError, "cu_seqlens of shape [N + 1] with N >= 1, got (1,)"),
    "bounds elsewhere": (
        row(cu_seqlens=torch.tensor([0, 5], device="meta")),
        ValueError,
        "expected cu_seqlens on cpu, where q is, got meta",
    ),
    "bounds and a batch": (
        sequence(state=None, cu_seqlens=torch.tensor([0, 2, T])),
        ValueError,
        "expected batch 1 with cu_seqlens, got 2; pack the sequences along T",
    ),
    "state per row, packed": (row(state=torch.zeros(1, HV, K, V)), ValueError, "(2, 4, 3, 6), got (1, 4, 3, 6)"),
    "negative bound": (row(cu_seqlens=torch.tensor([-1, 2, T])), ValueError, "end at T = 5, got [-1, 2, 5]"),
    "late first bound": (
        row(cu_seqlens=torch.tensor([1, 2, T])),
        ValueError,
        "start at 0, never fall and end at T = 5",
    ),
    "falling bounds": (
        row(cu_seqlens=torch.tensor([0, 4, 3, T])),
        ValueError,
        "never fall and end at T = 5, got [0, 4",
    ),
    "early last bound": (row(cu_seqlens=torch.tensor([0, 2, 4])), ValueError, "end at T = 5, got [0, 2, 4]"),
    "late last bound": (row(cu_seqlens=torch.tensor([0, 2, 6])), ValueError, "end at T = 5, got [0, 2, 6]"),
    "many wrong bounds": (row(cu_seqlens=torch.zeros(40).int()), ValueError, "0, 0, 0, 0, ... 40 values]"),
}
TOKEN = {
    "q with tokens": (token(q=torch.rand(B, 1, H, K)), ValueError, "expected q of shape [B, H, K], got (2, 1, 2, 3)"),
    "k of one row": (token(k=torch.rand(1, H, K)), ValueError, "expected k of shape (2, 2, 3), got (1, 2, 3)"),
    "v of one row": (token(v=torch.rand(1, HV, V)), ValueError, "expected v of shape [2, HV, V], with"),
    "HV no multiple": (
        token(v=torch.rand(B, 3, V), w=torch.rand(B, 3, V)),
        ValueError,
        "expected HV, the heads of v, to be a positive multiple of H = 2, got 3",
    ),
    "g in half": (token(g=torch.zeros(B, H, K).half()), TypeError, "g of dtype float32 (a decay in low precision"),
    "state of one": (token(state=torch.zeros(1, HV, K, V)), ValueError, "(2, 4, 3, 6), got (1, 4, 3, 6)"),
    "state in half": (token(state=torch.zeros(B, HV, K, V).half()), TypeError, "states are never rounded"),
    "w elsewhere": (token(w=torch.rand(B, HV, V, device="meta")), ValueError, "w on cpu, where q is, got meta"),
}


def slots(rows, **changes) -> dict:
    return token(state=torch.zeros(3, HV, K, V), slots=torch.tensor(rows), **changes)


def in_one_buffer(distance: int, kind: type = torch.Tensor) -> dict:
    """v begins `distance` numbers after the end of the state."""
    size = B * HV * K * V
    buffer = torch.zeros(size + B * HV * V)
    state = buffer[:size].view(B, HV, K, V)
    state = state if kind is torch.Tensor else kind(state, requires_grad=False)
    return token(state=state, v=buffer[size + distance :][: B * HV * V].view(B, HV, V))


INPLACE = {
    "state with gaps": (
        token(state=torch.zeros(B, HV, V, K).mT),
        ValueError,
        "expected a contiguous state, got strides (72, 18, 1, 3) for shape (2, 4, 3, 6); keep the state contiguous, or "
        "use gdn2_ops.step",
    ),
    "pool without slots": (token(state=torch.zeros(3, HV, K, V)), ValueError, "(2, 4, 3, 6), got (3, 4, 3, 6)"),
    "pool of rank 3": (token(state=torch.zeros(HV, K, V), slots=torch.tensor([0, 1])), ValueError, "got (4, 3, 6)"),
    "too few slots": (slots([1]), ValueError, "expected slots of shape (2,), got (1,)"),
    "slots of rank 2": (slots([[0, 1]]), ValueError, "expected slots of shape (2,), got (1, 2)"),
    "slots of floats": (slots([0.0, 1.0]), TypeError, "expected slots of dtype int32 or int64, got float32"),
    "slots elsewhere": (
        token(slots=torch.tensor([0, 1], device="meta")),
        ValueError,
        "expected slots on cpu, where q is, got meta",
    ),
    "a slot twice": (slots([1, 1]), ValueError, "expected distinct slots in [0, 3), got [1, 1]"),
    "a slot past the pool": (slots([0, 3]), ValueError, "expected distinct slots in [0, 3), got [0, 3]"),
    "a negative slot": (slots([0, -1]), ValueError, "expected distinct slots in [0, 3), got [0, -1]"),
    "v in the state": (
        in_one_buffer(-1),
        ValueError,
        "expected state apart in memory from the other arguments, got v across it; use v.clone()",
    ),
    "v in a parameter": (in_one_buffer(-1, torch.nn.Parameter), ValueError, "got v across it; use v.clone()"),
}
FUNCTIONS = {"chunk": (SEQUENCE,), "step": (TOKEN,), "step_inplace": (TOKEN, INPLACE)}
EVERY = [(function, what, *t[what]) for function, tables in FUNCTIONS.items() for t in tables for what in t]


def refused(error: type[Exception], text: str, function: str, arguments: dict) -> None:
    with pytest.raises(error, match=re.escape(text)) as caught:
        getattr(gdn2_ops, function)(**arguments)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"gdn2::{function}: expected ") and ", got " in str(caught.value)


def test_the_right_arguments_are_taken():
    assert gdn2_ops.chunk(**sequence()).o.shape == (B, T, HV, V)
    assert gdn2_ops.chunk(**row()).state.shape == (2, HV, K, V)
    assert gdn2_ops.step(**token()).o.shape == (B, HV, V)
    assert gdn2_ops.step_inplace(**slots([2, 0])).shape == (B, HV, V)
    assert gdn2_ops.step_inplace(**in_one_buffer(0)).shape == (B, HV, V)


@pytest.mark.parametrize("function, what, arguments, error, text", EVERY, ids=[f"{f}: {what}" for f, what, *_ in EVERY])
def test_refused(function, what, arguments, error, text):
    before = None if arguments.get("state") is None else arguments["state"].clone()
    refused(error, text, function, arguments)
    if before is not None and before.device.type == "cpu":
        assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"do": torch.zeros(B, T, HV, V + 1)}, "expected do of shape [2, 5, 4, 6], got [2, 5, 4, 7]"),
        ({"do": torch.zeros(B, T, HV, V).half()}, "expected do of dtype float32, got float16"),
        ({"dfinal_state": torch.zeros(1, HV, K, V)}, "expected dfinal_state of shape [2, 4, 3, 6], got [1, 4, 3, 6]"),
        ({"dfinal_state": torch.zeros(B, HV, K, V).half()}, "expected dfinal_state of dtype float32, got float16"),
    ],
)
def test_refused_by_the_backward(change, text):
    arguments = {"do": torch.zeros(B, T, HV, V), "dfinal_state": None, "cu_seqlens": None, "scale": 1.0} | sequence()
    with pytest.raises(RuntimeError, match=re.escape("gdn2::chunk_backward: " + text)):
        torch.ops.gdn2.chunk_backward(**(arguments | change))


@pytest.mark.parametrize("what", SEQUENCE)
def test_the_chunk_operator_refuses_by_itself(what):
    """Called without the functions that check first, a kernel still never reads outside its tensors."""
    arguments = {"state": None, "cu_seqlens": None, "scale": 1.0} | SEQUENCE[what][0]
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.gdn2.chunk(**arguments)


@pytest.mark.parametrize("what", INPLACE)
def test_the_step_operator_refuses_by_itself(what):
    arguments = {"slots": None, "scale": 1.0} | INPLACE[what][0]
    with pytest.raises((RuntimeError, ValueError, TypeError)), torch.no_grad():
        torch.ops.gdn2.step_inplace(**arguments)


@pytest.mark.parametrize("what", ["k of other heads", "g in bfloat16", "HV no multiple", "bounds and a batch"])
def test_refused_by_the_compiler(what):
    arguments, _, text = SEQUENCE[what]
    torch._dynamo.reset()
    compiled = torch.compile(gdn2_ops.chunk, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=re.escape(text)):
        compiled(**arguments)


@pytest.mark.parametrize("what", ["state with gaps", "too few slots"])
def test_in_place_refused_by_the_compiler(what):
    arguments, _, text = INPLACE[what]
    torch._dynamo.reset()
    compiled = torch.compile(gdn2_ops.step_inplace, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=re.escape(text)):
        compiled(**arguments)


def test_wrong_values_are_refused_by_the_compiled_function():
    torch._dynamo.reset()
    chunk = torch.compile(gdn2_ops.chunk, backend="eager", fullgraph=True)
    step_inplace = torch.compile(gdn2_ops.step_inplace, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"expected cu_seqlens to start at 0.*got \[0, 4, 3, 5\]"):
        chunk(**SEQUENCE["falling bounds"][0])
    with pytest.raises(RuntimeError, match=r"distinct slots in \[0, 3\), got \[1, 1\]"):
        step_inplace(**INPLACE["a slot twice"][0])
