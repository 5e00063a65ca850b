"""Rung 3: the registries of TensorRT 10.15 and 11.4 take the one library both ways; refusals reach their loggers.

They are those of the lean runtimes: real registries, creators and loggers. There is no builder among them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
VERSIONS = ("10.15.1.29", "11.4.0.106")
OURS = [["gdn2", "GatedDeltaNet2", "1", ["scale"]]]
KINDS = [["PLUGIN", 1], ["PLUGIN_V3ONE_BUILD", 2]]
each_version = pytest.mark.parametrize("version", VERSIONS)


def run(*command, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, **options).stdout


@pytest.fixture
def seen(built, wheel):
    def of(version: str, how: str) -> dict:
        env = os.environ | {"PYTHONPATH": str(wheel(f"lean-{version}"))}
        found = json.loads(run(sys.executable, HERE / "registry.py", built.library, how, env=env))
        assert found.pop("version") == version and found.pop("before") == [] and found.pop("plugin") == KINDS
        return found

    return of


@each_version
def test_load_unload_load(version, seen):
    assert seen(version, "load") == {"after load": OURS, "after unload": [], "loaded again": OURS}


@each_version
def test_a_library_that_is_only_opened_registers_itself(version, seen):
    assert seen(version, "dlopen") == {"after dlopen": OURS}


@each_version
def test_opened_then_loaded(version, seen):
    found = seen(version, "both")
    assert found == {"after dlopen": OURS, "after load": OURS, "after unload": [], "loaded again": OURS}


@each_version
def test_refusals_reach_the_logger(version, seen):
    found = seen(version, "log")
    message = "gdn2::GatedDeltaNet2: expected the field scale, a float, got a node without it"
    assert found["refused"] and found["messages"] == [["ERROR", message]]


def test_the_library_needs_nothing_of_nvidia_and_shows_two_functions(built):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", built.library))
    assert set(needed) <= {"libc.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2", "libm.so.6"}
    shown = [line.split()[-1] for line in run("nm", "-D", "--defined-only", built.library).splitlines()]
    assert shown == ["getCreators", "setLoggerFinder"]
    assert str(HERE.parent.parent).encode() not in built.library.read_bytes()


def test_opened_and_closed_where_there_is_no_tensorrt(built):
    code = f"import _ctypes; library = _ctypes.dlopen({str(built.library)!r}, 2); _ctypes.dlclose(library)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
