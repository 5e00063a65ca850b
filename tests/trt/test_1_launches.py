"""Rung 1: every launch, read through the cubin's own table of parameters, is the torch launcher's for the same inputs.

Image, grid, threads, shared memory, numbers, pointers to inputs and outputs, and a workspace whose parts lie inside of
it, apart from each other. Nothing is allocated or loaded in enqueue.
"""

import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gdn2_ops.export import cubins, plugin
from gdn2_ops.export.kernels import Build
from gdn2_ops.kernels import chunk_forward, kernel, step, tiles

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7}
SIZES = ((1, 1), (1, 63), (2, 64), (3, 200), (0, 5), (2, 0))
GROUPS = ((2, 2), (2, 6))
MASKED = ((1, 1, 2, 4, 48, 33), (2, 70, 1, 3, 64, 50))  # of cubins for 64
SEGMENTS = ((1, 8192, 1, 2, 64, 64), (2, 2048, 2, 4, 128, 128), (1, 2100, 1, 1, 50, 64))


@dataclass(frozen=True)
class Problem:
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    dtype: torch.dtype
    scale: float = 0.375

    def command(self, most_B: int | None = None, most_T: int | None = None) -> str:
        sizes = (self.B, self.T, self.H, self.HV, self.K, self.V, DTYPES[self.dtype], self.scale)
        most = (self.B if most_B is None else most_B, self.T if most_T is None else most_T)
        return "run " + " ".join(map(str, (*sizes, *most)))


PROBLEMS = [
    *(Problem(B, T, *heads, K, K, dtype) for B, T in SIZES for heads in GROUPS for K in (64, 128) for dtype in DTYPES),
    *(Problem(*sizes, torch.bfloat16) for sizes in (*MASKED, *SEGMENTS)),
    Problem(*SEGMENTS[0], torch.float32),
    Problem(*SEGMENTS[0], torch.float16),
]


@dataclass(frozen=True)
class Launch:
    """name: of the cubin. arguments: numbers, None, and tensors."""

    name: str
    grid: list[int]
    arguments: tuple


def torch_launches(problem: Problem, monkeypatch) -> tuple[list[Launch], dict[str, torch.Tensor]]:
    """What the launchers of gdn2_ops.kernels start on a device of sm_90, and the tensors by their names in the node."""
    launches = []

    def record(self, grid, device, dtype, K, V, *arguments, **options):
        constexprs, _ = self.constexprs(kernel.DTYPES[dtype], K, V, 90, **options)
        blocks = grid(constexprs) if callable(grid) else grid
        if 0 in blocks:
            return
        sizes = (tiles.head_size(K), tiles.head_size(V))
        chosen = tuple((name, options[name]) for name in self.options)
        name = Build(self.name, kernel.DTYPES[dtype], *sizes, 90, chosen).name
        launches.append(Launch(name, [*blocks, 1, 1][:3], arguments))

    monkeypatch.setattr(kernel.Kernel, "launch", record)
    p, (keys, values) = problem, ((problem.B, problem.T, problem.H), (problem.B, problem.T, problem.HV))
    shapes = {"q": (*keys, p.K), "k": (*keys, p.K), "v": (*values, p.V)}
    shapes |= {"g": (*keys, p.K), "b": (*keys, p.K), "w": (*values, p.V)}
    x = {name: torch.empty(shape, dtype=torch.float32 if name == "g" else p.dtype) for name, shape in shapes.items()}
    x["state"] = torch.empty(p.B, p.HV, p.K, p.V)
    if p.T == 1:
        token = [y[:, 0] for name, y in x.items() if name != "state"]
        x["o"], x["final_state"] = step.step(*token, x["state"], p.scale)
    else:
        x["o"], x["final_state"] = chunk_forward.chunk(*x.values(), None, p.scale)
    return launches, x


def assert_same_launch(got: dict, want: Launch, built, image: bytes, at: dict[int, int], parts: dict[int, int]) -> None:
    """at: addresses of tensors of torch here to those in the host. parts: of the workspace, filled as they are met."""
    entry = built.entries[want.name]
    assert image == (built.cubins / entry["file"]).read_bytes(), want.name
    assert got["grid"] == want.grid and got["block"] == [entry["threads"], 1, 1]
    assert got["shared"] == entry["shared_memory"] and got["stream"] == 5
    assert [size for size, _ in got["parameters"]] == [one["size"] for one in entry["parameters"]] + [8, 8]
    assert [value for _, value in got["parameters"][-2:]] == [0, 0]
    assert len(want.arguments) == len(entry["parameters"])
    for parameter, argument, (_, value) in zip(entry["parameters"], want.arguments, got["parameters"]):
        where = f"{want.name}: {parameter['name']}"
        if argument is None:
            assert value == 0 and parameter["type"].startswith("*"), where
        elif parameter["type"] == "i32":
            assert value == argument, where
        elif parameter["type"] == "fp32":
            assert struct.unpack("f", value.to_bytes(4, "little"))[0] == argument, where
        elif argument.numel() > 0:
            here = argument.data_ptr()
            assert value == (at[here] if here in at else parts.setdefault(here, value)), where
            assert value % 16 == 0, where


def assert_parts_lie_apart(parts: dict[int, int], tensors: dict[int, int], begin: int, size: int) -> None:
    """tensors: addresses here to bytes."""
    end = begin
    for here, there in sorted(parts.items(), key=lambda part: part[1]):
        assert there >= end, "parts of the workspace overlap"
        end = there + tensors[here]
    assert end <= begin + size, "the workspace is too small"


def launches_of(lines: list[dict], result: str = "configured") -> list[tuple[list[dict], list[dict], dict]]:
    """For each problem of a session: what was loaded or launched before enqueue, in it, and the host's result.

    result: what the line of a result has.
    """
    found, before, inside, current = [], [], [], None
    for line in lines:
        if result in line:
            found.append((before, inside, line))
            before, inside, current = [], [], None
        elif "enqueue" in line:
            current = inside
        else:
            (before if current is None else current).append(line)
    return found


@pytest.fixture(scope="module")
def session(drive):
    """Every problem twice: in a workspace for itself alone, and in one for larger shapes."""
    return drive([line for p in PROBLEMS for line in (p.command(), p.command(max(p.B, 4), max(p.T, 9000)))])


@pytest.mark.parametrize("larger", [False, True], ids=["own", "larger"])
def test_launches_are_those_of_torch(larger, session, built, monkeypatch):
    results = launches_of(session.lines)
    assert len(results) == 2 * len(PROBLEMS)
    loaded: dict[int, str] = {}
    for problem, (before, inside, host) in zip(PROBLEMS, results[int(larger) :: 2]):
        launches, tensors = torch_launches(problem, monkeypatch)
        assert (host["changed"], host["queued"], host["allocations"]) == (0, 0, 0), (problem, session.messages)
        assert all("loaded" in line for line in before) and all("image" in line for line in inside), problem
        assert len(inside) == len(launches), problem
        names = ("q", "k", "v", "g", "b", "w", "state", "o", "final_state")
        at = {tensors[name].data_ptr(): there for name, there in zip(names, host["at"]) if tensors[name].numel()}
        parts: dict[int, int] = {}
        for got, want in zip(inside, launches):
            assert_same_launch(got, want, built, session.images[got["image"]], at, parts)
            assert loaded.setdefault(got["image"], want.name) == want.name
        mine = {y.data_ptr(): y.nbytes for one in launches for y in one.arguments if isinstance(y, torch.Tensor)}
        assert_parts_lie_apart(parts, mine, host["at"][-1], host["bytes"])
    assert {name.split("-")[0] for name in loaded.values()} == cubins.EMBEDDED.keys()
    assert len(set(loaded.values())) == len(session.images)  # each was loaded once


def test_every_context_has_its_own_modules(drive):
    line = Problem(1, 64, 1, 1, 64, 64, torch.bfloat16).command()
    done = drive([line, "context 2", line, "context 1", line])
    assert [one["context"] for one in done.lines if "loaded" in one] == [1, 1, 2, 2]


def test_a_cubin_of_an_older_minor_version_serves(drive, built):
    line = Problem(1, 1, 1, 1, 64, 64, torch.bfloat16).command()
    for arch, serving in ((80, 80), (86, 80), (89, 80), (90, 90)):
        done = drive([line], arch=arch)
        name = f"step-bf16-k64-v64-slots0-masked0-sm{serving}"
        assert done.images == [(built.cubins / built.entries[name]["file"]).read_bytes()]


def test_threads_share_what_is_loaded(drive):
    done = drive(["threads 4 2 5"])
    assert done.lines[-1] == {"good": 40} and sum("image" in line for line in done.lines) == 80
    assert [line["symbol"] for line in done.lines if "loaded" in line] == ["prepare_kernel", "recur_kernel"]


def test_the_host_of_the_tests_on_a_gpu_drives_it_the_same(recording_cuda, built, tmp_path, monkeypatch):
    """tests/plugin_host.py, which brings tensors of torch, on tensors of the CPU."""
    wanted = PROBLEMS[:: len(PROBLEMS) // 12] + PROBLEMS[-3:]
    script = "\n".join(f"{p.B} {p.T} {p.H} {p.HV} {p.K} {p.V} {str(p.dtype)[6:]} 4 9000" for p in wanted)
    record, host = tmp_path / "record", tmp_path / "host"
    record.mkdir(), host.mkdir()
    env = os.environ | {"LD_LIBRARY_PATH": str(recording_cuda), "GDN2_RECORD": str(record), "GDN2_ARCH": "90"}
    env["PYTHONPATH"] = str(HERE.parent)
    command = [sys.executable, HERE / "gpu_host.py", built.library, host, plugin.TARGETS["tensorrt"][1]]
    done = subprocess.run(command, input=script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    images = [(record / f"{i}.cubin").read_bytes() for i in range(len(list(record.iterdir())))]
    loaded, launched = [], []
    for line in lines:
        if "loaded" in line:
            loaded.append(line)
        elif "image" in line:
            launched.append(line)
        else:
            problem = wanted.pop(0)
            launches, tensors = torch_launches(problem, monkeypatch)
            assert len(launched) == len(launches), problem
            names = ("q", "k", "v", "g", "b", "w", "state", "o", "final_state")
            at = {tensors[name].data_ptr(): there for name, there in zip(names, line["at"]) if tensors[name].numel()}
            parts: dict[int, int] = {}
            for got, want in zip(launched, launches):
                assert_same_launch(got, want, built, images[got["image"]], at, parts)
            mine = {y.data_ptr(): y.nbytes for one in launches for y in one.arguments if isinstance(y, torch.Tensor)}
            assert_parts_lie_apart(parts, mine, line["workspace"], line["bytes"])
            launched = []
    assert not wanted and len(loaded) == len(images) > 4
