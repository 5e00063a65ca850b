"""Cubins and their manifest, built without a GPU in processes of their own: this one interprets kernels."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gdn2_ops import cli, kernels
from gdn2_ops.export import kernels as export
from gdn2_ops.kernels import catalog, kernel, step, tiles

COMPILING = os.environ | {"TRITON_INTERPRET": "0"}


def gdn2(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gdn2_ops.cli", *arguments]
    return subprocess.run(command, env=COMPILING, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One kernel in both its options for one architecture."""
    folder = tmp_path_factory.mktemp("kernels") / "cubins"
    selection = ["--kernel", "step", "--arch", "90", "--dtype", "bf16", "--head-size", "64x128", "--jobs", "1"]
    done = gdn2("build-kernels", "-o", str(folder), *selection)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 of 4 cubins", f"wrote {folder / 'manifest.json'}"]
    return folder


def test_the_manifest_says_what_a_launcher_needs(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["pointer_alignment"] == 16
    assert manifest["hidden_parameters"] == ["global_scratch", "profile_scratch"]
    assert [tuple(entry["options"].values()) for entry in manifest["kernels"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for entry in manifest["kernels"]:
        assert (entry["kernel"], entry["symbol"], entry["dtype"]) == ("step", "step_kernel", "bf16")
        assert (entry["K"], entry["V"], entry["arch"]) == (64, 128, 90)
        assert entry["target"] == "sm_90a"
        tile = tiles.tile("step", "bf16", 64, 128, 90)
        assert entry["threads"] == 32 * tile.num_warps
        assert entry["constexprs"] == {"K": 64, "V": 128, **entry["options"], **tile.constexprs}
        assert 0 < entry["shared_memory"] <= tiles.SHARED_MEMORY[90]
        declared = [(parameter["name"], parameter["type"], parameter["size"]) for parameter in entry["parameters"]]
        sizes = {"*bf16": 8, "*fp32": 8, "*i64": 8, "i32": 4, "fp32": 4}
        assert declared == [(n, kind, sizes[kind]) for n, kind in step.KERNELS[0].parameter_types("bf16").items()]


def test_the_cubins_are_the_manifest_s(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {entry["file"] for entry in manifest["kernels"]}
    assert names == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for entry in manifest["kernels"]:
        cubin = (folder / entry["file"]).read_bytes()
        assert cubin[:4] == b"\x7fELF" and len(cubin) == entry["bytes"]
        assert hashlib.sha256(cubin).hexdigest() == entry["sha256"]
        assert entry["symbol"].encode() in cubin
        assert os.getcwd().encode() not in cubin  # no paths of this machine


def test_the_plan_is_the_whole_table():
    builds = export.plan()
    assert len({build.name for build in builds}) == len(builds)
    wanted = {
        (one.name, dtype, size, arch)
        for one in catalog.catalog()
        for dtype in tiles.ANY_DTYPE
        for size in tiles.HEAD_SIZES
        for arch in tiles.ARCHS
        if tiles.rows(one.name, dtype, size, size, arch)
    }
    assert {(build.kernel, build.dtype, build.K, build.arch) for build in builds} == wanted
    assert {"step", "step_bf16_state", "step_layer", "step_layer_masked"} <= {build.kernel for build in builds}


def test_every_kernel_of_the_catalog_has_rows_and_every_row_a_kernel():
    assert {one.name for one in catalog.catalog()} == {row.kernel for row in tiles.ROWS}


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--arch", "75"], "expected architectures among (80, 90, 100, 120), got (75,)"),
        (["--head-size", "96"], "expected head sizes among (32, 64, 128, 256), got (96, 96)"),
        (["--head-size", "big"], "expected --head-size like 128 or 128x256, got 'big'"),
        (["--dtype", "fp8"], "expected dtypes among ('fp32', 'bf16', 'fp16'), got ('fp8',)"),
        (["--kernel", "stop"], "expected kernels among"),
    ],
)
def test_a_wrong_selection_is_refused(arguments, text, tmp_path, capsys):
    assert cli.main(["build-kernels", "-o", str(tmp_path / "none"), *arguments]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_interpreting_process_builds_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="expected a compiling Triton, got TRITON_INTERPRET=1"):
        export.build_kernels(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


BUILD = export.Build("step", "bf16", 64, 64, 90, (("SLOTS", 0), ("MASKED", 0)))
PTX = ".entry k(.param .u64 .ptr .global .align 1 a, .param .u32 b, .param .u64 c, .param .u64 d)\n.reqntid 128"
RIGHT = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "num_warps": 4, "shared": 1024}


@pytest.mark.parametrize(
    "changes, ptx, text",
    [
        ({"global_scratch_size": 128}, PTX, "global_scratch_size of nothing, got 128"),
        ({"launch_cooperative_grid": True}, PTX, "launch_cooperative_grid of nothing, got True"),
        ({"tensordesc_meta": [{}]}, PTX, "tensordesc_meta of nothing"),
        ({"num_ctas": 2}, PTX, "no clusters, got 2"),
        ({"shared": 1 << 20}, PTX, "at most 232448 bytes of shared memory, got 1048576; give it a smaller tile"),
        ({"num_warps": 8}, PTX, "expected 256 threads, got 128"),
        ({}, PTX.replace(", .param .u64 d", ""), r"parameters of \[8, 4, 8, 8\] bytes, got \[8, 4, 8\]"),
    ],
)
def test_what_a_cubin_cannot_carry_is_refused(changes, ptx, text):
    types = {"a": "*bf16", "b": "i32"}
    export.refuse_what_a_cubin_cannot_carry(BUILD, SimpleNamespace(**RIGHT), PTX, types)
    with pytest.raises(RuntimeError, match=text):
        export.refuse_what_a_cubin_cannot_carry(BUILD, SimpleNamespace(**(RIGHT | changes)), ptx, types)


@pytest.mark.parametrize("size", [64, 50])
def test_warm_up_launches_what_a_model_needs(size, monkeypatch):
    launched = []
    launch = kernel.Kernel.launch

    def recorded(self, grid, device, dtype, K, V, *arguments, **options):
        launched.append((self.name, dtype, K, V, tuple(options.items())))
        launch(self, grid, device, dtype, K, V, *arguments, **options)

    monkeypatch.setattr(kernel.Kernel, "launch", recorded)
    kernels.warm_up("cpu", torch.float16, size, size, ("chunk", "step", "step_layer"))
    assert {one[1:4] for one in launched} == {(torch.float16, size, size)}
    masked = int(size == 50)
    for one in catalog.catalog():
        ways = {name: values for name, values in one.options.items() if name not in ("MASKED", "BACKWARD")}
        wanted = set(itertools.product(*ways.values()))
        found = [dict(options) for name, *_, options in launched if name == one.name]
        assert all(options["MASKED"] == masked and not options.get("BACKWARD") for options in found)
        of_size = [(name, f"{name}_masked")[masked] for name in ("recur", "step_layer")]
        if one.name in ("step", "prepare", "summarise", *of_size):
            assert {tuple(options[name] for name in ways) for options in found} == wanted


def test_another_part_is_refused():
    with pytest.raises(
        ValueError, match=r"expected parts among \('chunk', 'step', 'backward', 'step_layer'\), got \('train',\)"
    ):
        kernels.warm_up("cpu", torch.float16, 64, 64, ("train",))


def test_a_device_without_kernels_is_refused():
    with pytest.raises(NotImplementedError, match="expected tensors on cuda, got meta"):
        kernel.arch(torch.device("meta"))


def test_a_kernel_whose_types_are_not_its_parameters_is_refused(monkeypatch):
    wrong = replace(step.KERNELS[0], types=dict(reversed(step.KERNELS[0].types.items())))
    monkeypatch.setattr(export, "_kernel", lambda build: wrong)
    with pytest.raises(RuntimeError, match=r"step declares \['q', 'k'"):
        export.compiled_kernel(BUILD)


def test_launchers_hand_over_what_is_built_ahead_of_time():
    script = Path(__file__).with_name("bound_launches.py")
    done = subprocess.run([sys.executable, script], env=COMPILING, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    bound = json.loads(done.stdout)
    assert {one["kernel"] for one in bound} >= {"step_kernel", "step_layer_kernel", "prepare_kernel", "recur_kernel"}
    assert {one["constexprs"]["MASKED"] for one in bound} == {0, 1}
    for launch in bound:
        assert any(is_built_as(launch, one) for one in catalog.catalog()), launch


def is_built_as(launch: dict, one: kernel.Kernel) -> bool:
    """Whether the types, constexprs and warps of a launch are those of the kernel; a pointer may be absent."""
    constexprs = {name: value for name, value in launch["constexprs"].items() if not name.endswith("_ptr")}
    options = {name: constexprs.get(name) for name in one.options}
    if launch["kernel"] != one.function.fn.__name__ or options["MASKED"] not in one.options["MASKED"]:
        return False
    types = {name.removesuffix("_ptr"): kind for name, kind in launch["types"].items() if name not in constexprs}
    wanted, tile = one.constexprs("bf16", 64, 64, 90, **options)
    declared = one.parameter_types("bf16")
    absent = {name for name, kind in types.items() if kind == "constexpr" and declared[name].startswith("*")}
    narrow = {name for name, kind in types.items() if (kind, declared[name]) == ("*i32", "*i64")}  # indices
    same = {name for name in types.keys() - absent - narrow if types[name] == declared[name]}
    return same | absent | narrow == declared.keys() and constexprs == wanted and launch["warps"] == tile.num_warps
