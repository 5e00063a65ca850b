"""Gated DeltaNet-2 as operators that a compiler can see.

    o, state = gdn2_ops.chunk(q, k, v, g, b, w)                     # whole sequences: training, prefill
    o, state = gdn2_ops.step(q, k, v, g, b, w, state)               # one token: exported decoding
    o = gdn2_ops.step_inplace(q, k, v, g, b, w, state)              # one token, state overwritten: serving
    o, state = gdn2_ops.chunk(q, k, v, *gdn2_ops.gates.kda(k, v, g, beta))      # special cases are gates
    o, state = gdn2_ops.chunk(q, k, v, g, gdn2_ops.guard_erase(k, b, g), w)     # states that cannot run away

`GatedDeltaNet2` is the layer, `GDN2LM` a language model of it, `Decoder` one that keeps its state.
`gdn2_ops.export.onnx` writes a model as one ONNX file,
`gdn2_ops.runtime` runs and compares files. `gdn2_ops.reference` is the specification, and `torch.ops.gdn2.*` are the
operators behind these functions. On the command line: `gdn2 --help`.
"""

from gdn2_ops import gates, reference
from gdn2_ops.decoder import Decoder
from gdn2_ops.functional import GDN2Output, chunk, step, step_inplace
from gdn2_ops.layers import GatedDeltaNet2
from gdn2_ops.model import GDN2LM, GDN2Config
from gdn2_ops.stability import guard_erase, state_norms

__all__ = [
    "GDN2LM",
    "Decoder",
    "GDN2Config",
    "GDN2Output",
    "GatedDeltaNet2",
    "chunk",
    "gates",
    "guard_erase",
    "reference",
    "state_norms",
    "step",
    "step_inplace",
]
