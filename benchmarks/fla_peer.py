"""fla-core 0.6.0 (flash-linear-attention), a peer on GPUs: its Triton kernels of the same rule, never part of this
repository. `make peers-fla` installs it into build/peers/fla, where it is found without being in the environment.

Its chunk takes as many value heads as key heads. With safe_gate its scores come from tensor cores with an anchor in the
middle of 16 tokens, which holds for decays of at most 5 a token; without, from a slower kernel, one token at a time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import operator
import os
import sys
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "build" / "peers" / "fla"
VERSION = "0.6.0"


@functools.cache
def missing() -> str | None:
    """Why it cannot be used; None where it can. Puts build/peers/fla on the path."""
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")  # its Triton kernels, whatever else is installed
    if importlib.util.find_spec("fla") is None and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    if importlib.util.find_spec("fla") is None:
        return "not installed: make peers-fla"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says on import that there is no GPU
        importlib.import_module("fla")
    found = importlib.metadata.version("fla-core")
    return None if found == VERSION else f"expected fla-core {VERSION}, got {found}"


def chunk(q, k, v, g, b, w, state, scale: float, *, safe_gate: bool, cu_seqlens=None):
    """o and the final state."""
    from fla.ops.gdn2 import chunk_gdn2

    return chunk_gdn2(
        *(q, k, v, g, b, w),
        scale=scale,
        initial_state=state,
        output_final_state=True,
        safe_gate=safe_gate,
        cu_seqlens=cu_seqlens,
    )


def step_inplace(q, k, v, g, b, w, state, scale: float):
    """o of one token [N, H, K], [N, HV, V]; state is overwritten, as a server has it."""
    from fla.ops.gdn2.fused_recurrent import fused_recurrent_gdn2_fwd

    token = [x[:, None] for x in (q, k, v, g, b, w)]
    out = torch.empty_like(token[2])  # which it would fill with zeros
    fused_recurrent_gdn2_fwd(*token, initial_state=state, scale=scale, inplace_final_state=True, out=out)
    return out[:, 0]


def make_interpretable() -> None:
    """Lets Triton's interpreter run it: no search for tiles, names that the interpreter can replace, and loop counters
    that are tensors, as they are in compiled kernels."""
    import triton.language as tl
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import _implicit_cvt, interpreter_builder

    def first_configuration(self, *arguments, **keywords):
        self.nargs = dict(zip(self.arg_names, arguments))
        return self.fn.run(*arguments, **keywords, **self.configs[0].all_kwargs())

    def counters(*bounds):
        return (_implicit_cvt(i) for i in range(*map(operator.index, bounds)))

    precisions = (*interpreter_builder.options.allowed_dot_input_precisions, "bf16x3")  # float32 there, as all are
    object.__setattr__(interpreter_builder.options, "allowed_dot_input_precisions", precisions)
    Autotuner.run = first_configuration  # type: ignore[method-assign]
    for name in (
        "gdn2.chunk_intra",
        "gdn2.chunk_bwd",
        "common.chunk_delta_h",
        "kda.chunk_bwd",
        "kda.gate",
        "gla.chunk",
    ):
        module = importlib.import_module(f"fla.ops.{name}")
        module.range = counters  # type: ignore[attr-defined]
        if hasattr(module, "gather"):
            module.gather = lambda x, index, axis: tl.gather(x, index, axis)  # type: ignore[attr-defined]
