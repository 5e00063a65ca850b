"""The operators on DTensors, split over batch and heads, have the numbers and gradients of one process."""

from __future__ import annotations

from typing import Any

import torch
from cases import NAMES, OUTPUTS, Case, Inputs, bounds, cotangents, gradients, inputs
from ranks import Group, check, close, raises
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import gdn2_ops

WHOLE = Replicate()
OF_TOKENS = {"whole": (WHOLE, WHOLE), "batch": (Shard(0), Shard(0)), "heads": (Shard(2), Shard(1))}  # rows, states
OF_A_TOKEN = {"whole": WHOLE, "batch": Shard(0), "heads": Shard(1)}


def case(group: Group, **options) -> Case:
    return Case("parallel", **({"T": 19, "B": group.size, "H": group.size, "HV": 2 * group.size} | options))


def sharded(x: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(x, mesh, placements)


def token_of(c: Case) -> Inputs:
    x = inputs(c, torch.float32)
    return Inputs(*(y[:, 0] for y in x[:6]), x.state)


def assert_chunk_is_chunk(
    c: Case, mesh: DeviceMesh, rows: list[tuple[Placement, ...]], states: tuple[Placement, ...], **options: Tensor
) -> tuple[DTensor, DTensor]:
    """Outputs and gradients; rows are the placements of the six inputs and of do. Returns o and state."""
    x, (do, dstate) = inputs(c, torch.float32), cotangents(c, torch.float32)
    want = gradients(gdn2_ops.chunk, x, do, dstate, **options)
    leaves = [sharded(y, mesh, *p).requires_grad_() for y, p in zip(x, (*rows[:6], states))]
    options = {name: sharded(y, mesh, *[WHOLE] * mesh.ndim) for name, y in options.items()}
    o, state = gdn2_ops.chunk(*leaves, **options)
    grads = torch.autograd.grad((o, state), leaves, (sharded(do, mesh, *rows[6]), sharded(dstate, mesh, *states)))
    for name, y, z in zip((*OUTPUTS, *NAMES), (o, state, *grads), want):
        close(y, z, f"{c}: {name}")
    return o, state


@check(2, 4)
def chunk_over_batch_and_heads(group):
    for rows, states in OF_TOKENS.values():
        o, state = assert_chunk_is_chunk(case(group), group.mesh, [(rows,)] * 7, (states,))
        assert o.placements == (rows,) and state.placements == (states,)


@check(2)
def chunk_redistributes_inputs_that_are_sharded_otherwise(group):
    tokens, channels = (Shard(1),), (Shard(3),)
    mixed = [(WHOLE,), (WHOLE,), (Shard(2),), (WHOLE,), (WHOLE,), (Shard(0),), tokens]
    for rows in ([tokens] * 7, [channels] * 7, mixed):
        o, state = assert_chunk_is_chunk(case(group), group.mesh, rows, (WHOLE,))
        assert o.placements == (Shard(2),) and state.placements == (Shard(1),)
    odd = case(group, H=1, HV=2)  # one key head: over the batch
    o, _ = assert_chunk_is_chunk(odd, group.mesh, [tokens] * 7, (WHOLE,))
    assert o.placements == (Shard(0),)


@check(4)
def two_mesh_dimensions(group):
    mesh, c = init_device_mesh("cpu", (2, 2)), Case("two dimensions", 9, B=3, H=2, HV=4)
    batch_heads, heads_only = ((Shard(0), Shard(2)), (Shard(0), Shard(1))), ((Shard(2), WHOLE), (Shard(1), WHOLE))
    for rows, states in (batch_heads, heads_only):
        assert_chunk_is_chunk(c, mesh, [rows] * 7, states)
    x = token_of(Case("two dimensions, a token", 1, B=3, H=2, HV=4))
    p, want = (Shard(0), Shard(1)), gdn2_ops.step(*x)
    six, pool = [sharded(y, mesh, *p) for y in x[:6]], sharded(x.state.clone(), mesh, *p)
    close(gdn2_ops.step_inplace(*six, pool), want.o, "o")
    close(pool, want.state, "state")
    crossed = sharded(x.state, mesh, Shard(1), Shard(0))
    text = "update of a redistributed copy would be lost"
    raises(RuntimeError, text, lambda: gdn2_ops.step_inplace(*six, crossed))


@check(2, 4)
def uneven_shards(group):
    n, (batch, heads) = group.size, (OF_TOKENS["batch"], OF_TOKENS["heads"])
    for c, (rows, states) in (
        (case(group, B=n + 1, H=2, HV=4), batch),
        (case(group, B=1, H=2, HV=4), batch),  # ranks without a row
        (case(group, H=2 * n - 1, HV=2 * n - 1), heads),
    ):
        assert_chunk_is_chunk(c, group.mesh, [(rows,)] * 7, (states,))
    rows, states = heads
    for H, HV in ((n + 1, 2 * n + 2), (1, 2), (n - 1, n - 1)):
        c = case(group, H=H, HV=HV)
        text = rf"gdn2::chunk: expected H, .* multiple of the {n} shards of the mesh, got H = {H}, HV = {HV}"
        raises(RuntimeError, text, lambda c=c: assert_chunk_is_chunk(c, group.mesh, [(rows,)] * 7, (states,)))


@check(2)
def packed_sequences_over_heads_only(group):
    c = case(group, B=1, cu_seqlens=(0, 7, 7, 19))

    def run(kind: str) -> Any:
        rows, states = OF_TOKENS[kind]
        return assert_chunk_is_chunk(c, group.mesh, [(rows,)] * 7, (states,), cu_seqlens=bounds(c))

    run("heads")
    run("whole")
    text = "gdn2::chunk: expected inputs sharded over heads or replicated together with cu_seqlens"
    raises(RuntimeError, text, lambda: run("batch"))


@check(2, 4)
def steps_over_batch_and_heads(group):
    x, (do, dstate) = token_of(case(group, T=1)), cotangents(case(group, T=1), torch.float32)
    want = gradients(gdn2_ops.step, x, do[:, 0], dstate)
    for kind, p in OF_A_TOKEN.items():
        leaves = [sharded(y, group.mesh, p).requires_grad_() for y in x]
        outputs = gdn2_ops.step(*leaves)
        grads = torch.autograd.grad(outputs, leaves, (sharded(do[:, 0], group.mesh, p), sharded(dstate, group.mesh, p)))
        for name, y, z in zip((*OUTPUTS, *NAMES), (*outputs, *grads), want):
            close(y, z, f"{kind}: {name}")
        *six, pool = (sharded(y.clone(), group.mesh, p) for y in x)
        close(gdn2_ops.step_inplace(*six, pool), want[0], f"{kind}: o in place")
        close(pool, want[1], f"{kind}: state in place")


@check(2)
def a_state_in_place_is_never_a_copy(group):
    x = token_of(case(group, T=1))

    def rows(p: Placement) -> list[DTensor]:
        return [sharded(y, group.mesh, p) for y in x[:6]]

    text = "gdn2::step_inplace: expected a state placed .*update of a redistributed copy would be lost"
    for p, states in (
        (Shard(1), WHOLE),
        (Shard(0), WHOLE),
        (Shard(1), Shard(0)),
        (WHOLE, Shard(2)),
        (Shard(2), Shard(3)),
    ):
        pool = sharded(x.state.clone(), group.mesh, states)
        raises(RuntimeError, text, lambda p=p, pool=pool: gdn2_ops.step_inplace(*rows(p), pool))
        close(pool, x.state, "state")
    unsummed = DTensor.from_local(x.state.clone(), group.mesh, [Partial()])
    raises(RuntimeError, text, lambda: gdn2_ops.step_inplace(*rows(WHOLE), unsummed))
    pool, want = sharded(x.state.clone(), group.mesh, Shard(1)), gdn2_ops.step(*x)
    close(gdn2_ops.step_inplace(*rows(WHOLE), pool), want.o, "o")  # whole inputs are cut as the state is
    close(pool, want.state, "state")


@check(2)
def slots_over_heads_only(group):
    x, slots = token_of(case(group, T=1)), torch.tensor([4, 1])
    pool = torch.cat((x.state, -x.state, x.state))
    want_pool = pool.clone()
    want = gdn2_ops.step_inplace(*x[:6], want_pool, slots=slots)

    def run(p: Placement) -> tuple[DTensor, DTensor]:
        got_pool = sharded(pool.clone(), group.mesh, p)
        six = [sharded(y, group.mesh, p) for y in x[:6]]
        return gdn2_ops.step_inplace(*six, got_pool, slots=sharded(slots, group.mesh, WHOLE)), got_pool

    for kind in ("heads", "whole"):
        got, got_pool = run(OF_A_TOKEN[kind])
        close(got, want, f"{kind}: o")
        close(got_pool, want_pool, f"{kind}: pool")
    raises(RuntimeError, "replicated together with slots", lambda: run(OF_A_TOKEN["batch"]))


@check(2)
def kept_decisions_hold_placements_only(group):
    """DTensor keeps its decision for one call for the next: scales and absent states are not part of it."""
    x = inputs(case(group), torch.float32)
    six = [sharded(y, group.mesh, Shard(1)) for y in x[:6]]
    for scale in (0.5, 2.0):
        for state in (x.state, None):
            got = gdn2_ops.chunk(*six, None if state is None else sharded(state, group.mesh, WHOLE), scale=scale)
            want = gdn2_ops.chunk(*x[:6], state, scale=scale)
            close(got.o, want.o, f"scale {scale}: o")
            close(got.state, want.state, f"scale {scale}: state")


@check(2)
def chunk_compiles_on_dtensors(group):
    x, (rows, states) = inputs(case(group), torch.float32), OF_TOKENS["heads"]
    six = [sharded(y, group.mesh, rows) for y in x[:6]]
    compiled = torch.compile(gdn2_ops.chunk, backend="aot_eager", fullgraph=True)
    got, want = compiled(*six, sharded(x.state, group.mesh, states)), gdn2_ops.chunk(*x)
    close(got.o, want.o, "o")
    close(got.state, want.state, "state")
