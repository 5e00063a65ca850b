"""The study of examples/recall: each variant is its own recurrence, runs are resumed, docs say what the JSON says."""

import contextlib
import dataclasses
import json
import re
import statistics
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import assert_equal_to

import gdn2_ops
from examples.recall import __main__ as main
from examples.recall import report, study
from examples.recall.model import Model
from examples.recall.variants import VARIANTS, rotate
from gdn2_ops import tasks

SIZE, H, K, B, T = 12, 2, 4, 2, 9


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(B, T, SIZE, generator=generator), *torch.randn(3, B, T, H, K, generator=generator)


def rule_of(variant: str):
    """With weights that matter: decays of every speed, and rotations."""
    torch.manual_seed(1)
    rule = VARIANTS[variant](SIZE, H, K)
    for name, p in rule.named_parameters():
        torch.nn.init.normal_(p) if name.endswith("weight") else torch.nn.init.uniform_(p, -1, 1)
    return rule.requires_grad_(False)


def decay_of(rule, x):
    """g = -exp(A_log) softplus(f(x) + dt_bias) and the step, per head or per channel, by loops' letters."""
    step = F.softplus(rule.decay.f(x) + rule.decay.dt_bias).view(B, T, H, -1).double()
    return -rule.decay.A_log.double().exp().view(H, 1) * step, step


def scan(variant: str, x, q, k, v):
    """The rule as its paper writes it, token by token with explicit matrices: o before the scale of the operator."""
    rule, I = rule_of(variant), torch.eye(K, dtype=torch.float64)
    g, step = decay_of(rule, x) if hasattr(rule, "decay") else (None, None)
    beta = {
        name: getattr(rule, name)(x).sigmoid().view(B, T, H, -1).double()
        for name, _ in rule.named_children()
        if name in ("beta", "b_proj", "w_proj")
    }
    if variant == "Mamba-3":
        mix = rule.mix(x).sigmoid().double()
        theta = (step * rule.angle(x).view(B, T, H, K // 2).double()).cumsum(1)
        rotation = torch.polar(torch.ones_like(theta), theta)
        q, k = (torch.complex(y[..., : K // 2], y[..., K // 2 :]).to(torch.complex128) * rotation for y in (q, k))
        q, k = (torch.cat((y.real, y.imag), -1) for y in (q, k))
    q, k, v = q.double(), k.double(), v.double()
    o = torch.empty(B, T, H, K, dtype=torch.float64)
    for n in range(B):
        for h in range(H):
            S = torch.zeros(K, K, dtype=torch.float64)
            for t in range(T):
                at = (n, t, h)
                alpha = torch.diag(g[at].expand(K).exp()) if g is not None else I
                if variant == "linear attention":
                    S = S + torch.outer(k[at], v[at])
                elif variant == "Mamba-2":
                    S = alpha @ S + step[at] * torch.outer(k[at], v[at])
                elif variant == "Mamba-3":
                    S = alpha @ S + mix[at] * step[at] * torch.outer(k[at], v[at])
                    if t:
                        before = (n, t - 1, h)
                        S = S + (1 - mix[at]) * step[at] * g[at].exp() * torch.outer(k[before], v[before])
                elif variant in ("Gated DeltaNet", "KDA"):
                    erase = I - beta["beta"][at] * torch.outer(k[at], k[at])
                    S = erase @ alpha @ S + beta["beta"][at] * torch.outer(k[at], v[at])
                else:
                    b, w = beta["b_proj"][at].expand(K), beta["w_proj"][at].expand(K)
                    S = (I - torch.outer(k[at], b * k[at])) @ alpha @ S + torch.outer(k[at], w * v[at])
                o[at] = S.T @ q[at]
    return o


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_its_recurrence(variant, x):
    x, q, k, v = x
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    rule = rule_of(variant)
    o = gdn2_ops.chunk(*rule(x, q, k, v), scale=1.0).o[:, rule.tokens - 1 :: rule.tokens]
    assert_equal_to(o.double(), scan(variant, x, q, k, v), 2e-6, variant)


def test_variants_differ(x):
    x, q, k, v = x
    outputs = [scan(variant, x, *(F.normalize(y, dim=-1) for y in (q, k, v))) for variant in VARIANTS]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-2


def test_gates_per_channel_are_the_ones_named():
    width = {variant: {} for variant in VARIANTS if variant.startswith("GDN-2")}
    for variant, found in width.items():
        found.update(
            {name: getattr(VARIANTS[variant](SIZE, H, K), name).out_features // H for name in ("b_proj", "w_proj")}
        )
    assert width == {
        "GDN-2, erase only": {"b_proj": K, "w_proj": 1},
        "GDN-2, write only": {"b_proj": 1, "w_proj": K},
        "GDN-2": {"b_proj": K, "w_proj": K},
    }


def test_rotations_turn_pairs_and_keep_lengths():
    y, angle = torch.randn(3, K), torch.randn(3, K // 2)
    torch.testing.assert_close(rotate(y, angle).norm(dim=-1), y.norm(dim=-1))
    torch.testing.assert_close(rotate(rotate(y, angle), -angle), y)
    assert rotate(torch.tensor([1.0, 0, 0, 0]), torch.tensor([torch.pi / 2, 0])).allclose(
        torch.tensor([0.0, 0, 1, 0]), atol=1e-6
    )


@pytest.mark.parametrize("task", study.TASKS)
def test_parameters_and_states_are_the_same_for_all(task):
    sizes = {**study.SIZES, "head_dim": study.TASKS[task].head_dim}
    counts = {v: sum(p.numel() for p in Model(v, study.TASKS[task].vocab, **sizes).parameters()) for v in VARIANTS}
    assert max(counts.values()) / min(counts.values()) < 1.01, counts


@pytest.mark.parametrize("variant", ["Mamba-3", "GDN-2"])
def test_the_past_does_not_see_the_future(variant):
    torch.manual_seed(0)
    model = Model(variant, 20, size=16, layers=2, heads=2, head_dim=4)
    tokens = torch.randint(20, (2, 12))
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 20
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    first, second = (model(t, everywhere).view(2, 12, 20) for t in (tokens, other))
    assert torch.equal(first[:, :7], second[:, :7]) and not torch.equal(first[:, 7:], second[:, 7:])


@pytest.fixture
def short(monkeypatch):
    """A task that takes a second."""
    vocabulary = tasks.Vocabulary(6, 6, 2)
    ask = {f"{n} in 20": lambda n=n: tasks.recall(64, 20, n, vocabulary=vocabulary, seed=10**9) for n in (2, 4)}
    task = study.Task(14, 8, 60, lambda seed: tasks.recall(16, 20, 3, vocabulary=vocabulary, seed=seed), ask)
    monkeypatch.setattr(study, "TASKS", {"recall": task})
    return task


def test_a_run_learns(short):
    run = study.Run("recall", "GDN-2", 1, 1e-2)
    found = study.train(run)
    assert study.key(found) == run and found["scores"]["2 in 20"] > 0.9
    study.TASKS["recall"] = dataclasses.replace(short, steps=1)
    assert study.train(run)["scores"]["2 in 20"] < 0.6


def record(variant="KDA", seed=1, rate=1e-3, score=0.5, **more):
    return {"task": "recall", "variant": variant, "seed": seed, "rate": rate, "scores": {"4 in 20": score}, **more}


def test_the_best_rate_is_that_of_the_selection_seed():
    records = [
        record(seed=0, rate=1e-3, score=0.4),
        record(seed=0, rate=2e-3, score=0.6),
        record(seed=1, rate=1e-3, score=0.9),
    ]
    assert study.best_rate(records, "recall", "KDA") == 2e-3
    runs = study.reported_runs("recall", records, ["KDA"])
    assert [(run.seed, run.rate) for run in runs] == [(seed, 2e-3) for seed in study.SEEDS]
    assert study.SELECTION_SEED not in study.SEEDS and len(study.SEEDS) >= 3


def test_records_are_kept_and_a_torn_line_is_found(tmp_path):
    file = tmp_path / "build" / "records.jsonl"
    assert study.load(file) == []
    study.append(file, record(seed=1))
    study.append(file, record(seed=2))
    assert [r["seed"] for r in study.load(file)] == [1, 2]
    file.write_text(file.read_text()[:-9])
    assert [r["seed"] for r in study.load(file)] == [1]
    with pytest.raises(ValueError, match="not whole"):
        study.append(file, record(seed=3))


class NoProcesses:
    """A pool that trains in this process."""

    Pool = staticmethod(lambda _: contextlib.nullcontext(types.SimpleNamespace(imap_unordered=map)))


def test_a_stopped_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Training is replaced: what counts is which runs are asked for."""
    asked = []

    def train(run):
        asked.append(run)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {**dataclasses.asdict(run), "scores": {"4 in 20": run.rate}}

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(main.multiprocessing, "get_context", lambda _: NoProcesses)
    command = ["recall", "--tasks", "recall", "--variants", "KDA", "GDN-2", "--records", str(tmp_path / "records")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(KeyboardInterrupt):
        main.main()
    main.main()
    assert len(asked) == 15 and len(set(asked)) == 14  # the stopped one is the only one that began twice
    assert {run.rate for run in asked if run.seed in study.SEEDS} == {max(study.RATES)}
    main.main()
    assert len(asked) == 15 and "runs are left for a report" in capsys.readouterr().out


@pytest.mark.parametrize(
    "differences, said", [([1, 0.9, 1.4], "reproduced"), ([0.2, 0.1, 2], "not decided"), ([-1, -2, -3], "the opposite")]
)
def test_a_verdict_needs_every_seed(differences, said):
    assert report.verdict(differences) == said


@pytest.fixture(scope="module")
def written():
    return json.loads(report.RESULT.read_text())


def test_the_document_says_what_the_results_say(written):
    document = report.DOCUMENT.read_text()
    assert report.behind_marker(document, report.text(written)) == document


def test_the_text_says_what_the_results_say(written):
    said = report.DOCUMENT.read_text().partition("## What it says")[2].partition("**Reproduced in one run")[0]
    differences = [report.differences(written, "recall", *rules) for rules in report.ORDERINGS]
    reproduced = [report.spread(x) for x in differences if report.verdict(x) == "reproduced"]
    assert len(reproduced) == said.count("±") and all(text in said for text in reproduced)
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    readme = readme.partition("`make recall` (")[2].partition("##")[0]
    for rule in ("linear attention", "Mamba-2", "Mamba-3", "Gated DeltaNet", "KDA", "GDN-2"):
        mean = statistics.fmean(report.scores(written, "recall", rule, "all"))
        assert re.search(rf"{rule}[a-z\s]*\s{mean:.1f}\b", readme), (rule, mean)


def test_the_results_are_the_whole_study(written):
    for task in study.TASKS:
        for variant in VARIANTS:
            runs = report.reported(written, task, variant)
            assert sorted(r["seed"] for r in runs) == list(study.SEEDS)
            assert {r["rate"] for r in runs} == {study.best_rate(written["runs"], task, variant)}
            assert all(list(r["scores"]) == list(study.TASKS[task].ask) for r in runs)


def test_a_changed_number_changes_the_document(written):
    changed = json.loads(json.dumps(written))
    runs = report.reported(changed, "recall", "KDA")
    runs[0]["scores"] = {what: 0.0 for what in runs[0]["scores"]}
    assert report.text(changed) != report.text(written)


def test_pictures_are_drawn(written, tmp_path):
    report.draw(written, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"recall-{task}.png" for task in study.TASKS}
