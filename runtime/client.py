"""Talks to a served repository: text as a stream, scores, sequences; HTTP with the standard library, gRPC with
tritonclient.
"""

from __future__ import annotations

import json
import math
import queue
import random
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from typing import Any


class ServerError(RuntimeError):
    """What the server answered instead of a result."""


class Client:
    """One HTTP address.

    Args: http: "host:port". name: prefix of the models. seconds: how long an answer, or the next part of a stream, may
        take.

    Every method raises ServerError with the server's words where it refuses, and OSError where there is no server.
    """

    def __init__(self, http: str, *, name: str = "gdn2", seconds: float = 60) -> None:
        self._address, self._name, self._seconds = http, name, seconds

    def is_ready(self) -> bool:
        """Whether the server says so; it says so of a model whose process is dead, too."""
        try:
            return self._call("GET", "/v2/health/ready")[0] == 200
        except OSError:
            return False

    def canary(self) -> list[str]:
        """A small request to every model of the server, for one whose process is dead calls itself ready.

        Returns: the models that answered; those that take more than 2**16 numbers are not asked.
        Raises: ServerError, OSError: a model did not answer.
        """
        status, answer = self._call("POST", "/v2/repository/index", {})
        if status != 200:
            raise ServerError(_error(answer))
        return [model for model in sorted(x["name"] for x in json.loads(answer)) if self._ask(model)]

    def _ask(self, model: str) -> bool:
        if model.endswith("_generate"):
            written = [t for part in self.stream(tokens=[0], count=1) for t in part["tokens"]]
            if len(written) != 1:
                raise ServerError(f"{model}: expected one token, got {written}")
            return True
        config = json.loads(self._call("GET", f"/v2/models/{model}/config")[1])
        inputs = {}
        for x in config["input"]:
            shape = [1 if int(size) < 0 else int(size) for size in x["dims"]]
            inputs[x["name"]] = x["data_type"].removeprefix("TYPE_"), [1, *shape], [0] * math.prod(shape)
        if sum(len(data) for _, _, data in inputs.values()) > 2**16:
            return False
        sequence = {"sequence_id": random.getrandbits(62) | 1, "sequence_start": True, "sequence_end": True}
        self.infer(model, inputs, **(sequence if "sequence_batching" in config else {}))
        return True

    def generate(self, prompt: bytes, count: int, **options: Any) -> Iterator[bytes]:
        """The continuation of a prompt, as it comes; options of `stream`."""
        for part in self.stream(tokens=list(prompt), count=count, **options):
            yield bytes(part["tokens"])

    def stream(
        self, *, text: str | None = None, tokens: list[int] | None = None, count: int, **options: float
    ) -> Iterator[dict[str, Any]]:
        """Server-sent events of gdn2_generate: tokens and text of each. options: seconds, the deadline."""
        prompt = {"text": text} if text is not None else {"tokens": tokens}
        connection, response = self._open(
            "POST", f"/v2/models/{self._name}_generate/generate_stream", {**prompt, "count": count, **options}
        )
        try:
            if response.status != 200:
                raise ServerError(_error(response.read()))
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise ServerError(event["error"])
                event["tokens"] = event["tokens"] if isinstance(event["tokens"], list) else [event["tokens"]]
                yield event
        finally:
            connection.close()

    def infer(self, model: str, inputs: dict[str, tuple[str, list[int], list]], **parameters: Any) -> dict[str, list]:
        """One request: inputs {name: (datatype, shape, flat data)} to {output: flat data}; parameters: of sequences."""
        body = {
            "inputs": [
                {"name": name, "datatype": kind, "shape": shape, "data": data}
                for name, (kind, shape, data) in inputs.items()
            ],
            "parameters": parameters,
        }
        status, answer = self._call("POST", f"/v2/models/{model}/infer", body)
        if status != 200:
            raise ServerError(_error(answer))
        return {output["name"]: output["data"] for output in json.loads(answer)["outputs"]}

    def advance(self, sequence: int, tokens: list[int], *, start: bool = False, end: bool = False) -> int:
        """The next tokens of a sequence to gdn2_decode; returns the most probable one after them."""
        answer = self.infer(
            f"{self._name}_decode",
            {"tokens": ("INT32", [1, len(tokens)], tokens)},
            sequence_id=sequence,
            sequence_start=start,
            sequence_end=end,
        )
        return answer["next"][0]

    def control(self, model: str, action: str) -> None:
        """action: load or unload; the server must have been started with model_control."""
        status, answer = self._call("POST", f"/v2/repository/models/{model}/{action}", {})
        if status != 200:
            raise ServerError(_error(answer))

    def _call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection, response = self._open(method, path, body)
        with closing(connection):
            return response.status, response.read()

    def _open(self, method: str, path: str, body: Any) -> tuple[Any, Any]:
        connection = HTTPConnection(self._address, timeout=self._seconds)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            return connection, connection.getresponse()
        except HTTPException as error:
            raise OSError(f"{self._address}: {error!r}") from error


def generate_by_grpc(
    address: str, prompt: bytes, count: int, *, name: str = "gdn2", seconds: float | None = None
) -> Iterator[bytes]:
    """The continuation of a prompt over a gRPC stream, as it comes.

    Raises: ServerError: the server refused. ImportError: tritonclient is not installed.
    """
    try:
        import numpy as np
        from tritonclient import grpc
    except ImportError as missing:
        raise ImportError("a stream over gRPC needs tritonclient: pip install 'gdn2-ops[server]'") from missing
    parts: queue.SimpleQueue = queue.SimpleQueue()
    given = {"tokens": np.frombuffer(prompt, np.uint8).astype(np.int32), "count": np.array([count], np.int32)}
    if seconds is not None:
        given["seconds"] = np.array([seconds], np.float32)
    inputs = []
    for key, value in given.items():
        inputs.append(grpc.InferInput(key, value.shape, "FP32" if key == "seconds" else "INT32"))
        inputs[-1].set_data_from_numpy(value)
    client = grpc.InferenceServerClient(address)
    try:
        client.start_stream(lambda result, error: parts.put((result, error)))
        client.async_stream_infer(f"{name}_generate", inputs, enable_empty_final_response=True)
        while True:
            result, error = parts.get()
            if error is not None:
                raise ServerError(error.message())
            tokens = result.as_numpy("tokens")
            if tokens is not None:
                yield bytes(tokens.tolist())
            if result.get_response().parameters["triton_final_response"].bool_param:
                return
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def _error(answer: bytes) -> str:
    try:
        return json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace")[:500]
