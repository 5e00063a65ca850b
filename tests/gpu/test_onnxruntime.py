"""ONNX Runtime on CUDA with our library: the specification's numbers from kernels on the GPU, states in one buffer.

The files have a body that is wrong on purpose, and no node may run on the CPU: right numbers are our kernels'.
"""

import shutil

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, FORMS, OUTPUTS, Case, Inputs, assert_as_good_as, exact, inputs
from gpu_building import HEADS, build, skip_without_gpu

import gdn2_ops
from gdn2_ops.runtime import onnxruntime_library

pytest.importorskip("onnx", reason="the wheel onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the wheel onnxruntime-gpu is not installed")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Our library with cubins for this GPU beside it."""
    skip_without_gpu()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("the wheel onnxruntime-gpu is not installed, but onnxruntime")
    folder = tmp_path_factory.mktemp("library")
    build(folder, "onnxruntime")
    return shutil.copy(onnxruntime_library.path(), folder)


@pytest.fixture(scope="module")
def open_session(library):
    from test_onnx_library import model

    def opened(dtype):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.register_custom_ops_library(str(library))
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN of the packages that PyTorch brought
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
        return onnxruntime.InferenceSession(model(dtype), options, providers=providers, enable_fallback=0)

    return opened


def feed(x: Inputs) -> dict[str, np.ndarray]:
    from onnx_files import feed

    return feed(x)


def assert_specification(session, case: Case, dtype: torch.dtype) -> None:
    x = inputs(case, dtype)
    specifications = zip(*(form(*x, scale=0.5) for form in FORMS))
    got = session.run(None, feed(x))
    for name, same, y, want in zip(OUTPUTS, specifications, got, exact(x, scale=0.5)):
        assert_as_good_as(same, torch.from_numpy(y).to(same[0].dtype), want, dtype, f"{case.name}: {name}")


@every_dtype
def test_the_kernels_are_as_good_as_the_specification(dtype, device, open_session):
    session = open_session(dtype)
    for case in CASES:
        if case.cu_seqlens is None:
            assert_specification(session, case, dtype)
    for K in HEADS:
        for T in (1, 64, 300):
            assert_specification(session, Case(f"{T} tokens of {K}", T, B=2, H=1, HV=2, K=K, V=K), dtype)


def test_a_long_sequence_walks_in_segments(device, open_session):
    x = inputs(Case("in segments", 8200, H=1, HV=1, K=64, V=64), torch.float32)
    got = open_session(torch.float32).run(None, feed(x))
    for y, want in zip(got, gdn2_ops.chunk(*x, scale=0.5)):
        assert np.abs(y - want.numpy()).max() <= 2e-5 * want.abs().max()


@every_dtype
@pytest.mark.parametrize("T", [1, 65])
def test_past_and_present_may_be_one_buffer_of_the_gpu(T, dtype, device, open_session):
    x = feed(inputs(Case("one buffer", T, B=2, H=2, HV=4, K=64, V=64), dtype))
    session = open_session(dtype)
    want_o, want_state = session.run(None, x)
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(y, "cuda", 0) for name, y in x.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("o")
    binding.bind_ortvalue_output("final_state", values["initial_state"])
    session.run_with_iobinding(binding)
    o, state = (value.numpy() for value in binding.get_outputs())
    assert np.array_equal(o, want_o) and np.array_equal(state, want_state)
    assert np.array_equal(values["initial_state"].numpy(), want_state)


def test_steps_are_the_sequence(device, open_session):
    x = inputs(Case("steps", 9, B=3, HV=4, K=64, V=64), torch.float32)
    session = open_session(torch.float32)
    whole_o, whole_state = session.run(None, feed(x))
    state, tokens = x.state, []
    for t in range(9):
        o, state = session.run(None, feed(Inputs(*(y[:, t : t + 1] for y in x[:6]), torch.as_tensor(state))))
        tokens.append(o)
    for got, want in ((np.concatenate(tokens, 1), whole_o), (state, whole_state)):
        assert np.abs(got - want).max() <= 1e-5


def test_a_head_size_without_cubins_is_an_error(device, open_session):
    x = feed(inputs(Case("wide", 5, K=200, V=200), torch.float32))
    with pytest.raises(Exception, match="build it with them: gdn2 build-plugin"):
        open_session(torch.float32).run(None, x)
