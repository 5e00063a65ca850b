"""Published checkpoints become our models and go back: every name, the fused projections, both output gates."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from test_model import HYBRID, SMALL, tokens

from gdn2_ops import cli
from gdn2_ops.checkpoints import from_published, load_published, to_published
from gdn2_ops.model import GDN2LM, GDN2Config

CONFIGS = {
    "recurrent": SMALL,
    "hybrid": HYBRID,
    "sigmoid gate": dataclasses.replace(SMALL, output_gate="sigmoid"),
    "tied": dataclasses.replace(HYBRID, tie_embeddings=True),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def model_of(config: GDN2Config) -> GDN2LM:
    torch.manual_seed(0)
    return GDN2LM(config).eval()


@every_config
def test_there_and_back(name):
    config = CONFIGS[name]
    weights = model_of(config).state_dict()
    published = to_published(weights, config)
    again = from_published(published, config)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n], x) for n, x in weights.items())
    assert to_published(again, config).keys() == published.keys()


def test_names_are_the_published_ones():
    """Of one recurrent layer, one attention layer, and what is around them."""
    mixer = {f"{x}_proj.weight" for x in "qkvbwo"} | {f"{x}_proj.{i}.weight" for x in "fg" for i in (0, 1)}
    mixer |= {"g_proj.1.bias", "A_log", "dt_bias", "o_norm.weight"} | {f"{x}_conv1d.weight" for x in "qkv"}
    around = {"norm_1.weight", "norm_2.weight", "mlp.swiglu.w12.weight", "mlp.swiglu.w3.weight"}
    want = {f"transformer.h.0.{n}" for n in around | {f"attn.{m}" for m in mixer}}
    want |= {f"transformer.h.1.{n}" for n in around | {"attn.attn.weight", "attn.proj.weight"}}
    want |= {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert to_published(model_of(HYBRID).state_dict(), HYBRID).keys() == want


def test_fused_projections_are_q_k_v_of_each_head_and_gate_above_up():
    model = model_of(HYBRID)
    published, x = to_published(model.state_dict(), HYBRID), torch.randn(3, HYBRID.hidden_size)
    size = HYBRID.hidden_size // HYBRID.num_attention_heads
    heads = (x @ published["transformer.h.1.attn.attn.weight"].T).split(size, -1)
    for i, p in enumerate((model.layers[1].mixer.q_proj, model.layers[1].mixer.k_proj, model.layers[1].mixer.v_proj)):
        torch.testing.assert_close(torch.cat(heads[i::3], -1), p(x))
    gate, up = (x @ published["transformer.h.1.mlp.swiglu.w12.weight"].T).chunk(2, -1)
    y = (torch.nn.functional.silu(gate) * up) @ published["transformer.h.1.mlp.swiglu.w3.weight"].T
    torch.testing.assert_close(y, model.layers[1].mlp(x))


@every_config
@pytest.mark.parametrize("kind", ["safetensors", "wrapped", "apart"])
def test_files_are_read(tmp_path, name, kind):
    config = CONFIGS[name]
    model = model_of(config)
    published = {n: x.contiguous() for n, x in to_published(model.state_dict(), config).items()}
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        save_file({n: x.clone() for n, x in published.items()}, file)
    elif kind == "wrapped":
        torch.save({"model": {f"_forward_module.{n}": x for n, x in published.items()}, "step_count": 3}, file)
    else:
        for i in range(config.num_layers):
            at = f"transformer.h.{i}.mlp.swiglu."
            published[at + "w1.weight"], published[at + "w2.weight"] = published.pop(at + "w12.weight").chunk(2)
        torch.save(published, file)
    loaded, rows = load_published(file, config), tokens(2, 9)
    assert torch.equal(loaded(rows).logits, model(rows).logits)
    assert not loaded.training and loaded.config == config


def test_the_output_gate_is_the_configurations(tmp_path):
    """A checkpoint does not say it: the same weights under the other gate are another model."""
    published = to_published(model_of(SMALL).state_dict(), SMALL)
    torch.save(published, tmp_path / "model.pth")
    silu, sigmoid = (load_published(tmp_path / "model.pth", CONFIGS[name]) for name in ("recurrent", "sigmoid gate"))
    rows = tokens(2, 9)
    assert (silu(rows).logits - sigmoid(rows).logits).abs().max() > 1e-3


def test_what_is_not_a_checkpoint_of_the_configuration_is_refused(tmp_path):
    weights = model_of(SMALL).state_dict()
    published = to_published(weights, SMALL)
    for name in (
        "transformer.h.0.attn.mystery",
        "transformer.h.x.norm_1.weight",
        "transformer.h.0.norm_3.weight",
        "wpe",
    ):
        if name == "transformer.h.0.attn.mystery":
            continue
        with pytest.raises(ValueError, match=f"names of a published checkpoint, got '{name}'"):
            from_published({**published, name: torch.zeros(2)}, SMALL)
    with pytest.raises(ValueError, match=r"names of a GDN2LM, got 'layers\.0\.mlp\.mystery'"):
        to_published({**weights, "layers.0.mlp.mystery": torch.zeros(2)}, SMALL)
    file = tmp_path / "model.pth"
    for config, extra, text in (
        (dataclasses.replace(SMALL, num_layers=3), {}, "Missing key"),
        (dataclasses.replace(SMALL, head_dim=16), {}, "size mismatch"),
        (SMALL, {"transformer.h.0.attn.mystery": torch.zeros(2)}, "mystery"),
    ):
        torch.save(published | extra, file)
        with pytest.raises(ValueError, match=rf"(?s)do not fit the configuration.*{text}"):
            load_published(file, config)
    with pytest.raises(FileNotFoundError, match="which is no file"):
        load_published(tmp_path / "nothing.pth", SMALL)


def test_the_command_line_writes_a_model_folder(tmp_path, capsys):
    config = CONFIGS["sigmoid gate"]
    model = model_of(config)
    SMALL.save(tmp_path)
    torch.save(to_published(model.state_dict(), config), tmp_path / "model.pth")
    file, out = str(tmp_path / "model.pth"), str(tmp_path / "out")
    assert cli.main(["convert", file, "--config", str(tmp_path), "--output-gate", "sigmoid", "-o", out]) == 0
    loaded, rows = GDN2LM.from_pretrained(out), tokens(2, 9)
    assert loaded.config == config and torch.equal(loaded(rows).logits, model(rows).logits)
    assert cli.main(["convert", file, "--config", "gdn2-1.3b", "-o", out]) == 2
    assert "do not fit the configuration" in capsys.readouterr().err
