"""A PyTorch model as a backend of `gdn2_ops.runtime.generate`: numpy in, numpy out; eager, compiled, or a package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gdn2_ops.model import GDN2LM
from gdn2_ops.stability import state_norms


class TorchBackend:
    """tokens [B, T] and a state to logits [B, T, vocab] and a state; a single token after a state takes the step.

    Args:
        model: in evaluation mode.
        compiled: run `torch.compile(fullgraph=True)` of the model's forward, one graph for every length, and decode.
    """

    def __init__(self, model: GDN2LM, *, compiled: bool = False) -> None:
        self._forward, self._decode, self._compiled = model.forward, model.decode, compiled
        if compiled:
            self._forward = torch.compile(model.forward, fullgraph=True)
            self._decode = torch.compile(model.decode, fullgraph=True)

    @torch.no_grad()
    def __call__(self, tokens: NDArray[np.int64], state: Any | None) -> tuple[NDArray[np.float32], Any]:
        rows = torch.from_numpy(tokens)
        if state is not None and rows.shape[1] == 1:
            logits, state = self._decode(rows[:, 0], state)
            return logits.unsqueeze(1).float().numpy(), state
        if self._compiled:
            torch._dynamo.decorators.mark_unbacked(rows, 1)
        logits, state = self._forward(rows, state)
        return logits.float().numpy(), state

    @torch.no_grad()
    def state_norms(self, state: Any) -> NDArray[np.float32]:
        return state_norms(state).numpy()


class PackageBackend:
    """The same from a package of `gdn2_ops.export.aoti`. A single token after a state overwrites that state.

    Args:
        file: a .pt2 file, compiled for this machine's processor.

    Raises: FileNotFoundError: no such file.
    """

    def __init__(self, file: str | Path) -> None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"expected a package, got {str(file)!r}; gdn2 export MODEL --to aoti writes one")
        from torch._inductor.package import load_package  # here: it loads the compiler, which others do not need

        self._prefill, self._decode = (
            load_package(str(file), name, run_single_threaded=True) for name in ("prefill", "decode")
        )
        states = self._prefill.get_metadata()["states"].split(";")
        self._states = [(getattr(torch, dtype), [int(n) for n in sizes]) for dtype, _, *sizes in map(str.split, states)]

    @torch.no_grad()
    def __call__(self, tokens: NDArray[np.int64], state: Any | None) -> tuple[NDArray[np.float32], Any]:
        rows = torch.from_numpy(np.ascontiguousarray(tokens))
        if state is not None and rows.shape[1] == 1:
            return self._decode(rows[:, 0], *state).unsqueeze(1).float().numpy(), state
        if state is None:
            state = [torch.zeros(len(rows), *sizes, dtype=dtype) for dtype, sizes in self._states]
        logits, *state = self._prefill(rows, *state)
        return logits.float().numpy(), state

    @torch.no_grad()
    def state_norms(self, state: Any) -> NDArray[np.float32]:
        floating = (x.flatten(1) for x in state if x.is_floating_point())  # a package does not say which is which
        return torch.stack([torch.linalg.vector_norm(x, dim=1).float() for x in floating], 1).numpy()
