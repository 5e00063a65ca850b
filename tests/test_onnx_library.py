"""The ONNX Runtime library: its kernels, not the body, run the node; the specification's numbers; states in one buffer.

The files here have a body that is wrong on purpose (`o = v`, the state unchanged), so right numbers are a kernel's.
"""

import ctypes
import re
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_files
import onnxruntime
import pytest
import torch
from cases import CASES, DTYPES, FORMS, OUTPUTS, Case, Inputs, assert_as_good_as, exact, inputs
from onnx import TensorProto, helper
from onnx_files import AXES, SCALE, feed, run_in_one_buffer

from gdn2_ops.export.onnx_schema import DOMAIN, INPUTS, IR_VERSION, OP, OPSET, PLUGIN
from gdn2_ops.export.onnx_schema import OUTPUTS as NODE_OUTPUTS
from gdn2_ops.runtime import onnxruntime_library

session = partial(onnx_files.session, library=True)
ONE_NODE_CASES = [case for case in CASES if case.cu_seqlens is None]
ELEMENT = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
ABI = (Path(__file__).parents[1] / "runtime" / "onnxruntime" / "abi.h").read_text()
SLOTS = {name: int(slot) for slot, name in re.findall(r"^constexpr Slot<\s*(\d+),[^;]*>\s+(\w+);$", ABI, re.MULTILINE)}


def model(dtype: torch.dtype = torch.float32, **types: int) -> bytes:
    """The node between casts: float32 around it, dtype for its q k v b w o; types: other ones for single inputs."""
    body = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {OP} <scale, plugin_namespace, plugin_version> '
        f"({', '.join(INPUTS)}) => (o, final_state) {{ o = Identity (v) final_state = Identity (initial_state) }}"
    )
    of_node = {name: ELEMENT[dtype] if name in "qkvbw" else TensorProto.FLOAT for name in INPUTS} | types
    nodes = [helper.make_node("Cast", [name], [f"{name}_"], to=of_node[name]) for name in INPUTS]
    nodes.append(
        helper.make_node(OP, [f"{n}_" for n in INPUTS], ["o_", "final_state"], domain=DOMAIN, scale=SCALE, **PLUGIN)
    )
    nodes.append(helper.make_node("Cast", ["o_"], ["o"], to=TensorProto.FLOAT))
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, AXES[name].split()) for name in AXES}
    graph = helper.make_graph(nodes, "one", [value[n] for n in INPUTS], [value[n] for n in NODE_OUTPUTS])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=IR_VERSION)
    return proto.SerializeToString()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_are_as_good_as_the_specification(dtype):
    one, two = (session(model(dtype), threads=threads) for threads in (1, 2))
    for case in ONE_NODE_CASES:
        x = inputs(case, dtype)
        got = one.run(None, feed(x))
        assert all(np.array_equal(y, z) for y, z in zip(got, two.run(None, feed(x)))), case
        specifications = zip(*(form(*x, scale=SCALE) for form in FORMS))
        for name, same, y, want in zip(OUTPUTS, specifications, got, exact(x, scale=SCALE)):
            y = torch.from_numpy(y).to(same[0].dtype)
            assert_as_good_as(same, y, want, dtype, f"{case.name}: {name}")


def test_without_the_library_the_body_runs():
    x = inputs(Case("body", 5), torch.float32)
    for library in (False, True):
        o, state = session(model(), library=library).run(None, feed(x))
        assert np.array_equal(o, x.v.numpy()) is not library
        assert np.array_equal(state, x.state.numpy()) is not library


@pytest.mark.parametrize("T", [1, 2, 65])
@pytest.mark.parametrize("sizes", [{}, {"B": 1, "H": 1, "HV": 1, "K": 64, "V": 200}], ids=["heads", "one head"])
def test_past_and_present_may_be_one_buffer(T, sizes):
    x = inputs(Case("one buffer", T, **{"B": 2, "H": 2, "HV": 4} | sizes), torch.float32)
    run = session(model(), threads=2)
    want_o, want_state = run.run(None, feed(x))
    got = run_in_one_buffer(run, feed(x), {"initial_state": "final_state"})
    assert np.array_equal(got["o"], want_o) and np.array_equal(got["final_state"], want_state)


def test_steps_are_the_sequence():
    x = inputs(Case("steps", 9, B=3, HV=4), torch.float32)
    run = session(model())
    whole_o, whole_state = run.run(None, feed(x))
    state, tokens = x.state, []
    for t in range(9):
        o, state = run.run(None, feed(Inputs(*(y[:, t : t + 1] for y in x[:6]), torch.as_tensor(state))))
        tokens.append(o)
    for got, want in ((np.concatenate(tokens, 1), whole_o), (state, whole_state)):
        assert np.abs(got - want).max() <= 1e-5


REFUSED = {
    "k of another length": ({"k": (2, 4, 2, 3)}, "k of shape [2, 5, 2, 3], got [2, 4, 2, 3]"),
    "v of another batch": ({"v": (1, 5, 4, 6)}, "v of shape [2, 5, 4, 6], got [1, 5, 4, 6]"),
    "g of one channel": ({"g": (2, 5, 2, 1)}, "g of shape [2, 5, 2, 3], got [2, 5, 2, 1]"),
    "b of values": ({"b": (2, 5, 4, 6)}, "b of shape [2, 5, 2, 3], got [2, 5, 4, 6]"),
    "w of keys": ({"w": (2, 5, 2, 3)}, "w of shape [2, 5, 4, 6], got [2, 5, 2, 3]"),
    "state of one row": ({"initial_state": (1, 4, 3, 6)}, "initial_state of shape [2, 4, 3, 6], got [1, 4, 3, 6]"),
    "heads no multiple": (
        {"v": (2, 5, 3, 6), "w": (2, 5, 3, 6), "initial_state": (2, 3, 3, 6)},
        "HV to be a positive multiple of H = 2, got 3",
    ),
    "no heads": (
        {"q": (2, 5, 0, 3), "k": (2, 5, 0, 3), "g": (2, 5, 0, 3), "b": (2, 5, 0, 3)},
        "HV to be a positive multiple of H = 0, got 4",
    ),
    "wide heads": (
        {"v": (2, 5, 4, 257), "w": (2, 5, 4, 257), "initial_state": (2, 4, 3, 257)},
        "head sizes K and V in 1..256, got 3 and 257",
    ),
}
SHAPES = dict.fromkeys("qkgb", (2, 5, 2, 3)) | dict.fromkeys("vw", (2, 5, 4, 6)) | {"initial_state": (2, 4, 3, 6)}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_shapes_are_refused(what):
    shapes, text = REFUSED[what]
    run = session(model())
    right = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    with pytest.raises(Exception, match=re.escape(f"gdn2::GatedDeltaNet2: expected {text}")):
        run.run(None, right | {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert not run.run(None, right)[1].any()


def test_wrong_ranks_are_refused():
    proto = onnx.load_from_string(model())
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    run = session(proto.SerializeToString())
    right = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for name, shape, text in (
        ("q", (5, 2, 3), "q of shape [B, T, H, K], got [5, 2, 3]"),
        ("v", (1, 2, 5, 4, 6), "v of shape [B, T, HV, V], got [1, 2, 5, 4, ...]"),
        ("w", (), "w of shape [2, 5, 4, 6], got []"),
        ("k", (2, 5, 2, 3, 1), "k of shape [2, 5, 2, 3], got [2, 5, 2, 3, ...]"),
    ):
        with pytest.raises(Exception, match=re.escape(f"expected {text}")):
            run.run(None, right | {name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize("types", [{"k": TensorProto.FLOAT16}, {"g": TensorProto.FLOAT16}, {"q": TensorProto.DOUBLE}])
def test_mixed_types_are_refused_when_the_file_is_loaded(types):
    with pytest.raises(Exception, match=OP):
        session(model(**types))


def test_a_node_without_scale_is_refused():
    proto = onnx.load_from_string(model())
    (node,) = (node for node in proto.graph.node if node.op_type == OP)
    node.attribute.remove(next(a for a in node.attribute if a.name == "scale"))
    with pytest.raises(Exception, match="expected the attribute scale, a float, got a node without it"):
        session(proto.SerializeToString())


def test_many_sessions_at_once():
    x = feed(inputs(Case("sessions", 17), torch.float32))
    sessions = [session(model()) for _ in range(3)]
    first, *others = [run.run(None, x) for run in sessions]
    del sessions[0]
    others.append(sessions[0].run(None, x))
    assert all(np.array_equal(y, z) for other in others for y, z in zip(first, other))


class ApiBase(ctypes.Structure):
    """OrtApiBase, as abi.h declares it."""

    GET = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    _fields_ = (("get_api", GET), ("version_string", ctypes.CFUNCTYPE(ctypes.c_char_p)))


def test_a_runtime_too_old_gets_no_kernel():
    asked = []
    base = ApiBase(ApiBase.GET(asked.append), type(ApiBase().version_string)(lambda: b"1.16.3"))
    register = ctypes.CDLL(str(onnxruntime_library.path())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    register.argtypes = (ctypes.c_void_p, ctypes.POINTER(ApiBase))
    no_options = None  # to touch them would be a crash
    assert register(no_options, base) is None
    assert asked == [int(re.search(r"API_VERSION = (\d+);", ABI)[1])]


def test_slots_hold_the_functions_they_are_named_after():
    """Those that can be called without a kernel; the others are called by every test above."""
    (binary,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    get_base = ctypes.CDLL(str(binary)).OrtGetApiBase
    get_base.restype = ctypes.POINTER(ApiBase)
    base = get_base().contents
    assert base.version_string().decode() == onnxruntime.__version__
    slots = ctypes.cast(base.get_api(17), ctypes.POINTER(ctypes.c_void_p))
    made = ctypes.c_void_p()

    def call(slot, *types):
        return ctypes.CFUNCTYPE(ctypes.c_void_p, *types)(slots[slot])

    status = call(SLOTS["CreateStatus"], ctypes.c_int, ctypes.c_char_p)(2, b"what was wrong")
    get_error_message = 2
    text = ctypes.cast(call(get_error_message, ctypes.c_void_p)(status), ctypes.c_char_p).value
    assert text == b"what was wrong"
    call(SLOTS["ReleaseStatus"], ctypes.c_void_p)(status)
    create = call(SLOTS["CreateCustomOpDomain"], ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
    assert create(b"nothing", ctypes.byref(made)) is None and made.value
    call(SLOTS["ReleaseCustomOpDomain"], ctypes.c_void_p)(made)
    assert len(SLOTS) == ABI.count("constexpr Slot<") and max(SLOTS.values()) < int(
        re.search(r"slots\[(\d+)\]", ABI)[1]
    )


def test_registration_is_all_the_library_shows():
    file = onnxruntime_library.path()
    listed = subprocess.run(["nm", "-D", "--defined-only", file], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["RegisterCustomOps"]
    assert b"libtorch" not in file.read_bytes()
