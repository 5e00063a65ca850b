"""Rung 5: what `gdn2 export --to tensorrt` asks of TensorRT's builder is in NVIDIA's bindings; its command lines parse.

The builder of TensorRT-RTX, which has the same interface, takes all of it but plugins. A stand-in for the package, held
against the bindings of TensorRT 10.15 and 11.4 name by name, shows what is done with the answers.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gdn2_ops import cli
from gdn2_ops.export import tensorrt
from gdn2_ops.export import tensorrt_commands as commands

HERE = Path(__file__).parent
VERSIONS = ("10.15.1.29", "11.4.0.106")
STANDIN = HERE / "standin" / "tensorrt" / "__init__.py"
TINY = HERE.parent.parent / "examples" / "models" / "tiny"
AT_RUN_TIME = ("Runtime", "ICudaEngine", "IExecutionContext", "ILogger", "IPluginRegistry", "TensorIOMode", "DataType")


@pytest.fixture
def compare(wheel, empty_libraries):
    def compared(folder: str, *arguments, file: Path = STANDIN) -> list[str]:
        env = os.environ | {"PYTHONPATH": str(wheel(folder)), "LD_LIBRARY_PATH": str(empty_libraries)}
        command = [sys.executable, HERE / "bindings.py", file, *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return compared


@pytest.mark.parametrize("version", VERSIONS)
def test_names_parameters_and_numbers_are_those_of_the_bindings(version, compare):
    assert compare(f"bindings-{version}", "tensorrt_bindings") == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_runs_a_plan_is_in_the_lean_bindings_too(version, compare):
    assert compare(f"lean-{version}", "tensorrt_lean_bindings", *AT_RUN_TIME) == []


def test_the_bindings_of_tensorrt_rtx_are_the_same(compare):
    assert compare("rtx-1.7.1.116", "tensorrt_rtx") == []


def test_a_wrong_name_parameter_or_number_is_found(compare, tmp_path):
    text = STANDIN.read_text()
    for right, wrong in (
        ("def set_timing_cache(self, cache, ignore_mismatch)", "def set_timing_cache(self, cache, mismatch)"),
        ("def clear_flag(self, flag)", "def remove_flag(self, flag)"),
        ("self.progress_monitor = None", "self.monitor = None"),
        ("PLUGIN_V3 = 46", "PLUGIN_V3 = 45"),
        ("TF32 = enum.auto()", "FP33 = enum.auto()"),
    ):
        assert right in text
        text = text.replace(right, wrong)
    (tmp_path / "standin.py").write_text(text)
    found = compare("bindings-11.4.0.106", "tensorrt_bindings", file=tmp_path / "standin.py")
    assert [line.split(":")[0] for line in found] == [
        "LayerType.PLUGIN_V3",
        "BuilderFlag.FP33",
        "IBuilderConfig.monitor",
        "IBuilderConfig.remove_flag",
        "IBuilderConfig.set_timing_cache",
    ]


def test_the_builder_of_tensorrt_rtx_builds_both_profiles(wheel, exported, tmp_path):
    env = os.environ | {"PYTHONPATH": str(wheel("rtx-1.7.1.116"))}
    command = [sys.executable, HERE / "rtx_builder.py", exported, tmp_path / "tiny.plan", tmp_path / "cache"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["layers"] > 500 and seen["size"] == (tmp_path / "tiny.plan").stat().st_size > 1_000_000
    parts = [part for _, part in seen["said"]]
    assert parts == sorted(parts) and parts[-1] == 1.0 and len(parts) > 100  # progress, by TensorRT's own monitor
    assert seen["said"][-1][0] == "Building engine" and (tmp_path / "cache").stat().st_size > 100
    assert seen["refused"].startswith("TensorRT's parser refuses") and seen["cancelled"]


def test_an_export_of_a_model(standin, built, tmp_path, capsys):
    said, cache, file = [], tmp_path / "timing.cache", tmp_path / "tiny.onnx"
    assert cli_export(tmp_path, "--plugin", built.library, "--timing-cache", cache) == 0
    printed = capsys.readouterr()
    assert "4 of them plugins" in printed.out and "100% Building engine" in printed.err
    profiles = commands.Sizes(2, 16).profiles(commands.read_inputs(file))
    for known in (b"timed", b"of another GPU"):
        cache.write_bytes(known)
        tensorrt.build(file, tmp_path / "tiny.plan", profiles, plugin=built.library, timing_cache=cache)
        assert cache.read_bytes() == b"timed"
    assert [line["cache"] for line in standin()] == ["", "timed", ""]
    found = tensorrt.build(
        file, tmp_path / "b.plan", profiles, plugin=built.library, report=lambda what, part: said.append((what, part))
    )
    assert found.plugins == 4 and found.layers > 100 and found.size == (tmp_path / "b.plan").stat().st_size
    assert said[0] == ("Building engine", 0.0) and said[-1] == ("Building engine", 1.0)
    assert ("Building engine: Timing 0", 0.25) in said and [part for _, part in said] == sorted(p for _, p in said)
    assert standin()[-1] == {"built": str(file), "cleared": ["TF32"], "profiles": 2, "cache": ""}


def cli_export(folder: Path, *options) -> int:
    return cli.main(["export", str(TINY), "--to", "tensorrt", "-o", str(folder / "tiny.plan"), *map(str, options)])


def test_a_build_that_is_refused_or_cancelled_writes_nothing(standin, exported, tmp_path, built):
    inputs = commands.read_inputs(exported)
    profiles, plan = commands.Sizes().profiles(inputs), tmp_path / "none.plan"
    (tmp_path / "text.onnx").write_text("no model")
    refused = tmp_path / "gdn2_refuse.onnx"
    refused.write_bytes(exported.read_bytes())

    def build(file, **options):
        return tensorrt.build(file, plan, options.pop("profiles", profiles), **({"plugin": None} | options))

    with pytest.raises(RuntimeError, match=r"parser refuses .*text.onnx.*: In node 0"):
        build(tmp_path / "text.onnx")
    with pytest.raises(RuntimeError, match=r"builds no engine of .*: Error Code 4"):
        build(refused)
    with pytest.raises(RuntimeError, match=r"refuses the plugin '/no/such.so': it said nothing"):
        build(exported, plugin="/no/such.so")
    with pytest.raises(ValueError, match="expected profiles of the inputs"):
        build(exported, profiles=[{"input_ids": profiles[0]["input_ids"]}])

    def interrupt(what, part):
        if part >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(exported, report=interrupt)
    assert not plan.exists()


def test_nodes_of_another_kind_become_no_plugin(standin, tmp_path, built):
    import onnx

    other = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) {y = Abs(x)}'
    )
    onnx.save(other, tmp_path / "abs.onnx")
    with pytest.raises(RuntimeError, match=r"expected nodes that become plugins in .*abs\.onnx"):
        tensorrt.build(tmp_path / "abs.onnx", tmp_path / "p", [{"x": ((1,), (1,), (1,))}], plugin=built.library)


def test_without_tensorrt_or_a_gpu_the_error_says_what_to_do(exported, tmp_path, capsys):
    assert cli_export(tmp_path, "--plugin", "") == 2
    error = capsys.readouterr().err
    assert "needs tensorrt and a GPU: pip install tensorrt-cu13" in error and "--dry-run" in error
    assert cli_export(tmp_path, "--plugin", "/no/such.so") == 2
    assert "expected a plugin library, got '/no/such.so'; gdn2 build-plugin" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_with_tensorrt_and_no_driver_the_error_says_so(exported, tmp_path):
    env = os.environ | {"PYTHONPATH": str(STANDIN.parent.parent)}
    command = [sys.executable, "-m", "gdn2_ops.cli", "export", TINY, "--to", "tensorrt", "--plugin", ""]
    done = subprocess.run([*command, "-o", tmp_path / "m.plan"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(
        "gdn2: error: expected an NVIDIA GPU and its driver, got none"
    )


def test_sizes_that_no_profile_can_have():
    with pytest.raises(ValueError, match="at least one sequence and one token, got 0 and 1"):
        commands.Sizes(0, 1)
    with pytest.raises(ValueError, match=r"dimensions named 'batch' and 'sequence', got \['rows'\] of 'x'"):
        commands.Sizes().profiles({"x": ("rows", 3)})


# Options of trtexec as its sources have them (samples/common/sampleOptions.cpp of NVIDIA/TensorRT, 10.x); those without
# a value are false here. Shapes of a profile come right behind its number, in any order.
TRTEXEC = {"--onnx": True, "--saveEngine": True, "--stronglyTyped": False, "--noTF32": False, "--skipInference": False}
TRTEXEC |= {"--dynamicPlugins": True, "--timingCacheFile": True}
SHAPES = ("--minShapes", "--optShapes", "--maxShapes")


def read_trtexec(line: str) -> tuple[dict, list[commands.Profile]]:
    """As trtexec reads it: an option ends at its first =."""
    name, *words = shlex.split(line)
    assert name == "trtexec"
    pairs, options, profiles = [word.partition("=")[::2] for word in words], {}, []
    while pairs:
        option, value = pairs.pop(0)
        if option != "--profile":
            assert bool(value) == TRTEXEC[option] and option not in options
            options[option] = value
            continue
        assert int(value) == len(profiles)
        shapes = {}
        for option, value in (pairs.pop(0) for _ in SHAPES):
            named = [item.rpartition(":")[::2] for item in value.split(",")]
            shapes[option] = {name: tuple(map(int, sizes.split("x"))) for name, sizes in named}
        profiles.append({name: tuple(shapes[option][name] for option in SHAPES) for name in shapes[SHAPES[0]]})
    return options, profiles


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder, whose name has a space in it, and the lines of a dry run."""
    folder = tmp_path_factory.mktemp("dry run")
    options = ["--dry-run", "--batch", "3", "--tokens", "32", "--plugin", "my plugin.so", "--timing-cache", "my.cache"]
    command = [
        sys.executable,
        "-m",
        "gdn2_ops.cli",
        "export",
        TINY,
        "--to",
        "tensorrt",
        "-o",
        folder / "t.plan",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [file.name for file in folder.iterdir()] == ["t.onnx"]
    return folder, done.stdout.strip().split("\n\n")


@pytest.fixture(scope="module")
def wanted(printed) -> list[commands.Profile]:
    states = {
        name: axes[1:] for name, axes in commands.read_inputs(printed[0] / "t.onnx").items() if name != "input_ids"
    }
    assert len(states) == 8 and states["past.3.recurrent"] == (4, 32, 32)
    ranges = [[(1, 1), (1, 32), (3, 32)], [(1, 1), (3, 1), (3, 1)]]
    return [
        {"input_ids": tuple(sizes)} | {name: tuple((B, *axes) for B, _ in sizes) for name, axes in states.items()}
        for sizes in ranges
    ]


def test_the_line_for_trtexec(printed, wanted):
    folder, lines = printed
    options, profiles = read_trtexec(lines[0])
    assert profiles == wanted and [list(x) for x in profiles] == [list(x) for x in wanted]
    assert options == {
        "--onnx": str(folder / "t.onnx"),
        "--saveEngine": str(folder / "t.plan"),
        "--stronglyTyped": "",
        "--noTF32": "",
        "--skipInference": "",
        "--dynamicPlugins": "my plugin.so",
        "--timingCacheFile": "my.cache",
    }


def test_polygraphy_reads_its_lines(printed, wanted, wheel):
    """By polygraphy's own argument parser, which needs no TensorRT."""
    folder, (_, convert, compare) = printed
    env = os.environ | {"PYTHONPATH": str(wheel("polygraphy-0.53.6"))}

    def read(line: str) -> dict:
        command = [sys.executable, HERE / "polygraphy_arguments.py", *shlex.split(line)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    seen = read(convert)
    assert seen["profiles"] == [{name: list(map(list, x)) for name, x in profile.items()} for profile in wanted]
    assert seen["model"] == str(folder / "t.onnx") and seen["output"] == str(folder / "t.plan") and seen["to"] == "trt"
    assert seen["plugins"] == ["my plugin.so"] and seen["strongly_typed"] and not seen["tf32"]
    assert seen["caches"] == ["my.cache", "my.cache"]
    seen = read(compare)
    assert seen["profiles"] == [{name: list(map(list, x)) for name, x in wanted[0].items()}]
    assert seen["runners"] == ["trt", "onnxrt"] and seen["plugins"] == ["my plugin.so"] and seen["strongly_typed"]
    assert seen["inputs"] == {name: list(x[1]) for name, x in wanted[0].items()} and seen["tolerance"] == [1e-3, 1e-3]
