"""The step kernels in Triton's interpreter, whose bfloat16 is wrong: float32 and float16. What they launch on a GPU."""

import pytest
import step_laws
import torch
from cases import CASES, Case

from gdn2_ops.kernels import step as kernel
from gdn2_ops.kernels.step_layer import LayerToken, LayerWeights, step_layer

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
SCANS = [case for case in CASES if 0 < case.T <= 17 and case.cu_seqlens is None]
LONG = [case for case in CASES if case.T >= 65 and case.B * case.HV == 1 and case.erase == "two"]
SIZES = [(32, 32), (64, 256), (100, 33), (128, 128), (256, 200)]
assert len(SCANS) == 6 and len(LONG) == 2


@both_dtypes
@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
def test_a_sequence_is_the_scan_of_step(case, dtype):
    step_laws.assert_scan_of_step(case, dtype, "cpu")


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_a_long_sequence_is_the_scan_of_step(case):
    step_laws.assert_scan_of_step(case, torch.float32, "cpu")


@both_dtypes
@pytest.mark.parametrize("K, V", SIZES)
def test_every_head_size(K, V, dtype):
    step_laws.assert_one_step(Case(f"step of {K} and {V}", 1, H=1, HV=2, K=K, V=V, decay="channels"), dtype, "cpu")


@both_dtypes
def test_in_place_is_not_in_place(dtype):
    step_laws.assert_in_place_is_not_in_place(dtype, "cpu")


def test_a_slot_outside_of_the_pool_touches_nothing():
    step_laws.assert_a_slot_outside_of_the_pool_touches_nothing("cpu")


def test_strides_do_not_matter():
    step_laws.assert_strides_do_not_matter("cpu")


def test_a_bfloat16_state():
    step_laws.assert_bfloat16_state(1.0, "cpu")  # the interpreter cuts digits off where a GPU rounds


def test_an_empty_batch():
    six, state = step_laws.token(Case("empty", 1, B=2), torch.float32, "cpu")
    o, final = kernel.step(*(y[:0] for y in six), state[:0], 1.0)
    assert o.shape == (0, 2, 6) and final.shape == (0, 2, 8, 6)


@both_dtypes
@pytest.mark.parametrize("name", step_laws.LAYERS)
def test_step_layer_is_the_layer(name, dtype):
    step_laws.assert_step_layer_is_the_layer(name, dtype, "cpu")


WRONG = {
    "q in double": ({"q": torch.rand(2, 2, 8).double()}, TypeError, "q of dtype torch.float32 or torch.bfloat16 or"),
    "k of another dtype": ({"k": torch.rand(2, 2, 8).half()}, TypeError, "k of dtype torch.float32, got torch.float16"),
    "b of other heads": ({"b": torch.rand(2, 1, 8)}, ValueError, r"b of shape \(2, 2, 8\), got \(2, 1, 8\)"),
    "g in half": ({"g": torch.zeros(2, 2, 8).half()}, TypeError, "g of dtype torch.float32"),
    "w of another batch": ({"w": torch.rand(1, 2, 6)}, ValueError, r"w of shape \(2, 2, 6\), got \(1, 2, 6\)"),
    "a state in half": (
        {"state": torch.zeros(2, 2, 8, 6).half()},
        TypeError,
        "state of dtype torch.float32 or torch.b",
    ),
    "a pool without slots": ({"state": torch.zeros(3, 2, 8, 6)}, ValueError, r"state of shape \(2, 2, 8, 6\)"),
    "a state with strides": (
        {"state": torch.zeros(2, 2, 6, 8).mT},
        ValueError,
        r"expected a contiguous state, got strides \(96, 48, 1, 8\)",
    ),
    "slots for one row": ({"slots": torch.tensor([0])}, ValueError, r"slots of shape \(2,\), got \(1,\)"),
    "slots as floats": ({"slots": torch.tensor([0.0, 1.0])}, TypeError, "slots of dtype torch.int32 or torch.int64"),
    "another device": ({"q": torch.rand(2, 2, 8, device="meta")}, ValueError, "expected k on meta, got cpu"),
    "HV no multiple": (
        {"v": torch.rand(2, 3, 6), "w": torch.rand(2, 3, 6)},
        ValueError,
        "expected HV to be a multiple of H = 2, got 3",
    ),
    "too wide": (
        {name: torch.rand(2, 2, 257) for name in "qkgb"} | {"state": torch.zeros(2, 2, 257, 6)},
        NotImplementedError,
        "head size in 1..256, got 257",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_launcher_refuses(what):
    changes, error, text = WRONG[what]
    x = {name: torch.rand(2, 2, 8 if name in "qkgb" else 6) for name in "qkvgbw"}
    x |= {"state": torch.zeros(2, 2, 8, 6), "slots": None} | changes
    with pytest.raises(error, match=text):
        kernel.step_inplace(*x.values(), scale=1.0)


WRONG_LAYER = {
    "a short window": (
        {"window": torch.zeros(2, 96, 2)},
        ValueError,
        r"window of shape \(2, 96, 3\), got \(2, 96, 2\)",
    ),
    "no window": ({"window": None}, ValueError, "expected window and convolution weights, or neither"),
    "strides": ({"window": torch.zeros(2, 3, 96).mT}, ValueError, "expected contiguous window"),
    "no slots": ({"state": torch.zeros(3, 1, 32, 32), "window": torch.zeros(3, 96, 3)}, ValueError, "2 rows, got 3"),
    "a gate": ({"output_gate": "relu"}, ValueError, "silu or sigmoid, got 'relu'"),
    "a guard": ({"guard_erase": True}, NotImplementedError, "expected a layer without guard_erase"),
}


@pytest.mark.parametrize("what", WRONG_LAYER)
def test_step_layer_refuses(what):
    changes, error, text = WRONG_LAYER[what]
    token = LayerToken(torch.zeros(2, 96), *(torch.zeros(2, 32) for _ in range(4)))
    weights = LayerWeights(torch.zeros(96, 4), torch.zeros(1), torch.zeros(32), torch.ones(32))
    with pytest.raises(error, match=text):
        step_layer(token, weights, **({"window": torch.zeros(2, 96, 3), "state": torch.zeros(2, 1, 32, 32)} | changes))
