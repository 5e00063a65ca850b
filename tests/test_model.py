"""The models of the paper have its sizes; prefill and decoding are the forward; a saved model comes back."""

import dataclasses
import json

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from versions import fails_on

from gdn2_ops.model import GDN2LM, GDN2Config

SMALL = GDN2Config(
    vocab_size=64, hidden_size=32, num_layers=2, intermediate_size=48, num_heads=2, num_v_heads=4, head_dim=8
)
HYBRID = dataclasses.replace(SMALL, attention_every=2, num_attention_heads=2, window=7, guard_erase=True)


def small(config: GDN2Config = SMALL) -> GDN2LM:
    torch.manual_seed(0)
    return GDN2LM(config).eval()


def tokens(B: int, T: int, vocab: int = 64) -> torch.Tensor:
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize(
    "preset, without_embeddings, all_of_them",
    [("gdn2-1.3b", 1_302_638_112, 1_450_096_416), ("gdn2-1.3b-hybrid", 1_300_314_384, 1_447_772_688)],
)
def test_presets_have_the_published_parameter_counts(preset, without_embeddings, all_of_them):
    with torch.device("meta"):
        model = GDN2LM(GDN2Config.preset(preset))
    assert sum(p.numel() for p in model.layers.parameters()) == without_embeddings
    assert sum(p.numel() for p in model.parameters()) == all_of_them


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["recurrent", "hybrid"])
def test_prefill_and_decode_are_the_forward(config):
    model, rows = small(config), tokens(3, 24)
    with torch.no_grad():
        logits = model(rows).logits
    last, state = model.prefill(rows[:, :13])
    torch.testing.assert_close(last, logits[:, 12], rtol=1e-4, atol=1e-5)
    for t in range(13, 24):
        last, state = model.decode(rows[:, t], state)
        torch.testing.assert_close(last, logits[:, t], rtol=1e-4, atol=1e-5)
    again, _ = model.prefill(rows, model.initial_state(3))
    torch.testing.assert_close(again, logits[:, -1], rtol=1e-4, atol=1e-5)


def test_decode_leaves_the_old_state_as_it_is():
    model = small()
    _, state = model.prefill(tokens(2, 9))
    before = [x.clone() for layer in state for x in layer]
    model.decode(tokens(2, 1)[:, 0], state)
    assert all(torch.equal(x, y) for x, y in zip(before, (x for layer in state for x in layer)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back(tmp_path, tied):
    model, rows = small(dataclasses.replace(SMALL, tie_embeddings=tied)), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = GDN2LM.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(rows).logits, model(rows).logits)
    model.save_pretrained(tmp_path, dtype=torch.float16)
    stored = GDN2LM.from_pretrained(tmp_path)
    assert torch.equal(stored.embed.weight, model.embed.weight.half().float())
    assert torch.equal(stored.layers[0].mixer.A_log, model.layers[0].mixer.A_log)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        GDN2LM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'gdn2'"):
        GDN2LM.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(ValueError, match=r"unknown options \['depth'\]"):
        GDN2LM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match="weights do not fit"):
        GDN2LM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        GDN2LM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="preset"):
        GDN2Config.preset("huge")


@fails_on("2.11", InductorError, "Inductor has no lowering of a concatenation over an unbacked size (KeyError)")
def test_tiny_trains_in_one_compiled_graph_at_every_length():
    """A length marked as unbacked is never looked at: one token and 300 share a graph, forward and backward."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = GDN2LM(GDN2Config.preset("tiny"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T in (1, 7, 64, 65, 300):
        rows = tokens(2, T, 256)
        torch._dynamo.decorators.mark_unbacked(rows, 1)
        got = gradients(compiled, model, rows)
        want = gradients(model, model, rows)
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-7 + 1e-4 * float(y.abs().max()))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def gradients(forward, model: GDN2LM, rows: torch.Tensor) -> list[torch.Tensor]:
    logits = forward(rows).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten())
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
