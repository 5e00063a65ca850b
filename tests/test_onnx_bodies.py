"""The function bodies: the specification on hard data, and states in one buffer."""

import numpy as np
import onnx
import pytest
import torch
from cases import CASES, Case, exact, inputs
from onnx.reference import ReferenceEvaluator
from onnx_files import SCALE, feed, one_node, run_in_one_buffer, session

from gdn2_ops.export.onnx_bodies import BODIES, float64_body, function_body
from gdn2_ops.export.onnx_schema import DOMAIN, INPUTS, OP, OPSET, OPSETS, register_schema

HARD = {  # decay, erase, keys
    "weak": ("weak", "uniform", "random"),
    "no decay, equal keys": ("none", "uniform", "equal"),
    "resets, full erase, equal keys": ("resets", "one", "equal"),
    "resets, reflections, equal keys": ("resets", "two", "equal"),
    "channels, no erase": ("channels", "none", "random"),
}
SIZES = [(B, T) for B in (1, 3) for T in (1, 2, 15, 16, 17, 64, 65, 300)]
GRID = [
    Case(f"B {B}, T {T}, {name}", T, *kind, B=B, HV=4, K=16, V=12) for (B, T) in SIZES for name, kind in HARD.items()
]
ALL = [case for case in CASES if case.cu_seqlens is None and case.T > 0] + GRID
ONE_BUFFER = {"initial_state": "final_state"}


def largest_error(got, want: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of o and the final state, relative to the largest wanted number where that is above one."""
    assert all(np.isfinite(y).all() for y in got)
    return max(float(np.abs(y - z.numpy()).max() / max(1.0, z.abs().max())) for y, z in zip(got, want, strict=True))


@pytest.mark.parametrize("body", BODIES)
def test_the_specification_on_hard_data(body):
    run = session(one_node(body))
    for case in ALL:
        x = inputs(case, torch.float32)
        assert largest_error(run.run(None, feed(x)), exact(x, scale=SCALE)) <= 5e-6, case


@pytest.mark.parametrize("body", ["scan", "chunk"])
def test_onnx_evaluates_the_bodies_without_a_runtime(body):
    run = ReferenceEvaluator(one_node(body))
    for case in (case for case in GRID if case.T == 17):
        x = inputs(case, torch.float32)
        assert largest_error(run.run(None, feed(x)), exact(x, scale=SCALE)) <= 5e-6, case


def test_the_body_in_float64_is_exact_up_to_the_rounding_of_its_outputs():
    run = ReferenceEvaluator(one_node(float64_body()))
    for case in (case for case in GRID if case.T == 17):
        x = inputs(case, torch.float32)
        assert largest_error(run.run(None, feed(x)), exact(x, scale=SCALE)) <= 1e-7, case


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("threads, optimise", [(1, True), (2, True), (1, False)])
def test_past_and_present_may_be_one_buffer(body, threads, optimise):
    for sizes in ({}, {"H": 2, "HV": 2, "K": 16, "V": 12}, {"B": 2, "H": 1, "HV": 2, "K": 16, "V": 12}):
        run = session(one_node(body, **sizes), threads=threads, optimise=optimise)
        for T in (1, 2, 16, 17):
            of = {"B": 2, "H": 2, "HV": 4} | sizes
            x = feed(inputs(Case("one buffer", T, **{"K": 16, "V": 12} | of), torch.float32))
            o, state = run.run(None, x)
            got = run_in_one_buffer(run, x, ONE_BUFFER)
            assert np.array_equal(got["o"], o) and np.array_equal(got["final_state"], state), (sizes, T)


def test_a_body_that_reads_the_first_state_late_is_wrong_in_one_buffer():
    late = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {OP} <scale, plugin_namespace, plugin_version> '
        f"({', '.join(INPUTS)}) => (o, final_state) {{ final_state = Neg (initial_state) "
        "written = ReduceMax <keepdims = 0> (final_state) late = Mul (initial_state, written) "
        "total = ReduceSum <keepdims = 0> (late) o = Mul (v, total) }"
    )
    run, x = session(one_node(late)), feed(inputs(GRID[0], torch.float32))
    assert not np.array_equal(run_in_one_buffer(run, x, ONE_BUFFER)["o"], run.run(None, x)[0])


@pytest.mark.parametrize("body", BODIES)
def test_bodies_are_valid_for_every_opset(body):
    for opset in OPSETS:
        model = one_node(function_body(body, opset))
        model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import), True)
        onnx.checker.check_model(model, full_check=True)
    x = inputs(GRID[0], torch.float32)
    assert largest_error(session(model).run(None, feed(x)), exact(x, scale=SCALE)) <= 5e-6


def test_the_registered_schema_infers_shapes_and_rejects_an_unknown_attribute():
    register_schema()
    register_schema()
    model = one_node("scan", H=2, HV=4, K=16, V=12)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shapes = {x.name: [d.dim_value or d.dim_param for d in x.type.tensor_type.shape.dim] for x in inferred.graph.output}
    assert shapes == {"o": ["B", "T", 4, 12], "final_state": ["B", 4, 16, 12]}
    inferred.graph.node[0].attribute.append(onnx.helper.make_attribute("window", 3))
    with pytest.raises(onnx.checker.ValidationError, match="window"):
        onnx.checker.check_model(inferred)


def test_an_unknown_body_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a body in \['chunk', 'linear_attention', 'none', 'scan'\], got 'loop'"
    ):
        function_body("loop")
