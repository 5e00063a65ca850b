"""Rung 7: ONNX Runtime's kernels on CUDA launch what the plugin launches: the torch launcher's launches.

A stand-in for ONNX Runtime counts what it lends; ONNX Runtime itself, with the library's providers renamed, runs the
same code on memory of the host.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from trt.test_1_launches import (
    DTYPES,
    PROBLEMS,
    Problem,
    assert_parts_lie_apart,
    assert_same_launch,
    launches_of,
    torch_launches,
)

from gdn2_ops.export import plugin
from gdn2_ops.runtime import onnxruntime_library

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIBRARY = "libgdn2_onnxruntime.so"
HEAD = "gdn2::GatedDeltaNet2: "
ELEMENTS = (1, 10, 16)  # float, float16, bfloat16
OPS = [["GatedDeltaNet2", f"{device}ExecutionProvider", x] for device in ("CPU", "CUDA") for x in ELEMENTS]
BF16 = DTYPES[torch.bfloat16]


class Session(NamedTuple):
    """ops: what was registered. lines: what the host and the driver printed. images: what was loaded."""

    ops: list
    lines: list[dict]
    images: list[bytes]


def run(command: list, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(built, tmp_path_factory):
    """The library, and its cubins beside it."""
    made = tmp_path_factory.mktemp("onnxruntime")
    plugin.compile_library(built.cubins, made, "onnxruntime")
    shutil.copy(onnxruntime_library.path(), made)
    return made


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    made = tmp_path_factory.mktemp("driver")
    run(["c++", "-std=c++17", "-O1", "-shared", "-fPIC", HERE / "recording_cuda.cpp", "-o", made / "libcuda.so.1"])
    return made


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    made = tmp_path_factory.mktemp("host") / "host"
    abi = ROOT / "runtime" / "onnxruntime"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{abi}"]
    run(["c++", *flags, HERE / "onnxruntime_host.cpp", "-o", made, "-ldl", "-pthread"])
    return made


@pytest.fixture(scope="module")
def drive(folder, cuda, host, tmp_path_factory):
    """Runs a script in the stand-in. driver: with the recording libcuda, else without any."""

    def driven(script, *, arch=90, driver=True, version="1.31.1", library=folder / LIBRARY):
        record = tmp_path_factory.mktemp("record")
        env = os.environ | {"GDN2_ARCH": str(arch), "GDN2_RECORD": str(record)}
        if driver:
            env["LD_LIBRARY_PATH"] = str(cuda)
        done = subprocess.run(
            [host, library, version], input="\n".join(script), env=env, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:] + done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        images = [(record / f"{i}.cubin").read_bytes() for i in range(len(list(record.iterdir())))]
        assert lines[0]["domain"] == "gdn2"
        return Session(lines[0]["ops"], lines[1:], images)

    return driven


@pytest.fixture(scope="module")
def session(drive):
    """Every problem, twice in a row and then in another order: kernels keep the launches of their last problem."""
    lines = [line for p in PROBLEMS for line in (p.command(), p.command())]
    return drive([*lines, *(p.command() for p in reversed(PROBLEMS)), "end"])


def test_launches_are_those_of_torch(session, built, monkeypatch):
    results = launches_of(session.lines[:-1], "created")
    count = len(PROBLEMS)
    assert len(results) == 3 * count
    loaded: set[str] = set()
    for i, problem in enumerate(PROBLEMS):
        launches, tensors = torch_launches(problem, monkeypatch)
        for before, inside, host in (*results[2 * i : 2 * i + 2], results[3 * count - 1 - i]):
            assert host["created"] and host["wrong"] == "", problem
            assert all("loaded" in line for line in before) and all("image" in line for line in inside), problem
            assert len(inside) == len(launches), problem
            assert host["shapes"] == [list(tensors["v"].shape), list(tensors["state"].shape)]
            names = ("q", "k", "v", "g", "b", "w", "state", "o", "final_state")
            at = {tensors[name].data_ptr(): there for name, there in zip(names, host["at"]) if tensors[name].numel()}
            parts: dict[int, int] = {}
            for got, want in zip(inside, launches):
                assert_same_launch(got, want, built, session.images[got["image"]], at, parts)
                loaded.add(want.name)
            mine = {y.data_ptr(): y.nbytes for one in launches for y in one.arguments if isinstance(y, torch.Tensor)}
            assert_parts_lie_apart(parts, mine, host["at"][-1], host["bytes"])
            assert (host["bytes"] > 0) == (problem.T > 1 and problem.B > 0), problem
    assert len(loaded) == len(session.images)  # each was loaded once


def test_what_was_lent_is_given_back(session):
    """Scratch buffers, shapes and errors are counted by the host after every call."""
    assert session.lines[-1] == {"allocators": 0}


def test_both_states_may_be_one_buffer(drive):
    for T in (1, 63, 200):
        line = Problem(2, T, 2, 4, 64, 64, torch.bfloat16).command()
        lines = drive([line, line.replace("run", "aliased")]).lines
        (_, apart, two), (_, together, one) = launches_of(lines, "created")
        assert two["wrong"] == one["wrong"] == "" and one["at"][8] == one["at"][6] != two["at"][8]
        assert [x["image"] for x in apart] == [x["image"] for x in together]
        values = [value for x in together for _, value in x["parameters"]]
        assert values.count(one["at"][6]) == 2  # read, and written by the last launch


def test_threads_share_a_kernel(drive):
    done = drive(["threads 4", "end"])
    assert done.lines[-2:] == [{"good": 40}, {"allocators": 0}]
    launched = [line["image"] for line in done.lines if "image" in line]
    symbols = [line["symbol"] for line in done.lines if "loaded" in line]
    assert sorted(symbols) == ["prepare_kernel", "recur_kernel", "step_kernel"]
    assert [launched.count(symbols.index(name)) for name in ("prepare_kernel", "recur_kernel", "step_kernel")] == [
        20
    ] * 3


@pytest.mark.parametrize("version, ops", [("1.17.3", OPS[:3]), ("1.18.0", OPS), ("1.31.1", OPS), ("2.0.0", OPS)])
def test_a_runtime_without_scratch_buffers_gets_the_kernels_of_the_cpu(version, ops, drive):
    assert drive([], version=version).ops == ops


def wrong(session: Session) -> str:
    """Of a script of one call: nothing was launched."""
    assert not any("image" in line for line in session.lines)
    assert session.lines[-1]["wrong"].startswith(HEAD)
    return session.lines[-1]["wrong"].removeprefix(HEAD)


@pytest.mark.parametrize(
    "line, text",
    [
        (f"run 2 5 2 2 300 64 {BF16} 1", "expected head sizes K and V in 1..256, got 300 and 64"),
        (f"run 2 5 2 2 64 0 {BF16} 1", "expected head sizes K and V in 1..256, got 64 and 0"),
        (f"run 2 5 2 3 64 64 {BF16} 1", "expected HV to be a positive multiple of H = 2, got 3"),
        (f"run 2 5 2 2 32 32 {BF16} 1", "got step-bf16-k32-v32-slots0-masked0, which it does not hold; build it with"),
        ("shape 1 2 4 2 64", "expected k of shape [2, 5, 2, 64], got [2, 4, 2, 64]"),
        ("shape 6 2 4 64 65", "expected initial_state of shape [2, 4, 64, 64], got [2, 4, 64, 65]"),
        ("misaligned", "expected tensors at multiples of 16 bytes, got others"),
        ("unscaled", "expected the attribute scale, a float, got a node without it"),
    ],
)
def test_what_cannot_run_is_a_status(line, text, drive):
    assert text in wrong(drive([line]))


@pytest.mark.parametrize("arch", [75, 91, 100])
def test_an_architecture_without_cubins_is_a_status(arch, drive):
    done = drive([f"run 1 1 1 1 64 64 {BF16} 1"], arch=arch)
    assert f"(sm_90, 80), got sm_{arch}; build the library for it: gdn2 build-plugin" in wrong(done)
    assert done.lines[-1]["created"] is True


def test_no_driver_is_a_status_when_a_kernel_is_made(drive):
    done = drive([f"run 1 1 1 1 64 64 {BF16} 1"], driver=False)
    assert wrong(done).startswith("expected a CUDA driver, got none: libcuda.so.1")
    assert done.lines[-1]["created"] is False


def test_no_cubins_is_a_status_when_a_kernel_is_made(drive, folder, tmp_path):
    library = shutil.copy(folder / LIBRARY, tmp_path)
    line = f"run 1 1 1 1 64 64 {BF16} 1"
    done = drive([line], library=library)
    assert re.match(r"expected GPU kernels beside this library, got none: .*/libgdn2_cubins\.so: ", wrong(done))
    assert wrong(done).endswith("gdn2 build-plugin --for onnxruntime") and done.lines[-1]["created"] is False


def test_cubins_of_another_format_are_a_status(drive, folder, built, tmp_path):
    table = (built.cubins / "table.cpp").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "table.cpp").write_text(table.replace("{TABLE_FORMAT,", "{TABLE_FORMAT + 1,"))
    shutil.copy(built.cubins / "cubins.S", other)
    plugin.compile_library(other, tmp_path, "onnxruntime")
    library = shutil.copy(folder / LIBRARY, tmp_path)
    done = drive([f"run 1 1 1 1 64 64 {BF16} 1"], library=library)
    assert "expected GPU kernels of format 1 in " in wrong(done) and "libgdn2_cubins.so, got 2; this writes" in wrong(
        done
    )


IN_ONNX_RUNTIME = """
import sys
import onnxruntime, torch
from cases import Case, inputs
from onnx_files import feed, one_node, run_in_one_buffer

options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(sys.argv[1])
file = one_node("scan").SerializeToString()
session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
for T in map(int, sys.argv[2:]):
    x = inputs(Case("real", T, B=2, H=2, HV=4, K=64, V=64), torch.float32)
    run_in_one_buffer(session, feed(x), {"initial_state": "final_state"})
"""


def test_onnx_runtime_itself_runs_the_code(folder, cuda, built, tmp_path, monkeypatch):
    """With both states in one buffer and on no stream, which the CPU has none of; a workspace comes back for reuse."""
    shim, record = tmp_path / "shim.so", tmp_path / "record"
    record.mkdir()
    abi = ROOT / "runtime" / "onnxruntime"
    run(["c++", "-std=c++17", "-shared", "-fPIC", f"-I{abi}", HERE / "onnxruntime_shim.cpp", "-o", shim, "-ldl"])
    env = os.environ | {"LD_LIBRARY_PATH": str(cuda), "GDN2_RECORD": str(record), "PYTHONPATH": str(ROOT / "tests")}
    env["GDN2_LIBRARY"] = str(folder / LIBRARY)
    lengths = (1, 0, 70, 70, 70)
    done = run([sys.executable, "-c", IN_ONNX_RUNTIME, shim, *lengths], env=env, timeout=120)
    launched = [line for line in map(json.loads, done.splitlines()) if "image" in line]
    workspaces = []
    for T in lengths:
        launches, _ = torch_launches(Problem(2, T, 2, 4, 64, 64, torch.float32, 0.5), monkeypatch)
        for want in launches:
            got, entry = launched.pop(0), built.entries[want.name]
            assert (record / f"{got['image']}.cubin").read_bytes() == (built.cubins / entry["file"]).read_bytes()
            assert (got["grid"], got["shared"], got["stream"]) == (want.grid, entry["shared_memory"], 0)
            values = {x["name"]: value for x, (_, value) in zip(entry["parameters"], got["parameters"])}
            for parameter, argument in zip(entry["parameters"], want.arguments):
                assert parameter["type"] != "i32" or values[parameter["name"]] == argument
        assert values["state"] == values["final_state"] > 0
        workspaces += [values["e"]] if T == 70 else []
    assert not launched and len(workspaces) == 3 and len(set(workspaces)) == 1
