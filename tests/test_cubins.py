"""The table that C++ libraries embed: what is in it, and that the launcher of runtime/cuda knows every name in it."""

import json
import re
from pathlib import Path

import pytest

from gdn2_ops import cli
from gdn2_ops.export import cubins, plugin
from gdn2_ops.kernels import catalog, tiles

CUDA = Path(__file__).parent.parent / "runtime" / "cuda"


def test_what_is_embedded_is_what_a_batch_launches():
    builds = cubins.embedded([90], [(64, 128)], ["bf16", "fp32"])
    masks = {"recur": {0}, "recur_masked": {1}}
    for kernel, chosen in cubins.EMBEDDED.items():
        for dtype in ("bf16", "fp32"):
            found = [dict(build.options) for build in builds if (build.kernel, build.dtype) == (kernel, dtype)]
            assert {options["MASKED"] for options in found} == masks.get(kernel, {0, 1})
            assert len(found) == len(masks.get(kernel, {0, 1}))
            assert all(options.items() >= chosen.items() for options in found)
    assert {(build.K, build.V) for build in builds if build.kernel == "prepare"} == {(64, 64)}
    assert {(build.K, build.V) for build in builds if build.kernel != "prepare"} == {(64, 128)}
    assert {dict(build.options)["EXACT"] for build in builds if (build.kernel, build.dtype) == ("chain", "fp32")} == {1}
    assert {dict(build.options)["EXACT"] for build in builds if (build.kernel, build.dtype) == ("chain", "bf16")} == {0}


def test_the_launcher_knows_every_parameter_and_every_size_of_a_grid():
    pointers = set(re.findall(r"GDN2_POINTER\((\w+)\)", (CUDA / "kernels.cpp").read_text())) - {"name"}
    sizes = set(re.findall(r"GDN2_SIZE\((\w+)\)", (CUDA / "kernels.cpp").read_text())) - {"name"}
    (members,) = re.findall(r"struct Sizes \{\s*int64_t ([^;]*);", (CUDA / "kernels.h").read_text())
    known = set(members.split(", ")) | {"K", "V", "BK", "BV"}
    for kernel in catalog.catalog():
        if kernel.name in cubins.EMBEDDED:
            for name, kind in kernel.types.items():
                assert name in (pointers if kind.startswith("*") else sizes | {"scale"}), (kernel.name, name)
            assert set(re.findall(r"[A-Za-z]\w*", kernel.grid)) <= known, kernel.name


ENTRY = {
    "kernel": "step",
    "dtype": "bf16",
    "name": "step-bf16-k64-v64-slots0-masked0-sm80",
    "arch": 80,
    "target": "sm_80",
    "file": "step.cubin",
    "symbol": "step_kernel",
    "threads": 64,
    "shared_memory": 512,
    "constexprs": {"K": 64, "V": 64, "BV": 32},
    "parameters": [{"name": "q", "type": "*bf16", "size": 8}, {"name": "H", "type": "i32", "size": 4}],
    "grid": "(N * HV * V / BV, 1, 1)",
}
MANIFEST = {
    "format": 1,
    "hidden_parameters": ["one", "two"],
    "pointer_alignment": 16,
    "head_sizes": [32, 64],
    "segments": [[4, 128, 16]],
    "kernels": [ENTRY],
}


def write(folder: Path, **changes) -> str:
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | changes))
    table, images = cubins.write_table(folder)
    assert f'.incbin "{folder / "step.cubin"}"' in images.read_text()
    return table.read_text()


def test_the_table_says_what_the_manifest_says(tmp_path):
    text = write(tmp_path)
    assert 'const Parameter step[] = {{"q", Kind::pointer}, {"H", Kind::i32}};' in text
    row = '{"step-bf16-k64-v64-slots0-masked0", "step_kernel", gdn2_cubin_0, step, step_grid, 80, false, 64, 512, 2,'
    assert row in text and "return N * HV * V / BV;" in text and "const int64_t BV = image.BV;" in text
    assert "const int64_t HEAD_SIZES[] = {32, 64};" in text and "SEGMENTS[] = {{4, 128, 16}};" in text
    assert ", 80, true, 64," in write(tmp_path, kernels=[ENTRY | {"target": "sm_80a"}])


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"format": 2}, "expected a manifest of format 1, got 2"),
        ({"kernels": [ENTRY | {"kernel": "gradients"}]}, r"expected kernels among .*, got \('gradients',\)"),
        ({"kernels": [ENTRY | {"grid": "(N, H, 1)"}]}, r"step: expected a grid like '\(N \* H, 1, 1\)', got"),
    ],
)
def test_a_manifest_that_cannot_be_embedded_is_refused(changes, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        write(tmp_path, **changes)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected manifest\.json in"):
        cubins.write_table(tmp_path)


def test_an_unknown_head_size_is_refused():
    with pytest.raises(ValueError, match=re.escape(f"expected head sizes among {tiles.HEAD_SIZES}, got (96, 96")):
        cubins.embedded(head_sizes=[(96, 96)])


def test_the_command_line_refuses_an_unknown_architecture(tmp_path, capsys):
    assert cli.main(["build-plugin", "-o", str(tmp_path / "none"), "--arch", "75"]) == 2
    assert "expected architectures among (80, 90, 100, 120), got (75,)" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words, target", [([], "tensorrt"), (["--for", "onnxruntime"], "onnxruntime")])
def test_the_command_line_builds_what_it_is_for(words, target, tmp_path, capsys, monkeypatch):
    def build(output, builds, *, target, jobs, report):
        output.mkdir()
        (output / plugin.TARGETS[target][0]).write_bytes(bytes(1234))
        return output / plugin.TARGETS[target][0]

    monkeypatch.setattr(plugin, "build", build)
    assert cli.main(["build-plugin", "-o", str(tmp_path / "made"), "--arch", "90", *words]) == 0
    name = {"tensorrt": "libgdn2_tensorrt.so", "onnxruntime": "libgdn2_cubins.so"}[target]
    assert capsys.readouterr().out == f"wrote {tmp_path / 'made' / name} (1,234 bytes)\n"


def test_without_cmake_the_error_names_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(plugin.shutil, "which", lambda *name, **path: None)
    with pytest.raises(ImportError, match=r"needs cmake: pip install 'gdn2-ops\[tensorrt\]'"):
        plugin.build(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


def test_where_the_plugin_is_not_built_the_error_names_the_command():
    from gdn2_ops import runtime
    from gdn2_ops.compiled import library_folder

    if not (library_folder() / plugin.LIBRARY).is_file():
        with pytest.raises(ImportError, match=r"expected libgdn2_tensorrt.so in .*: gdn2 build-plugin"):
            runtime.tensorrt_plugin()
    else:
        assert runtime.tensorrt_plugin() == library_folder() / plugin.LIBRARY


def test_where_the_cubins_are_not_built_the_error_names_the_command():
    from gdn2_ops.runtime import onnxruntime_library

    file = onnxruntime_library.path().parent / "libgdn2_cubins.so"
    if not file.is_file():
        with pytest.raises(ImportError, match=r"expected libgdn2_cubins.so in .*: gdn2 build-plugin --for onnxruntime"):
            onnxruntime_library.cubins()
    else:
        assert onnxruntime_library.cubins() == file
