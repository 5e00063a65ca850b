"""`gdn2 check` of a plan of TensorRT: does it write and predict what PyTorch does, how fast?"""

from __future__ import annotations

from pathlib import Path

from gdn2_ops import corpus
from gdn2_ops.backends import TorchBackend
from gdn2_ops.check import EAGER, PROMPT_BYTES, TEXT_BYTES, TOLERANCES
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.compare import Task, disagreements, measure, some_logits, table
from gdn2_ops.runtime.tensorrt_session import TensorRTBackend


def run(plan: Path, model_folder: Path, *, plugin: Path | None = None, in_place: bool = False) -> int:
    """Prints the comparison. Returns the exit status: 0, or 1 when they disagree.

    Args:
        plan: of a language model of bytes.
        model_folder: of the model that was exported.
        plugin, in_place: those of `runtime.tensorrt_session.TensorRTBackend`.

    Raises: what `TensorRTBackend` raises. FileNotFoundError: no such model.
    """
    backend = TensorRTBackend(plan, plugin=plugin, in_place=in_place)
    eager = TorchBackend(GDN2LM.from_pretrained(model_folder))
    types = {x.dtype for x in backend.inputs}
    precision = next(name for name in ("bfloat16", "float16", "float32") if name in types)
    text = corpus.held_out_text(PROMPT_BYTES + TEXT_BYTES)
    task = Task(text[:PROMPT_BYTES], text[PROMPT_BYTES:])
    name = "TensorRT, states in one buffer" if in_place else "TensorRT"
    rows = [measure(EAGER, eager, task, None), measure(name, backend, task, some_logits(eager, task))]
    print(f"{plan}: {precision}; {len(task.text):,} bytes of held-out modules, {task.count} bytes generated")
    print(table(rows))
    wrong = disagreements(rows, TOLERANCES[precision])
    print("\n" + ("\n".join(wrong) if wrong else f"{name} agrees with {EAGER}."))
    return 1 if wrong else 0
