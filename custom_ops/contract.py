"""The contract of every operator: schema, check and fake implementation. Imports torch only.

    B batch, T tokens, H key heads, HV value heads (a multiple of H), K key and V value channels of a head,
    N sequences: B, or the number of packed sequences where cu_seqlens is given (then B = 1).

    q, k, g, b [B, T, H, K]    v, w, o [B, T, HV, V]    state [N, HV, K, V]    (step: without the T axis)
    q, k, v, b, w, o: one dtype of float32, bfloat16, float16.    g and state: float32.

Any strides are taken, but a state that is written in place is contiguous. The state always comes out.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

LIB = torch.library.Library("gdn2", "FRAGMENT")  # the registrations live as long as this object

_GATES = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w"
SCHEMAS = {
    "chunk": f"({_GATES}, Tensor? state, Tensor? cu_seqlens, float scale) -> (Tensor o, Tensor final_state)",
    "chunk_backward": f"(Tensor do, Tensor? dfinal_state, {_GATES}, Tensor? state, Tensor? cu_seqlens, float scale) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor db, Tensor dw, Tensor dstate)",
    "step": f"({_GATES}, Tensor state, float scale) -> (Tensor o, Tensor final_state)",
    "step_inplace": f"({_GATES}, Tensor(a!) state, Tensor? slots, float scale) -> Tensor",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_HEAD_SIZE = 256

for _name, _schema in SCHEMAS.items():
    # The schemas are defined by the native library, so that a process without Python has them; here they are the text.
    _wanted, _found = torch._C.parse_schema(f"gdn2::{_name}{_schema}"), getattr(torch.ops.gdn2, _name).default._schema
    if str(_wanted) != str(_found):
        raise ImportError(f"gdn2_ops: its native library is of another version: expected {_wanted}, got {_found}")


def check_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    op: str = "gdn2::chunk",
) -> None:
    """Raises ValueError or TypeError unless the arguments match the contract. Reads no values, so fakes call it too."""
    _check_inputs(op, "[B, T, H, K]", q, k, v, g, b, w)
    if cu_seqlens is not None:
        _expect_index(op, "cu_seqlens", cu_seqlens, q)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"{op}: expected cu_seqlens of shape [N + 1] with N >= 1, got {_shape(cu_seqlens)}")
        if q.shape[0] != 1:
            raise ValueError(f"{op}: expected batch 1 with cu_seqlens, got {q.shape[0]}; pack the sequences along T")
    if state is not None:
        _check_state(op, state, _states_shape(q, v, cu_seqlens), q)


def check_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor) -> None:
    """As `check_chunk`, for one token and one state per row."""
    op = "gdn2::step"
    _check_inputs(op, "[B, H, K]", q, k, v, g, b, w)
    _check_state(op, state, (q.shape[0], v.shape[1], q.shape[2], v.shape[2]), q)


def check_step_inplace(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor, slots: Tensor | None
) -> None:
    """As `check_step`; with slots, state is a pool [P, HV, K, V] and row n of the batch updates state[slots[n]]."""
    op = "gdn2::step_inplace"
    _check_inputs(op, "[B, H, K]", q, k, v, g, b, w)
    rows = q.shape[0] if slots is None or state.dim() == 0 else state.shape[0]
    _check_state(op, state, (rows, v.shape[1], q.shape[2], v.shape[2]), q)
    if not state.is_contiguous():
        raise ValueError(
            f"{op}: expected a contiguous state, got strides {tuple(state.stride())} for shape {_shape(state)}; "
            "keep the state contiguous, or use gdn2_ops.step, which returns a new one"
        )
    if slots is not None:
        _expect_index(op, "slots", slots, q)
        _expect_shape(op, "slots", slots, (q.shape[0],))


def check_chunk_backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """As `check_chunk`; do is like v, dfinal_state like the final state."""
    op = "gdn2::chunk_backward"
    check_chunk(q, k, v, g, b, w, state, cu_seqlens, op)
    _expect_shape(op, "do", do, v.shape)
    _expect_dtype(op, "do", do, q.dtype, "that of q")
    _expect_device(op, "do", do, q)
    if dfinal_state is not None:
        _check_state(op, dfinal_state, _states_shape(q, v, cu_seqlens), q, "dfinal_state")


def check_chunk_call(q, k, v, g, b, w, state, cu_seqlens) -> None:
    """As `check_chunk`, and cu_seqlens rises from 0 to T. Reads values, so fakes do not call it."""
    check_chunk(q, k, v, g, b, w, state, cu_seqlens)
    check_cu_seqlens_values(cu_seqlens, q.shape[1])


def check_chunk_backward_call(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens) -> None:
    """As `check_chunk_backward`, and cu_seqlens rises from 0 to T. Reads values, so fakes do not call it."""
    check_chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens)
    check_cu_seqlens_values(cu_seqlens, q.shape[1], "gdn2::chunk_backward")


def check_step_inplace_call(q, k, v, g, b, w, state, slots) -> None:
    """As `check_step_inplace`, slots are distinct rows of the pool, and the state is apart from the inputs. Reads
    values and addresses, so fakes do not call it."""
    check_step_inplace(q, k, v, g, b, w, state, slots)
    check_slots_values(slots, state.shape[0])
    for name, x in zip("qkvgbw", (q, k, v, g, b, w)):
        if _overlap(x, state):
            raise ValueError(
                f"gdn2::step_inplace: expected state apart in memory from the other arguments, got {name} across it; "
                f"use {name}.clone()"
            )


def check_cu_seqlens_values(cu_seqlens: Tensor | None, T: int, op: str = "gdn2::chunk") -> None:
    """Raises ValueError unless cu_seqlens rises from 0 to T. Reads values, so fakes do not call it."""
    if cu_seqlens is None or not _has_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(begin > end for begin, end in pairwise(bounds)):
        raise ValueError(f"{op}: expected cu_seqlens to start at 0, never fall and end at T = {T}, got {_some(bounds)}")


def check_slots_values(slots: Tensor | None, pool: int) -> None:
    """Raises ValueError unless slots are distinct rows of the pool. Reads values, so fakes do not call it."""
    if slots is None or not _has_values(slots):
        return
    rows = slots.tolist()
    if any(row < 0 or row >= pool for row in rows) or len(set(rows)) != len(rows):
        raise ValueError(f"gdn2::step_inplace: expected distinct slots in [0, {pool}), got {_some(rows)}")


@torch.library.register_fake("gdn2::chunk", lib=LIB)
def _fake_chunk(q, k, v, g, b, w, state, cu_seqlens, scale):
    check_chunk(q, k, v, g, b, w, state, cu_seqlens)
    return q.new_empty(v.shape), q.new_empty(_states_shape(q, v, cu_seqlens), dtype=torch.float32)


@torch.library.register_fake("gdn2::chunk_backward", lib=LIB)
def _fake_chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens, scale):
    check_chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens)
    dstate = _fake_chunk(q, k, v, g, b, w, state, cu_seqlens, scale)[1]
    return *(x.new_empty(x.shape) for x in (q, k, v, g, b, w)), dstate


@torch.library.register_fake("gdn2::step", lib=LIB)
def _fake_step(q, k, v, g, b, w, state, scale):
    check_step(q, k, v, g, b, w, state)
    return q.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.register_fake("gdn2::step_inplace", lib=LIB)
def _fake_step_inplace(q, k, v, g, b, w, state, slots, scale):
    check_step_inplace(q, k, v, g, b, w, state, slots)
    return q.new_empty(v.shape)


def _check_inputs(op: str, axes: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor) -> None:
    rank = axes.count(",") + 1
    if q.dim() != rank:
        raise ValueError(f"{op}: expected q of shape {axes}, got {_shape(q)}")
    if v.dim() != rank or v.shape[:-2] != q.shape[:-2]:
        want = f"[{', '.join(str(n) for n in q.shape[:-2])}, HV, V]"
        raise ValueError(f"{op}: expected v of shape {want}, with the batch and token sizes of q, got {_shape(v)}")
    for name, x, like in (("k", k, q), ("g", g, q), ("b", b, q), ("w", w, v)):
        _expect_shape(op, name, x, like.shape)
    (H, K), (HV, V) = q.shape[-2:], v.shape[-2:]
    if H < 1 or HV < 1 or HV % H != 0:
        raise ValueError(f"{op}: expected HV, the heads of v, to be a positive multiple of H = {H}, got {HV}")
    if not (1 <= K <= MAX_HEAD_SIZE and 1 <= V <= MAX_HEAD_SIZE):
        raise ValueError(f"{op}: expected head sizes K and V in 1..{MAX_HEAD_SIZE}, got K = {K}, V = {V}")
    if q.dtype not in DTYPES:
        raise TypeError(f"{op}: expected q of dtype float32, bfloat16 or float16, got {_dtype(q)}; use q.float()")
    for name, x in (("k", k), ("v", v), ("b", b), ("w", w)):
        _expect_dtype(op, name, x, q.dtype, "that of q")
    _expect_dtype(op, "g", g, torch.float32, "a decay in low precision loses the state")
    for name, x in (("k", k), ("v", v), ("g", g), ("b", b), ("w", w)):
        _expect_device(op, name, x, q)


def _states_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (sequences, v.shape[2], q.shape[3], v.shape[3])


def _check_state(op: str, state: Tensor, shape: tuple, q: Tensor, name: str = "state") -> None:
    _expect_shape(op, name, state, shape)
    _expect_dtype(op, name, state, torch.float32, "states are never rounded")
    _expect_device(op, name, state, q)


def _expect_shape(op: str, name: str, x: Tensor, shape) -> None:
    if x.shape != shape:
        raise ValueError(f"{op}: expected {name} of shape {tuple(shape)}, got {_shape(x)}")


def _expect_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype, why: str) -> None:
    if x.dtype != dtype:
        want = str(dtype).removeprefix("torch.")
        raise TypeError(f"{op}: expected {name} of dtype {want} ({why}), got {_dtype(x)}; use {name}.to(torch.{want})")


def _expect_device(op: str, name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{op}: expected {name} on {q.device}, where q is, got {x.device}; move it there")


def _expect_index(op: str, name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype not in INDEX_DTYPES:
        raise TypeError(f"{op}: expected {name} of dtype int32 or int64, got {_dtype(x)}; use {name}.long()")
    _expect_device(op, name, x, q)


def _has_values(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the memory from the first to the last number of one meets that of the other."""
    if not (_has_values(x) and _has_values(y)) or x.numel() == 0 or y.numel() == 0:
        return False
    (x_begin, x_end), (y_begin, y_end) = (
        (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))))
        for t in (x, y)
    )
    return x_begin < y_end and y_begin < x_end


def _shape(x: Tensor) -> tuple:
    return tuple(x.shape)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _some(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ... {len(values)} values]"
