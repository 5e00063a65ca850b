"""The hourglass: nothing above the operators imports what is below them, and no arrow points back.

Imports are read from the source, those inside functions too. A module or folder without a row here is refused.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("gdn2_ops", "custom_ops", "export", "runtime")  # the last three are gdn2_ops.<folder> by links

ABOVE = (
    "gdn2_ops",
    "functional",
    "gates",
    "stability",
    "layers",
    "model",
    "decoder",
    "corpus",
    "tasks",
    "backends",
    "checkpoints",
    "export",
    "export.kernels",
    "export.cubins",
    "export.plugin",
    "export.tensorrt",
    "runtime",
    "check",
    "check_plan",
    "demo",
    "commands",
    "cli",
)
ARROWS = {
    "compiled": (),  # finds compiled libraries
    # below the waist: how a number is made
    "reference": (),
    "kernels": ("kernels",),
    # the waist
    "contract": (),
    "dispatch": ("contract", "kernels"),
    "autograd": ("contract",),
    "batching": ("contract",),
    "autocast": ("contract",),
    "sharding": ("contract",),
    "custom_ops": ("compiled", "contract", "dispatch", "autograd", "batching", "autocast"),
    # above: who uses the operators
    "functional": ("contract", "autocast", "autograd"),
    "gates": (),
    "stability": (),
    "layers": ("functional", "stability"),
    "corpus": (),
    "tasks": (),
    "model": ("layers", "functional", "corpus"),
    "parallel": ("parallel", "sharding", "functional", "layers", "model"),
    "decoder": ("model",),
    "checkpoints": ("model",),
    "huggingface": ("layers", "model"),
    "backends": ("model", "stability"),
    "export": ("export", "custom_ops", "compiled"),
    "export.kernels": ("kernels",),  # the kernels themselves are what it writes
    "export.cubins": ("kernels", "export.kernels"),
    "export.plugin": ("export.kernels", "export.cubins", "runtime"),
    "export.tensorrt": ("export", "compiled", "runtime"),
    "export.torch_tensorrt": ("export", "runtime"),
    "runtime": ("runtime", "compiled"),
    "check": ("corpus", "backends", "model", "export", "runtime"),
    "check_plan": ("corpus", "backends", "model", "check", "runtime"),
    "demo": ("corpus", "backends", "model", "export", "runtime"),
    "commands": (*ABOVE[:-1], "contract", "compiled"),  # `gdn2 info` lists the schemas
    "cli": ("commands",),
    "gdn2_ops": ("functional", "gates", "layers", "model", "decoder", "reference", "stability"),
}
LIBRARIES = {  # what a layer may import besides the standard library, where that is bounded
    "contract": ("torch",),
    "autograd": ("torch",),
    "kernels": ("torch", "triton"),
    "batching": ("torch",),
    "autocast": ("torch",),
    "sharding": ("torch",),
    "reference": ("torch",),
    "functional": ("torch",),
    "gates": ("torch",),
    "stability": ("torch",),
}
NEVER_AT_LOAD = {"runtime": ("torch",)}  # a server of exported files starts without it


def modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder in FOLDERS:
        base = ROOT / folder
        for path in sorted(base.rglob("*.py")):
            inner = path.relative_to(base)
            if folder == "gdn2_ops" and inner.parts[0] in FOLDERS:
                continue  # behind a link
            parts = ["gdn2_ops", *([] if folder == "gdn2_ops" else [folder]), *inner.with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> str:
    """The row of a module: its first name below gdn2_ops, its own name inside custom_ops or where it has a row."""
    parts = module.split(".")
    if parts[:2] == ["gdn2_ops", "custom_ops"] and len(parts) > 2:
        return parts[2]
    if ".".join(parts[1:]) in ARROWS:
        return ".".join(parts[1:])
    return parts[1] if len(parts) > 1 else parts[0]


def imports(source: str, module: str, known: set[str], is_package: bool = False) -> list[tuple[str, int, bool]]:
    """(imported module, line, whether on load) of every import statement, relative ones and those in functions too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []

    def visit(node: ast.AST, on_load: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, on_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((inner if inner in known else base, node.lineno, on_load))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, on_load and not typing_only and not in_function)

    visit(ast.parse(source), True)
    return found


def violations(source: str, module: str, known: set[str], is_package: bool = False) -> list[str]:
    """One line per import of module that its row does not allow."""
    row = layer(module)
    if row not in ARROWS:
        return [f"{module} is in no row of ARROWS: say which layer it is and what it may import"]
    found = []
    for target, line, on_load in imports(source, module, known, is_package):
        top = target.split(".")[0]
        if top == "gdn2_ops":
            if target != module and layer(target) not in ARROWS[row]:
                found.append(f"{module}:{line} imports {target}; {row} may import {list(ARROWS[row])}")
        elif top in LIBRARIES.get(row, (top,)) or top in STANDARD:
            if on_load and top in NEVER_AT_LOAD.get(row, ()):
                found.append(f"{module}:{line} imports {top} on load; import it in the function that needs it")
        else:
            found.append(f"{module}:{line} imports {target}; {row} may import {list(LIBRARIES[row])}")
    return found


STANDARD = {
    "__future__",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "importlib",
    "itertools",
    "math",
    "pkgutil",
    "types",
    "typing",
}


def test_no_arrow_points_back():
    known = modules()
    assert {"gdn2_ops.reference", "gdn2_ops.custom_ops.dispatch", "gdn2_ops.functional"} <= known.keys()
    found = [
        line
        for name, path in known.items()
        for line in violations(path.read_text(), name, set(known), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_the_arrows_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {row for row, targets in ARROWS.items() if row not in done and set(targets) - {row} <= done}
        if not ready:
            break
        done |= ready
    assert set(ARROWS) - done == set()


BAD = {
    "a layer reaches below the operators": ("gdn2_ops.layers", "from gdn2_ops import reference"),
    "inside a function": ("gdn2_ops.functional", "def f():\n    from gdn2_ops.kernels import step"),
    "by a relative import": ("gdn2_ops.gates", "from . import functional"),
    "up from a folder": ("gdn2_ops.export.onnx", "from ..model import Model"),
    "an exporter knows the model": ("gdn2_ops.export.onnx", "import gdn2_ops.model"),
    "an exporter knows the package": ("gdn2_ops.export.onnx", "from gdn2_ops import chunk"),
    "an exporter knows a kernel": ("gdn2_ops.export.onnx", "from gdn2_ops.kernels import step"),
    "the runtime knows an exporter": ("gdn2_ops.runtime.session", "from gdn2_ops.export import onnx"),
    "the runtime loads torch": ("gdn2_ops.runtime.session", "import torch"),
    "the runtime loads part of torch": (
        "gdn2_ops.runtime.session",
        "try:\n    from torch import nn\nfinally:\n    pass",
    ),
    "the specification knows the operators": ("gdn2_ops.reference", "from gdn2_ops.custom_ops import contract"),
    "the contract knows a kernel": ("gdn2_ops.custom_ops.contract", "from gdn2_ops import reference"),
    "a kernel knows the operators": ("gdn2_ops.kernels.step", "from gdn2_ops.custom_ops import contract"),
    "the contract imports more than torch": ("gdn2_ops.custom_ops.contract", "import numpy as np"),
    "autograd knows the dispatch": ("gdn2_ops.custom_ops.autograd", "from gdn2_ops.custom_ops import dispatch"),
    "a model knows the command line": ("gdn2_ops.model", "if True:\n    import gdn2_ops.cli"),
    "a new module without a row": ("gdn2_ops.misc", "import math"),
}
GOOD = {
    "the dispatch may": ("gdn2_ops.custom_ops.dispatch", "from gdn2_ops.kernels import step"),
    "the exporter of kernels": ("gdn2_ops.export.kernels", "from gdn2_ops.kernels import step"),
    "a folder among itself": ("gdn2_ops.export.onnx", "from . import program"),
    "the runtime uses torch when asked": ("gdn2_ops.runtime.session", "def f():\n    import torch"),
    "types only": ("gdn2_ops.runtime.session", "if typing.TYPE_CHECKING:\n    import torch"),
    "a command": ("gdn2_ops.commands", "import gdn2_ops\nfrom gdn2_ops.export import onnx"),
}
KNOWN = {f"gdn2_ops.{name}" for name in (*ARROWS, "custom_ops.dispatch", "custom_ops.contract", "kernels.step")}
KNOWN |= {"gdn2_ops.export.onnx", "gdn2_ops.export.program", "gdn2_ops.export.kernels"}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_import_is_refused(what):
    module, source = BAD[what]
    (line,) = violations(source, module, KNOWN)
    assert module in line


@pytest.mark.parametrize("what", GOOD)
def test_a_good_import_is_taken(what):
    module, source = GOOD[what]
    assert violations(source, module, KNOWN) == []
