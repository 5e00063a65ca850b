"""Inputs on which a wrong backend shows, for any graph with `gdn2::GatedDeltaNet2` nodes.

Graph inputs that are a node's own get the hard kinds of what the operator takes: no decay at all, resets, keys that are
nearly equal, an erase of nothing, of everything and of twice that. Other inputs are normal numbers, or rows of the
table that they look up, one row again and again among them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.runner import Port

if TYPE_CHECKING:
    import onnx

NODE = ("gdn2", "GatedDeltaNet2")
_PORTS = ("q", "k", "v", "g", "b", "w", "initial_state")


class Kind(NamedTuple):
    """decay weak | none | resets | channels, erase uniform | none | one | two, keys (and rows) random | equal."""

    decay: str
    erase: str
    keys: str

    def __str__(self) -> str:
        return f"{self.decay} decay, {self.erase} erase, {self.keys} keys"


class Feed(NamedTuple):
    """name: for a reader. batch, tokens: the sizes of dynamic axes. inputs: of the graph."""

    name: str
    batch: int
    tokens: int
    inputs: dict[str, NDArray]


KINDS = (
    Kind("weak", "uniform", "random"),
    Kind("none", "uniform", "equal"),
    Kind("resets", "one", "equal"),
    Kind("channels", "none", "random"),
    Kind("resets", "two", "equal"),
)
FEW = 4
SIZES = ((1, 1), (3, 2), (1, 15), (3, 16), (1, 17), (1, 64), (3, 65), (1, 300))


def hard_feeds(model: onnx.ModelProto, inputs: Sequence[Port]) -> Iterator[Feed]:
    """Two kinds of inputs in every size; the same on every machine. inputs: those of the model."""
    roles, bounds = _roles(model), _bounds(model)
    kinds = KINDS if roles else KINDS[:2]
    for i, (batch, tokens) in enumerate(SIZES):
        for kind in (kinds[2 * i % len(kinds)], kinds[(2 * i + 1) % len(kinds)]):
            name = f"batch {batch}, {tokens} tokens, {kind if roles else f'{kind.keys} rows'}"
            random = np.random.default_rng(zlib.crc32(name.encode()))
            shapes = fixed_shapes(inputs, batch, tokens)
            made = {
                x.name: _values(random, kind, roles.get(x.name), bounds.get(x.name, 2), x.dtype, shapes[x.name])
                for x in inputs
            }
            yield Feed(name, batch, tokens, made)


def fixed_shapes(inputs: Sequence[Port], batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes with sizes for dynamic axes: those that are some input's first one are the batch, those that are a second
    one and never a later one the tokens, all others heads and channels, `FEW` of them."""
    axes: dict[str, set[int]] = {}
    for x in inputs:
        for axis, of in enumerate(x.shape):
            axes.setdefault(str(of), set()).add(axis)

    def size(axis: int, of: int | str | None) -> int:
        if isinstance(of, int):
            return of
        seen = {axis} if of is None else axes[of]
        return batch if 0 in seen else tokens if seen == {1} else FEW

    return {x.name: tuple(size(axis, of) for axis, of in enumerate(x.shape)) for x in inputs}


def _roles(model: onnx.ModelProto) -> dict[str, str]:
    """Graph inputs that are a node's own: which."""
    return {
        name: port
        for node in model.graph.node
        if (node.domain, node.op_type) == NODE
        for name, port in zip(node.input, _PORTS)
    }


def _bounds(model: onnx.ModelProto) -> Mapping[str, int]:
    """Graph inputs that look up rows of a weight: how many there are."""
    rows = {x.name: x.dims[0] for x in model.graph.initializer if x.dims}
    return {
        node.input[1]: rows[node.input[0]]
        for node in model.graph.node
        if node.op_type == "Gather" and node.input[0] in rows
    }


def _values(
    random: np.random.Generator, kind: Kind, role: str | None, bound: int, dtype: str, shape: tuple[int, ...]
) -> NDArray:
    if np.dtype(dtype).kind in "iub":
        one = kind.keys == "equal" and len(shape) > 1
        whole = random.integers(0, bound, (shape[0], *(1 for _ in shape[1:])) if one else shape)
        return np.broadcast_to(whole, shape).astype(dtype)
    x = random.normal(size=shape)
    if role == "k":
        x = 0.05 * x + random.normal(size=(shape[0], 1, *shape[2:])) if kind.keys == "equal" else x
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
    elif role == "g":
        x = -0.1 * random.random(shape) if kind.decay != "none" else np.zeros(shape)
        if kind.decay == "resets":  # a whole token now and then, and single channels
            x[random.random(shape[:2]) < 0.1] = -30
            x[random.random(shape) < 0.05] = -30
        elif kind.decay == "channels":
            x *= np.resize([0.5, 50, 0, 300, 10, 3], shape[-1])
    elif role == "b":
        x = random.random(shape)
        if kind.erase != "uniform":
            x[:] = {"none": 0, "one": 1, "two": 2}[kind.erase]
    elif role == "w":
        x = random.random(shape)
    return x.astype(dtype)
