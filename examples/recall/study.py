"""The study: which runs there are, one run, and all of them in processes of one thread, resumable.

Each variant first meets every learning rate with seed 0; the best one is used for the seeds that are reported. A
finished run is one line of a file of records, appended at once: a study that was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from examples.recall.model import Model
from examples.recall.variants import VARIANTS
from examples.schedule import warm_cosine
from gdn2_ops import corpus, tasks

WARMUP = 0.05  # share of the steps
SELECTION_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
RATES = (3e-3, 8e-3)
SIZES = {"size": 64, "layers": 1, "heads": 2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is learned and asked. learn: seed -> a batch. ask: what -> a large batch of unseen rows."""

    vocab: int
    head_dim: int
    steps: int
    learn: Callable[[int], tasks.Batch]
    ask: dict[str, Callable[[], tasks.Batch]]


@dataclass(frozen=True)
class Run:
    """One training: the name of a task and of a variant, seed, learning rate."""

    task: str
    variant: str
    seed: int
    rate: float


UNSEEN = 10**9  # seeds of the questions; those of the lessons are below
VOCABULARY = tasks.Vocabulary(64, 64, 8)
PAIRS, ASKED_PAIRS = (8, 16, 32), (4, 8, 16, 24, 32, 48)
FILLERS, ASKED_LENGTHS_OF_16 = (16, 80), (256, 512, 1024)


def _recall(batch: int, pairs: int, length: int, seed: int) -> tasks.Batch:
    """A third of the writes bind a new value to a key that has one."""
    return tasks.recall(batch, length, pairs, rewrites=pairs // 2, vocabulary=VOCABULARY, seed=seed)


KINDS = ("s-niah-1", "s-niah-2", "s-niah-word", "mk-niah-1")
LENGTH, ASKED_LENGTHS = 128, (128, 256, 512)
WORDS, DIGITS = 768, 4


def _needles(batch: int, length: int, kind: str, seed: int, *, held_out: bool = False) -> tasks.Batch:
    return tasks.needles(batch, length, kind, _text(held_out), digits=DIGITS, words=WORDS, seed=seed)


@functools.cache
def _text(held_out: bool) -> bytes:
    if held_out:
        return corpus.held_out_text(512 * 1024)
    return b"".join(file.read_bytes() for file in corpus.training_files())[: 4 * 1024 * 1024]


def _learn_recall(seed: int) -> tasks.Batch:
    chance = random.Random(seed)
    pairs = chance.choice(PAIRS)
    return _recall(16, pairs, 5 * pairs + chance.choice(FILLERS), seed)


def _questions_of_recall() -> dict[str, Callable[[], tasks.Batch]]:
    """About a thousand of each kind."""
    sizes = [(pairs, 5 * pairs + FILLERS[0]) for pairs in ASKED_PAIRS]
    sizes += [(16, length) for length in ASKED_LENGTHS_OF_16]
    return {
        f"{pairs} in {length}": functools.partial(_recall, 1024 // pairs, pairs, length, UNSEEN + pairs + length)
        for pairs, length in sizes
    }


def _learn_needles(seed: int) -> tasks.Batch:
    return _needles(16, LENGTH, random.Random(seed).choice(KINDS), seed)


def _questions_of_needles() -> dict[str, Callable[[], tasks.Batch]]:
    """A hundred of each kind, in modules that no needle was learned in."""
    return {
        f"{kind} {length}": functools.partial(_needles, 100, length, kind, UNSEEN + length, held_out=True)
        for kind in KINDS
        for length in ASKED_LENGTHS
    }


TASKS = {
    "recall": Task(VOCABULARY.size, 16, 1000, _learn_recall, _questions_of_recall()),
    "needles": Task(256 + WORDS, 32, 1500, _learn_needles, _questions_of_needles()),
}


def train(run: Run) -> Record:
    """Trains one model and asks it. The record: the run, its scores, parameters, floats of state, seconds.

    The paper's recipe scaled down: AdamW (0.9, 0.95), weight decay 0.1 on matrices, clipping at 1, a linear warm-up
    and a cosine to a tenth.
    """
    task = TASKS[run.task]
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    began, began_cpu = time.perf_counter(), time.process_time()
    model = Model(run.variant, task.vocab, head_dim=task.head_dim, **SIZES).to(DEVICE)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, task.steps, WARMUP))
    losses = []
    for step in range(task.steps):
        batch = on_device(task.learn(run.seed * 10**6 + step))
        asked = batch.targets != tasks.NOT_ASKED
        loss = F.cross_entropy(model(batch.tokens, asked), batch.targets[asked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
    return {
        **asdict(run),
        "scores": {what: round(score(model, on_device(ask())), 4) for what, ask in task.ask.items()},
        "loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "parameters": sum(p.numel() for p in parameters),
        "state": SIZES["layers"] * SIZES["heads"] * task.head_dim**2,
        "cpu_s": round(time.process_time() - began_cpu, 1),
        "wall_s": round(time.perf_counter() - began, 1),
    }


def on_device(batch: tasks.Batch) -> tasks.Batch:
    """Where the model is; the numbers are made on the CPU, so that they are the same everywhere."""
    return tasks.Batch(*(x.to(DEVICE) for x in batch))


@torch.no_grad()
def score(model: Model, batch: tasks.Batch) -> float:
    """`tasks.exact_match` of the most likely tokens."""
    asked = batch.targets != tasks.NOT_ASKED
    predicted = batch.targets.clone()
    predicted[asked] = model(batch.tokens, asked).argmax(-1)
    return tasks.exact_match(predicted, batch.targets)


def selection_runs(task: str, variants: Iterable[str] = VARIANTS) -> list[Run]:
    """Every learning rate with seed 0."""
    return [Run(task, variant, SELECTION_SEED, rate) for rate in RATES for variant in variants]


def reported_runs(task: str, records: Sequence[Record], variants: Iterable[str] = VARIANTS) -> list[Run]:
    """Every seed that is reported, with each variant's best learning rate."""
    rates = {variant: best_rate(records, task, variant) for variant in variants}
    return [Run(task, variant, seed, rates[variant]) for seed in SEEDS for variant in variants]


def best_rate(records: Sequence[Record], task: str, variant: str) -> float:
    """The rate of the highest mean score with seed 0."""
    wanted = (task, variant, SELECTION_SEED)
    tried = [r for r in records if (r["task"], r["variant"], r["seed"]) == wanted]
    return max(tried, key=lambda r: sum(r["scores"].values()))["rate"]


def key(record: Record) -> Run:
    """Which run a record is of."""
    return Run(**{field.name: record[field.name] for field in fields(Run)})


def fingerprint() -> str:
    """Of the code that a record depends on: records of another study are not taken for this one's."""
    folder = Path(__file__).parent
    files = (folder / "study.py", folder / "model.py", folder / "variants.py", Path(tasks.__file__))
    return f"{zlib.crc32(b''.join(file.read_bytes() for file in files)):08x}"


def load(file: Path) -> list[Record]:
    """The records of a file; a last line that a stopped machine left half-written is no record."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def append(file: Path, record: Record) -> None:
    """One write, so that two studies may append to one file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        torn = os.fstat(descriptor).st_size and os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1) != b"\n"
        if torn:
            raise ValueError(f"{file}: the last line is not whole; remove it")
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)
