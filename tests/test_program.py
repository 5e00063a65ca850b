"""torch.export of a language model: operator nodes, any batch and length, the eager numbers."""

import pytest
import torch
from test_model import HYBRID, SMALL, small, tokens
from torch.utils._pytree import tree_leaves

from gdn2_ops.export.program import flatten_language_model


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["recurrent", "hybrid"])
def test_one_program_serves_every_batch_and_length(config, strict):
    model = small(config)
    program = flatten_language_model(model).exported(strict=strict)
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.gdn2.chunk.default]
    assert len(nodes) == sum(hasattr(state, "recurrent") for state in model.initial_state(1))
    for B, T in ((1, 1), (3, 63), (2, 130)):
        rows = tokens(B, T)
        logits, state = model(rows)
        got, *past = program.module()(rows, *tree_leaves(model.initial_state(B)))
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)
        more = tokens(B, 5)
        torch.testing.assert_close(program.module()(more, *past)[0], model(more, state).logits, rtol=1e-4, atol=1e-5)


def test_names_follow_the_template():
    flat = flatten_language_model(small(HYBRID), state_names="{field}_{layer}_{when}")
    assert flat.input_names == ["input_ids", "conv_0_past", "recurrent_0_past", "k_1_past", "v_1_past", "length_1_past"]
    assert flat.output_names == [
        "logits",
        "conv_0_present",
        "recurrent_0_present",
        "k_1_present",
        "v_1_present",
        "length_1_present",
    ]


def test_a_module_without_state_is_refused():
    with pytest.raises(TypeError, match="initial_state"):
        flatten_language_model(torch.nn.Linear(2, 2))
