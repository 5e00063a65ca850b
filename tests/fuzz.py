"""Random calls of the operators, right and wrong ones: a kernel takes what the contract takes, and nothing leaks.

python tests/fuzz.py --calls 1000000        (make fuzz)

A call is right or has one thing wrong with it: a size, a rank, a dtype, a device, strides, bounds, slots, or an input
in the memory of the state. The sizes are small, so that most calls are argument handling; the numbers are the other
tests' business.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from gdn2_ops.custom_ops import contract

OPS = torch.ops.gdn2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
HEAD_SIZES = (1, 2, 3, 8, 16, 17, 33, 64, 256, 257, 0)
CHECKS: dict[str, Callable[..., None]] = {
    "chunk": contract.check_chunk_call,
    "chunk_backward": contract.check_chunk_backward_call,
    "step": contract.check_step,
    "step_inplace": contract.check_step_inplace_call,
}


def arguments(dice: random.Random, name: str) -> list[Tensor | None]:
    """Right arguments of one operator, the scale left out."""
    B, T, H = dice.randint(0, 3), dice.randint(0, 9), dice.choice((1, 1, 2, 3))
    HV = H * dice.choice((1, 1, 2))
    K, V = dice.choice(HEAD_SIZES[:8]), dice.choice(HEAD_SIZES[:8])
    dtype = dice.choice(DTYPES[:3])
    tokens = (B,) if name.startswith("step") else (B, T)
    cu_seqlens = None
    if not name.startswith("step") and dice.random() < 0.3:
        tokens = (1, T)
        bounds = [0, *sorted(dice.randint(0, T) for _ in range(dice.randint(0, 3))), T]
        cu_seqlens = torch.tensor(bounds, dtype=dice.choice(contract.INDEX_DTYPES))
    N = tokens[0] if cu_seqlens is None else len(cu_seqlens) - 1
    q, k, b = (torch.rand(*tokens, H, K, dtype=dtype) for _ in "qkb")
    k = k / K  # short enough for every result to be finite
    v, w = (torch.rand(*tokens, HV, V, dtype=dtype) for _ in "vw")
    six = [q, k, v, -torch.rand(*tokens, H, K), b, w]
    if name == "step":
        return [*six, torch.rand(B, HV, K, V)]
    if name == "step_inplace":
        pool = B + dice.randint(0, 2)
        rows = torch.tensor(dice.sample(range(pool), B), dtype=dice.choice(contract.INDEX_DTYPES))
        return [*six, torch.rand(pool, HV, K, V), rows if pool != B or dice.random() < 0.5 else None]
    state = torch.rand(N, HV, K, V) if dice.random() < 0.5 else None
    if name == "chunk":
        return [*six, state, cu_seqlens]
    dfinal_state = torch.rand(N, HV, K, V) if dice.random() < 0.5 else None
    return [torch.rand(*tokens, HV, V, dtype=dtype), dfinal_state, *six, state, cu_seqlens]


def another(dice: random.Random, x: Tensor) -> Tensor:
    """A tensor that differs from x in one respect: it may still be a right one."""
    change = dice.choice(("size", "rank", "dtype", "device", "strides", "values", "offset"))
    if change == "size" and x.dim():
        axis = dice.randrange(x.dim())
        size = dice.choice((0, 1, x.shape[axis] + 1, dice.choice(HEAD_SIZES)))
        return torch.zeros(*x.shape[:axis], size, *x.shape[axis + 1 :], dtype=x.dtype)
    if change == "rank":
        return x[None] if dice.random() < 0.5 or x.dim() == 0 or x.shape[0] == 0 else x[0]
    if change == "dtype":
        return x.to(dice.choice((*DTYPES, torch.int32)))
    if change == "device":
        return x.to("meta")
    if change == "strides" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if change == "values" and not x.is_floating_point():
        return torch.randint_like(x, -2, 12) if x.dtype != torch.bool else x
    if change == "offset" and x.dim() and x.shape[-1]:
        return torch.cat((x, x), -1)[..., x.shape[-1] :]
    return x.clone()


def within(dice: random.Random, state: Tensor, x: Tensor) -> Tensor:
    """A tensor like x in the memory of the state, where that is large enough."""
    memory = state.view(-1).view(x.dtype)
    room = memory.numel() - x.numel()
    if room < 0:
        return x
    begin = dice.randint(0, room)
    return memory[begin : begin + x.numel()].view(x.shape)


def call(dice: random.Random) -> str:
    """One call. Returns its operator and how it ended; raises AssertionError where operator and contract differ."""
    name = dice.choice(tuple(CHECKS))
    given = arguments(dice, name)
    if dice.random() < 0.5:
        at = dice.choice([i for i, x in enumerate(given) if x is not None])
        given[at] = another(dice, given[at])
    elif name == "step_inplace" and dice.random() < 0.1:
        at = dice.randrange(6)
        given[at] = within(dice, given[6], given[at])
    try:
        CHECKS[name](*given)
        wrong = None
    except (ValueError, TypeError) as error:
        wrong = error
    state = given[6] if name == "step_inplace" else None
    before = state.clone() if wrong is not None and state is not None else None
    try:
        result = getattr(OPS, name).default(*given, 0.5)
    except (RuntimeError, ValueError, TypeError) as error:
        assert wrong is not None, f"{name} refuses what the contract takes: {error}: {described(given)}"
        assert before is None or before.is_meta or before.equal(state), f"{name} wrote before it refused"
        return f"{name} refused"
    assert wrong is None, f"{name} takes what the contract refuses: {wrong}: {described(given)}"
    outputs = (result,) if isinstance(result, Tensor) else result
    like = given[4] if name == "chunk_backward" else given[2]
    assert name == "chunk_backward" or outputs[0].shape == like.shape
    assert all(bool(x.isfinite().all()) for x in outputs if not x.is_meta), f"{name}: not finite: {described(given)}"
    return f"{name} taken"


def described(given: list[Tensor | None]) -> list[str]:
    return ["None" if x is None else f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device}" for x in given]


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(calls: int, seed: int) -> tuple[Counter, float]:
    """Returns how the calls ended, and by how many megabytes the process would grow over half of them.

    That is five times the median of what it grew by in the last five tenths: a leak is in all of them, while an
    allocator takes memory in jumps.
    """
    dice = random.Random(seed)
    torch.manual_seed(seed)
    ends: Counter = Counter()
    sizes = []
    with torch.no_grad():
        for i in range(1, calls + 1):
            ends[call(dice)] += 1
            if i * 10 % calls < 10:  # the last of a tenth
                sizes.append(resident_megabytes())
    return ends, 5 * statistics.median(after - before for before, after in pairwise(sizes[4:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=8.0, help="megabytes that half of the calls may grow by")
    options = parser.parse_args()
    torch.set_num_threads(2)
    ends, growth = run(options.calls, options.seed)
    for end in sorted(ends):
        print(f"{end:24} {ends[end]:>9,}")
    print(f"grows by {growth:.1f} MB in {options.calls // 2:,} calls")
    if growth > options.growth:
        raise SystemExit(f"expected at most {options.growth} MB, got {growth:.1f}: something leaks")


if __name__ == "__main__":
    main()
