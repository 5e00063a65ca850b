"""Rung 9: examples/tensorrt/verify.sh, which the owner of a TensorRT runs, says what it found and nothing else.

The programs that it calls are stand-ins here; the comparison itself is `gdn2 check` of a plan, on the stand-ins of
rung 6.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdn2_ops import check_plan, cli
from gdn2_ops.export import tensorrt
from gdn2_ops.export import tensorrt_commands as commands

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPT = ROOT / "examples" / "tensorrt" / "verify.sh"
TINY = ROOT / "examples" / "models" / "tiny"
PYTHON = """#!/bin/sh
# Answers what verify.sh asks, writes down the commands of gdn2, and fails in those that name FAIL.
if [ "$1" = -c ]; then
    case $2 in
    *Driver*) [ -n "$NO_GPU" ] && { echo no driver >&2; exit 3; }; echo 90 ;;
    *) [ -n "$NO_TENSORRT" ] && { echo no module >&2; exit 1; }; echo 11.4 ;;
    esac
    exit 0
fi
shift 2
echo "$@" >> "$CALLS"
case "$*" in *"$FAIL"*) exit 1 ;; esac
"""


@pytest.fixture
def verify(tmp_path):
    """Runs the script with answers; returns its status, its last line and the commands."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*arguments: str, **answers: str) -> tuple[int, str, list[list[str]]]:
        calls.write_text("")
        empty = {"NO_GPU": "", "NO_TENSORRT": "", "FAIL": "nothing fails", "CALLS": str(calls)}
        env = os.environ | {"PYTHON": str(python), "WORK": str(tmp_path / "work")} | empty | answers
        done = subprocess.run(["sh", SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=120)
        lines = calls.read_text().splitlines() if not arguments else done.stdout.splitlines()
        return done.returncode, done.stdout.splitlines()[-1], [line.split() for line in lines]

    return run


def test_every_type_and_kind_is_built_and_checked(verify, tmp_path):
    status, verdict, calls = verify()
    assert (status, verdict) == (0, "verdict: verified: 9 plans agree with eager, TensorRT 11.4, sm_90")
    assert calls[0][:2] == ["build-plugin", "-o"] and calls[0][3:] == ["--arch", "90", "--head-size", "32"]
    exports, checks = ([call for call in calls if call[0] == name] for name in ("export", "check"))
    plans = [call[call.index("-o") + 1] for call in exports]
    work, types = tmp_path / "work", ("float32", "float16", "bfloat16")
    assert plans == [f"{work}/{dtype}-{kind}.plan" for dtype in types for kind in ("plugin", "body")]
    library = f"--plugin={work}/plugin/libgdn2_tensorrt.so"
    assert [call[call.index("--dtype") + 2] for call in exports] == [library, "--plugin="] * 3
    assert [(call[1], "--in-place" in call, "--plugin" in call) for call in checks] == [
        (f"{work}/{dtype}-{'body' if kind == 'body' else 'plugin'}.plan", kind == "in-place", kind != "body")
        for dtype in types
        for kind in ("plugin", "in-place", "body")
    ]


def test_a_plan_that_differs_or_is_not_built_fails(verify):
    status, verdict, _ = verify(FAIL="--in-place")
    assert (
        status == 1
        and verdict == "verdict: failed: float32-in-place float16-in-place bfloat16-in-place; 6 agree with eager"
    )
    status, verdict, _ = verify(FAIL="--dtype float16")
    assert (
        status == 1 and verdict == "verdict: failed: float16-plugin float16-in-place float16-body; 6 agree with eager"
    )
    assert verify(FAIL="build-plugin")[:2] == (1, "verdict: failed: the plugin was not built")


def test_nothing_is_verified_without_a_gpu_or_tensorrt(verify):
    assert verify(NO_GPU="yes") == (3, "verdict: not verified: no GPU found (no driver)", [])
    status, verdict, calls = verify(NO_TENSORRT="yes")
    assert status == 2 and calls == [] and verdict.startswith("verdict: not verified: no tensorrt (no module): ")
    assert verify(PYTHON="/no/such/python")[0] == 1


def test_on_this_machine():
    done = subprocess.run(["sh", SCRIPT], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.startswith(
        "verdict: not verified: no GPU found (expected an NVIDIA GPU"
    )


def test_a_dry_run_prints_commands_that_exist(verify, capsys):
    status, _, calls = verify("--dry-run")
    assert status == 0 and len(calls) == 16
    parser = cli._parser()
    for _, module, name, *words in calls:
        assert (module, name) == ("-m", "gdn2_ops.cli") and parser.parse_args(words).command


def test_the_script_is_portable_shell(wheel):
    shellcheck = next(wheel("shellcheck-0.11.0.1").rglob("shellcheck"))
    assert subprocess.run([shellcheck, "--shell=sh", SCRIPT], capture_output=True, text=True).stdout == ""


@pytest.fixture
def plans(standin, exported, tmp_path, monkeypatch) -> dict[str, Path]:
    """Of the model, and of one whose weights are others."""
    import onnx

    monkeypatch.setattr(check_plan, "TEXT_BYTES", 1024)
    model = onnx.load(exported)
    weight = next(x for x in model.graph.initializer if x.data_type == onnx.TensorProto.FLOAT and len(x.dims) == 2)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    made = {"same": exported, "other": tmp_path / "other.onnx"}
    for name, file in made.items():
        profiles = commands.Sizes(1, 512).profiles(commands.read_inputs(file))
        tensorrt.build(file, tmp_path / f"{name}.plan", profiles, plugin=None)
        made[name] = tmp_path / f"{name}.plan"
    return made


def test_check_of_a_plan(plans, capsys):
    for options in ([], ["--in-place"]):
        assert cli.main(["check", str(plans["same"]), "--model", str(TINY), *options]) == 0
        out = capsys.readouterr().out
        assert "float32; 1,024 bytes of held-out modules" in out and "agrees with torch eager." in out
    assert ("states in one buffer agrees" in out) and cli.main(
        ["check", str(plans["other"]), "--model", str(TINY)]
    ) == 1
    assert "TensorRT: logits differ from torch eager by" in capsys.readouterr().out
    assert cli.main(["check", str(plans["same"])]) == 2
    assert "expected --model with a plan" in capsys.readouterr().err
    assert cli.main(["check", "x.onnx", "--in-place"]) == 2
    assert "expected a plan with --plugin and --in-place, got 'x.onnx'" in capsys.readouterr().err
