"""Gated DeltaNet-2 as operators that a compiler can see.

    o, state = gdn2_ops.chunk(q, k, v, g, b, w)             # whole sequences: training, prefill
    o, state = gdn2_ops.step(q, k, v, g, b, w, state)       # one token: exported decoding
    o = gdn2_ops.step_inplace(q, k, v, g, b, w, state)      # one token, state overwritten: serving
    gdn2_ops.chunk(q, k, v, *gdn2_ops.gates.kda(k, v, g, beta))     # the special cases are gates

`gdn2_ops.reference` is the specification, `torch.ops.gdn2.*` the operators behind these functions.
"""

from gdn2_ops import gates, reference
from gdn2_ops.functional import GDN2Output, chunk, step, step_inplace

__all__ = ["GDN2Output", "chunk", "gates", "reference", "step", "step_inplace"]
