"""A folder that onnxruntime-genai loads and generates with: the ONNX file, its configuration, a tokenizer, our kernels.

export(model, "folder")     then onnxruntime_genai.Model("folder"), from Python, C++, C# or Java

What onnxruntime-genai does with recurrent states, and what it cannot, is in docs/decisions/0004-onnxruntime-genai.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gdn2_ops.compiled import find_library
from gdn2_ops.export import onnx
from gdn2_ops.export.program import flatten_language_model

MODEL_TYPE = "decoder"  # the type that stands for no family of models
STATES = ("conv", "recurrent")
MODEL_FILE, CONFIG_FILE = "model.onnx", "genai_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LIBRARY = "libgdn2_onnxruntime.so"
CONTEXT = 2**20  # tokens; the model has no limit, onnxruntime-genai wants a number
BYTES = 256
END_BYTE = 0xFF  # onnxruntime-genai stops at one token of the vocabulary: the byte that no UTF-8 text has


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    body: str = "chunk",
    dtype: torch.dtype | None = None,
    library: bool = False,
    tokenizer: str | Path | None = None,
) -> Path:
    """Writes a language model as a folder for onnxruntime-genai >= 0.18: greedy search and sampling.

    Prompts of one batch have one length: there is no mask, padding would be read as text. No beam search:
    onnxruntime-genai 0.18 does not move recurrent states when it reorders beams, and the text is wrong.

    Args:
        model: as for `export.onnx.export`, every layer a GDN-2 layer with its convolution.
        folder: where to write; made if missing.
        body, dtype: as for `export.onnx.export`.
        library: put our CPU kernels for ONNX Runtime into the folder, in place of the body: for this kind of machine.
        tokenizer: a folder with tokenizer.json and tokenizer_config.json, whose eos_token ends generation. Without it
            tokens are bytes, and the byte 0xFF, which no UTF-8 text has, ends generation.

    Returns: the folder.
    Raises: ValueError, FileNotFoundError: an unknown body, a model in training mode, a vocabulary that is not the
        tokenizer's. NotImplementedError: states that onnxruntime-genai does not carry. ImportError: the extra `onnx` is
        not installed, or the package has no library.
    """
    folder = Path(folder)
    layers, vocabulary = _layers(model), _vocabulary(model)
    texts, end = _byte_tokenizer(vocabulary) if tokenizer is None else _read_tokenizer(Path(tokenizer), vocabulary)
    kernels = find_library(LIBRARY) if library else None
    folder.mkdir(parents=True, exist_ok=True)
    onnx.export(model, folder / MODEL_FILE, body=body, dtype=dtype)
    if kernels is not None:
        shutil.copy(kernels, folder / LIBRARY)  # onnxruntime-genai refuses a library outside the model's folder
    config = _config(layers, vocabulary, end, LIBRARY if library else None)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def _config(layers: int, vocabulary: int, end: int, library: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        options["custom_ops_library"] = library
    inputs, outputs = {"input_ids": "input_ids"}, {"logits": "logits"}
    for field in STATES:
        inputs[f"past_{field}_names"] = f"past.%d.{field}"
        outputs[f"present_{field}_names"] = f"present.%d.{field}"
    decoder = {
        "filename": MODEL_FILE,
        "num_hidden_layers": layers,
        "inputs": inputs,
        "outputs": outputs,
        "session_options": options,
    }
    return {
        "model": {
            "type": MODEL_TYPE,
            "vocab_size": vocabulary,
            "context_length": CONTEXT,
            "eos_token_id": [end],
            "pad_token_id": end,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "num_beams": 1, "max_length": 2048, "past_present_share_buffer": False},
    }


def _layers(model: nn.Module) -> int:
    names = flatten_language_model(model).input_names[1:]
    layers = cast(Any, model).initial_state(1)
    expected = [f"past.{i}.{field}" for i in range(len(layers)) for field in STATES]
    if names != expected:
        other = sorted({name.rpartition(".")[2] for name in names})
        raise NotImplementedError(
            f"gdn2_ops.export.genai: onnxruntime-genai carries the states {list(STATES)} of every layer, got {other}; "
            "export such a model with gdn2_ops.export.onnx and run it with gdn2_ops.runtime"
        )
    return len(layers)


@torch.no_grad()
def _vocabulary(model: nn.Module) -> int:
    device = next(model.parameters()).device
    logits, _ = model(torch.zeros(1, 1, dtype=torch.int64, device=device), cast(Any, model).initial_state(1))
    return logits.shape[-1]


def _byte_tokenizer(vocabulary: int) -> tuple[dict[str, str], int]:
    if vocabulary != BYTES:
        raise ValueError(
            f"gdn2_ops.export.genai: expected a vocabulary of {BYTES} bytes without a tokenizer, got {vocabulary}; "
            "pass the folder of the model's tokenizer"
        )
    # Byte-level BPE writes bytes as printable letters: themselves, or the letters from U+0100 on for the rest.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(BYTES) if byte not in printable]
    letters = [chr(byte if byte in printable else BYTES + rest.index(byte)) for byte in range(BYTES)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(letters)}, "merges": []},
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False, "clean_up_tokenization_spaces": False}
    return dict(zip(TOKENIZER_FILES, (json.dumps(tokenizer), json.dumps(config)))), END_BYTE


def _read_tokenizer(folder: Path, vocabulary: int) -> tuple[dict[str, str], int]:
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"gdn2_ops.export.genai: expected {name} in the tokenizer's folder {str(folder)!r}")
    texts = {name: (folder / name).read_text() for name in TOKENIZER_FILES}
    tokenizer, config = (json.loads(text) for text in texts.values())
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end = config.get("eos_token")
    end = end["content"] if isinstance(end, dict) else end
    if end not in ids:
        raise ValueError(
            f"gdn2_ops.export.genai: expected an eos_token among the tokens of {str(folder)!r}, got {end!r}"
        )
    if max(ids.values()) >= vocabulary:
        raise ValueError(
            f"gdn2_ops.export.genai: expected a tokenizer of at most {vocabulary} tokens, the vocabulary of the model; "
            f"got the token {max(ids.values())} in {str(folder)!r}"
        )
    return texts, ids[end]
