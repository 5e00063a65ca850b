"""A program compiled ahead of time runs in C++ without Python, with the operators loaded from one library."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from test_model import SMALL, small
from torch.utils._pytree import tree_leaves

from gdn2_ops.compiled import find_library
from gdn2_ops.export.program import flatten_language_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "aoti_cpp"
COUNT = 24


def built_example(folder: Path) -> Path:
    tools = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=str(tools)) or "cmake"
    options = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([cmake, "-S", EXAMPLE, "-B", folder, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", folder], check=True, capture_output=True)
    return folder / "aoti_run"


def test_a_cpp_program_writes_the_same_bytes(tmp_path):
    model = small(dataclasses.replace(SMALL, vocab_size=256))
    token, state, want = torch.full((1, 1), ord("i")), model.initial_state(1), bytearray()
    shapes = ["x".join(map(str, x.shape)) for x in tree_leaves(state)]
    with torch.no_grad():
        for _ in range(COUNT):
            logits, state = model(token, state)
            token = logits.argmax(-1)
            want.append(token.item())
        program = flatten_language_model(model).exported()
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    command = [built_example(tmp_path / "build"), find_library("libgdn2_torch.so"), package, str(COUNT), *shapes]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == bytes(want) and len(set(want)) > 1


def test_a_mutated_state_survives_in_a_package(tmp_path):
    class Decoder(torch.nn.Module):
        def forward(self, q, k, v, g, b, w, pool, slots):
            return torch.ops.gdn2.step_inplace(q, k, v, g, b, w, pool, slots, 0.5)

    torch.manual_seed(0)
    q, k, v, b, w = (torch.rand(2, 3, 8) for _ in range(5))
    pool, slots = torch.randn(4, 3, 8, 8), torch.tensor([3, 1])
    arguments = (q, k, v, -torch.rand(2, 3, 8), b, w, pool, slots)
    with torch.no_grad():
        program = torch.export.export(Decoder(), arguments)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "decoder.pt2"))
        run = torch._inductor.aoti_load_package(package)
        want_pool = pool.clone()
        for _ in range(3):
            want = Decoder()(*arguments[:6], want_pool, slots)
            torch.testing.assert_close(run(*arguments), want)
        torch.testing.assert_close(pool, want_pool)
