"""Triton Inference Server from the wheel nvidia-pytriton: started on the loopback, watched, drained.

    with Server("repository", environment) as server:      # ready: every model has answered its canary
        ...                                                 # server.http, server.grpc, server.metrics, server.log

The wheel's server is of 2024: it is for development and tests, on the loopback only (docs/deploy.md).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from gdn2_ops.runtime.client import Client, ServerError

HOST = "127.0.0.1"
DEFAULT_ENVIRONMENT = Path(".venv-serve")
RESTRICTED = "shared-memory,logging,trace"
CACHE_BYTES = 16 * 2**20


class Server:
    """A running server.

    Args:
        repository: what `gdn2_ops.export.model_repository` wrote.
        environment: a virtual environment with the wheel, numpy < 2 and onnxruntime (`make serve-env`); models run in
            its Python.
        ports: of HTTP, gRPC and metrics; 0 is any free one.
        log: file of the server's output; None is one in the temporary folder that stays.
        model_control: whether clients may load and unload models.
        exit_seconds: how long sequences may go on after SIGTERM.
        more: further arguments of the server.

    Raises: FileNotFoundError: no repository, or no environment with the server. RuntimeError: the server did not start,
        or a model did not answer; the end of its log is in the message.
    """

    def __init__(
        self,
        repository: str | Path,
        environment: str | Path = DEFAULT_ENVIRONMENT,
        *,
        ports: Sequence[int] = (0, 0, 0),
        log: str | Path | None = None,
        model_control: bool = False,
        exit_seconds: int = 30,
        more: Sequence[str] = (),
    ) -> None:
        self.repository, python = Path(repository), Path(environment).absolute() / "bin"
        if not any(self.repository.glob("*/config.pbtxt")):
            raise FileNotFoundError(
                f"expected a model repository, got {str(repository)!r}; gdn2 export MODEL --to triton-repository"
            )
        wheel = next(python.parent.glob("lib/python3*/site-packages/pytriton/tritonserver"), None)
        if wheel is None:
            raise FileNotFoundError(
                f"expected the wheel nvidia-pytriton in {str(environment)!r}, got none; make serve-env"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="gdn2-serve-")
        http, grpc, metrics = (port or _free_port() for port in ports)
        self.http, self.grpc, self.metrics = (f"{HOST}:{port}" for port in (http, grpc, metrics))
        self._shared = f"gdn2_{os.getpid()}_{http}_"
        self.log = Path(log) if log is not None else Path(tempfile.gettempdir()) / f"gdn2-serve-{http}.log"
        command = [
            str(wheel / "bin" / "tritonserver"),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={_stage(wheel, Path(self._folder.name))}",
            f"--backend-config=python,shm-region-prefix-name={self._shared}",
            f"--cache-directory={wheel / 'caches'}",
            f"--cache-config=local,size={CACHE_BYTES}",
            *(f"--{name}-address={HOST}" for name in ("http", "grpc", "metrics")),
            *(f"--{name}-port={port}" for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics))),
            "--allow-gpu-metrics=false",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={exit_seconds}",
            *_control(model_control),
            *more,
        ]
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=_variables(wheel, python), start_new_session=True
            )
        try:
            self.ready_seconds = self._wait(60.0)
        except BaseException:
            self.stop(seconds=0)
            raise

    def canary(self) -> None:
        """Asks every model for an answer. Raises: RuntimeError: one gave none within 30 s."""
        try:
            Client(self.http, seconds=30).canary()
        except (OSError, ServerError) as error:
            raise RuntimeError(f"the canary failed: {error}; see {self.log}") from error

    def watch(self, every: float = 10, failures: int = 2) -> int:
        """Asks for canaries until the server ends; SIGTERM and SIGINT for this process drain it. Main thread only.

        Returns: the server's exit status.
        Raises: RuntimeError: so many canaries failed one after the other.
        """
        draining = False

        def drain(*_: object) -> None:
            nonlocal draining
            draining = True
            self.process.send_signal(signal.SIGTERM)

        handlers = {number: signal.signal(number, drain) for number in (signal.SIGTERM, signal.SIGINT)}
        failed = 0
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return self.process.wait(every)
                try:
                    self.canary()
                    failed = 0
                except RuntimeError:
                    failed += 1
                    if failed == failures and not draining:
                        raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def stop(self, seconds: float = 60) -> int:
        """Lets sequences finish, for that long at most, and ends the server. Returns: its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for file in Path("/dev/shm").glob(f"{self._shared}*"):  # a server that was killed leaves them
            file.unlink(missing_ok=True)
        self._folder.cleanup()
        return self.process.returncode

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _wait(self, seconds: float) -> float:
        began, client = time.monotonic(), Client(self.http, seconds=2)
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}: {self._end_of_log()}")
            if client.is_ready():
                self.canary()
                return time.monotonic() - began
            time.sleep(0.05)
        raise RuntimeError(f"expected the server to be ready within {seconds:g} s: {self._end_of_log()}")

    def _end_of_log(self) -> str:
        return f"the end of {self.log} is\n" + self.log.read_text(errors="replace")[-4000:]


def _stage(wheel: Path, folder: Path) -> Path:
    """A backend directory: the python backend with the stub of the environment's Python beside it, as it must be."""
    target = folder / "python"
    target.mkdir()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(wheel / "backends" / "python" / name, target)
    version = wheel.parents[2].name.removeprefix("python")
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = sorted(path.name for path in (wheel / "python_backend_stubs").iterdir())
        raise FileNotFoundError(f"expected an environment of Python {have}, got {version}")
    shutil.copy2(stub, target)
    (target / stub.name).chmod(0o755)
    return folder


def _variables(wheel: Path, python: Path) -> dict[str, str]:
    """The stub finds its packages by the `python3` on the path, and needs libpython and the wheel's libraries."""
    libpython = subprocess.run(
        [python / "python3", "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    libraries = [str(wheel.parents[1] / "nvidia_pytriton.libs"), libpython, os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {
        "PATH": f"{python}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }


def _control(allowed: bool) -> list[str]:
    """What nobody needs asks for a header that nobody knows."""
    nobody = f"{RESTRICTED}:admin={os.urandom(16).hex()}"
    flags = [f"--http-restricted-api={nobody}", f"--grpc-restricted-protocol={nobody}"]
    return [*flags, "--model-control-mode=explicit", "--load-model=*"] if allowed else flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
