"""How large the states of sequences are: `gdn2_ops.state_norms` for states in numpy, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RECURRENT = "recurrent"  # in the names that `gdn2_ops.export` gives


def watched(names: Sequence[str], dtypes: Sequence[str]) -> list[int]:
    """Which of a file's states can run away: the recurrent ones by their names; under other names all floating ones."""
    floating = [i for i, dtype in enumerate(dtypes) if dtype.startswith("float")]
    return [i for i in floating if RECURRENT in names[i]] or floating


def norms(states: Sequence[NDArray]) -> NDArray[np.float32]:
    """Frobenius norms [n, states] of states [n, ...]: inf or NaN where a number is not finite, or its square is not."""
    if not states:
        return np.zeros((0, 0), np.float32)
    rows = [x.reshape(len(x), -1).astype(np.float32, copy=False) for x in states]
    with np.errstate(over="ignore", invalid="ignore"):  # that is what the caller looks for
        return np.sqrt(np.concatenate([x[:, None] @ x[:, :, None] for x in rows], 1)[..., 0])
