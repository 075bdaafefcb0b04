"""The last product of a compiled part, left to eager torch, so that recomputation can stop before it.

torch.utils.checkpoint makes again what backward wants, and no more: of a layer all but the product at its end, whose
result nobody keeps (a quarter of the products of a Llama layer's forward). A compiled graph runs as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_PRODUCTS = (torch.nn.functional.linear, torch.addmm)
# What may come after it, uncompiled: it moves next to nothing, or is random, or both.
_METHODS = ("view", "reshape", "contiguous", "transpose", "squeeze", "unsqueeze", "flatten")
_FUNCTIONS = (torch.nn.functional.dropout,)
_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")  # eager torch would be outside of them


@functools.cache
def without_last_product(backend: Any) -> Callable[..., Any]:
    """A backend of torch.compile that gives another one's graphs their last product eagerly.

    Where a graph ends in one; other graphs are compiled as they are. One object for each `backend`: dynamo compiles
    anew for another.
    """
    compile_graph = backend if callable(backend) else torch._dynamo.lookup_backend(backend)

    def split(module: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        tail = _tail(module.graph)
        if not tail:
            return compile_graph(module, inputs, **options)
        last, wanted = _cut(module.graph, tail)
        module.recompile()
        places = {node: index for index, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        made = [node for node in wanted if node not in places]
        head = compile_graph(module, inputs, **options) if made else None
        indices = [places[node] if node in places else len(places) + made.index(node) for node in wanted]

        def run(*args: Any) -> Any:
            everything = (*args, *(head(*args) if head is not None else ()))
            return last(*(everything[index] for index in indices))

        return run

    return split


def _tail(graph: fx.Graph) -> list[fx.Node]:
    """The last product and what comes after it; empty where that is more than its way out of the graph.

    Or where it takes nothing of what comes before it, which then is there for what it does in place.
    """
    *nodes, output = graph.nodes
    if any(getattr(node.target, "__name__", "") in _MODES for node in nodes):
        return []
    start = next((i for i, node in reversed(list(enumerate(nodes))) if node.target in _PRODUCTS), len(nodes))
    follows = nodes[start + 1 :]
    passes = all(node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS) for node in follows)
    tail = [*nodes[start:], output]
    takes = {given for node in tail for given in node.all_input_nodes}
    before = {node for node in nodes[:start] if node.op != "placeholder"}
    known = not any(node.op == "get_attr" for node in takes) and (not before or takes & before)
    return tail[:-1] if passes and known else []


def _cut(graph: fx.Graph, tail: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Takes a tail out of a graph, which then returns what it wants of it.

    Returns:
        A module that does the rest, and the nodes whose values it takes.
    """
    output = next(iter(graph.find_nodes(op="output")))
    users = [*tail, output]
    wanted = list(dict.fromkeys(n for user in users for n in user.all_input_nodes if n not in set(tail)))
    rest = fx.Graph()
    copies = {node: rest.placeholder(node.name) for node in wanted}
    for node in tail:
        copies[node] = rest.node_copy(node, copies.__getitem__)
    rest.output(fx.map_arg(output.args[0], copies.__getitem__))
    output.args = (tuple(node for node in wanted if node.op != "placeholder"),)
    for node in reversed(tail):
        graph.erase_node(node)
    return fx.GraphModule({}, rest), wanted
