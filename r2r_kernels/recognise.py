"""Finds what the fused operators compute in anyone's module, by its computation and not by its names.

Norms and gates are told by what they answer. A module that holds convolutions is traced (torch.fx), and in its graph
whole NAF blocks and the second halves of NAF blocks are looked for; what is found becomes one call of an operator in a
graph of its own (`Fusion`). Nothing here is a proof: `r2r_kernels.swap` compares answers and gradients before it uses
any of it.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2r_kernels import fused
from r2r_kernels.functional import gated_feed_forward_shapes, naf_block_shapes
from r2r_kernels.reference import GatedFeedForwardParams, NAFBlockParams
from r2r_kernels.structure import Structure

TOLERANCE = 1e-6  # some norms compute in float32 whatever they are given
NO_BLOCK = "its computation is not that of a NAF block or of its second half"
EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12, 1e-3)


Epsilons = tuple[float | None, ...]  # for each of fused.DTYPES; None where the norm is not known in it


class Norm(NamedTuple):
    """A LayerNorm over channels: the names of its weight and bias, where it has them, and its eps, which some choose by
    the dtype of what they get."""

    weight: str | None
    bias: str | None
    eps: Epsilons
    channels: int | None


@dataclass(frozen=True)
class Fusion:
    """How to compute a module's answer with fused operators.

    `compute(*arguments, *tensors, *windows, ops)` answers what forward answers for that many arguments. `tensors` and
    `pools` are names inside the module: parameters or buffers, and pools whose `kernel_size` is the window. `dropouts`,
    where at work, leave the answer to the module itself. `whole` tells that no other module inside is called, `left`
    what else the module holds, and why that is not computed so.
    """

    operator: str
    compute: Callable[..., Any] = field(repr=False)
    arguments: int
    tensors: tuple[str, ...]
    pools: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    whole: bool = True
    left: str | None = None

    def fetch(self, module: nn.Module) -> list[Any]:
        """The tensors and windows, by attributes, as a compiler follows them."""
        found: list[Any] = []
        for path in self.tensors:
            value: Any = module
            for name in path.split("."):
                value = getattr(value, name)
            found.append(value)
        for path in self.pools:
            value = module
            for name in path.split("."):
                value = getattr(value, name)
            found.append(tuple(value.kernel_size))
        return found

    def guard(self, module: nn.Module) -> None:
        """Read what decides the answer, so that a compiler asks for it at each call."""
        for path in self.tensors:
            value: Any = module
            for name in path.split(".")[:-1]:
                value = getattr(value, name)
            if isinstance(value, nn.Conv2d):
                _ = (value.stride, value.padding, value.dilation, value.groups, value.padding_mode)
            elif hasattr(value, "eps"):
                _ = value.eps


def _vector(tensor: Tensor) -> bool:
    """[C], or with dimensions of 1 around it."""
    return tensor.numel() == max(tensor.shape, default=0)


def is_norm_like(module: nn.Module) -> bool:
    """Whether the module may be a norm over channels, by its parameters: one or two vectors, and no more."""
    parameters = list(module.parameters())
    vectors = len(parameters) <= 2 and len({p.numel() for p in parameters}) <= 1 and all(map(_vector, parameters))
    return vectors and not any(True for _ in module.buffers())


def _epsilons(module: nn.Module) -> Iterator[float]:
    """Numbers that a norm may add to the variance: its attributes, the constants of its code, the usual ones."""
    for part in module.modules():
        yield from (v for v in vars(part).values() if isinstance(v, float) and 0 < v < 0.1)
        code = getattr(getattr(type(part), "forward", None), "__code__", None)
        yield from (v for v in getattr(code, "co_consts", ()) if isinstance(v, float) and 0 < v < 0.1)
    yield from EPSILONS


@torch.no_grad()
def find_norm(twin: nn.Module) -> Norm | None:
    """What kind of LayerNorm over channels the module (a copy in float64) is, if it is one."""
    names: list[str | None] = [name for name, _ in twin.named_parameters()]
    channels = next((p.numel() for p in twin.parameters()), None)
    orders = (
        [(None, None)]
        if not names
        else [(names[0], None), (None, names[0])]
        if len(names) == 1
        else [
            (names[0], names[1]),
            (names[1], names[0]),
        ]
    )
    for weight, bias in orders:
        eps = tuple(_eps(twin.to(dtype), weight, bias, channels or 6) for dtype in fused.DTYPES)
        twin.to(torch.float64)
        if eps[0] is not None:
            return Norm(weight, bias, eps, channels)
    return None


def _eps(twin: nn.Module, weight: str | None, bias: str | None, channels: int) -> float | None:
    """The eps with which the module answers as a LayerNorm with this weight and bias, in the dtype that it is in."""
    dtype = next((p.dtype for p in twin.parameters()), torch.float64)
    tolerance = max(TOLERANCE, 4 * torch.finfo(dtype).eps)
    random = torch.Generator().manual_seed(0)
    x = 1e-2 * torch.randn((2, channels, 5, 3), generator=random, dtype=torch.float64, device="cpu").to(dtype)
    scale, shift = (twin.get_parameter(name) if name else None for name in (weight, bias))
    try:
        wanted = twin(x.clone())
    except Exception:
        return None
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape or wanted.dtype != dtype:
        return None
    for eps in dict.fromkeys(_epsilons(twin)):  # which shows in values as small as these
        got = fused.layer_norm_2d(x, scale, shift, (eps,) * len(fused.DTYPES), fused.REFERENCE)
        if torch.allclose(got, wanted, rtol=tolerance, atol=tolerance):
            return eps
    return None


@torch.no_grad()
def normalises(twin: nn.Module) -> bool:
    """Whether the module's answer does not depend on the scale of what it gets, as a norm's."""
    channels = next((p.numel() for p in twin.parameters()), 6)
    x = torch.randn((2, channels, 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        once, scaled = twin(x.clone()), twin(10 * x)
    except Exception:
        return False
    same = isinstance(once, Tensor) and once.shape == x.shape and torch.allclose(once, scaled, rtol=1e-2, atol=1e-2)
    return same and bool(once.std() > 1e-3)


def is_gate_like(module: nn.Module) -> bool:
    return not any(True for _ in (*module.children(), *module.parameters(), *module.buffers()))


@torch.no_grad()
def is_gate(twin: nn.Module) -> bool:
    """Whether the module answers the first half of the channels times the second half."""
    x = torch.randn((2, 6, 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        got = twin(x.clone())
    except Exception:
        return False
    return isinstance(got, Tensor) and got.shape == (2, 3, 5, 3) and torch.allclose(got, x[:, :3] * x[:, 3:])


# Graphs


def _function(call: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method as a function, which a graph can name."""

    def autograd_function(*inputs: Any) -> Any:
        return call(*inputs)

    return autograd_function


class _Tracer(fx.Tracer):
    """Enters modules of anyone's that hold modules, but for `leaves`; einops and autograd.Functions are calls."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        einops = sys.modules.get("einops")
        calls = [getattr(einops, name) for name in ("rearrange", "reduce", "repeat")] if einops else []
        super().__init__(autowrap_functions=tuple(calls))
        self.record_stack_traces = False  # they take most of the time
        self.leaves = leaves

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        own = torch.autograd.Function.__dict__["apply"]

        def apply(cls: type, *inputs: Any) -> Any:
            call = own.__get__(None, cls)
            if any(isinstance(x, fx.Proxy) for x in inputs):
                return self.create_proxy("call_function", _function(call), inputs, {})
            return call(*inputs)

        with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
            return super().trace(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.leaves or not any(True for _ in module.children()) or super().is_leaf_module(module, name)


def trace(twin: nn.Module, leaves: set[nn.Module]) -> fx.Graph:
    """The graph of forward with its defaults for all arguments that have one. Raises what tracing raises."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(twin).forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    graph = _Tracer(leaves).trace(twin, concrete_args=defaults or None)
    for node in reversed(graph.nodes):  # what asserts that defaults are what they are
        unused = not node.users and node.op in ("placeholder", "call_function")
        asserts = node.op == "call_function" and "_assert" in getattr(node.target, "__name__", "")
        compared = node.target is operator.eq
        default = node.op == "placeholder" and str(node.target).rpartition("_")[0] in defaults
        if unused and (asserts or compared or default):
            graph.erase_node(node)
    return graph


_ADD = (operator.add, torch.add)
_MUL = (operator.mul, torch.mul)


class Graph:
    """Questions about a traced module."""

    def __init__(
        self, twin: nn.Module, norms: dict[nn.Module, Norm], gates: set[nn.Module], blocks: set[nn.Module]
    ) -> None:
        self.twin = twin
        self.norms = norms
        self.gates = gates
        leaves, structure = {*norms, *blocks}, Structure.of(twin)
        try:
            self.graph = trace(twin, leaves)
        except Exception:  # what is inside may not be traced where the module itself may
            kept = {m for m in twin.modules() if m is not twin and not isinstance(m, nn.Sequential)}
            if kept <= leaves:
                raise
            self.graph = trace(twin, leaves | kept)
        if changed := structure.difference(twin):
            raise ValueError(f"it changes the module: {changed}")
        self.dropouts: dict[str, None] = {}
        self.near: str | None = None  # what kept the last candidate from fitting

    def own(self, *nodes: fx.Node) -> bool:
        """Whether the nodes are not all made inside of one and the same module of anyone's."""
        stacks = [node.meta.get("nn_module_stack") or {} for node in nodes]
        common = (kind for call, (_, kind) in stacks[0].items() if all(call in stack for stack in stacks))
        return all(kind.__module__.startswith("torch.nn.") for kind in common)

    def module(self, node: Any) -> nn.Module | None:
        return (
            self.twin.get_submodule(str(node.target))
            if isinstance(node, fx.Node) and node.op == "call_module"
            else None
        )

    def tensor(self, node: Any) -> Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = operator.attrgetter(str(node.target))(self.twin)
        return value if isinstance(value, Tensor) else None

    def past(self, node: Any) -> Any:
        """The node, or what goes into it where it does nothing in evaluation."""
        while isinstance(found := self.module(node), (nn.Identity, nn.modules.dropout._DropoutNd)):
            if isinstance(found, nn.modules.dropout._DropoutNd):
                self.dropouts[str(node.target)] = None
            node = node.args[0]
        return node

    def binary(self, node: Any, functions: tuple[Any, ...], method: str) -> list[tuple[Any, Any]]:
        """Both orders of the operands, where the node is that operation of two."""
        if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
            return []
        if not (node.op == "call_function" and node.target in functions) and not (
            node.op == "call_method" and node.target == method
        ):
            return []
        a, b = node.args
        return [(a, b), (b, a)]

    def adds(self, node: Any) -> list[tuple[Any, Any]]:
        return self.binary(node, _ADD, "add")

    def products(self, node: Any) -> list[tuple[Any, Any]]:
        return self.binary(node, _MUL, "mul")

    def conv(self, node: Any, kernel: int = 1) -> tuple[str, nn.Conv2d, Any] | None:
        """Name, module and input of a convolution of stride 1 that keeps the size, padded with zeros."""
        node = self.past(node)
        found = self.module(node)
        if type(found) is not nn.Conv2d:
            if isinstance(found, nn.Conv2d):
                self.near = f"{node.target} is a {type(found).__name__}, not a Conv2d"
            return None
        pad = kernel // 2
        wanted = ((kernel, kernel), (1, 1), (1, 1), found.padding if found.padding == "same" else (pad, pad))
        if (found.kernel_size, found.stride, found.dilation, found.padding) != wanted:
            self.near = f"{node.target} is not a plain {kernel} x {kernel} convolution"
            return None
        if kernel > 1 and found.padding_mode != "zeros":
            self.near = f"{node.target} pads with {found.padding_mode!r}"
            return None
        return str(node.target), found, node.args[0]

    def norm(self, node: Any) -> tuple[str, Norm, Any, tuple[Any, Any]] | None:
        """Name, kind and input of a norm, and what it is multiplied with and what is added then, if anything."""
        node = self.past(node)
        scales: list[tuple[Any, tuple[Any, Any]]] = [(node, (None, None))]
        scales += [(inner, (scale, None)) for inner, scale in self.products(node)]
        scales += [(i, (scale, shift)) for scaled, shift in self.adds(node) for i, scale in self.products(scaled)]
        for inner, modulation in scales:
            inner = self.past(inner)
            found = self.module(inner)
            if found in self.norms:
                return str(inner.target), self.norms[found], inner.args[0], modulation
        return None

    def gate(self, node: Any) -> Any:
        """What goes into the gate that the node is, if it is one."""
        node = self.past(node)
        if self.module(node) in self.gates:
            return node.args[0]
        for a, b in self.products(node)[:1]:
            one, other = self.half(a), self.half(b)
            if one and other and one[0] is other[0] and {one[1], other[1]} == {0, 1}:
                return one[0]
        return None

    def half(self, node: Any) -> tuple[Any, int] | None:
        """What is halved along the channels, and which of its halves the node is."""
        if not isinstance(node, fx.Node) or node.target is not operator.getitem:
            return None
        whole, which = node.args
        if not isinstance(whole, fx.Node) or not isinstance(which, int) or which not in (0, 1, -1, -2):
            return None
        chunks = whole.target in (torch.chunk, "chunk")
        dim = whole.kwargs.get("dim", whole.args[2] if len(whole.args) > 2 else 0)
        number = whole.kwargs.get("chunks", whole.args[1] if len(whole.args) > 1 else None)
        return (whole.args[0], which % 2) if chunks and number == 2 and dim in (1, -3) else None

    def pool(self, node: Any) -> tuple[Any, str | None] | None:
        """What is pooled, over the image (None) or by the window of the named pool."""
        node = self.past(node)
        if not isinstance(node, fx.Node):
            return None
        found = self.module(node)
        if isinstance(found, nn.AdaptiveAvgPool2d):
            return (node.args[0], None) if found.output_size in (1, (1, 1), [1, 1]) else None
        if (
            found is not None
            and not any(True for _ in (*found.children(), *found.parameters()))
            and len(node.args) == 1
        ):
            return node.args[0], str(node.target)
        if node.target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)):
            return node.args[0], None
        if node.target in ("mean", torch.mean) and (node.kwargs.get("keepdim") or node.args[2:] == (True,)):
            dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
            return (node.args[0], None) if sorted(d % 4 for d in dims) == [2, 3] else None  # type: ignore[union-attr, operator]
        return None

    def scaled(self, node: Any) -> list[tuple[Any, str | None]]:
        """What a parameter of one value a channel multiplies, and its name; also the node by itself."""
        node = self.past(node)
        found: list[tuple[Any, str | None]] = [(node, None)]
        for inner, scale in self.products(node):
            tensor = self.tensor(scale)
            if tensor is not None and _vector(tensor):
                found.append((self.past(inner), str(scale.target)))
        return found


class Found(NamedTuple):
    """An operator in a graph: the node whose answer it is, its input, tensors in the order of its parameters."""

    operator: str
    node: fx.Node
    x: fx.Node
    tensors: tuple[str | None, ...]
    eps: Epsilons
    modulations: tuple[tuple[Any, Any], ...]
    pool: str | None = None


def _conv_tensors(name: str, conv: nn.Conv2d) -> tuple[str, str | None]:
    return f"{name}.weight", None if conv.bias is None else f"{name}.bias"


def _norm_tensors(name: str, norm: Norm) -> tuple[str | None, str | None]:
    weight, bias = (None if tensor is None else f"{name}.{tensor}" for tensor in (norm.weight, norm.bias))
    return weight, bias


def _misfit(graph: Graph, names: Sequence[str], tensors: Sequence[str | None], shapes: Sequence[Sequence[int]]) -> bool:
    for role, name, shape in zip(names, tensors, shapes, strict=True):
        if name is None:
            continue
        got, wanted = list(operator.attrgetter(name)(graph.twin).shape), list(shape)
        vectors = (
            [n for n in got if n != 1] == [n for n in wanted if n != 1]
            if len(wanted) != 4 or role in ("beta", "gamma")
            else False
        )
        if got != wanted and not vectors:
            graph.near = f"{name} is {got}, not {wanted}"
            return True
    return False


def find_half(graph: Graph, node: fx.Node) -> Found | None:
    """node = y + conv5(gate(conv4(norm(y)))) * gamma, gamma optional."""
    for skip, branch in graph.adds(node):
        for inner, gamma in graph.scaled(branch):
            conv5 = graph.conv(inner)
            hidden = graph.gate(conv5[2]) if conv5 else None
            conv4 = graph.conv(hidden) if hidden is not None else None
            norm = graph.norm(conv4[2]) if conv4 else None
            if conv5 is None or conv4 is None or norm is None or norm[2] is not skip:
                continue
            tensors = (*_norm_tensors(*norm[:2]), *_conv_tensors(*conv4[:2]), *_conv_tensors(*conv5[:2]), gamma)
            channels = conv5[1].out_channels
            if not _misfit(graph, GatedFeedForwardParams._fields, tensors, gated_feed_forward_shapes(channels)):
                return Found("GatedFeedForward", node, skip, tensors, norm[1].eps, (norm[3],))
    return None


def find_block(graph: Graph, second: Found) -> Found | None:
    """second is that of y = x + conv3(g * attention(pool(g))) * beta, g = gate(conv2(conv1(norm(x))))."""
    for skip, branch in graph.adds(second.x):
        for inner, beta in graph.scaled(branch):
            conv3 = graph.conv(inner)
            for gated, attention in graph.products(graph.past(conv3[2])) if conv3 else []:
                sca = graph.conv(attention)
                pool = graph.pool(sca[2]) if sca else None
                hidden = graph.gate(gated) if pool and graph.past(pool[0]) is graph.past(gated) else None
                conv2 = graph.conv(hidden, 3) if hidden is not None else None
                conv1 = graph.conv(conv2[2]) if conv2 else None
                norm = graph.norm(conv1[2]) if conv1 else None
                if not (conv3 and sca and pool and conv2 and conv1 and norm) or norm[2] is not skip:
                    continue
                if norm[1].eps != second.eps:
                    graph.near = f"its norms have different eps, {norm[1].eps[0]:g} and {second.eps[0]:g}"
                    continue
                convs = (tensor for conv in (conv1, conv2, sca, conv3) for tensor in _conv_tensors(*conv[:2]))
                first = (*_norm_tensors(*norm[:2]), *convs, beta)
                tensors = (*first, *second.tensors)
                if not _misfit(graph, NAFBlockParams._fields, tensors, naf_block_shapes(conv3[1].out_channels)):
                    modulations = (norm[3], *second.modulations)
                    return Found("NAFBlock", second.node, skip, tensors, second.eps, modulations, pool[1])
    return None


def _sources(node: Any) -> Iterator[fx.Node]:
    """The node, what goes into it first, and so on, as far as a gate or an attention may reach."""
    for _ in range(8):
        if not isinstance(node, fx.Node):
            return
        yield node
        node = next(iter(node.all_input_nodes), None)


def has_attention(graph: Graph) -> bool:
    """Whether the module itself multiplies something by what is made of a mean over the image."""
    for node in filter(graph.own, graph.graph.nodes):
        for _, scale in graph.products(node)[:2]:
            if any((pool := graph.pool(source)) is not None and pool[1] is None for source in _sources(scale)):
                return True
    return False


def has_gate(graph: Graph) -> bool:
    """Whether the module itself multiplies what is made of two halves of something."""
    for node in filter(graph.own, graph.graph.nodes):
        for operands in graph.products(node)[:1]:
            halves = [next((h for s in _sources(x) if (h := graph.half(s))), None) for x in operands]
            if halves[0] and halves[1] and halves[0][0] is halves[1][0] and halves[0][1] != halves[1][1]:
                return True
        if graph.module(node) in graph.gates:
            return True
    return False


def find_fusion(graph: Graph) -> Fusion | None:
    """All blocks and second halves in the graph, blocks first; None where there are none."""
    found: list[Found] = []
    graph.dropouts.clear()
    for node in reversed(graph.graph.nodes):
        second = find_half(graph, node)
        if second is None:
            continue
        block = find_block(graph, second)
        if block is not None and graph.own(node, second.x):  # its halves may be modules of their own
            found.append(block)
        elif graph.own(node):
            found.append(second)
    if not found:
        return None
    blocks = any(match.operator == "NAFBlock" for match in found)
    left = None if blocks or not has_attention(graph) else f"but for its second half: {graph.near or NO_BLOCK}"
    return _fusion(graph, found, left)


def _fusion(graph: Graph, found: list[Found], left: str | None) -> Fusion:
    copied: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        copied[node] = new.placeholder(node.name)
    names = list(dict.fromkeys(name for match in found for name in match.tensors if name is not None))
    tensors = {name: new.placeholder(f"tensor_{i}") for i, name in enumerate(names)}
    pools = list(dict.fromkeys(match.pool for match in found if match.pool is not None))
    windows = {name: new.placeholder(f"window_{i}") for i, name in enumerate(pools)}
    ops = new.placeholder("ops")
    ends = {match.node: match for match in found}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        match = ends.get(node)
        if match is None:
            copied[node] = new.node_copy(node, copied.__getitem__)
            continue
        parameters = tuple(None if name is None else tensors[name] for name in match.tensors)
        window = (windows[match.pool] if match.pool else None,) if match.operator == "NAFBlock" else ()
        function = fused.naf_block if match.operator == "NAFBlock" else fused.gated_feed_forward
        modulations = fx.map_arg(match.modulations, copied.__getitem__)
        copied[node] = new.call_function(function, (copied[match.x], parameters, match.eps, modulations, *window, ops))
    output = next(iter(reversed(graph.graph.nodes)))
    new.output(fx.map_arg(output.args[0], copied.__getitem__))
    copies = {copied[node]: node for node in graph.graph.nodes if node in copied}
    for node in reversed(new.nodes):  # what the operators have made superfluous; other dead ends may have effects
        superfluous = not node.users and node.op not in ("placeholder", "output")
        if superfluous and node in copies and copies[node].users:
            new.erase_node(node)
    used = {str(node.target) for node in new.nodes if node.op in ("call_module", "get_attr")}
    code = new.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return Fusion(
        operator=" + ".join(dict.fromkeys(match.operator for match in found)),
        compute=namespace["forward"],
        arguments=len(inputs),
        tensors=tuple(names),
        pools=tuple(pools),
        dropouts=tuple(graph.dropouts),
        whole=not used,
        left=left,
    )


def norm_fusion(norm: Norm) -> Fusion:
    def compute(_: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        *tensors, ops = rest
        found = iter(tensors)
        weight, bias = (None if name is None else next(found) for name in (norm.weight, norm.bias))
        return fused.layer_norm_2d(x, weight, bias, norm.eps, ops)

    names = tuple(name for name in (norm.weight, norm.bias) if name is not None)
    return Fusion("LayerNorm2d", compute, 1, names)


def _gate(_: nn.Module, x: Tensor, ops: ModuleType) -> Tensor:
    return fused.simple_gate(x, ops)


GATE = Fusion("SimpleGate", _gate, 1, ())
