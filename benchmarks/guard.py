"""What `guard_erase` costs a layer: the same layer with and without it in turns, in processor time of one thread.

python -m benchmarks.guard
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gdn2_ops.layers import GatedDeltaNet2

ROUNDS = 15
SIZES = {"tiny": (128, 4, 32), "gdn2-1.3b": (2304, 16, 128)}  # hidden_size, num_heads, head_dim
TOKENS = {"step": 0, "256 tokens": 256}


def main() -> None:
    torch.set_num_threads(1)
    for size, shape in SIZES.items():
        for what, tokens in TOKENS.items():
            for compiled in (False, True):
                ratios, seconds = compare(shape, tokens, compiled)
                low, middle, high = statistics.quantiles(ratios, n=4)
                name = f"{size}, {what}, {'compiled' if compiled else 'eager'}"
                print(f"{name:34} {1e6 * seconds:9.0f} us  x {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


@torch.no_grad()
def compare(shape: tuple[int, int, int], tokens: int, compiled: bool) -> tuple[list[float], float]:
    """Time with the guard over time without, round by round, and the median of the time without."""
    calls = [call(shape, tokens, compiled, guard) for guard in (False, True)]
    repeats = max(1, int(0.05 / measure(calls[0], 3)))
    times = [[measure(one, repeats) for one in calls] for _ in range(ROUNDS)]
    return [guarded / plain for plain, guarded in times], statistics.median(plain for plain, _ in times)


def call(shape: tuple[int, int, int], tokens: int, compiled: bool, guard: bool) -> Callable[[], object]:
    hidden_size, num_heads, head_dim = shape
    torch.manual_seed(0)
    layer = GatedDeltaNet2(hidden_size, num_heads=num_heads, head_dim=head_dim, guard_erase=guard).eval()
    method = layer.forward if tokens else layer.step
    run = torch.compile(method, fullgraph=True, dynamic=False) if compiled else method
    x, state = torch.randn(1, *([tokens] if tokens else []), hidden_size), layer.initial_state(1)
    run(x, state)
    return lambda: run(x, state)


def measure(run: Callable[[], object], repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats


if __name__ == "__main__":
    main()
