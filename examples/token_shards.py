"""Tokens on disk, more than fit into memory: a folder of flat files that are mapped, and an index that describes them.

    tokens.json      {"dtype": "uint16", "vocab_size": 32000, "shards": [{"file": "00000.bin", "tokens": 100000000}]}
    00000.bin ...    token ids one after the other, uint16 or uint32, little-endian, nothing else

Documents follow each other with whatever token separates them. A window never crosses from one shard into the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INDEX = "tokens.json"
DTYPES = {"uint16": "<u2", "uint32": "<u4"}


class TokenShards:
    """The windows of a folder's tokens.

    Args:
        folder: as in the module's docstring; `write` makes one.
        vocab_size: of the model.
        length: tokens of a window.

    Raises: FileNotFoundError: no index, or no shard. ValueError: the index is not complete, a file has another size
        than it says, its vocabulary is larger than the model's, or no shard is as long as a window.
    """

    def __init__(self, folder: str | Path, *, vocab_size: int, length: int) -> None:
        self.folder, self._vocab, self._length = Path(folder), vocab_size, length
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"expected a folder of tokens with {INDEX}, got {str(folder)!r} without it")
        described = json.loads(index.read_text())
        missing = sorted({"dtype", "vocab_size", "shards"} - set(described))
        if missing:
            raise ValueError(f"{index}: expected dtype, vocab_size and shards, got none of {missing}")
        if described["dtype"] not in DTYPES:
            raise ValueError(f"{index}: expected dtype {' or '.join(DTYPES)}, got {described['dtype']!r}")
        if described["vocab_size"] > vocab_size:
            raise ValueError(
                f"{index}: expected at most the model's {vocab_size} token ids, got vocab_size "
                f"{described['vocab_size']}; is it of another tokenizer?"
            )
        self.names = [shard["file"] for shard in described["shards"]]
        self._shards = [self._map(shard, DTYPES[described["dtype"]]) for shard in described["shards"]]
        self.tokens = sum(map(len, self._shards))
        counts = [max(0, len(shard) - length + 1) for shard in self._shards]
        self._ends = np.cumsum(counts)
        if not sum(counts):
            longest = max(map(len, self._shards), default=0)
            raise ValueError(f"{index}: expected a shard of at least {length} tokens, got {longest} in the longest")

    def __len__(self) -> int:
        """How many windows there are: one begins at every token that has enough after it."""
        return int(self._ends[-1])

    def window(self, i: int) -> NDArray[np.int64]:
        """[length] int64. Raises: ValueError: a token id is not below the vocabulary's size."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        begin = i - (int(self._ends[shard - 1]) if shard else 0)
        tokens = self._shards[shard][begin : begin + self._length].astype(np.int64)
        if tokens.max() >= self._vocab:
            at = begin + int(tokens.argmax())
            raise ValueError(
                f"{self.folder / self.names[shard]}: expected token ids below {self._vocab}, got {tokens.max()} at {at}"
            )
        return tokens

    def _map(self, shard: dict, dtype: str) -> NDArray:
        file = self.folder / shard["file"]
        if not file.is_file():
            raise FileNotFoundError(f"expected the shard {str(file)!r} that {INDEX} names, got none")
        want, got = shard["tokens"] * np.dtype(dtype).itemsize, file.stat().st_size
        if want != got:
            raise ValueError(
                f"{file}: expected {want} bytes, {shard['tokens']} tokens of {np.dtype(dtype).name}, got {got}; is the "
                f"dtype in {INDEX} another?"
            )
        return np.memmap(file, dtype, "r") if got else np.zeros(0, dtype)


def write(folder: str | Path, shards: Iterable[NDArray], *, vocab_size: int) -> Path:
    """Writes shards of token ids, in the smallest dtype that holds the vocabulary, and their index; returns the folder.

    Raises: ValueError: a token id is not in 0..vocab_size - 1.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = "uint16" if vocab_size <= 2**16 else "uint32"
    entries = []
    for i, tokens in enumerate(shards):
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"expected token ids in 0..{vocab_size - 1}, got {tokens.min()}..{tokens.max()}")
        tokens.astype(DTYPES[name]).tofile(folder / f"{i:05}.bin")
        entries.append({"file": f"{i:05}.bin", "tokens": tokens.size})
    index = {"dtype": name, "vocab_size": vocab_size, "shards": entries}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return folder
