"""The operator tests and the fuzzer on libraries built with the address, undefined-behaviour and thread sanitizers.

python tests/sanitize.py [address] [thread]        (make sanitize: both)

Needs gcc with its sanitizers' libraries, on Linux. Before anything is believed, each sanitizer has to report a planted
fault: a read past a buffer, a race between two threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZERS = {"address": ("address,undefined", ("libasan.so", "libubsan.so")), "thread": ("thread", ("libtsan.so",))}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter frees little at its end; the fuzzer watches memory
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
}
OPERATORS = ("test_operators.py", "test_errors.py", "test_native.py", "test_laws.py")
# ONNX Runtime's threads wait for each other where the thread sanitizer does not see it: every task would be a race.
TESTS = {"address": (*OPERATORS, "test_onnx_library.py"), "thread": OPERATORS}
PREAMBLE = """
import ctypes, threading
import gdn2_ops
from gdn2_ops.compiled import find_library
exp = ctypes.CDLL(str(find_library("libgdn2_torch.so"))).gdn2_exp
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
count = 1 << 20
x, y = (ctypes.c_void_p(libc.malloc(ctypes.c_size_t(4 * count))) for _ in "xy")
ctypes.memset(x, 0, 4 * count)
"""
FAULTS = {
    "address": ("exp(x, y, ctypes.c_int64(count + 16))", "heap-buffer-overflow"),
    "thread": (
        "twenty = lambda: [exp(x, y, ctypes.c_int64(count)) for _ in range(20)]\n"
        "threads = [threading.Thread(target=twenty) for _ in 'ab']\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]",
        "data race",
    ),
}


def build(name: str) -> Path:
    """Installs the package with instrumented libraries into a folder of its own."""
    folder = ROOT / "build" / "sanitize" / name
    flags = f"cmake.define.CMAKE_CXX_FLAGS=-fsanitize={SANITIZERS[name][0]} -g -fno-omit-frame-pointer"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
    subprocess.run([*pip, "--target", folder, "-C", f"build-dir={folder}-build", "-C", flags, ROOT], check=True)
    return folder


def environment(name: str, package: Path) -> dict[str, str]:
    """The interpreter without this environment's editable install: the instrumented package comes first."""
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={library}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for library in (*SANITIZERS[name][1], "libstdc++.so")
    ]
    path = os.pathsep.join((str(package), sysconfig.get_path("purelib"), str(ROOT / "tests")))
    return os.environ | OPTIONS | {"LD_PRELOAD": " ".join(libraries), "PYTHONPATH": path}


def run(arguments: list[str], env: dict[str, str], **options) -> subprocess.CompletedProcess:
    interpreter = os.path.realpath(sys.executable)
    fixed = ["setarch", "-R"]  # the thread sanitizer wants the addresses of a process without randomisation
    return subprocess.run([*fixed, interpreter, *arguments], env=env, cwd=ROOT, **options)


def reports_a_planted_fault(name: str, env: dict[str, str]) -> bool:
    fault, report = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "fault.py"
        script.write_text(PREAMBLE + fault)
        result = run([str(script)], env, capture_output=True, text=True)
    return result.returncode != 0 and report in result.stderr


def main() -> None:
    names = sys.argv[1:] or list(SANITIZERS)
    if unknown := sorted(set(names) - set(SANITIZERS)):
        raise SystemExit(f"expected sanitizers among {list(SANITIZERS)}, got {unknown}")
    for name in names:
        env = environment(name, build(name))
        if not reports_a_planted_fault(name, env):
            raise SystemExit(f"the {name} sanitizer did not report a planted fault: its verdicts would mean nothing")
        print(f"{name}: the planted fault is reported; now the tests", flush=True)
        pytest = [str(Path(sysconfig.get_path("scripts")) / "pytest"), "-q", "-x", "-p", "no:cacheprovider"]
        tests = [f"tests/{test}" for test in TESTS[name]]
        for arguments in ([*pytest, "-o", "pythonpath=tests", *tests], ["tests/fuzz.py", "--calls", "20000"]):
            extra = ["--growth", "64"] if arguments[0] == "tests/fuzz.py" else []  # shadow memory grows too
            if run([*arguments, *extra], env).returncode != 0:
                raise SystemExit(f"{name}: {arguments[0]} failed")
        print(f"{name}: clean", flush=True)


if __name__ == "__main__":
    main()
