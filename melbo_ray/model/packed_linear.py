"""Matrix products on the CPU with oneDNN; in a recorded step they are merged and their weights packed for few rows.

A step on a prompt of 20 to 40 tokens is bound by its products with the model's weights. The recording shows which
products share an input, which are summed, and that the weights are constant, which makes them faster.
"""

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
# None if torch is built without oneDNN.
_packed: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_TRANSPOSES = {_aten.t.default, _aten.transpose.int, _aten.permute.default}

MOST_PACKED = 4 << 30
"""Maximum bytes of packed copies per recording, unless the caller has checked that more fit."""

_library = torch.library.Library("melbo_ray", "DEF")
_library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def available() -> bool:
    """Whether torch is built with oneDNN."""
    return _packed is not None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + bias by oneDNN; `weight` may be a `packed_copy`, and all are of one dtype."""
    return _packed(x.contiguous(), weight, bias, "none", [], "")


def packed_copy(weight: Tensor, rows: int) -> Tensor:
    """A copy of a weight in the layout that oneDNN prefers for so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


_library.impl("product", product, "CompositeExplicitAutograd")
torch.library.register_fake(
    "melbo_ray::product", lambda x, weight, bias: x.new_empty(len(x), len(weight)), lib=_library
)


class onednn(TorchFunctionMode):  # noqa: N801 - used as a context manager
    """Within the context, products with float32 weights on the CPU use oneDNN if gradients are disabled.

    torch uses MKL by default, which does not use AVX-512 on processors other than Intel's and is at most half as fast
    there. Results differ in the last bits.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute a linear layer with oneDNN if possible, and call every other function unchanged."""
        if func is torch.nn.functional.linear and not kwargs and suits(*args):
            return product(*args)
        return func(*args, **(kwargs or {}))


def suits(x: Tensor, weight: Tensor, *_: Any) -> bool:
    """Whether oneDNN computes this product: float32 on the CPU, without gradients."""
    both = (x, weight)
    plain = all(part.dtype == torch.float32 and part.device.type == "cpu" and part.numel() for part in both)
    return _packed is not None and plain and weight.is_contiguous() and not torch.is_grad_enabled()


@dataclass(frozen=True)
class _Product:
    """[concatenated inputs] @ weight + bias: inputs (rows, ·) each, weight (in, out), bias (out,) or None.

    A merged weight is a copy, so `weight` makes it when it is packed; `columns` is its number of columns.
    """

    inputs: Sequence[Node]
    columns: int
    weight: Callable[[], Tensor]
    bias: Tensor | None

    @classmethod
    def of(cls, x: Node, weight: Tensor, bias: Tensor | None) -> "_Product":
        return cls([x], weight.shape[1], lambda: weight, bias)


def pack(recording: GraphModule, most: float = math.inf) -> GraphModule:
    """The recording with its products by constant weights merged where possible, and packed by oneDNN.

    Products of one input become one product (q, k, v; gate and up), and a sum of products becomes one product of the
    concatenated inputs (their gradients). The order of summation changes, so results differ in the last bits. A packed
    weight is a copy; `most` limits their total, bytes.

    Raises:
        RuntimeError: no oneDNN, weights that this processor or dtype cannot pack, or more than `most` bytes of them.
    """
    if _packed is None:
        raise RuntimeError("this torch is built without oneDNN")
    module = GraphModule(recording, copy.deepcopy(recording.graph))
    products = _find(module)
    if (size := sum(product.weight().nbytes for product in products.values())) > most:
        raise RuntimeError(
            f"packed copies would take {size / 2**30:.1f} GiB, and at most {most / 2**30:.1f} are given to them"
        )
    _merge_sums(module.graph, products)
    _merge_shared(module.graph, products)
    for number, (node, product) in enumerate(products.items()):
        _place(module, node, product, str(number))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def opaque(recording: GraphModule) -> GraphModule:
    """The recording with its packed products wrapped in a custom operator, as TorchInductor cannot lower them."""
    module = GraphModule(recording, copy.deepcopy(recording.graph))
    for node in module.graph.nodes:
        if node.target is _packed:
            node.target, node.args = torch.ops.melbo_ray.product.default, node.args[:3]
    module.recompile()
    return module


def _find(module: GraphModule) -> dict[Node, _Product]:
    """The products by constant weights, in order."""
    constants: dict[Node, Tensor] = {}
    products: dict[Node, _Product] = {}
    for node in module.graph.nodes:
        args = _args(node)
        if node.op == "get_attr":
            constants[node] = getattr(module, node.target)
        elif node.target in _TRANSPOSES and args[0] in constants:
            constants[node] = node.target(constants[args[0]], *args[1:])
        elif node.target is _aten.mm.default and args[1] in constants:
            products[node] = _Product.of(args[0], constants[args[1]], None)
        elif node.target is _aten.addmm.default and args[0] in constants and args[2] in constants and not node.kwargs:
            products[node] = _Product.of(args[1], constants[args[2]], constants[args[0]])
    return products


def _merge_sums(graph: Graph, products: dict[Node, _Product]) -> None:
    """Replace every sum x V + y W of equally reshaped products by [x y] [V; W]."""
    for node in list(graph.nodes):
        views = _args(node)
        if node.target is not _aten.add.Tensor or node.kwargs or not all(_lone(view, products) for view in views):
            continue
        if views[0] is views[1] or views[0].args[1] != views[1].args[1]:
            continue
        terms = [products.pop(_args(view)[0]) for view in views]
        with graph.inserting_before(node):
            whole = graph.call_function(_aten.mm.default)
            node.replace_all_uses_with(graph.call_function(_aten.view.default, (whole, views[0].args[1])))
        inputs = [value for term in terms for value in term.inputs]
        products[whole] = _Product(inputs, terms[0].columns, functools.partial(_joined, terms, 0), None)
        _erase(graph, node, *views, *(_args(view)[0] for view in views))


def _joined(products: Sequence[_Product], dim: int) -> Tensor:
    return torch.cat([product.weight() for product in products], dim)


def _lone(view: object, products: dict[Node, _Product]) -> bool:
    """Whether `view` is a reshaped product without bias and without another user."""
    if not isinstance(view, Node) or view.target not in _VIEWS or len(view.users) > 1:
        return False
    product = _args(view)[0]
    return product in products and products[product].bias is None and len(product.users) == 1


def _merge_shared(graph: Graph, products: dict[Node, _Product]) -> None:
    """Replace products x V and x W of one input by the columns of x [V W]."""
    groups: dict[tuple, list[Node]] = defaultdict(list)
    for node, product in products.items():
        if len(product.inputs) == 1:
            groups[_origin(product.inputs[0]), product.bias is None].append(node)
    for nodes in groups.values():
        if len(nodes) == 1:
            continue
        parts, begin, end = [products.pop(node) for node in nodes], 0, 0
        with graph.inserting_before(nodes[0]):
            whole = graph.call_function(_aten.mm.default)
            for node, part in zip(nodes, parts, strict=True):
                end = begin + part.columns
                node.replace_all_uses_with(graph.call_function(_aten.slice.Tensor, (whole, 1, begin, end)))
                begin = end
        biases = [part.bias for part in parts if part.bias is not None]
        weight = functools.partial(_joined, parts, 1)
        products[whole] = _Product(parts[0].inputs, end, weight, torch.cat(biases) if biases else None)
        _erase(graph, *nodes)


def _origin(x: Node) -> tuple:
    """A key that is equal for equal inputs, since every linear layer reshapes its input separately."""
    if x.target not in _VIEWS:
        return (x,)
    viewed, shape = _args(x)
    return (viewed, *shape)


def _place(module: GraphModule, node: Node, product: _Product, name: str) -> None:
    """Replace `node` by the packed product."""
    graph, rows = module.graph, product.inputs[0].meta["val"].shape[0]
    weight = product.weight().detach().t().contiguous()
    module.register_buffer(f"weight{name}", packed_copy(weight, rows))
    with graph.inserting_before(node):
        x, bias = product.inputs[0], None
        if len(product.inputs) > 1:
            x = graph.call_function(_aten.cat.default, (list(product.inputs), 1))
        if product.bias is not None:
            module.register_buffer(f"bias{name}", product.bias.detach())
            bias = graph.get_attr(f"bias{name}")
        x = graph.call_function(_aten.contiguous.default, (x,))
        ours = graph.call_function(_packed, (x, graph.get_attr(f"weight{name}"), bias, "none", [], ""))
    node.replace_all_uses_with(ours)
    _erase(graph, node)


def _args(node: Node) -> tuple[Any, ...]:
    # The type checker cannot follow torch's recursive union of argument types.
    return cast(tuple[Any, ...], node.args)


def _erase(graph: Graph, *nodes: Node) -> None:
    for node in nodes:
        graph.erase_node(node)
