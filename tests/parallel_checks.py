"""Models over several processes have the logits and gradients of one: tensor and context parallelism, FSDP2."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from cases import NAMES, Case, cotangents, gradients, inputs
from ranks import Group, check, close, raises, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import gdn2_ops
from gdn2_ops import parallel
from gdn2_ops.model import GDN2LM, GDN2Config

RECURRENT = GDN2Config(
    vocab_size=50, hidden_size=32, num_layers=2, intermediate_size=48, num_heads=4, num_v_heads=8, head_dim=8
)
HYBRID = dataclasses.replace(RECURRENT, attention_every=2, num_attention_heads=4, window=6)
MODELS = {
    "recurrent": RECURRENT,
    "hybrid": HYBRID,
    "tied": dataclasses.replace(
        HYBRID, tie_embeddings=True, output_gate="sigmoid", use_short_conv=False, guard_erase=True
    ),
}


def model_of(name: str) -> GDN2LM:
    torch.manual_seed(0)
    return GDN2LM(MODELS[name])


def rows_of(B: int, T: int) -> Tensor:
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(T))


def run(model: nn.Module, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The logits, and the gradients of a loss that is a sum over tokens."""
    model.zero_grad()
    logits = model(rows).logits
    (logits.logsumexp(-1).sum() + logits.square().sum() / 10).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_gradients(got: dict[str, Any], want: dict[str, Tensor], factor: float = 1.0) -> None:
    assert got.keys() == want.keys()
    for name, y in want.items():
        close(whole(got[name]) * factor, y, name)


@check(2, 4)
def tensor_parallel_model_is_the_model(group):
    for name in MODELS:
        rows = rows_of(2, 11)
        logits, grads = run(model_of(name), rows)
        split = parallel.apply_tensor_parallel(model_of(name), group.mesh)
        got_logits, got_grads = run(split, rows)
        close(got_logits, logits, f"{name}: logits")
        assert_gradients(got_grads, grads)
        mixer = split.layers[0].mixer
        assert mixer.q_proj.weight.to_local().shape[0] == 32 // group.size
        assert mixer.initial_state(1).recurrent.shape[1] == 8 // group.size
        last, state = split.prefill(rows[:, :7], split.initial_state(2))
        for t in range(7, 10):
            last, state = split.decode(rows[:, t], state)
            close(last, logits[:, t], f"{name}: decode {t}")
        close(split.decode_inplace(rows[:, 10], state), logits[:, 10], f"{name}: decode in place")


@check(2)
def tensor_parallel_model_trains_and_saves_whole_tensors(group):
    one, split = model_of("tied"), parallel.apply_tensor_parallel(model_of("tied"), group.mesh)
    norms = []
    for model in (one, split):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            run(model, rows_of(2, 11))
            norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 10.0)))
            optimizer.step()
    close(torch.stack(norms[2:]), torch.stack(norms[:2]), "norms")
    state = get_model_state_dict(split, options=StateDictOptions(full_state_dict=True))
    assert state.keys() == one.state_dict().keys()
    for name, y in one.state_dict().items():
        close(state[name], y, name)


@check(2)
def tensor_parallel_refuses_what_does_not_divide(group):
    for options, text in (
        ({"num_heads": 3, "num_v_heads": 6}, "num_heads to be a multiple of the 2 ranks of the mesh, got 3"),
        ({"intermediate_size": 47}, "intermediate_size to be a multiple of the 2 ranks of the mesh, got 47"),
        ({"num_attention_heads": 1}, "num_attention_heads to be a multiple of the 2 ranks of the mesh, got 1"),
    ):
        model = GDN2LM(dataclasses.replace(HYBRID, **options))
        raises(ValueError, text, lambda model=model: parallel.apply_tensor_parallel(model, group.mesh))
        assert not any(hasattr(p, "placements") for p in model.parameters())
    split = parallel.apply_tensor_parallel(model_of("recurrent"), group.mesh)
    raises(ValueError, "not split yet", lambda: parallel.apply_tensor_parallel(split, group.mesh))
    raises(ValueError, "not split yet", lambda: parallel.apply_context_parallel(split, group.mesh))


@check(2, 4)
def fsdp_model_is_the_model(group):
    for name in ("hybrid", "tied"):
        rows, mine = rows_of(group.size, 11), slice(group.rank, group.rank + 1)
        logits, grads = run(model_of(name), rows)
        split = parallel.apply_fsdp(model_of(name), group.mesh)
        got_logits, got_grads = run(split, rows[mine])
        close(got_logits, logits[mine], f"{name}: logits")
        assert_gradients(got_grads, grads, group.size)  # it averages
        _, state = split.prefill(rows[:, :9])
        last, state = split.decode(rows[:, 9], state)
        close(last, logits[:, 9], f"{name}: decode")
        close(split.decode_inplace(rows[:, 10], state), logits[:, 10], f"{name}: decode in place")
    raises(ValueError, "not sharded yet", lambda: parallel.apply_fsdp(split, group.mesh))


@check(2)
def fsdp_in_mixed_precision_keeps_states_in_float32(group):
    model, rows = parallel.apply_fsdp(model_of("hybrid"), group.mesh, param_dtype=torch.bfloat16), rows_of(2, 11)
    with torch.no_grad():
        want = model_of("hybrid").bfloat16()(rows).logits
    logits, state = model(rows)
    assert logits.dtype == torch.bfloat16 and state[0].recurrent.dtype == torch.float32
    assert torch.equal(logits, want)
    model(rows, state).logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@check(4)
def tensor_parallel_and_fsdp_together(group):
    mesh, rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), rows_of(2, 11)
    logits, grads = run(model_of("hybrid"), rows)
    split = parallel.apply_tensor_parallel(model_of("hybrid"), mesh["tensor"])
    split, row = parallel.apply_fsdp(split, mesh["data"]), mesh["data"].get_local_rank()
    got_logits, got_grads = run(split, rows[row : row + 1])
    close(got_logits, logits[row : row + 1], "logits")
    assert_gradients(got_grads, grads, 2)


def tokens_of(group: Group, T: int, sizes: tuple[int, ...]) -> slice:
    """This rank's tokens: the given numbers on the first ranks, the rest on the last."""
    begin = [sum(sizes[:i]) for i in range(group.size)] + [T]
    return slice(begin[group.rank], begin[group.rank + 1])


@check(2, 4)
def context_parallel_chunk_is_chunk(group):
    is_last = group.rank == group.size - 1
    for c in (
        Case("context", 70, B=2, H=2, HV=4),
        Case("context, equal keys, reflections", 70, keys="equal", erase="two"),
        Case("context, resets", 70, decay="resets", erase="one"),
        Case("context, no decay", 70, decay="none", erase="one"),
    ):
        x, (do, dstate) = inputs(c, torch.float32), cotangents(c, torch.float32)
        want = gradients(gdn2_ops.chunk, x, do, dstate)
        largest = max(y.abs().max().item() for y in want[2:8])  # dg is small under strong decay, its error is not
        for sizes in ((17, 20, 16), (33, 0, 1)):
            mine = tokens_of(group, c.T, sizes)
            *leaves, state = (y.clone().requires_grad_() for y in (*(y[:, mine] for y in x[:6]), x.state))
            o, end = parallel.context_parallel_chunk(*leaves, state, mesh=group.mesh)
            torch.autograd.backward((o, end), (do[:, mine], dstate if is_last else torch.zeros_like(dstate)))
            close(o, want[0][:, mine], f"{c.name}: o", want[0].abs().max().item())
            for name, y, z in zip(NAMES, leaves, want[2:]):
                close(y.grad, z[:, mine], f"{c.name}: d{name}", largest)
            if is_last:
                close(end, want[1], f"{c.name}: final state")
            if group.rank == 0:
                close(state.grad, want[8], f"{c.name}: dstate")


@check(2)
def context_parallel_chunk_in_bfloat16(group):
    c, mine = Case("context, bfloat16", 64, K=16, V=16), tokens_of(group, 64, (32,))
    x = inputs(c, torch.bfloat16)
    exact, _ = gdn2_ops.reference.recurrent(*x.double())
    o, state = parallel.context_parallel_chunk(*(y[:, mine] for y in x[:6]), x.state, mesh=group.mesh)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    error_of_one = (gdn2_ops.chunk(*x).o.double() - exact).abs().max()
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (o.double() - exact[:, mine]).abs().max() <= 2 * (error_of_one + rounding)


@check(2, 4)
def context_parallel_model_is_the_model(group):
    for name in MODELS:
        one, rows, mine = model_of(name), rows_of(2, 26), tokens_of(group, 26, (7, 5, 6))
        logits, grads = run(one, rows)
        split = parallel.apply_context_parallel(model_of(name), group.mesh)
        got_logits, got_grads = run(split, rows[:, mine])
        close(got_logits, logits[:, mine], f"{name}: logits")
        for grad in got_grads.values():
            dist.all_reduce(grad)
        assert_gradients(got_grads, grads)
        with torch.no_grad():
            _, state = split(rows[:, mine])
        if group.rank == group.size - 1:  # decoding goes on where the last rank ends
            token = torch.tensor([3, 4])
            want = one.decode(token, one.prefill(rows).state).logits
            close(split.decode(token, state).logits, want, f"{name}: decode")
            close(split.decode_inplace(token, state), want, f"{name}: decode in place")


@check(2)
def context_parallel_sequence_goes_on_from_a_state(group):
    """The first rank takes the state before the sequence; the convolution's and the window's too."""
    one, rows, mine = model_of("hybrid"), rows_of(2, 26), tokens_of(group, 16, (7,))
    split = parallel.apply_context_parallel(model_of("hybrid"), group.mesh)
    with torch.no_grad():
        state = one(rows[:, :10]).state
        close(split(rows[:, 10:][:, mine], state).logits, one(rows).logits[:, 10:][:, mine], "logits")


@check(2)
def split_models_compile_into_one_graph(group):
    for apply in (parallel.apply_tensor_parallel, parallel.apply_context_parallel):
        split = apply(model_of("hybrid"), group.mesh)
        rows = rows_of(2, 26)
        rows = rows if apply is parallel.apply_tensor_parallel else rows[:, tokens_of(group, 26, (7,))]
        logits, grads = run(split, rows)
        want = {name: whole(grad).clone() for name, grad in grads.items()}
        split.compile(backend="aot_eager", fullgraph=True)
        got_logits, got_grads = run(split, rows)
        close(got_logits, logits, f"{apply.__name__}: logits")
        assert_gradients(got_grads, want)


@check(4)
def context_parallel_and_fsdp_together(group):
    """Each rank has some tokens of every row: the average of gradients times the ranks is their sum."""
    rows = rows_of(2, 26)
    _, grads = run(model_of("recurrent"), rows)
    split = parallel.apply_fsdp(parallel.apply_context_parallel(model_of("recurrent"), group.mesh), group.mesh)
    _, got_grads = run(split, rows[:, tokens_of(group, 26, (7, 5, 6))])
    assert_gradients(got_grads, grads, group.size)


@check(2)
def context_parallel_refusals(group):
    x = inputs(Case("refused", 4), torch.float32)
    mesh = init_device_mesh("cpu", (1, 2))
    raises(ValueError, "mesh of one dimension", lambda: parallel.context_parallel_chunk(*x, mesh=mesh))
    raises(ValueError, "mesh of one dimension", lambda: parallel.apply_tensor_parallel(model_of("tied"), mesh))
    split = parallel.apply_context_parallel(model_of("recurrent"), group.mesh)
    raises(ValueError, "not split yet", lambda: parallel.apply_context_parallel(split, group.mesh))
    raises(ValueError, "not split yet", lambda: parallel.apply_tensor_parallel(split, group.mesh))
    raises(ValueError, "not split yet", lambda: parallel.apply_context_parallel(nn.Linear(2, 2), group.mesh))
    if group.rank == 0:
        text = "expected at least 3 tokens on every rank but the last, got 2 on rank 0"
        raises(ValueError, text, lambda: split(rows_of(1, 2)))
