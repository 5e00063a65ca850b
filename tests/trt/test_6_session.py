"""Rung 6: a plan as a backend of generate: states stay in the GPU's memory, decoding is by CUDA graphs, errors say why.

On stand-ins: engines are run by ONNX Runtime, on a driver that is stricter than a real one about memory and streams.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gdn2_ops import cli
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export import tensorrt
from gdn2_ops.export import tensorrt_commands as commands
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.cuda_driver import Buffer, Driver, Stream
from gdn2_ops.runtime.generate import generate, tokens_of
from gdn2_ops.runtime.session import OnnxRuntime
from gdn2_ops.runtime.tensorrt_session import TensorRT, TensorRTBackend

HERE = Path(__file__).parent
TINY = HERE.parent.parent / "examples" / "models" / "tiny"
PROMPT, COUNT = b"import ", 12
VERSIONS = ("10.15.1.29", "11.4.0.106")


@pytest.fixture
def plan(standin, exported, tmp_path) -> Path:
    """For up to 3 sequences and 8 tokens in a call."""
    file = tmp_path / "tiny.plan"
    profiles = commands.Sizes(3, 8).profiles(commands.read_inputs(exported))
    tensorrt.build(exported, file, profiles, plugin=None)
    return file


@pytest.fixture(scope="module")
def eager() -> TorchBackend:
    return TorchBackend(GDN2LM.from_pretrained(TINY).eval())


@pytest.fixture(scope="module")
def written(eager) -> bytes:
    return b"".join(generate(eager, PROMPT, COUNT))


def steps_of(standin) -> list[dict]:
    return [line for line in standin() if line.get("ran", [0, 0])[1] == 1]


def test_generate_is_eager_and_decodes_by_graphs(plan, standin, written):
    assert b"".join(generate(TensorRTBackend(plan), PROMPT, COUNT)) == written
    first, *steps = [line for line in standin() if "ran" in line]
    assert first == {"ran": [1, len(PROMPT)], "captured": False, "profile": commands.PREFILL}
    plain = {"ran": [1, 1], "captured": False, "profile": commands.DECODE}
    assert steps == [plain, plain, plain | {"captured": True}, plain | {"captured": True}]  # the others are launches


def test_without_graphs_every_step_is_a_call(plan, standin, written):
    assert b"".join(generate(TensorRTBackend(plan, graphs=False), PROMPT, COUNT)) == written
    assert len(steps_of(standin)) == COUNT - 1 and not any(line["captured"] for line in steps_of(standin))


def test_states_in_one_buffer(plan, written, cuda):
    before = cuda.standin_live(0)
    two = TensorRTBackend(plan)
    assert b"".join(generate(two, PROMPT, COUNT)) == written
    both = cuda.standin_live(0) - before
    one = TensorRTBackend(plan, in_place=True)
    assert b"".join(generate(one, PROMPT, COUNT)) == written
    assert cuda.standin_live(0) - before - both == both - 4  # of four layers


def logits_of(backend, sequences: list[bytes], order: list[int]) -> list[np.ndarray]:
    """Logits of each sequence, whose bytes are given one by one in that order of sequences."""
    states, at, found = [None] * len(sequences), [0] * len(sequences), [[] for _ in sequences]
    for i in order:
        logits, states[i] = backend(tokens_of(sequences[i][at[i] : at[i] + 1])[None], states[i])
        at[i] += 1
        found[i].append(logits[0, 0])
    return [np.array(x) for x in found]


def test_sequences_take_turns(plan, eager):
    """Each has its state, wherever the others left theirs; one that nobody has any more is not kept."""
    sequences, order = [b"abcdef", b"uvwxyz", b"012345"], [0, 1, 0, 2, 2, 0, 1, 1, 0, 2, 0, 1, 2, 0, 1, 2, 1, 2]
    got, want = (logits_of(backend, sequences, order) for backend in (TensorRTBackend(plan), eager))
    for x, y in zip(got, want):
        np.testing.assert_allclose(x, y, atol=1e-3, rtol=0)


def test_batches_and_prompts_longer_than_a_call(plan, eager):
    backend, random = TensorRTBackend(plan), np.random.default_rng(0)
    state = other = None
    for batch, lengths in ((3, (21, 1, 1, 1, 5, 1)), (1, (16, 1, 8, 1, 1, 1, 1)), (2, (1, 1, 1, 17))):
        state = other = None
        for length in lengths:
            tokens = random.integers(0, 256, (batch, length))
            logits, state = backend(tokens, state)
            want, other = eager(tokens, other)
            np.testing.assert_allclose(logits, want, atol=1e-3, rtol=0)


def test_a_runner_is_onnx_runtime(plan, exported):
    runner, other = TensorRT(plan), OnnxRuntime(exported)
    assert [x.name for x in runner.inputs] == [x.name for x in other.inputs]
    assert [x.dtype for x in runner.outputs] == [x.dtype for x in other.outputs]
    assert runner.inputs[0].shape == (None, None) and runner.inputs[2].shape == (None, 4, 32, 32)
    random = np.random.default_rng(0)
    for B, T in ((1, 1), (2, 8), (3, 1)):
        feed = {"input_ids": random.integers(0, 256, (B, T))}
        feed |= {x.name: random.normal(size=(B, *x.shape[1:])).astype(np.float32) for x in runner.inputs[1:]}
        for got, want in zip(runner.run(feed), other.run(feed)):
            np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_shapes_that_no_profile_has_are_refused(plan):
    runner = TensorRT(plan)
    feed = {x.name: np.zeros([1 if size is None else size for size in x.shape], x.dtype) for x in runner.inputs}
    with pytest.raises(ValueError, match=r"input_ids of a shape from \(1, 1\) to \(3, 8\), got \(1, 9\)"):
        runner.run(feed | {"input_ids": np.zeros((1, 9), np.int64)})
    backend = TensorRTBackend(plan)
    with pytest.raises(ValueError, match=r"to \(3, 8\), got \(4, 2\); gdn2 export --to tensorrt has --batch"):
        backend(np.zeros((4, 2), np.int64), None)
    _, state = backend(np.zeros((2, 2), np.int64), None)
    with pytest.raises(ValueError, match="expected tokens of the state's 2 sequences, got 1"):
        backend(np.zeros((1, 1), np.int64), state)


def test_nothing_stays_allocated(plan, cuda):
    gc.collect()
    before = [cuda.standin_live(kind) for kind in range(3)]
    backend = TensorRTBackend(plan)
    logits_of(backend, [b"abcdefgh", b"ijklmnop"], [0, 1] * 8)
    logits_of(backend, [b"abcdefgh"], [0] * 8)
    assert [cuda.standin_live(kind) for kind in range(3)] > before
    del backend
    gc.collect()
    assert [cuda.standin_live(kind) for kind in range(3)] == before


def test_a_plan_that_tensorrt_refuses(plan, tmp_path, built, exported, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gdn2 export MODEL --to tensorrt writes one"):
        TensorRT(tmp_path / "none.plan")
    (tmp_path / "text.plan").write_text("no plan")
    with pytest.raises(
        RuntimeError, match=r"TensorRT 0.0.0 refuses the plan .*magicTag assertion failed\); a plan is of"
    ):
        TensorRT(tmp_path / "text.plan")
    profiles = commands.Sizes(3, 8).profiles(commands.read_inputs(exported))
    tensorrt.build(exported, plan, profiles, plugin=built.library)
    sys.modules["tensorrt"]._REGISTRY.__init__()  # a new process, in which nobody has loaded the plugin
    with pytest.raises(RuntimeError, match=r"could not find plugin GatedDeltaNet2 .* gdn2 build-plugin"):
        TensorRT(plan)
    for _ in range(2):  # TensorRT has the library already the second time
        assert b"".join(generate(TensorRTBackend(plan, plugin=built.library), PROMPT, 2))
    with pytest.raises(RuntimeError, match=r"refuses the plugin '/no/such.so'"):
        sys.modules["tensorrt"]._REGISTRY.__init__()
        TensorRT(plan, plugin="/no/such.so")


def test_the_command_line_generates_from_a_plan(plan, written, capfdbinary):
    assert cli.main(["generate", str(plan), "--prompt", PROMPT.decode(), "--count", str(COUNT)]) == 0
    assert capfdbinary.readouterr().out == written + b"\n"


def test_without_a_gpu_the_command_line_says_so(plan, cuda, monkeypatch, capsys):
    monkeypatch.setenv("GDN2_DEVICES", "0")
    assert cli.main(["generate", str(plan), "--prompt", "x"]) == 1
    assert capsys.readouterr().err == "gdn2: error: expected an NVIDIA GPU, got a driver without one\n"
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not folder.endswith("standin")])
    assert cli.main(["generate", str(plan), "--prompt", "x"]) == 2
    assert "needs tensorrt: pip install tensorrt-cu13" in capsys.readouterr().err


@pytest.mark.parametrize("version", VERSIONS)
def test_the_lean_runtimes_meet_no_driver(version, wheel, tmp_path):
    """Without a driver these return objects that crash when they end: the driver is asked for first."""
    (tmp_path / "a.plan").write_bytes(b"")
    (tmp_path / "tensorrt_lean.py").write_text("from tensorrt_lean_bindings import *")
    code = "import sys; from gdn2_ops.runtime.tensorrt_session import TensorRT; TensorRT(sys.argv[1])"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{wheel(f'lean-{version}')}"}
    command = [sys.executable, "-c", code, tmp_path / "a.plan"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RuntimeError: expected an NVIDIA GPU and its driver, got none" in done.stderr


# The stand-ins refuse what they should: a mistake in the session would show.


def test_the_driver_refuses_what_a_device_would(cuda, standin):
    driver = Driver()
    stream, buffer = Stream(driver), Buffer(driver, 64)
    array = np.zeros(16, np.float32)
    stream.read(array, buffer)
    assert (array == 0).all()  # nothing happens before the stream is waited for
    stream.synchronize()
    assert np.isnan(array).all()
    with pytest.raises(ValueError, match="at most 64 bytes, got 68"):
        stream.write(buffer, np.zeros(17, np.float32))
    with pytest.raises(RuntimeError, match="cuStreamSynchronize: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        stream.capture(stream.synchronize)
    driver.call("cuMemsetD8Async", buffer.address + 32, 0, 64, stream.handle)
    with pytest.raises(RuntimeError, match="cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS"):
        stream.synchronize()
    stream.clear(buffer)
    stream.synchronize()  # a capture that failed has ended
    driver.call("cuCtxSetCurrent", None)
    with pytest.raises(RuntimeError, match="cuMemAlloc_v2: CUDA_ERROR_INVALID_CONTEXT"):
        Buffer(driver, 1)


def test_the_engine_refuses_to_be_captured_before_a_run(plan):
    engine = TensorRT(plan)
    context = engine.context(commands.DECODE)
    with pytest.raises(RuntimeError, match="TensorRT does not run the plan"):
        engine.execute(context)
    shapes = {"input_ids": (1, 1)} | {x.name: (1, *x.shape[1:]) for x in engine.inputs[1:]}
    for name, shape in shapes.items():
        assert context.set_input_shape(name, shape)
    names = [x.name for x in (*engine.inputs, *engine.outputs)]
    engine.bind(context, {name: Buffer(engine.driver, 1 << 20) for name in names})
    with pytest.raises(RuntimeError, match="TensorRT does not run the plan"):
        engine.stream.capture(lambda: engine.execute(context))
