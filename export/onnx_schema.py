"""The ONNX operator `gdn2::GatedDeltaNet2`: its name, inputs, outputs, attributes and types, stated once."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

DOMAIN, OP, VERSION = "gdn2", "GatedDeltaNet2", 1
OPSET, IR_VERSION = 21, 10  # of the files we write unless told: ONNX Runtime from 1.20 on reads them
OPSETS = range(18, 26)  # that bodies and the exporter of torch 2.13 both know
INPUTS = ("q", "k", "v", "g", "b", "w", "initial_state")
OUTPUTS = ("o", "final_state")

# With these two a TensorRT parser takes the plugin where it is registered, and the function body where it is not.
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}

DOC = """Gated DeltaNet-2 over T >= 1 tokens (T = 1 is a decoding step):
S_t = (I - k_t (b_t*k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t*v_t)^T,  o_t = scale S_t^T q_t.
Source: arXiv 2605.22791, eq. 10."""

_SHAPES = {
    "q": "[B, T, H, K] queries",
    "k": "[B, T, H, K] keys",
    "v": "[B, T, HV, V] values, HV a multiple of H",
    "g": "[B, T, H, K] natural log of the decay, <= 0",
    "b": "[B, T, H, K] erase gate",
    "w": "[B, T, HV, V] write gate",
    "initial_state": "[B, HV, K, V] state before the first token",
    "o": "[B, T, HV, V] outputs",
    "final_state": "[B, HV, K, V] state after the last token",
}
_STATES = ("g", "initial_state", "final_state")


def _parameter(name: str) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(name, "S" if name in _STATES else "T", _SHAPES[name])


SCHEMA = OpSchema(
    OP,
    DOMAIN,
    VERSION,
    doc=DOC,
    inputs=[_parameter(name) for name in INPUTS],
    outputs=[_parameter(name) for name in OUTPUTS],
    type_constraints=[
        ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "queries, keys, values, gates and outputs"),
        ("S", ["tensor(float)"], "decays and states"),
    ],
    attributes=[
        OpSchema.Attribute("scale", onnx.defs.OpSchema.AttrType.FLOAT, "of the outputs, usually K ** -0.5"),
        *(OpSchema.Attribute(k, onnx.helper.make_attribute(k, v), "for TensorRT parsers") for k, v in PLUGIN.items()),
    ],
)


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """o is like v, the final state like the first one."""
    for output, like in ((0, INPUTS.index("v")), (1, INPUTS.index("initial_state"))):
        context.set_output_type(output, context.get_input_type(like))


SCHEMA.set_type_and_shape_inference_function(_infer)


def register_schema() -> None:
    """Makes onnx's checker and shape inference know the operator, in this process. Harmless when called again."""
    if not onnx.defs.has(OP, VERSION, DOMAIN):
        onnx.defs.register_schema(SCHEMA)
