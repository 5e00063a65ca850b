"""docs/compiler-support.md from the results of the tests, one column for each version of torch.

    make compiler-support       # the tests on every version, then this on their build/torch/VERSION.xml

A cell is "yes" when every test of its row passed on that version, "no" with a note when one failed as its condition
(tests/versions.py) says, or a number that a test measured while it ran. A row without a test, or a test that failed,
is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

DOCUMENT = Path(__file__).parents[1] / "docs" / "compiler-support.md"
ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "torch.compile": {
        "one graph for every length, forward and backward": ("test_training_is_one_graph_for_every_length",),
        "... and for a single token too, with `mark_unbacked`": (
            "test_tiny_trains_in_one_compiled_graph_at_every_length",
        ),
        "... and for a single token too, with `backed_size_oblivious`": ("test_one_graph_serves_a_single_token_too",),
        "any number of packed sequences": ("test_packed_sequences_are_one_graph",),
        "step and step in place, any batch, with slots": (
            "test_step_is_one_graph_for_every_batch",
            "test_step_inplace_is_one_graph_for_every_batch",
        ),
        "decode loop: one graph, no graph break, `fail_on_recompile`": (
            "test_the_decode_loop_is_one_graph_and_writes_the_eager_tokens",
        ),
        "decode loop: recurrent states go to the operator, uncopied (generated code)": (
            "test_the_compiled_decode_loop_copies_no_recurrent_state",
        ),
        "decode loop: any batch": ("test_one_decode_graph_serves_every_batch",),
        "`reduce-overhead`, `max-autotune` (their CPU behaviour)": ("test_modes_write_the_eager_tokens",),
        "regional: one graph for all layers": ("test_a_layer_is_compiled_once_for_all",),
        "checkpointing, selective policies that name `gdn2.chunk`": ("test_checkpointing_gives_the_plain_gradients",),
        "low precision": ("test_low_precision_compiles",),
    },
    "torch.export": {
        "strict and not; dynamic batch, length, number of packed sequences": (
            "test_chunk",
            "test_chunk_without_a_state",
            "test_packed_sequences",
            "test_one_program_serves_every_batch_and_length",
        ),
        "decode: state in and out, input overwritten, buffers overwritten": (
            "test_step",
            "test_step_inplace",
            "test_a_decode_step_with_its_state_as_buffers",
        ),
    },
    "AOTInductor": {
        "package from Python: the eager bytes, any batch and length": (
            "test_python_generates_the_eager_bytes",
            "test_a_package_serves_every_batch_and_length_and_overwrites_its_state",
            "test_a_pool_in_a_package_is_overwritten_where_its_slots_say",
        ),
        "package from C++ without Python: the eager bytes": ("test_a_cpp_program_generates_the_eager_bytes",),
        "a call costs at most 10 us above the kernel": (
            "test_a_call_costs_less_than_ten_microseconds_above_the_kernel",
        ),
    },
    "Autocast": {
        "operators round q, k, v, b, w only": (
            "test_functions_and_operators_take_the_dtype_of_autocast",
            "test_gradients_come_back_in_the_dtype_of_the_inputs",
        ),
        "training and decoding of models, eager and compiled": (
            "test_a_model_trains_within_the_budget_of_its_bfloat16_form",
            "test_decoding_under_autocast_is_its_forward",
        ),
    },
    "torch.func": {
        "vmap over any subset of inputs, nested, states in place": (
            "test_any_subset_of_inputs_is_mapped",
            "test_public_functions_are_mapped_twice",
            "test_mapped_states_are_overwritten",
        ),
        "grad, vjp, jacrev; per-sample gradients": (
            "test_functional_gradients_are_those_of_autograd",
            "test_gradients_per_sample_are_those_of_each_sample",
            "test_the_jacobian_is_that_of_the_specification",
        ),
        "... compiled": ("test_a_compiled_map_and_a_compiled_functional_gradient",),
        "second derivatives, forward mode: refused in words": (
            "test_derivatives_of_a_functional_gradient_are_refused",
            "test_forward_mode_is_refused",
        ),
    },
    "Operators": {"opcheck, fakes, numbers, gradients": ("test_opcheck", "test_fakes_are_like_the_real_ones")},
    "Parallelism": {
        "DTensor, tensor parallel, FSDP2, context parallel on 2 and 4 processes": ("test_processes_are_one_process",)
    },
    "transformers": {
        "`generate` with a cache, beam search, left padding, saved folders": (
            "test_generate_writes_the_bytes_of_the_runtime",
            "test_beam_search_with_a_cache_is_the_search_without",
            "test_prompts_padded_on_the_left_continue_as_they_do_alone",
            "test_folders_serve_both",
        )
    },
}
MEASURED = {
    "eager decoding, us per token": "eager_us",
    "compiled decoding, us per token": "compiled_us",
    "AOTInductor in C++: the kernel of a small step, us": "kernel_us",
    "... through the dispatcher, us": "operator_us",
    "... as a package, us": "package_us",
}


@dataclass
class Results:
    """One run of the tests: of each test function its outcomes, the reasons of expected failures, what was measured."""

    torch: str
    passed: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    measured: dict[str, str] = field(default_factory=dict)


def read(file: Path) -> Results:
    """A JUnit file of pytest, named by the version of torch."""
    results = Results(torch=file.stem)
    for case in ElementTree.parse(file).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        for x in case.iter("property"):
            results.measured[x.get("name", "")] = x.get("value", "")
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            results.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            results.reasons[name] = skipped.get("message", "")
        else:
            results.passed.add(name)
    return results


def table(columns: Iterable[Results]) -> str:
    """The document. Raises: ValueError: a test failed, or a row has none."""
    columns = sorted(columns, key=lambda x: [int(part) for part in x.torch.split(".")])
    wrong = [f"torch {x.torch}: {name} failed" for x in columns for name in x.failed]
    notes: list[str] = []
    lines = []
    for part, rows in ROWS.items():
        lines += [
            "",
            f"| {part} | " + " | ".join(f"torch {x.torch}" for x in columns) + " |",
            "|---" * (1 + len(columns)) + "|",
        ]
        for row, tests in rows.items():
            cells = []
            for x in columns:
                missing = [test for test in tests if test not in x.passed and test not in x.reasons]
                wrong += [f"torch {x.torch}: no result of {test}" for test in missing]
                cells.append(_cell(x, tests, notes))
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    if wrong:
        raise ValueError("\n".join(wrong))
    lines += ["", "| measured while the tests ran | " + " | ".join(f"torch {x.torch}" for x in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    lines += [
        f"| {row} | " + " | ".join(x.measured.get(key, "-") for x in columns) + " |" for row, key in MEASURED.items()
    ]
    text = "\n".join(lines).strip()
    return HEADER + text + "\n" + "".join(f"\n[{i}] {note}\n" for i, note in enumerate(notes, 1))


def _cell(results: Results, tests: tuple[str, ...], notes: list[str]) -> str:
    reasons = [results.reasons[test] for test in tests if test in results.reasons]
    for reason in reasons:
        if reason not in notes:
            notes.append(reason)
    return "no " + "".join(f"[{notes.index(reason) + 1}]" for reason in dict.fromkeys(reasons)) if reasons else "yes"


HEADER = """# What works with which torch

Written by `make compiler-support` from the results of the tests, which it runs on every version; do not edit. CPU
builds or the CPU behaviour of CUDA builds, one binary of the native library for all versions; nothing here was run on a
GPU, and CUDA graphs (`reduce-overhead`) are not exercised. Times are of one run on a shared 2-core machine, one thread,
the best of short rounds taken in turns: compare them within a column. Decoding is of the `tiny` model's sizes, batch 2,
a token a call; the small step has 2 tokens, 2 heads and 16 channels, with a pool of 4 states.

"""


if __name__ == "__main__":
    DOCUMENT.write_text(table(read(Path(file)) for file in sys.argv[1:]))
