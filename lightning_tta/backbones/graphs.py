"""The last linear operation of a net that is a graph of operations, as ``torch.export`` and PT2E make it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_NOTED: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("noted", default=None)


def note(features: Tensor, output: Tensor) -> None:
    """Called by the graph: what went into its last linear operation, and what came out."""
    calls = _NOTED.get()
    if calls is not None:
        calls.append((features, output))


class GraphHead:
    """The last ``aten.linear`` of a graph. It is no module, so no hook can see it.

    While :meth:`recorded` is active, the graph's forward is one that hands input and output to :func:`note`; the graph
    itself, and what a copy or a saved file of the net has, stays as it is.

    Args:
        owner: A module that is a graph.
        node: The operation.
    """

    def __init__(self, owner: GraphModule, node: Node) -> None:
        self.owner, self.node_name = owner, node.name
        self.out_features, self.in_features = self.weight().shape

    @classmethod
    def find(cls, model: nn.Module) -> tuple[str, Self] | None:
        """The last one of the last graph in a net, with its name."""
        for name, module in reversed(list(model.named_modules())):
            if isinstance(module, GraphModule):
                nodes = [n for n in module.graph.nodes if n.target == torch.ops.aten.linear.default]
                if nodes:
                    return f"{name}.{nodes[-1].name}".lstrip("."), cls(module, nodes[-1])
        return None

    def weight(self) -> Tensor:
        """(K, D), dequantised."""
        weight: Tensor = self._value(self._node(self.owner.graph).args[1])
        return weight

    @property
    def bias(self) -> Tensor | None:
        """(K,), or ``None``."""
        arguments = self._node(self.owner.graph).args
        return self._value(arguments[2]) if len(arguments) > 2 and arguments[2] is not None else None

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[str, Any, Any]]]:
        """While active, calls are listed: a name, inputs, output."""
        kind: Any = type(self.owner)  # a class of this one module: fx makes one for each
        if getattr(kind.forward, "noted", None) != self.node_name:
            kind.forward = self._noting_forward()
        calls: list[tuple[Tensor, Tensor]] = []
        listed: list[tuple[str, Any, Any]] = []
        token = _NOTED.set(calls)
        try:
            yield listed
        finally:
            _NOTED.reset(token)
            listed += [(self.node_name, (features,), output) for features, output in calls]

    def _node(self, graph: torch.fx.Graph) -> Node:
        nodes: dict[str, Node] = {node.name: node for node in graph.nodes}
        return nodes[self.node_name]

    def _noting_forward(self) -> Any:
        graph = copy.deepcopy(self.owner.graph)
        node = end = self._node(graph)
        while len(end.users) == 1 and "quantize" in str(next(iter(end.users)).target):
            end = next(iter(end.users))
        with graph.inserting_after(end):
            graph.call_function(note, (node.args[0], end))
        forward: Any = type(GraphModule(self.owner, graph)).forward
        forward.noted = self.node_name
        return forward

    @torch.no_grad()
    def _value(self, node: Any) -> Any:
        """Value of a node that does not depend on the graph's input."""
        if not isinstance(node, Node):
            return node
        if node.op == "get_attr":
            value: Any = self.owner
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        assert node.op == "call_function", "the weight of the last linear operation is computed from the input"
        assert callable(node.target)
        return node.target(*map(self._value, node.args), **{k: self._value(v) for k, v in node.kwargs.items()})
