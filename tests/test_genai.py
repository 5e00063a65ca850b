"""The folder for onnxruntime-genai: it loads, writes the bytes of eager, and what cannot run there is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_model import HYBRID, SMALL, small

from gdn2_ops import cli
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.genai import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILES, export
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.generate import generate
from gdn2_ops.runtime.session import OnnxRuntimeBackend

og = pytest.importorskip("onnxruntime_genai")

TINY = Path(__file__).parents[1] / "examples" / "models" / "tiny"
PROMPTS = (b"import ", b"class A", b"\tprint(")  # of one length
COUNT = 48


def generated(folder: Path, prompts: list[list[int]], count: int, pieces: int = 1) -> list[list[int]]:
    """The tokens after prompts of one length, read in as many pieces."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=len(prompts[0]) + count)
    generator = og.Generator(model, parameters)
    for piece in np.array_split(np.array(prompts, np.int32), pieces, axis=1):
        generator.append_tokens(np.ascontiguousarray(piece))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(i)[len(prompts[0]) :])) for i in range(len(prompts))]


def greedy(backend, prompt: bytes, count: int = COUNT) -> bytes:
    return b"".join(generate(backend, prompt, count))


@pytest.fixture(scope="module")
def eager() -> TorchBackend:
    return TorchBackend(GDN2LM.from_pretrained(TINY))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("genai") / "tiny"
    assert cli.main(["export", str(TINY), "--to", "genai", "-o", str(path), "--library"]) == 0
    return path


@pytest.fixture(scope="module", params=["body", "library"])
def folder(request, exported, tmp_path_factory) -> Path:
    """The folder without its library, or with it and no body, so that only our kernels can run it."""
    path = tmp_path_factory.mktemp("genai") / request.param
    shutil.copytree(exported, path)
    if request.param == "library":
        model = onnx.load(path / MODEL_FILE)
        del model.functions[:]
        onnx.save(model, path / MODEL_FILE)
    else:
        config = json.loads((path / CONFIG_FILE).read_text())
        (path / config["model"]["decoder"]["session_options"].pop("custom_ops_library")).unlink()
        (path / CONFIG_FILE).write_text(json.dumps(config))
    return path


def test_it_writes_the_bytes_of_eager(folder, eager):
    for prompt in PROMPTS:
        (got,) = generated(folder, [list(prompt)], COUNT, pieces=3)
        assert bytes(got) == greedy(eager, prompt)
    batch = generated(folder, [list(prompt) for prompt in PROMPTS], COUNT)
    assert [bytes(row) for row in batch] == [greedy(eager, prompt) for prompt in PROMPTS]


def test_tokens_are_bytes(folder):
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    for text in ("import os\n\n  x = 1", "a  b\t\tc\r\n\x7f", "don't 123 <|endoftext|> <s>", "ünïcödé – 日本語 😀"):
        tokens = tokenizer.encode(text)
        assert bytes(map(int, tokens)) == text.encode()
        assert tokenizer.decode(tokens) == text
        stream = tokenizer.create_stream()
        assert "".join(stream.decode(int(token)) for token in tokens) == text


def a_tokenizer(folder: Path, tokens: list[str], end: str | dict | None) -> Path:
    folder.mkdir()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    *plain, last = tokens
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": len(plain), "content": last, "special": True}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(plain)}, "merges": []},
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": end}
    for name, content in zip(TOKENIZER_FILES, (tokenizer, config)):
        (folder / name).write_text(json.dumps(content))
    return folder


def test_float16_and_a_tokenizer_that_names_the_end(tmp_path):
    prompt = [1, 2, 3]
    tokens = [chr(0x100 + i) for i in range(60)] + ["<s>"]
    texts = a_tokenizer(tmp_path / "tokenizer", tokens, {"content": "<s>"})
    folder = export(small(SMALL), tmp_path / "model", dtype=torch.float16, body="scan", tokenizer=texts)
    for name in TOKENIZER_FILES:
        assert (folder / name).read_text() == (texts / name).read_text()
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["model"]["eos_token_id"] == [60]
    written = list(greedy(OnnxRuntimeBackend(folder / MODEL_FILE, threads=1), bytes(prompt), 20))
    assert len(set(written)) > 5 and 60 not in written
    assert generated(folder, [prompt], 20) == [written]
    config["model"]["eos_token_id"] = [written[7]]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert generated(folder, [prompt], 20) == [written[: written.index(written[7])]]


def test_what_onnxruntime_genai_cannot_run_is_refused(tmp_path, capsys):
    target = tmp_path / "no"
    with pytest.raises(NotImplementedError, match=r"carries the states .* got \['conv', 'k', 'length'"):
        export(small(HYBRID), target)
    with pytest.raises(NotImplementedError, match=r"got \['recurrent'\]"):
        export(small(replace(SMALL, use_short_conv=False)), target)
    with pytest.raises(ValueError, match="vocabulary of 256 bytes without a tokenizer, got 64"):
        export(small(SMALL), target)
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        export(small(SMALL), target, tokenizer=tmp_path)
    with pytest.raises(ValueError, match=r"expected an eos_token among the tokens of .*, got None"):
        export(small(SMALL), target, tokenizer=a_tokenizer(tmp_path / "endless", ["a", "b"], None))
    large = a_tokenizer(tmp_path / "large", [chr(0x100 + i) for i in range(65)], {"content": "\u0100"})
    with pytest.raises(ValueError, match=r"at most 64 tokens, .* got the token 64"):
        export(small(SMALL), target, tokenizer=large)
    assert not target.exists()
    assert cli.main(["export", str(TINY), "--to", "onnx", "-o", str(tmp_path / "m.onnx"), "--library"]) == 2
    assert "--to genai" in capsys.readouterr().err
