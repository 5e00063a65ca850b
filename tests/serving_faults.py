"""On the real server: every fault ends in a clear error or in the right bytes, and everything taken comes back.

Run by `make test-server`.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from serving_fixtures import (
    ENVIRONMENT,
    ROOT,
    WAYS,
    another_process,
    at_once,
    becomes,
    eager,
    metric,
    only,
    repository,
    server,
    tensors,
)
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from gdn2_ops.runtime.client import Client, ServerError, generate_by_grpc
from gdn2_ops.runtime.server import Server

__all__ = ["repository", "server"]  # fixtures

PROMPT = b"class Node:\n"
LONG = 16384  # tokens of a generation that nobody waits for


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each fault the shared server has all its slots, and writes what it should."""
    yield
    if "server" not in request.fixturenames:
        return
    running = request.getfixturevalue("server")
    for model, slots in (("gdn2_generate", 64), ("gdn2_decode", 128), ("small_generate", 2), ("small_decode", 4)):
        assert becomes(partial(metric, running, "gdn2_slots_free", model), slots), model
    assert b"".join(Client(running.http).generate(PROMPT, 10)) == eager(PROMPT, 10)
    assert WAYS["HTTP, one request for each token"](running, PROMPT, 10, 5) == eager(PROMPT, 10)


def i32(*rows):
    return np.array(rows, np.int32)


REFUSED = {  # what: (model, tensors, part of the error)
    "name": ("gdn2_decode", {"tokenz": i32([1])}, "unexpected inference input 'tokenz'"),
    "missing": ("gdn2_decode", {}, "expected 1 inputs but got 0"),
    "dtype": ("gdn2_decode", {"tokens": np.ones((1, 1), np.float32)}, "data-type"),
    "rank": ("gdn2_decode", {"tokens": i32([[1]])}, "unexpected shape for input 'tokens'"),
    "two sequences in one": ("gdn2_decode", {"tokens": i32([1], [2])}, "batch-size 1"),
    "batch": ("gdn2_score", {"tokens": i32(*[[1]] * 65)}, "batch-size must be <= 64"),
    "no tokens": ("gdn2_decode", {"tokens": np.zeros((1, 0), np.int32)}, "expected at least one token"),
    "token 256": ("gdn2_decode", {"tokens": i32([1, 256])}, "expected tokens in 0..255, got 1..256"),
    "token -1": ("gdn2_score", {"tokens": i32([-1, 3])}, "expected tokens in 0..255, got -1..3"),
    "size of a state": ("gdn2_step", "past_00_recurrent", "unexpected shape"),
    "NaN in a state": ("gdn2_step", np.nan, "expected finite numbers in past_00_recurrent"),
    "infinity in a state": ("gdn2_step", np.inf, "expected finite numbers in past_00_recurrent"),
    "no prompt": ("gdn2_generate", {"count": i32(3)[0:1]}, "expected one prompt"),
    "empty prompt": ("gdn2_generate", {"tokens": i32()[:0], "count": i32(3)}, "expected at least one token"),
    "negative count": ("gdn2_generate", {"tokens": i32(65), "count": i32(-3)}, "count of at least 0"),
    "huge count": ("gdn2_generate", {"tokens": i32(65), "count": i32(2**31 - 1)}, "count of at most 16384"),
    "two counts": ("gdn2_generate", {"tokens": i32(65), "count": i32(1, 2)}, "unexpected shape for input 'count'"),
    "prompt of another type": ("gdn2_generate", {"tokens": np.ones(1, np.float32), "count": i32(3)}, "data-type"),
    "NaN seconds": (
        "gdn2_generate",
        {"tokens": i32(65), "count": i32(3), "seconds": np.array([np.nan], np.float32)},
        "expected finite seconds above 0, got nan",
    ),
}


def step_inputs(client, fault):
    """Inputs of gdn2_step, one of them wrong: of another size, or with such a number in it."""
    config = client.get_model_config("gdn2_step", as_json=True)["config"]
    shapes = {x["name"]: [1, *map(int, x["dims"])] for x in config["input"] if x["name"] != "input_ids"}
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if isinstance(fault, str):
        values[fault] = values[fault][:, 1:]
    else:
        values["past_00_recurrent"][0, 1, 2, 3] = fault
    return {"input_ids": np.array([[65]], np.int64)} | values


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_request_is_refused_with_the_reason(what, server):
    model, inputs, text = REFUSED[what]
    answers: list = []
    with grpc.InferenceServerClient(server.grpc) as client:
        values = inputs if isinstance(inputs, dict) else step_inputs(client, inputs)
        if model.endswith("_generate"):
            done = threading.Event()
            client.start_stream(lambda result, error: (answers.append(error), done.set()))
            client.async_stream_infer(model, tensors(values))
            assert done.wait(20)
            client.stop_stream()
            assert text in str(answers[0])
            return
        sequence = {"sequence_id": 3, "sequence_start": True, "sequence_end": True} if model == "gdn2_decode" else {}
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, tensors(values), **sequence)
    assert text in str(caught.value), caught.value


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 2000, b"null", b'{"text": 1}', b'{"count": 3}', b'{"text": "a", "count": "b"}']
)
def test_what_is_no_request_is_refused(body, server):
    import urllib.error
    import urllib.request

    url = f"http://{server.http}/v2/models/gdn2_generate/generate_stream"
    with pytest.raises((urllib.error.HTTPError, ServerError)) as caught:
        answer = urllib.request.urlopen(url, body, timeout=20).read().decode()
        raise ServerError(answer if "error" in answer else f"accepted: {answer}")
    assert "accepted" not in str(caught.value)


def test_a_sequence_needs_its_start_and_ends_with_its_end(server):
    client = Client(server.http)
    with pytest.raises(ServerError, match="must specify the START flag"):
        client.advance(91, [1])
    client.advance(91, [1], start=True)
    client.advance(91, [2], end=True)
    with pytest.raises(ServerError, match="must specify the START flag"):
        client.advance(91, [3])
    with pytest.raises(ServerError, match="non-zero or non-empty correlation ID"):
        client.infer("gdn2_decode", {"tokens": ("INT32", [1, 1], [1])})


def test_one_wrong_request_in_a_batch_harms_nobody(server):
    """Good sequences share batches with requests that are refused."""

    def bad(i):
        for at in range(40):
            with pytest.raises(ServerError, match="expected tokens in"):
                Client(server.http).advance(500 + 40 * i + at, [999], start=True, end=True)

    prompts = [PROMPT + bytes([97 + i]) * i for i in range(6)]
    good = [partial(WAYS["HTTP, one request for each token"], server, p, 40, 400 + i) for i, p in enumerate(prompts)]
    results = at_once([*good, partial(bad, 0), partial(bad, 1)])
    assert results[:6] == [eager(p, 40) for p in prompts]


def test_sequences_beyond_the_slots_wait_for_one(server):
    client = Client(server.http, name="small")
    for sequence in (1, 2):
        client.advance(sequence, list(PROMPT), start=True)
    third = threading.Thread(target=lambda: tokens.append(client.advance(3, list(PROMPT), start=True, end=True)))
    tokens: list[int] = []
    third.start()
    time.sleep(0.3)
    assert not tokens
    client.advance(1, [0], end=True)
    third.join(10)
    assert bytes(tokens) == eager(PROMPT, 1)
    client.advance(2, [0], end=True)


def test_prompts_beyond_the_queue_are_refused_and_the_others_are_written(server):
    """Two slots and one place to wait."""

    def ask(i):
        try:
            return b"".join(Client(server.http, name="small").generate(PROMPT, 3000))
        except ServerError as error:
            return str(error)

    results = at_once([partial(ask, i) for i in range(8)])
    refused = [text for text in results if isinstance(text, str)]
    assert 1 <= len(refused) <= 5 and all("at most 1 generations waiting" in text for text in refused)
    assert {x for x in results if isinstance(x, bytes)} == {eager(PROMPT, 3000)}


def test_an_idle_sequence_ends_and_its_slot_comes_back(server):
    client = Client(server.http, name="small")
    before = metric(server, "gdn2_evictions_total", "small_decode")
    client.advance(11, [1], start=True)
    assert becomes(partial(metric, server, "gdn2_evictions_total", "small_decode"), before + 1)
    assert metric(server, "gdn2_sequences_live", "small_decode") == 0
    time.sleep(1)  # the server looks for idle sequences at its own pace
    with pytest.raises(ServerError, match="must specify the START flag"):
        client.advance(11, [2])


def test_a_deadline_ends_a_generation_with_what_it_has(server):
    written = b""
    with pytest.raises(ServerError, match=r"deadline passed after \d+ of 16384 tokens"):
        for part in Client(server.http).generate(PROMPT, LONG, seconds=0.5):
            written += part
    assert written and eager(PROMPT, len(written)) == written


KILLED = {
    "a sequence": (
        "import sys; from gdn2_ops.runtime.client import Client\n"
        "client = Client(sys.argv[1], name='small')\n"
        "for i in (21, 22): client.advance(i, [1], start=True)\n"
    ),
    "a stream of events": (
        "import sys; from gdn2_ops.runtime.client import Client\n"
        "parts = Client(sys.argv[1], name='small').generate(b'x', 16384)\nnext(parts)\n"
    ),
    "a gRPC stream": (
        "import sys; from gdn2_ops.runtime.client import generate_by_grpc\n"
        "parts = generate_by_grpc(sys.argv[2], b'x', 16384, name='small')\nnext(parts)\n"
    ),
}


@pytest.mark.parametrize("what", KILLED)
def test_a_client_killed_in_the_middle_of(what, server):
    model = "small_decode" if what == "a sequence" else "small_generate"
    written = metric(server, "gdn2_tokens_written_total", model)
    code = KILLED[what] + "print('begun', flush=True)\nimport time; time.sleep(60)"
    process = another_process(code, server.http, server.grpc)
    process.kill()
    process.wait()
    assert becomes(partial(metric, server, "gdn2_sequences_live", model), 0, seconds=30)
    assert metric(server, "gdn2_tokens_written_total", model) - written < LONG  # nobody decodes for the dead
    if what == "a sequence":
        client = Client(server.http, name="small")
        for sequence in (23, 24, 25):
            assert bytes([client.advance(sequence, list(PROMPT), start=True, end=True)]) == eager(PROMPT, 1)


def test_sigterm_lets_a_stream_finish_and_takes_no_other(repository, tmp_path):
    with Server(
        only(repository, tmp_path, "gdn2_generate"), ENVIRONMENT, log=tmp_path / "log", exit_seconds=20
    ) as running:
        parts, count = Client(running.http).generate(PROMPT, 4000), 4000
        written = next(parts)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises((ServerError, OSError)):
            list(Client(running.http).generate(PROMPT, 1))
        written += b"".join(parts)
        assert written == eager(PROMPT, count)
        assert running.process.wait(20) == 0
    assert not list(Path("/dev/shm").glob(f"{running._shared}*"))


def stub_of(process: int, model: str) -> int:
    """The process of a model among the children of a server."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process and "triton_python_backend_stub" in line and f"/{model}/" in line:
            return int(folder.name)
    raise AssertionError(f"no process of {model} below {process}")


def test_a_killed_model_process_is_noticed_by_the_canary_and_by_nothing_else(repository, tmp_path):
    folder = only(repository, tmp_path / "models", "gdn2_generate", "gdn2_decode")
    command = [sys.executable, "-m", "gdn2_ops.cli", "serve", str(folder), "--env", str(ENVIRONMENT)]
    command += ["--ports", "0,0,0", "--log", str(tmp_path / "log"), "--canary-seconds", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        client = Client(line.split("HTTP ")[1].split(",")[0])
        assert "ready after" in line and str(tmp_path / "log") in line
        (server_process,) = (
            int(x) for x in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        )
        client.advance(1, [1], start=True)
        os.kill(stub_of(server_process, "gdn2_decode"), signal.SIGKILL)
        with pytest.raises(ServerError, match="not healthy"):
            client.advance(1, [2])
        assert client.is_ready()  # so says the server
        assert b"".join(client.generate(PROMPT, 10)) == eager(PROMPT, 10)  # the other model goes on
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and "the canary failed" in errors and "not healthy" in errors


def test_reload_under_load_gives_the_right_bytes_or_an_error(repository, tmp_path):
    folder = only(repository, tmp_path, "gdn2_generate")
    written, errors, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                written.append(b"".join(Client(running.http).generate(PROMPT, 200)) == wanted)
            except (ServerError, OSError) as error:
                errors.append(str(error))
                time.sleep(0.05)

    wanted = eager(PROMPT, 200)
    with Server(folder, ENVIRONMENT, log=tmp_path / "log", model_control=True) as running:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for version in ("2", "3"):
            shutil.copytree(folder / "gdn2_generate" / "1", folder / "gdn2_generate" / version)
            Client(running.http).control("gdn2_generate", "load")
            reached = len(written)
            assert becomes(lambda reached=reached: len(written) > reached + 8, True, seconds=30)
        stop.set()
        for thread in threads:
            thread.join()
    assert len(written) > 16 and all(written)
    assert all("not ready" in text or "unavailable" in text or "not found" in text for text in errors), errors


def test_nobody_loads_models_or_registers_memory(server):
    with pytest.raises(ServerError, match="explicit model load / unload is not allowed"):
        Client(server.http).control("gdn2_generate", "unload")
    with grpc.InferenceServerClient(server.grpc) as client, pytest.raises(InferenceServerException, match="restricted"):
        client.register_system_shared_memory("x", "/gdn2", 64)


def test_memory_files_and_threads_come_back(server):
    """After thousands of tokens in streams and sequences that end, break off and are refused."""

    def traffic():
        for i in range(8):
            list(generate_by_grpc(server.grpc, PROMPT, 50))
            next(Client(server.http).generate(PROMPT, LONG))  # leaves
            with pytest.raises(ServerError):
                list(Client(server.http).generate(b"", 5))
            WAYS["gRPC, one request for each token"](server, PROMPT, 20, threading.get_ident() % 10**6 + i)
        return True

    def level():
        assert becomes(partial(metric, server, "gdn2_sequences_live", "gdn2_generate"), 0, seconds=30)
        process = Path(f"/proc/{server.process.pid}")
        shared = sum(file.stat().st_size for file in Path("/dev/shm").glob(f"{server._shared}*"))
        resident = int((process / "statm").read_text().split()[1]) * 4096
        return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())), shared, resident

    at_once([traffic] * 8)
    files, threads, shared, resident = level()
    at_once([traffic] * 8)
    files_after, threads_after, shared_after, resident_after = level()
    assert files_after <= files + 4 and threads_after <= threads + 4 and shared_after <= shared
    assert resident_after <= 1.05 * resident
