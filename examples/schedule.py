"""The paper's learning rate over the steps of a run."""

import math


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step: a linear warm-up over that share of the steps, a cosine to a tenth."""
    warm = max(1, round(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
