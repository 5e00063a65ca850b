"""What the rungs share: the plugin library, a host that drives it, a driver that records."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from gdn2_ops.export.onnx import export
from gdn2_ops.model import GDN2LM

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WHEELS = ROOT / "build" / "tensorrt"  # one folder for each wheel and version: make test-tensorrt
COMPILER = ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
RUNGS: dict[str, tuple[str, list[str]]] = {}  # module: what it proves, outcomes


@dataclass(frozen=True)
class Built:
    """library: of the plugin. cubins: the folder of what it embeds. entries: the manifest's kernels by name."""

    library: Path
    cubins: Path
    entries: dict[str, dict]


@pytest.fixture(scope="session")
def built() -> Built:
    """Built again when a source of it has changed."""
    folder = WHEELS / "plugin"
    files = [*(ROOT / "gdn2_ops" / "kernels").glob("*.py"), HERE / "build.py"]
    files += [ROOT / "export" / f"{name}.py" for name in ("kernels", "cubins", "plugin")]
    files += [file for name in ("cuda", "tensorrt") for file in (ROOT / "runtime" / name).iterdir()]
    texts = [version("triton").encode(), *(file.read_bytes() for file in sorted(files))]
    digest, known = hashlib.sha256(b"".join(texts)).hexdigest(), folder / "digest"
    if not known.is_file() or known.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        env = os.environ | {"TRITON_INTERPRET": "0"}
        run([sys.executable, str(HERE / "build.py"), str(folder)], env=env, timeout=900)
        known.write_text(digest)
    manifest = json.loads((folder / "cubins" / "manifest.json").read_text())
    entries = {entry["name"]: entry for entry in manifest["kernels"]}
    return Built(folder / "libgdn2_tensorrt.so", folder / "cubins", entries)


@dataclass(frozen=True)
class Session:
    """What the host and the driver printed, the messages of the plugin, and the images that were loaded."""

    lines: list[dict]
    messages: list[str]
    images: list[bytes]


@pytest.fixture(scope="session")
def recording_cuda(tmp_path_factory) -> Path:
    """The folder of a libcuda.so.1 that records."""
    folder = tmp_path_factory.mktemp("recording")
    run([*COMPILER, "-shared", "-fPIC", HERE / "recording_cuda.cpp", "-o", folder / "libcuda.so.1"])
    return folder


@pytest.fixture(scope="session")
def drive(built, recording_cuda, tmp_path_factory):
    """Runs a script in the host. driver: with the recording libcuda, else without any."""
    host = tmp_path_factory.mktemp("host") / "host"
    abi = ROOT / "runtime" / "tensorrt"
    run([*COMPILER, f"-I{abi}", "-rdynamic", HERE / "host.cpp", "-o", host, "-ldl", "-pthread"])

    def driven(script: list[str], *, arch: int = 90, driver: bool = True) -> Session:
        record = tmp_path_factory.mktemp("record")
        env = os.environ | {"GDN2_ARCH": str(arch), "GDN2_RECORD": str(record)}
        if driver:
            env["LD_LIBRARY_PATH"] = str(recording_cuda)
        done = subprocess.run(
            [host, built.library], input="\n".join(script), env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        images = [(record / f"{i}.cubin").read_bytes() for i in range(len(list(record.iterdir())))]
        assert lines[0] == {"creator": ["gdn2", "GatedDeltaNet2", "1"]}
        return Session(lines[1:], done.stderr.splitlines(), images)

    return driven


# What NVIDIA's bindings need of the libraries of TensorRT, which PyPI does not have: null pointers, and the registry of
# a lean runtime where one is on the path.
MADE = ("InferBuilder", "InferRefitter", "InferRuntime", "NvOnnxParser", "NvOnnxParserRefitter")
NULL = [f"create{name}_INTERNAL" for name in MADE]
NULL += ["getBuilderPluginRegistry", "initLibNvInferPlugins", "getNvOnnxParserVersion"]
REGISTRY = """#include <dlfcn.h>
void* getPluginRegistry(void) {
  void* lean = dlopen("libnvinfer_lean.so.%d", RTLD_NOW | RTLD_GLOBAL);
  return lean ? ((void* (*)(void))dlsym(lean, "getPluginRegistry"))() : 0;
}
"""


@pytest.fixture(scope="session")
def empty_libraries(tmp_path_factory) -> Path:
    """A folder for LD_LIBRARY_PATH, with which the bindings of both versions load."""
    folder = tmp_path_factory.mktemp("empty")
    nulls = "\n".join(f"void* {symbol}(void) {{ return 0; }}" for symbol in NULL)
    for major in (10, 11):
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            source = nulls + "\n" + REGISTRY % major
            run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", folder / f"lib{name}.so.{major}", "-ldl"], input=source)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """The ONNX file of the model `tiny`."""
    model = GDN2LM.from_pretrained(ROOT / "examples" / "models" / "tiny")
    return export(model, tmp_path_factory.mktemp("onnx") / "tiny.onnx")


@pytest.fixture(scope="session")
def cuda(tmp_path_factory) -> ctypes.CDLL:
    """A driver whose device is host memory. Whoever opens libcuda.so.1 in this process gets it."""
    library = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    name = "-Wl,-soname,libcuda.so.1"
    run([*COMPILER, "-shared", "-fPIC", name, HERE / "standin_cuda.cpp", "-o", library])
    return ctypes.CDLL(str(library))


@pytest.fixture
def standin(cuda, monkeypatch, tmp_path):
    """The stand-in for the package tensorrt, with that driver. Returns what was built and run, so far."""
    monkeypatch.syspath_prepend(HERE / "standin")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setenv("GDN2_TRT_LOG", str(tmp_path / "standin.log"))
    yield lambda: [json.loads(line) for line in (tmp_path / "standin.log").read_text().splitlines()]
    sys.modules.pop("tensorrt", None)


def run(command: list, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def wheel():
    """The folder of a wheel that make test-tensorrt fetches."""

    def found(name: str) -> Path:
        if not (WHEELS / name).is_dir():
            pytest.skip(f"the wheel {name} is not in {WHEELS}: make test-tensorrt fetches it")
        return WHEELS / name

    return found


def pytest_runtest_logreport(report):
    rung = RUNGS.get(report.nodeid.split("::")[0])
    if rung is not None and (report.when == "call" or report.outcome != "passed"):
        rung[1].append(report.outcome)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE:
            RUNGS[item.nodeid.split("::")[0]] = (item.module.__doc__.split("\n\n")[0].replace("\n", " "), [])


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("what was proven")
    for proof, outcomes in RUNGS.values():
        verdict = "proven" if set(outcomes) == {"passed"} else "NOT PROVEN"
        terminalreporter.write_line(f"{verdict}, {len(outcomes)} tests: {proof}")
