"""transformers runs the same model from the same folder: the bytes of generate, caches, padding, loss, saved files."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="the wheel transformers is not installed")

from test_model import HYBRID, SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from gdn2_ops.backends import TorchBackend
from gdn2_ops.huggingface import GDN2Cache, GDN2ForCausalLM, GDN2PretrainedConfig
from gdn2_ops.model import GDN2LM, GDN2Config
from gdn2_ops.runtime.generate import generate

TINY = Path(__file__).resolve().parent.parent / "examples" / "models" / "tiny"
CONFIGS = {"recurrent": SMALL, "hybrid": HYBRID}
every_config = pytest.mark.parametrize("name", CONFIGS)


def model_of(config: GDN2Config, **options) -> GDN2ForCausalLM:
    torch.manual_seed(0)
    return GDN2ForCausalLM(GDN2PretrainedConfig(**dataclasses.asdict(config), **options)).eval()


def rows_of(B: int, T: int) -> torch.Tensor:
    return torch.randint(1, 64, (B, T), generator=torch.Generator().manual_seed(T))


def padded(rows: list[torch.Tensor], T: int, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths in one batch, and their mask; what stands in the padding is no zero."""
    ids, mask = torch.full((len(rows), T), 7), torch.zeros(len(rows), T, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@pytest.fixture(scope="module")
def tiny() -> GDN2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def new_tokens(model, ids: torch.Tensor, count: int, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)[:, ids.shape[1] :]


def test_generate_writes_the_bytes_of_the_runtime(tiny):
    prompt = b"import "
    want = b"".join(generate(TorchBackend(GDN2LM.from_pretrained(TINY)), prompt, 48))
    ids = torch.from_numpy(np.frombuffer(prompt, np.uint8).astype(np.int64))[None]
    assert isinstance(tiny, GDN2ForCausalLM) and tiny.dtype == torch.float32
    assert bytes(new_tokens(tiny, ids, 48)[0].tolist()) == want
    assert bytes(new_tokens(tiny, ids, 24, use_cache=False)[0].tolist()) == want[:24]


def test_beam_search_with_a_cache_is_the_search_without(tiny):
    ids = torch.tensor([list(b"class A"), list(b"def run")])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with_cache = new_tokens(tiny, ids, 12, **beams)
    assert torch.equal(with_cache, new_tokens(tiny, ids, 12, use_cache=False, **beams))
    assert len({tuple(row) for row in with_cache.tolist()}) == 4  # the beams moved


@every_config
def test_prompts_padded_on_the_left_continue_as_they_do_alone(name):
    model = model_of(CONFIGS[name])
    rows = [rows_of(1, T)[0] for T in (11, 3, 1)]
    ids, mask = padded(rows, 12)
    together = new_tokens(model, ids, 9, attention_mask=mask)
    with torch.no_grad():
        output = model(ids, attention_mask=mask)
        for i, row in enumerate(rows):
            alone = model(row[None])
            torch.testing.assert_close(output.logits[i, 12 - len(row) :], alone.logits[0], rtol=1e-4, atol=1e-5)
            for got, want in zip(output.past_key_values.states, alone.past_key_values.states):
                for x, y in zip(got, want):
                    torch.testing.assert_close(x[i : i + 1], y, rtol=1e-4, atol=1e-5)
            assert torch.equal(together[i], new_tokens(model, row[None], 9)[0])


@every_config
def test_a_cache_goes_on_and_its_rows_are_chosen(name):
    model, ids = model_of(CONFIGS[name]), rows_of(2, 12)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        middle = model(ids[:, 5:11], past_key_values=first.past_key_values)
        cache = middle.past_key_values
        assert cache.get_seq_length() == 11
        torch.testing.assert_close(middle.logits, whole[:, 5:11], rtol=1e-4, atol=1e-5)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        last = model(ids[[1, 0], 11:], past_key_values=cache)
        torch.testing.assert_close(last.logits[:, 0], whole[[1, 0], 11], rtol=1e-4, atol=1e-5)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="cannot forget its last tokens"):
        cache.crop(-1)


def test_loss_is_the_cross_entropy_of_the_next_token_and_padding_changes_nothing():
    model = model_of(SMALL)
    rows = [rows_of(1, T)[0] for T in (12, 7)]
    (ids, mask), want = padded(rows, 12, "right"), []
    for row in rows:
        logits = model(row[None]).logits[0]
        want.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, sum(want) / (11 + 6))


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients():
    model, ids = model_of(HYBRID).train(), rows_of(2, 12)
    calls = []
    model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(ids, labels=ids)
        assert output.past_key_values is None  # training keeps none
        output.loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want, plain = grads(), len(calls)
    model.activation_checkpointing_enable()
    got = grads()
    assert plain == 1 and len(calls) == 3
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    model.activation_checkpointing_disable()
    grads()
    assert len(calls) == 4


@pytest.mark.parametrize("name", [*CONFIGS, "tied"])
def test_folders_serve_both(tmp_path, name):
    config = dataclasses.replace(SMALL, tie_embeddings=True) if name == "tied" else CONFIGS[name]
    model, ids = model_of(config), rows_of(2, 9)
    model.save_pretrained(tmp_path / "theirs")
    ours = GDN2LM.from_pretrained(tmp_path / "theirs")
    assert ours.config == config
    ours.save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.config.to_gdn2() == config
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(ours(ids).logits, model(ids).logits)
    auto = AutoConfig.from_pretrained(tmp_path / "ours")
    assert auto.num_hidden_layers == config.num_layers and auto.tie_word_embeddings == config.tie_embeddings
    assert type(AutoModelForCausalLM.from_config(auto)) is GDN2ForCausalLM


def test_low_precision_keeps_decays_in_float32(tmp_path):
    model_of(SMALL).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = model.layers[0].mixer
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert new_tokens(model, rows_of(2, 5), 3).shape == (2, 3)
    assert model(rows_of(2, 5)).past_key_values.states[0].recurrent.dtype == torch.float32


def test_a_parameter_that_a_checkpoint_lacks_gets_its_initial_value(tmp_path):
    model = model_of(SMALL)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = ["layers.0.mixer.A_log", "layers.1.mixer.q_proj.weight", "layers.1.mlp_norm.weight"]
    save_file({n: x for n, x in weights.items() if n not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(lacking)
    found = loaded.state_dict()
    rate = found["layers.0.mixer.A_log"].exp()
    assert rate.min() >= 1 and rate.max() <= 16
    projection = found["layers.1.mixer.q_proj.weight"]
    bound = 2**-2.5 * (6 / sum(projection.shape)) ** 0.5
    assert 0.9 * bound < projection.abs().max() <= bound
    assert torch.equal(found["layers.1.mlp_norm.weight"], torch.ones(32))
    assert all(torch.equal(x, found[n]) for n, x in weights.items() if n not in lacking)


def test_what_cannot_be_done_is_refused():
    model, ids = model_of(HYBRID), rows_of(2, 4)
    for mask in ([[1, 0, 1, 1]] * 2, [[1, 1, 1, 1], [1, 1, 1, 0]]):
        with pytest.raises(ValueError, match="attention_mask to be 0 on the left of each row only"):
            model(ids, attention_mask=torch.tensor(mask), use_cache=True)
    with pytest.raises(ValueError, match="attention_mask to be 0 on the left"):
        model(ids, attention_mask=torch.tensor([[1, 0, 1, 1]] * 2), use_cache=False)
    with pytest.raises(ValueError, match=r"attention_mask of shape \[B, T\] with T >= 4, got \(2, 3\)"):
        model(ids, attention_mask=torch.ones(2, 3))
    cache = model(ids).past_key_values
    assert isinstance(cache, GDN2Cache)
    with pytest.raises(ValueError, match="padding at the beginning of a sequence only"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1]] * 2), past_key_values=cache)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.embed(ids))
    with pytest.raises(ValueError, match="expected no cache_implementation, got 'static'"):
        new_tokens(model, ids, 3, cache_implementation="static")
    with pytest.raises(ValueError, match="stateful"):
        new_tokens(model, ids[:1], 3, assistant_model=model_of(HYBRID))
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="past_key_values from this model, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())


def test_inputs_outputs_and_shapes_are_those_of_transformers(tmp_path):
    model, ids = model_of(SMALL), rows_of(2, 6)
    output = model(ids, output_hidden_states=True, logits_to_keep=2)
    assert output.logits.shape == (2, 2, 64) and len(output.hidden_states) == 3
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits[:, -2:], output.logits)
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[0], model(ids).logits)
    model.resize_token_embeddings(70)
    assert model(ids).logits.shape == (2, 6, 70) and model.config.vocab_size == 70


def test_a_missing_transformers_is_named_with_its_cure():
    code = "import sys; sys.modules['transformers'] = None; import gdn2_ops.huggingface"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode != 0
    assert "gdn2_ops.huggingface needs transformers >= 5.23: pip install 'gdn2-ops[transformers]'" in found.stderr
