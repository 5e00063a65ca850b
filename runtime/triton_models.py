"""The models of an exported repository, for the python backend of Triton Inference Server; loaded only inside it.

`Generate` streams the continuation of a prompt. `Decode` keeps the state of sequences that a client drives request by
request. `Score` says how probable a text is. `Step` takes states and returns them. `gdn2_ops.export.model_repository`
writes their configurations: what arrives here has the types and ranks that those say.
"""

from __future__ import annotations

import codecs
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb
from numpy.typing import NDArray

from gdn2_ops.runtime.generate import log_softmax
from gdn2_ops.runtime.scheduler import Cancelled, Counters, Generation, Part, Scheduler, Sequences
from gdn2_ops.runtime.session import TYPES, open_language_model, zeros
from gdn2_ops.runtime.state_pool import SlotsExhausted, StatePool

START, END = 1, 2  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_*
TICK_SECONDS = 0.5
_CODES = {  # the server adds TritonError to its module only after it has loaded this one
    SlotsExhausted: "UNAVAILABLE",
    Cancelled: "CANCELLED",
    TimeoutError: "UNAVAILABLE",
    ValueError: "INVALID_ARG",
    LookupError: "INVALID_ARG",
}


class Model:
    """What the models share: the file of their version, their parameters, and answers."""

    def initialize(self, args: dict[str, str]) -> None:
        self.config = json.loads(args["model_config"])
        self.name = self.config["name"]
        self.parameters = {key: x["string_value"] for key, x in self.config.get("parameters", {}).items()}
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and self.parameters.get("numpy_2") != "yes":
            raise pb.TritonModelException(
                f"expected numpy < 2, got {np.__version__}: servers before 24.11 then receive and send wrong tensors; "
                "on a newer server set the parameter numpy_2 to yes"
            )
        self.file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.start()

    def start(self) -> None:
        raise NotImplementedError

    def number(self, name: str) -> int:
        return int(self.parameters[name])

    def options(self) -> dict[str, Any]:
        return {"threads": self.number("threads"), "library": self.parameters["library"] == "yes"}


class Generate(Model):
    """prompt (text [1] or tokens [T]), count [1] and perhaps seconds [1], the deadline -> tokens and text as they come.

    One thread decodes; another sends what has come up since it last sent, and rests twice as long as it took: many
    streams get several tokens in a response, a single one gets each at once.
    """

    def start(self) -> None:
        self.pool = StatePool(self.file, self.number("slots"), chunk=self.number("chunk"), **self.options())
        self.scheduler = Scheduler(self.pool, vocab=self.pool.vocab, waiting=self.number("waiting"))
        self.streams: dict[Generation, _Stream] = {}
        self.joining, self.work, self.news = threading.Lock(), threading.Event(), threading.Event()
        self.stopping = False
        self.metrics = Metrics(self.name, self._state)
        self.threads = [threading.Thread(target=x, daemon=True) for x in (self._decode, self._send)]
        for thread in self.threads:
            thread.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                prompt, count, seconds = self._read(request)
                with self.joining:
                    generation = self.scheduler.submit(prompt, count, seconds=seconds)
                    self.streams[generation] = _Stream(sender)
            except (ValueError, SlotsExhausted) as error:
                sender.send(_refusal(error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.work.set()
        self.news.set()

    def finalize(self) -> None:
        self.stopping = True
        self.work.set()
        self.news.set()
        for thread in self.threads:
            thread.join()
        self.metrics.stop()

    def _state(self) -> State:
        return State(self.scheduler.counters, self.scheduler.live, self.pool.free, self.scheduler.largest_state)

    def _read(self, request: Any) -> tuple[NDArray[np.int64], int, float | None]:
        text, tokens = _input(request, "text"), _input(request, "tokens")
        if (text is None) == (tokens is None):
            raise ValueError("expected one prompt, either text or tokens, got both or none")
        if text is not None:
            if text.size != 1:
                raise ValueError(f"expected one text, got {text.size}")
            tokens = np.frombuffer(text.reshape(-1)[0], np.uint8)
        (count,), seconds = _input(request, "count").reshape(-1).tolist(), _input(request, "seconds")
        most = self.number("most")
        if tokens.size > most or count > most:
            raise ValueError(f"expected a prompt and a count of at most {most}, got {tokens.size} and {count}")
        if seconds is None:
            return tokens.reshape(-1).astype(np.int64), count, None
        (limit,) = seconds.reshape(-1).tolist()
        if not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"expected finite seconds above 0, got {limit}")
        return tokens.reshape(-1).astype(np.int64), count, limit

    def _decode(self) -> None:
        while not self.stopping:
            try:
                changed = self.scheduler.step()
            except Exception as error:  # a defect of ours: nobody must wait for ever
                pb.Logger.log_error(f"{self.name}: {error!r}")
                changed = self.scheduler.fail(error)
            if changed:
                self.news.set()
            elif not self.scheduler.live and not self.scheduler.waiting:
                self.work.wait()
                self.work.clear()

    def _send(self) -> None:
        while not self.stopping:
            self.news.wait()
            self.news.clear()
            began = time.perf_counter()
            with self.joining:
                streams = list(self.streams.items())
            for generation, stream in streams:
                try:
                    last = stream.send(generation)
                except Exception as error:  # of this stream: the others go on
                    pb.Logger.log_error(f"{self.name}: {error!r}")
                    generation.cancel()
                    last = True
                if last:
                    with self.joining:
                        del self.streams[generation]
            time.sleep(2 * (time.perf_counter() - began))


@dataclass
class _Stream:
    """Where the tokens of a generation go. Text ends between characters; what is no UTF-8 is replaced in it."""

    sender: Any
    sent: int = 0
    asked: float = field(default_factory=time.monotonic)
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def send(self, generation: Generation) -> bool:
        """Sends what is new; says whether that was the last. A caller who left cancels the generation."""
        done = generation.done  # before the tokens are read, for it is set after them
        tokens = generation.written[self.sent :]
        flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if done else 0
        if not tokens and not done:
            return self._leave(generation)
        self.sent += len(tokens)
        if tokens or generation.error is None:
            text = self.decoder.decode(bytes(token & 255 for token in tokens), final=done)
            outputs = [
                pb.Tensor("tokens", np.array(tokens, np.int32)),
                pb.Tensor("text", np.array([text.encode()], np.object_)),
            ]
            last = flags if generation.error is None else 0
            self.sender.send(pb.InferenceResponse(outputs), flags=last)
        if done and generation.error is not None:
            self.sender.send(_refusal(generation.error), flags=flags)
        return done or self._leave(generation)

    def _leave(self, generation: Generation) -> bool:
        now = time.monotonic()
        if now - self.asked > TICK_SECONDS / 5:  # a question to the server costs as much as a response
            self.asked = now
            if self.sender.is_cancelled():
                generation.cancel()
        return False


class Decode(Model):
    """tokens [T] of a sequence, T >= 1 -> next [1], the most probable token after them, and logits [vocab].

    A batch has at most one request of a sequence: the server's sequence batcher sees to it.
    """

    def start(self) -> None:
        self.pool = StatePool(self.file, self.number("slots"), chunk=self.number("chunk"), **self.options())
        idle = int(self.config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6
        self.sequences = Sequences(self.pool, idle_seconds=idle, vocab=self.pool.vocab)
        self.lock = threading.Lock()
        self.metrics = Metrics(self.name, self._state)

    def execute(self, requests: list[Any]) -> list[Any]:
        parts = [
            Part(
                request.correlation_id(),
                _input(request, "tokens").reshape(-1).astype(np.int64),
                bool(request.flags() & START),
                bool(request.flags() & END),
            )
            for request in requests
        ]
        with self.lock:
            results = self.sequences.advance(parts)
        return [self._answer(request, result) for request, result in zip(requests, results)]

    def finalize(self) -> None:
        self.metrics.stop()

    def _state(self) -> State:
        with self.lock:
            self.sequences.evict()
            return State(self.sequences.counters, self.sequences.live, self.pool.free, self.sequences.largest_state)

    def _answer(self, request: Any, result: NDArray[np.float32] | Exception) -> Any:
        if isinstance(result, Exception):
            return _refusal(result)
        outputs = {"next": np.array([[result.argmax()]], np.int32), "logits": result[None]}
        return pb.InferenceResponse([pb.Tensor(name, outputs[name]) for name in request.requested_output_names()])


class Score(Model):
    """tokens [T], 1 <= T <= most -> log_p [T], the natural log of the probability of each; 0 for the first."""

    def start(self) -> None:
        self.session = open_language_model(self.file, **self.options())
        self.vocab = self.session.get_outputs()[0].shape[-1]

    def execute(self, requests: list[Any]) -> list[Any]:
        rows = [_input(request, "tokens").reshape(-1).astype(np.int64) for request in requests]
        answers: list[Any] = [self._refuse(row) for row in rows]
        alike: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if answers[i] is None:
                alike.setdefault(-(-len(row) // 64), []).append(i)
        for blocks, group in alike.items():
            tokens = np.zeros((len(group), blocks * 64), np.int64)  # what follows a token does not change its logits
            for at, i in enumerate(group):
                tokens[at, : len(rows[i])] = rows[i]
            log_p = log_softmax(self._logits(tokens[:, :-1]))
            picked = np.zeros(tokens.shape, np.float32)
            picked[:, 1:] = np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
            for at, i in enumerate(group):
                row = picked[None, at, : len(rows[i])]
                error = FloatingPointError("expected finite logits, got NaN or infinity")
                answers[i] = _response({"log_p": row}) if np.isfinite(row).all() else _refusal(error)
        return answers

    def _logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        past = {x.name: zeros(x, len(tokens)) for x in self.session.get_inputs()[1:]}
        return self.session.run(["logits"], {"input_ids": tokens} | past)[0]

    def _refuse(self, row: NDArray[np.int64]) -> Any:
        most = self.number("most")
        if not 1 <= len(row) <= most:
            return _refusal(ValueError(f"expected 1 to {most} tokens, got {len(row)}"))
        if row.min() < 0 or row.max() >= self.vocab:
            return _refusal(ValueError(f"expected tokens in 0..{self.vocab - 1}, got {row.min()}..{row.max()}"))
        return None


class Step(Model):
    """input_ids [B, T] and states -> logits [B, T, vocab] and states, under the names of the file; nothing is kept."""

    def start(self) -> None:
        self.session = open_language_model(self.file, **self.options())
        self.inputs = {x.name: TYPES[x.type] for x in self.session.get_inputs()}
        self.outputs = [x.name for x in self.session.get_outputs()]
        self.vocab = self.session.get_outputs()[0].shape[-1]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._run({name: _input(request, name) for name in self.inputs}) for request in requests]

    def _run(self, feed: dict[str, NDArray]) -> Any:
        for name, x in feed.items():
            if not np.isfinite(x).all():
                return _refusal(ValueError(f"expected finite numbers in {name}, got NaN or infinity"))
        ids = feed["input_ids"]
        if ids.size == 0 or ids.min() < 0 or ids.max() >= self.vocab:
            return _refusal(ValueError(f"expected tokens in 0..{self.vocab - 1}, got others or none"))
        return _response(dict(zip(self.outputs, self.session.run(None, feed))))


class State(NamedTuple):
    """Of a model, for its metrics."""

    counters: Counters
    live: int
    free: int
    largest_state: float


class Metrics:
    """Numbers of a model for the server's /metrics, brought up to date twice a second by a thread of its own."""

    def __init__(self, model: str, state: Callable[[], State]) -> None:
        kinds = {"total": pb.MetricFamily.COUNTER, "gauge": pb.MetricFamily.GAUGE}
        texts = {
            "sequences_live": ("gauge", "sequences with a slot"),
            "slots_free": ("gauge", "slots without a sequence"),
            "state_norm": ("gauge", "the largest norm of a recurrent state among sequences with a slot"),
            "tokens_read_total": ("total", "tokens of prompts and requests"),
            "tokens_written_total": ("total", "tokens generated"),
            "steps_total": ("total", "calls with one token for each sequence in them"),
            "step_seconds_total": ("total", "time in those calls"),
            "evictions_total": ("total", "sequences that lost their slot for not being used"),
            "not_finite_total": ("total", "sequences that ended because numbers ran away"),
        }
        self._families = {
            name: pb.MetricFamily(name=f"gdn2_{name}", description=text, kind=kinds[kind])
            for name, (kind, text) in texts.items()
        }
        self._metrics = {name: family.Metric(labels={"model": model}) for name, family in self._families.items()}
        self._state, self._reported = state, dict.fromkeys(texts, 0.0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            counters, live, free, largest_state = self._state()
            self._report(
                {
                    "sequences_live": live,
                    "slots_free": free,
                    "state_norm": largest_state,
                    "tokens_read_total": counters.read,
                    "tokens_written_total": counters.written,
                    "steps_total": counters.steps,
                    "step_seconds_total": counters.step_seconds,
                    "evictions_total": counters.evicted,
                    "not_finite_total": counters.not_finite,
                }
            )
            if self._stopping.wait(TICK_SECONDS):
                return

    def _report(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if value == self._reported[name]:
                continue
            if name.endswith("_total"):
                self._metrics[name].increment(value - self._reported[name])
            else:
                self._metrics[name].set(value)
            self._reported[name] = value


def _input(request: Any, name: str) -> Any:
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _response(outputs: dict[str, NDArray]) -> Any:
    return pb.InferenceResponse([pb.Tensor(name, np.ascontiguousarray(x)) for name, x in outputs.items()])


def _refusal(error: Exception) -> Any:
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "INTERNAL")
    return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(str(error), getattr(pb.TritonError, code)))
