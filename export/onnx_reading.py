"""What somebody who opens a file in Netron sees: where a node comes from, what inputs and outputs are."""

from __future__ import annotations

import ast
import importlib.metadata

import onnx_ir as ir

from gdn2_ops.export.onnx_schema import DOC, DOMAIN, OP

_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_INNER = ("module.model.", "module.")  # of `program.FlatModule`: not the caller's


def describe(model: ir.Model, name: str, body: str) -> None:
    """Names nodes and weights after the modules they come from, and says what the file is.

    Removes what the exporter notes about the Python source: it names files of the machine that exported.
    """
    _name_nodes(model.graph)
    _name_weights(model.graph)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = DOC if (node.domain, node.op_type) == (DOMAIN, OP) else None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = name
    model.producer_name, model.producer_version = "gdn2-ops", importlib.metadata.version("gdn2-ops")
    model.doc_string = (
        f"{name}, with {DOMAIN}::{OP} nodes. A runtime with a kernel or a plugin for the node uses it; any other runs "
        f"the node's function body ({body})."
    )
    model.metadata_props.update({"gdn2.body": body, "gdn2.module": name})
    if model.graph.inputs and model.graph.inputs[0].name == "input_ids":
        _describe_language_model(model.graph)


def _describe_language_model(graph: ir.Graph) -> None:
    tokens, *past = graph.inputs
    logits, *present = graph.outputs
    tokens.doc_string = "Tokens, a whole prompt or the next one."
    logits.doc_string = "Of the token after each one given."
    for before, after in zip(past, present):
        before.doc_string = f"State before the tokens: zeros at the beginning, then {after.name} of the call before."
        after.doc_string = f"State after the tokens: {before.name} of the next call."


def _scope(node: ir.Node) -> str:
    """The path of the module that a node comes from, as the caller's module has it; empty for the module itself."""
    modules = [name for name in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1] if name != _NO_MODULE]
    return _of_caller(modules[-1] + ".").rstrip(".") if modules else ""


def _of_caller(name: str) -> str:
    for prefix in _INNER:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _name_nodes(graph: ir.Graph) -> None:
    """layers.0.mixer/GatedDeltaNet2, and a number where a module has several of a kind."""
    seen: dict[str, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        scope = _scope(node)
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[name] = seen.get(name, -1) + 1
        node.name = f"{name}_{seen[name]}" if seen[name] else name


def _name_weights(graph: ir.Graph) -> None:
    """The names of the caller's parameters; a matrix that the exporter has transposed ends in .T."""
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = _of_caller(value.name)
        users = [use.node for use in value.uses()]
        if name.startswith("val_") and len(users) == 1 and users[0].op_type in ("MatMul", "Gemm"):
            scope = _scope(users[0])
            name = f"{scope}.weight.T" if scope else name
        if name not in graph.initializers:
            value.name = name
