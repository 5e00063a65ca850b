"""In ONNX Runtime: its contrib operator LinearAttention (rule gated_delta, a decay for each key channel), and the
node gdn2::GatedDeltaNet2 with this library's kernels and with its function body."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from benchmarks.peers import GDN2
from benchmarks.problems import NAMES, Coordinates, Inputs, Problem

DOMAIN, OP = "com.microsoft", "LinearAttention"
TYPE = 1  # onnx.TensorProto.FLOAT


class InOnnxRuntime(ABC):
    """A graph of one node, memory bound once: its inputs and outputs are these tensors in order."""

    ops: tuple[str, ...] = ("step", "chunk")
    in_place = False

    @staticmethod
    def missing() -> str | None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError:
            return "not installed: pip install 'gdn2-ops[onnx]'"
        return None

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.state = x.state.clone()
        self.final = self.state if self.in_place else torch.empty_like(self.state)
        self.o = torch.empty_like(x.v)
        self.feed = self.prepare(problem, x, options)  # kept: the binding holds addresses only
        outs = {"o": self.o.view(*self.o.shape[:2], -1) if self.feed["q"].dim() == 3 else self.o, "final": self.final}
        model = self.model(problem, self.feed, outs).SerializeToString()
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        for bind, tensors in ((self.binding.bind_input, self.feed), (self.binding.bind_output, outs)):
            for name, t in tensors.items():
                bind(name, "cpu", 0, np.float32, list(t.shape), t.data_ptr())

    @abstractmethod
    def prepare(self, problem: Problem, x: Inputs, options) -> dict[str, Tensor]:
        """The inputs of the node, contiguous, self.state among them."""

    @abstractmethod
    def model(self, problem: Problem, feed: dict[str, Tensor], outs: dict[str, Tensor]):
        """An onnx.ModelProto."""

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def result(self) -> tuple[Tensor, ...]:
        self()
        return self.o.clone(), self.final


class OnnxRuntime(InOnnxRuntime):
    """LinearAttention from a past to a present state. The change of coordinates is not timed."""

    name = "ONNX Runtime LinearAttention"
    gates = "GDN-2 by coordinates"

    @staticmethod
    def missing() -> str | None:
        if said := InOnnxRuntime.missing():
            return said
        from onnxruntime.capi import onnxruntime_pybind11_state as native

        has_it = any(s.name == OP and s.domain == DOMAIN for s in native.get_all_operator_schema())
        return None if has_it else "no LinearAttention in this onnxruntime: pip install 'onnxruntime>=1.26'"

    def prepare(self, problem: Problem, x: Inputs, options) -> dict[str, Tensor]:
        self.coordinates = c = Coordinates.of(x)
        q, k, v, g = (t.flatten(2).contiguous() for t in (c.q, c.k, c.v, c.g))
        beta = torch.ones(problem.N, problem.T, problem.H)
        return {"q": q, "k": k, "v": v, "past": self.state, "g": g, "beta": beta}

    def model(self, problem: Problem, feed: dict[str, Tensor], outs: dict[str, Tensor]):
        heads = {"q_num_heads": problem.H, "kv_num_heads": problem.H}
        rule = {"update_rule": "gated_delta", "scale": problem.K**-0.5}
        return _one_node(OP, DOMAIN, feed, outs, heads | rule)

    def result(self) -> tuple[Tensor, ...]:
        o, final = super().result()
        return o, self.coordinates.state(final)


class OnnxRuntimeInPlace(OnnxRuntime):
    """The same memory bound as past and present state: no copy, and nothing in the operator's text that allows it."""

    name = "ONNX Runtime, state in place"
    ops = ("step",)
    in_place = True


class BodyInOnnxRuntime(InOnnxRuntime):
    """gdn2::GatedDeltaNet2 with no kernel registered: the function body of an exported file runs. A step in place."""

    name = "gdn2_ops, body in ONNX Runtime"
    gates = GDN2

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        self.in_place = problem.op == "step"
        super().__init__(problem, x, threads)

    def prepare(self, problem: Problem, x: Inputs, options) -> dict[str, Tensor]:
        return dict(zip(NAMES, (*x.tensors()[:-1], self.state)))

    def node(self, problem: Problem, feed: dict[str, Tensor], outs: dict[str, Tensor]):
        """The onnx.ModelProto without a body."""
        from gdn2_ops.export import onnx_schema

        attributes = {"scale": problem.K**-0.5} | onnx_schema.PLUGIN
        return _one_node(onnx_schema.OP, onnx_schema.DOMAIN, feed, outs, attributes)

    def model(self, problem: Problem, feed: dict[str, Tensor], outs: dict[str, Tensor]):
        from gdn2_ops.export.onnx_bodies import function_body, with_body

        model = self.node(problem, feed, outs)
        return with_body(model, function_body("chunk", model.opset_import[0].version))


class LibraryInOnnxRuntime(BodyInOnnxRuntime):
    """The same node with this library's kernels registered."""

    name = "gdn2_ops in ONNX Runtime"

    @staticmethod
    def missing() -> str | None:
        if said := BodyInOnnxRuntime.missing():
            return said
        from gdn2_ops.runtime import onnxruntime_library

        try:
            onnxruntime_library.path()
        except ImportError:
            return "not installed: make install, and pip install 'gdn2-ops[onnx]'"
        return None

    def prepare(self, problem: Problem, x: Inputs, options) -> dict[str, Tensor]:
        from gdn2_ops.runtime import onnxruntime_library

        onnxruntime_library.register(options)
        return super().prepare(problem, x, options)

    def model(self, problem: Problem, feed: dict[str, Tensor], outs: dict[str, Tensor]):
        return self.node(problem, feed, outs)  # no body: the kernel or an error


def _one_node(op: str, domain: str, feed: dict[str, Tensor], outs: dict[str, Tensor], attributes: dict):
    from onnx import helper

    infos = [[helper.make_tensor_value_info(name, TYPE, t.shape) for name, t in ts.items()] for ts in (feed, outs)]
    node = helper.make_node(op, list(feed), list(outs), domain=domain, **attributes)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    return helper.make_model(helper.make_graph([node], op, *infos), opset_imports=opsets, ir_version=10)
