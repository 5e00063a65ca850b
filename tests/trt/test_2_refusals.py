"""Rung 2: what cannot run is refused with a message when a network is built or a shape is set, never later.

The host negotiates formats, infers shapes, clones, serialises and restores the plugin in every problem of rung 1.
"""

import pytest

FLOAT, HALF, INT8, BF16 = 0, 1, 2, 7
HEAD = "gdn2::GatedDeltaNet2: "


def one(session) -> tuple[dict, str]:
    assert len(session.messages) == 1 and session.messages[0].startswith(HEAD)
    return session.lines[-1], session.messages[0].removeprefix(HEAD)


@pytest.mark.parametrize(
    "sizes, text",
    [
        ("2 5 2 2 300 64", "expected head sizes K and V in 1..256, got 300 and 64"),
        ("2 5 2 2 64 0", "expected head sizes K and V in 1..256, got 64 and 0"),
        ("2 5 2 3 64 64", "expected HV to be a positive multiple of H = 2, got 3"),
        ("2 5 0 2 64 64", "expected HV to be a positive multiple of H = 0, got 2"),
        ("2 5 2 2 32 32", "got step-bf16-k32-v32-slots0-masked0, which it does not hold; build it with them"),
    ],
)
def test_sizes_are_refused_when_a_network_is_built(sizes, text, drive):
    line, message = one(drive([f"run {sizes} {BF16} 1 2 5"]))
    assert line == {"configured": -1} and text in message


def test_masked_heads_of_another_type_are_refused(drive):
    line, message = one(drive([f"run 2 5 2 2 60 60 {HALF} 1 2 5"]))
    assert line == {"configured": -1} and "step-fp16-k64-v64-slots0-masked1" in message


@pytest.mark.parametrize(
    "types, text",
    [
        ((INT8, INT8, INT8, 0, INT8, INT8, 0), "expected q of type float, half or bfloat16, got another"),
        ((BF16, HALF, BF16, 0, BF16, BF16, 0), "expected k of type bfloat16, got half"),
        ((BF16, BF16, BF16, BF16, BF16, BF16, 0), "expected g of type float, got bfloat16"),
        ((HALF, HALF, HALF, 0, HALF, HALF, HALF), "expected initial_state of type float, got half"),
    ],
)
def test_types_are_refused_when_a_network_is_built(types, text, drive):
    line, message = one(drive(["types " + " ".join(map(str, types))]))
    assert line["status"] == -1 and text in message


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16])
def test_types_of_outputs(dtype, drive):
    done = drive([f"types {dtype} {dtype} {dtype} 0 {dtype} {dtype} 0"])
    assert done.lines[-1] == {"status": 0, "types": [dtype, FLOAT]} and not done.messages


@pytest.mark.parametrize(
    "change, text",
    [
        ("1 2 4 2 64", "expected k of shape [2, 5, 2, 64], got [2, 4, 2, 64]"),
        ("2 1 5 4 64", "expected v of shape [2, 5, 4, 64], got [1, 5, 4, 64]"),
        ("6 2 4 64 65", "expected initial_state of shape [2, 4, 64, 64], got [2, 4, 64, 65]"),
    ],
)
def test_shapes_are_refused_when_they_are_set(change, text, drive):
    done = drive([f"shape {change}"])
    assert done.lines[-1] == {"changed": -1, "queued": -1}
    assert text in done.messages[0] and "expected kernels that load() has chosen" in done.messages[1]
    assert not any("image" in line for line in done.lines)


@pytest.mark.parametrize("arch", [75, 91, 100, 120])  # the cubins of sm_90a serve no other 9.x
def test_an_architecture_without_cubins_is_refused_when_a_shape_is_set(arch, drive):
    line, message = one(drive([f"run 1 1 1 1 64 64 {BF16} 1 1 1"], arch=arch))
    assert line["configured"] == 0 and line["changed"] == -1
    assert f"(sm_90, 80), got sm_{arch}; build the library for it" in message


def test_no_driver_is_refused_when_a_shape_is_set(drive):
    line, message = one(drive([f"run 2 64 2 2 64 64 {BF16} 1 2 64"], driver=False))
    assert line["configured"] == 0 and line["bytes"] > 0 and line["changed"] == -1
    assert message.startswith("expected a CUDA driver, got none: libcuda.so.1")


def test_no_context_is_refused_when_a_shape_is_set(drive):
    line, message = one(drive(["context 0", f"run 2 64 2 2 64 64 {BF16} 1 2 64"]))
    assert line["changed"] == -1 and message == "expected a current CUDA context, got none"


def test_pointers_that_cubins_cannot_take_are_refused(drive):
    line, message = one(drive(["misaligned"]))
    assert line == {"queued": -1} and "expected tensors at multiples of 16 bytes" in message


@pytest.mark.parametrize("kind", [1, 2, 5, 10])
def test_scale_may_be_any_number(kind, drive):
    done = drive([f"field scale {kind} 2"])
    assert done.lines[-1] == {"scale": 2} and not done.messages


@pytest.mark.parametrize(
    "field, text",
    [
        ("none 1 0", "expected the field scale, a float, got a node without it"),
        ("scale 6 2", "expected a number for the field scale, got type 6"),
        ("scale 1 inf", "expected a finite field scale, got inf"),
        ("scales 1 2", "expected the field scale alone, got scales"),
    ],
)
def test_a_creator_refuses_a_wrong_field(field, text, drive):
    line, message = one(drive([f"field {field}"]))
    assert line == {"scale": -1} and message == text
