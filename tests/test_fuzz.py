"""The fuzzer of `make fuzz`, a small part of its calls."""

import fuzz
import pytest
import torch
from fuzz import CHECKS, run

from gdn2_ops.custom_ops import contract


def test_operators_take_exactly_what_the_contract_takes():
    ends, _ = run(calls=3000, seed=1)
    assert sum(ends.values()) == 3000
    for name in CHECKS:
        assert ends[f"{name} taken"] > 300 and ends[f"{name} refused"] > 100


def test_a_laxer_contract_is_found(monkeypatch):
    monkeypatch.setitem(CHECKS, "chunk", lambda *arguments: None)
    with pytest.raises(AssertionError, match="chunk refuses what the contract takes"):
        run(calls=300, seed=1)


def test_a_stricter_contract_is_found(monkeypatch):
    def half_is_wrong(q, *rest):
        contract.check_step(q, *rest)
        if q.dtype == torch.float16:
            raise TypeError("no float16")

    monkeypatch.setitem(CHECKS, "step", half_is_wrong)
    with pytest.raises(AssertionError, match="step takes what the contract refuses: no float16"):
        run(calls=300, seed=1)


def test_a_leak_is_found_and_a_jump_is_none(monkeypatch):
    monkeypatch.setattr(fuzz, "call", lambda dice: "done")
    for sizes, growth in (
        ([200, 210, 211, 212, 213, 214, 216, 218, 220, 222], 10),  # 2 MB in every tenth
        ([200, 210, 210, 210, 210, 210, 210, 240, 240, 240], 0),
        ([200, 200, 200, 200, 200, 201, 211, 212, 213, 214], 5),
    ):
        monkeypatch.setattr(fuzz, "resident_megabytes", iter(sizes).__next__)
        assert run(calls=100, seed=1)[1] == growth
