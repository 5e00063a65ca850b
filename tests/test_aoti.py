"""A program compiled ahead of time runs in Python, and in C++ without Python, with the operators from one library."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import HYBRID, small

from gdn2_ops import cli
from gdn2_ops.backends import PackageBackend, TorchBackend
from gdn2_ops.compiled import find_library
from gdn2_ops.export import aoti
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.generate import generate

EXAMPLE = Path(__file__).parents[1] / "examples" / "aoti_cpp"
MODEL = dataclasses.replace(HYBRID, vocab_size=256)  # every kind of state
PROMPT, COUNT = b"import ", 24
HEADS, CHANNELS = 2, 16  # of the step whose surroundings are timed: a kernel of less than a microsecond


class Step(torch.nn.Module):
    def forward(self, q, k, v, g, b, w, pool, slots):
        return torch.ops.gdn2.step_inplace(q, k, v, g, b, w, pool, slots, 1.0)


def step_arguments() -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v, g, b, w = (0.3 * torch.rand(2, HEADS, CHANNELS) for _ in range(6))
    return [q, k, v, -g, b, w, torch.randn(4, HEADS, CHANNELS, CHANNELS), torch.tensor([3, 1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, its package as the command line writes it, and the package of one step."""
    path = tmp_path_factory.mktemp("aoti")
    small(MODEL).save_pretrained(path / "model")
    assert cli.main(["export", str(path / "model"), "--to", "aoti", "-o", str(path / "model.pt2")]) == 0
    with torch.no_grad():
        program = torch.export.export(Step(), tuple(step_arguments()))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path / "step.pt2"))
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The folder of the example's executables."""
    tools, build = Path(sys.executable).parent, tmp_path_factory.mktemp("build")
    cmake = shutil.which("cmake", path=str(tools)) or "cmake"
    options = [f"-DTORCH_FOLDER={Path(torch.__file__).parent}", "-DCMAKE_BUILD_TYPE=Release"]
    core = next(EXAMPLE.parents[1].glob("build/*/custom_ops/native/libgdn2_core.a"), None)  # of an editable install
    options += [] if core is None else [f"-DGDN2_CORE={core}"]
    subprocess.run([cmake, "-S", EXAMPLE, "-B", build, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", build, "-j", "2"], check=True, capture_output=True)
    return build


def eager_bytes(folder: Path) -> bytes:
    return b"".join(generate(TorchBackend(GDN2LM.from_pretrained(folder / "model")), PROMPT, COUNT))


def run(*command: object, prompt: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run([str(x) for x in command], input=prompt, capture_output=True, timeout=120)


def test_python_generates_the_eager_bytes(folder, capfdbinary):
    want = eager_bytes(folder)
    assert len(set(want)) > 1
    prompt = ["--prompt", PROMPT.decode(), "--count", str(COUNT)]
    assert cli.main(["generate", str(folder / "model.pt2"), *prompt]) == 0
    assert capfdbinary.readouterr().out == want + b"\n"


def test_a_package_serves_every_batch_and_length_and_overwrites_its_state(folder):
    model, package = GDN2LM.from_pretrained(folder / "model"), PackageBackend(folder / "model.pt2")
    eager = TorchBackend(model)
    for B, T in ((1, 1), (3, 40)):
        rows = torch.randint(256, (B, T + 5), generator=torch.Generator().manual_seed(T)).numpy()
        (want, theirs), (got, mine) = eager(rows[:, :T], None), package(rows[:, :T], None)
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(want), rtol=1e-4, atol=1e-5)
        addresses = [x.data_ptr() for x in mine]
        for t in range(T, T + 5):
            (want, theirs), (got, mine) = eager(rows[:, t : t + 1], theirs), package(rows[:, t : t + 1], mine)
            torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(want), rtol=1e-4, atol=1e-5)
        assert [x.data_ptr() for x in mine] == addresses
        for x, y in zip(mine, (x for layer in theirs for x in layer), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_cpp_program_generates_the_eager_bytes(folder, programs):
    library = find_library("libgdn2_torch.so")
    done = run(programs / "aoti_run", library, folder / "model.pt2", COUNT, prompt=PROMPT)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == eager_bytes(folder)
    for package, prompt, text in ((folder / "model.pt2", b"", b"a prompt of"), (folder / "none.pt2", b"i", b"file")):
        wrong = run(programs / "aoti_run", library, package, COUNT, prompt=prompt)
        assert wrong.returncode == 2 and text in wrong.stderr


def test_a_call_costs_less_than_ten_microseconds_above_the_kernel(folder, programs, record_property):
    done = run(programs / "aoti_overhead", find_library("libgdn2_torch.so"), folder / "step.pt2", HEADS, CHANNELS)
    assert done.returncode == 0, done.stderr.decode()
    lines = (line.split() for line in done.stdout.decode().splitlines())
    nanoseconds = {name: float(value) for name, value in lines}
    assert nanoseconds.keys() == {"kernel", "operator", "package"}
    for name, value in nanoseconds.items():
        record_property(f"{name}_us", f"{value / 1000:.2f}")
    assert nanoseconds["kernel"] < nanoseconds["operator"]
    assert nanoseconds["package"] - nanoseconds["kernel"] <= 10_000


def test_a_pool_in_a_package_is_overwritten_where_its_slots_say(folder):
    run, arguments = torch._inductor.aoti_load_package(str(folder / "step.pt2")), step_arguments()
    pool = arguments[6].clone()
    with torch.no_grad():
        for _ in range(3):
            want = Step()(*arguments[:6], pool, arguments[7])
            torch.testing.assert_close(run(*arguments), want)
    torch.testing.assert_close(arguments[6], pool)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file that ends in \.pt2"):
        aoti.export(small(MODEL), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"expected a model in evaluation mode.*model\.eval\(\)"):
        aoti.export(small(MODEL).train(), tmp_path / "model.pt2")
    with pytest.raises(TypeError, match="initial_state"):
        aoti.export(torch.nn.Linear(2, 2).eval(), tmp_path / "model.pt2")
    with pytest.raises(FileNotFoundError, match="gdn2 export MODEL --to aoti writes one"):
        PackageBackend(tmp_path / "model.pt2")
