"""The report on GPU kernels: bytes are counted exactly, spills and instructions read, the document keeps its rest."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import codegen, kernels_report, traffic
from gdn2_ops.kernels import step

KV = traffic.K * traffic.V


def test_a_step_moves_its_state_once_each_way_and_its_vectors_once():
    (counted,) = traffic.for_a_step(lambda *x: step.step_inplace(*x, None, 1.0)).values()
    vectors = 3 * 2 * traffic.K + 4 * traffic.K + 3 * 2 * traffic.V
    assert counted["memory"] == 2 * 4 * KV + vectors
    tiles = traffic.V // 32  # programs of a head, each of which reads q, k, g and b
    assert counted["issued"] == 2 * 4 * KV + vectors + (tiles - 1) * 10 * traffic.K


def test_a_bfloat16_state_is_half_of_the_bytes():
    (counted,) = traffic.for_a_step(lambda *x: step.step_inplace(*x[:6], x[6].bfloat16(), None, 1.0)).values()
    assert counted["memory"] == 2 * 2 * KV + 2048


def test_counting_leaves_the_interpreter_as_it_was():
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    patched = (GridExecutor, "__call__"), (type(interpreter_builder), "create_masked_load")
    before = [getattr(*one) for one in patched]
    with pytest.raises(RuntimeError), traffic.counted():
        assert getattr(*patched[0]) is not before[0]
        raise RuntimeError
    assert [getattr(*one) for one in patched] == before


@pytest.fixture(scope="module")
def row():
    """Of one kernel, compiled in a process of its own."""
    code = """
import json
from benchmarks import codegen
from gdn2_ops.export.kernels import plan
(build, *_) = plan([90], [(128, 128)], ["bf16"], ["step"])
print(json.dumps(codegen.our_row(build)))
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_step_does_not_spill_and_loads_16_bytes_at_once(row):
    assert row["stack"] == row["LDL"] == row["STL"] == 0 and 32 <= row["registers"] <= 128
    assert row["LDG.128"] >= 8 and row["LDG"] >= row["LDG.128"] and row["HGMMA"] == row["HMMA"] == 0
    assert row["blocks_per_sm"] >= 4


@pytest.mark.parametrize(
    "registers, shared, warps, arch, blocks",
    [(128, 0, 4, 90, 4), (129, 0, 4, 90, 3), (32, 0, 4, 90, 16), (32, 0, 4, 120, 12), (32, 100 << 10, 4, 90, 2)],
)
def test_blocks_of_a_multiprocessor(registers, shared, warps, arch, blocks):
    assert codegen.blocks_per_sm(registers, shared, warps, arch) == blocks


def report(row):
    counted = {"forward": {"a_kernel": {"issued": 2000.0, "memory": 1000.0}, "b": {"issued": 1.0, "memory": 1.0}}}
    return {"versions": {"triton": "3"}, "bytes": {"gdn2_ops": counted}, "code": [row]}


def test_the_tables(row):
    text = kernels_report.text(report(row))
    assert "| gdn2_ops | forward | token and head | 2 | 1,001 | 2,001 | a 1,000, b 1 |" in text
    assert f"| step | 90 | bf16 | 128 | 4 | {row['registers']} | 0 | 1 |" in text
    assert "peer" not in text
    peer = row | {"who": "fla-core", "kernel": "x_kernel", "stack": 872}
    with_peer = kernels_report.text(report(row) | {"code": [row, peer]})
    assert "| fla-core: x | 90 |" in with_peer and "| 872 |" in with_peer and "spills least" in with_peer


def test_only_what_is_between_the_markers_is_replaced():
    begin, end = kernels_report.BEGIN, kernels_report.END
    document = f"before\n{begin}\nold\n{end}\nafter"
    once = kernels_report.between_markers(document, "new")
    assert once == f"before\n{begin}\n\nnew\n\n{end}\nafter"
    assert kernels_report.between_markers(once, "new") == once
    for wrong in ("no markers", f"{end}{begin}", document + document):
        with pytest.raises(ValueError, match="one pair of markers"):
            kernels_report.between_markers(wrong, "new")


def test_the_document_is_what_the_committed_numbers_say():
    written = kernels_report.text(json.loads(kernels_report.RESULT.read_text()))
    document = kernels_report.DOCUMENT.read_text()
    assert kernels_report.between_markers(document, written) == document
