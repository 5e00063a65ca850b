"""Run in a process of its own, with NVIDIA's bindings on the path and nothing behind them: is everything that the
stand-in for tensorrt declares in them, with the same parameters and numbers? Prints what is not, as JSON.

Signatures are read from the docstrings that pybind11 writes. Arguments: file of the stand-in, module, classes (all).
"""

import ast
import enum
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

CONSTRUCTED = ("Builder", "OnnxParser", "Runtime")  # by us; objects of other classes come from these


def overloads(doc: str, name: str) -> list[list[tuple[str, bool]]]:
    """The parameters after self of every signature, and which of them have defaults."""
    found = []
    for text in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> ", doc or "", re.M):
        parts, depth = [""], 0
        for letter in text:
            depth += (letter in "[(<") - (letter in "])>")
            if letter == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += letter
        names = [(part.split(":")[0].split("=")[0].strip(), "=" in part) for part in parts if part.strip()]
        found.append([parameter for parameter in names if parameter[0] != "self"])
    return found


def takes(signature: list[tuple[str, bool]], names: list[str]) -> bool:
    """Whether a call with those arguments is one of that signature."""
    return [name for name, _ in signature[: len(names)]] == names and all(has for _, has in signature[len(names) :])


def compare_class(node: ast.ClassDef, real, standin) -> list[str]:
    found = []
    if issubclass(standin, enum.Enum):
        for member in standin:
            if not hasattr(real, member.name):
                found.append(f"{node.name}.{member.name}: no such member")
            elif isinstance(member, enum.IntEnum) and int(getattr(real, member.name)) != member.value:
                found.append(f"{node.name}.{member.name}: {int(getattr(real, member.name))}, not {member.value}")
        return found
    for item in node.body:
        if isinstance(item, ast.ClassDef):
            found += compare_class(item, getattr(real, item.name), getattr(standin, item.name))
        if not isinstance(item, ast.FunctionDef) or (item.name.startswith("_") and item.name != "__init__"):
            continue
        if item.name == "__init__":
            found += [f"{node.name}.{x}: no such attribute" for x in public_attributes(item) if not hasattr(real, x)]
            if node.name not in CONSTRUCTED:
                continue
        if not hasattr(real, item.name):
            found.append(f"{node.name}.{item.name}: no such function")
        elif not item.decorator_list:  # a property
            names = [a.arg for a in item.args.args if a.arg != "self"]
            signatures = overloads(getattr(real, item.name).__doc__, item.name)
            if not any(takes(signature, names) for signature in signatures):
                found.append(f"{node.name}.{item.name}: expected one of {signatures}, got {names}")
    return found


def public_attributes(function: ast.FunctionDef) -> list[str]:
    stored = [x for x in ast.walk(function) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)]
    return [x.attr for x in stored if ast.unparse(x.value) == "self" and not x.attr.startswith("_")]


def main(file: str, module: str, *wanted: str) -> list[str]:
    real = importlib.import_module(module)
    spec = importlib.util.spec_from_file_location("standin", file)
    standin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(standin)
    found, compared = [], set()
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.ClassDef) and (not wanted or node.name in wanted):
            compared.add(node.name)
            if hasattr(real, node.name):
                found += compare_class(node, getattr(real, node.name), getattr(standin, node.name))
            else:
                found.append(f"{node.name}: no such class")
    assert compared and compared >= set(wanted), compared
    return found + ([] if hasattr(real, "get_plugin_registry") else ["get_plugin_registry: no such function"])


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
