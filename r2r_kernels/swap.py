"""`accelerate` puts the fused operators into anyone's NAFNet-like model, in place; `decelerate` takes them out again.

A swapped module stays the object that it is: it gets a class derived from its own, whose forward calls the operators.
It does so only where a copy with random parameters gave the same answers and gradients in float64, and only while the
module's parts are what they were then; else the module's own forward answers.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from r2r_kernels import fused, recognise
from r2r_kernels.nn import OperatorModule
from r2r_kernels.recognise import TOLERANCE, Fusion, Graph, Norm
from r2r_kernels.structure import (
    MARK,
    Sights,
    Structure,
    constant_when_compiled,
    homes,
    modes_fit,
    own_class,
    parts,
    tensors,
)

_GRADIENT_TOLERANCE = 1e-5
# One with rows beyond the usual windows, one odd; small values, so that another eps shows, and large ones for clamps.
# Then those for modules that take no odd sizes (wavelets).
_TRIALS = ((((66, 2), 0.1), ((7, 9), 10.0)), (((72, 8), 0.1), ((8, 24), 10.0)))
_WINDOW = [4, 3]  # of local pools in the proof, less than the images


@dataclass
class Swaps:
    """What `accelerate` did: names of modules with the operator each got, and with the reason each was left alone."""

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = list(self.swapped.values())
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        return "\n".join(
            [f"swapped {counts or 'nothing'}", *(f"left {name}: {why}" for name, why in self.left.items())]
        )


# The stand-in


def window_of(pool: nn.Module | None) -> tuple[int, int] | None:
    """The window of NAFNet's local pool, which knows it once it has seen an image, or of one alike."""
    size = getattr(pool, "kernel_size", None)
    known = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)
    return (size[0], size[1]) if known else None  # type: ignore[index]


class _Sight(NamedTuple):
    """Where a module's tensors are, and its windows."""

    tensors: list[tuple[dict[str, Any], str]]
    windows: list[tuple[int, int]]


class _State:
    """What a swapped module keeps: what it was proven to compute, for which structure, and how it was seen last."""

    def __init__(
        self, fusion: Fusion | None = None, structure: Structure | None = None, own: dict[str, Any] | None = None
    ) -> None:
        self.fusion: Any = fusion
        self.structure: Any = structure
        self.sights = Sights(own)
        self._free: dict[str, frozenset[str]] = {}
        if fusion is not None:  # what is asked for when the module is looked at
            self._free.update({name: frozenset({"p"}) for name in fusion.dropouts})
            self._free.update({name: frozenset({"kernel_size"}) for name in fusion.pools})

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        return _State(self.fusion, self.structure)

    def __reduce__(self) -> Any:
        return _State, ()  # proven anew where it is read

    def difference(self, module: nn.Module) -> str | None:
        return self.structure.difference(module, self._free)

    def see(self, module: nn.Module) -> _Sight | None:
        """What the operators are to be called with; None where the module is not what was proven."""
        return self.sights.see(module, self._look)

    def _look(self, module: nn.Module) -> _Sight | None:
        if self.difference(module) is not None or not modes_fit(module, self.fusion.dropouts, self.fusion.pools):
            return None
        windows = [window_of(module.get_submodule(path)) for path in self.fusion.pools]
        if None in windows:
            return None
        return _Sight(homes(module, self.fusion.tensors), [window for window in windows if window])


def _transformed() -> bool:
    """Whether functions are being transformed that the operators know nothing of: vmap, func.grad, jvp, tracing to ONNX
    by TorchScript."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export()


@constant_when_compiled
def _fits(module: nn.Module) -> bool:
    state = module.__dict__.get(MARK)
    return state is not None and state.see(module) is not None


class Swapped:
    """The base of the classes that swapped modules get: the operators where they are proven, else the module itself."""

    _original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _rebuild, (self._original_class,), state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.__dict__[MARK].fusion is None:  # from a file: nobody knows what the classes were there
            outcome = _Examination().outcome(_undone(self))  # type: ignore[arg-type]
            if isinstance(outcome, _State):
                _swap(self, outcome)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> nn.Module:
        module = self._original_class.__new__(self._original_class)
        module.__dict__.update({name: value for name, value in vars(self).items() if name != MARK})
        return module


def _rebuild(original: type[nn.Module]) -> nn.Module:
    kind = _stand_in(original)
    return kind.__new__(kind)


def _derived(original: type[nn.Module]) -> type[nn.Module]:
    """A class like `original`, with a forward that takes the operators."""
    own = original.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if not kwargs and _fits(self) and len(args) == self._fused.fusion.arguments:
                fusion = self._fused.fusion
                fusion.guard(self)
                try:
                    return fusion.compute(self, *args, *fusion.fetch(self), fused.FUNCTIONAL)
                except fused.Unfit:
                    pass
            return self._original_class.forward(self, *args, **kwargs)
        state = self.__dict__.get(MARK)
        if state is not None and not kwargs and len(args) == state.fusion.arguments and not _transformed():
            if state.sights.own is not self.__dict__:
                state = self.__dict__[MARK] = _State(state.fusion, state.structure, self.__dict__)
            sight = state.see(self)
            if sight is not None:
                try:
                    found = [home[name] for home, name in sight.tensors]
                    return state.fusion.compute(self, *args, *found, *sight.windows, fused.FUNCTIONAL)
                except (fused.Unfit, KeyError):
                    pass
        return self._original_class.forward(self, *args, **kwargs)

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    metaclass: Any = type(original)
    return metaclass(original.__name__, (Swapped, original), {**names, "_original_class": original, "forward": forward})


_stand_in: Any = functools.cache(_derived)  # one class for each


def _swap(module: nn.Module, state: _State) -> None:
    module.__class__ = _stand_in(type(module))
    module.__dict__[MARK] = state


def _undone(module: nn.Module) -> nn.Module:
    """The module, no longer swapped. One whose class was wrapped since (FSDP2) keeps it, and answers by itself."""
    if type(module) is _stand_in(own_class(module)):
        module.__class__ = own_class(module)
    module.__dict__.pop(MARK, None)
    return module


def _swapped(module: nn.Module) -> bool:
    return isinstance(module, Swapped) and MARK in module.__dict__


# The proof


def _copy(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy with other tensors. Raises what copying raises."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        plain = (value for value in vars(part).values() if isinstance(value, Tensor))
        for tensor in (*tensors(part).values(), *plain):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = replace(tensor)
    return copy.deepcopy(module, memo)


def _twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float64 with random parameters; buffers keep their values, where they have any."""
    random = torch.Generator().manual_seed(0)

    def replace(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            scale = max(1, tensor[0].numel() if tensor.dim() else 1) ** -0.5
            values = torch.rand(tensor.shape, generator=random, dtype=torch.float64, device="cpu")
            return nn.Parameter((values - 0.3) * scale)
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta:
            return torch.zeros(tensor.shape, dtype=dtype, device="cpu")
        return tensor.detach().to("cpu", dtype, copy=True)

    twin = _copy(module, replace)
    for part in twin.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    return twin


def _inputs(twin: nn.Module, number: int) -> Iterator[Callable[[tuple[int, int], Callable[..., Tensor]], list[Any]]]:
    """What forward may want: an image, two alike, or an image with the embedding of a time, apart or in a pair."""
    convs = [m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    vectors = [p.numel() for p in twin.parameters() if recognise._vector(p)]
    times = [n for m in twin.modules() if isinstance(m, nn.Linear) for n in (m.in_features, 2 * m.in_features)]
    for c in dict.fromkeys((*convs, *vectors, 6)):
        if number == 1:
            yield lambda size, make, c=c: [make(2, c, *size)]  # type: ignore[misc]
            for t in dict.fromkeys(times):
                yield lambda size, make, c=c, t=t: [(make(2, c, *size), make(2, t))]  # type: ignore[misc]
                yield lambda size, make, c=c, t=t: [[make(2, c, *size), make(2, t)]]  # type: ignore[misc]
        elif number == 2:
            for t in dict.fromkeys(times):
                yield lambda size, make, c=c, t=t: [make(2, c, *size), make(2, t)]  # type: ignore[misc]
            yield lambda size, make, c=c: [make(2, c, *size), make(2, c, *size)]  # type: ignore[misc]


def _gradients(answers: list[Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(a.shape, generator=random, dtype=a.dtype, device="cpu") for a in answers]
    differentiable = [(a, u) for a, u in zip(answers, upstream, strict=True) if a.requires_grad]
    if not differentiable:
        return [None for _ in leaves]
    outputs, weights = [a for a, _ in differentiable], [u for _, u in differentiable]
    return list(torch.autograd.grad(outputs, leaves, weights, allow_unused=True))


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    scale = max(1.0, _largest(wanted))
    return torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * scale)


def _disagreement(module: nn.Module, fusion: Fusion) -> str | None:
    """What a copy with random parameters answers otherwise than the operators, if anything."""
    twin = _twin(module)
    own = own_class(twin).forward
    inside = dict(parts(twin))
    for name in fusion.pools:
        inside[name].kernel_size = list(_WINDOW)  # type: ignore[assignment]
    names = {id(p): name for name, p in twin.named_parameters()}
    random = torch.Generator().manual_seed(0)

    def make(scale: float) -> Callable[..., Tensor]:
        return lambda *shape: (
            scale * torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
        ).requires_grad_()

    def fuse(arguments: list[Any]) -> Any:
        found = [home[name] for home, name in homes(twin, fusion.tensors)]
        return fusion.compute(twin, *arguments, *found, *(tuple(_WINDOW) for _ in fusion.pools), fused.REFERENCE)

    fitting, trials, errors = None, _TRIALS[0], []
    for trials, inputs in itertools.product(_TRIALS, list(_inputs(twin, fusion.arguments))):
        try:
            own(twin, *tree_map(lambda x: x.detach(), inputs(trials[1][0], make(1.0))))
            fitting = inputs
            break
        except Exception as raised:
            errors.append(_first_line(raised))
    if fitting is None:
        return f"it could not be tried: {errors[0] if errors else 'no image was taken'}"

    for training in (True, False):
        twin.train(training)
        for size, scale in trials:
            arguments = fitting(size, make(scale))
            leaves = [*tree_leaves(arguments), *twin.parameters()]
            with torch.set_grad_enabled(training):
                torch.manual_seed(0)
                wanted = tree_leaves(own(twin, *tree_map(lambda x: x.clone(), arguments)))
                torch.manual_seed(0)
                got = tree_leaves(fuse(arguments))
            if [getattr(a, "shape", None) for a in wanted] != [getattr(a, "shape", None) for a in got]:
                return "it answers another shape"
            for a, b in zip(wanted, got, strict=True):
                if a.dtype != b.dtype or not _close(b, a, TOLERANCE):
                    return f"its answers differ by {_largest(b - a):.1e} on images of {size[0]} x {size[1]}"
            if not training:
                continue
            for leaf, a, b in zip(leaves, _gradients(wanted, leaves), _gradients(got, leaves), strict=True):
                name = names.get(id(leaf), "its input")
                if (a is None) != (b is None):
                    return f"its gradient stops before {name}" if a is None else f"its gradient does not reach {name}"
                if a is not None and b is not None and not _close(b, a, _GRADIENT_TOLERANCE):
                    return f"its gradients differ by {_largest(b - a):.1e} at {name}"
    for dtype in (torch.float32, torch.bfloat16):  # some compute otherwise in these
        twin.to(dtype)
        arguments = tree_map(lambda x, dtype=dtype: x.detach().to(dtype), fitting(trials[1][0], make(1.0)))
        with torch.no_grad():
            torch.manual_seed(0)
            wanted = tree_leaves(own(twin, *arguments))
            torch.manual_seed(0)
            try:
                got = tree_leaves(fuse(arguments))
            except fused.Unfit:
                continue
        for a, b in zip(wanted, got, strict=True):
            if a.dtype != b.dtype or not _close(b.double(), a.double(), 16 * torch.finfo(dtype).eps):
                return f"its answers differ by {_largest(b.double() - a.double()):.1e} in {dtype}"
    return None


def _is_pytorchs(kind: type) -> bool:
    """Whether the class and all that it is derived from are PyTorch's own; FSDP2 derives classes from anyone's."""
    return all(base.__module__.partition(".")[0] in ("torch", "builtins") for base in kind.__mro__)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Examination:
    """Finds out about modules, children before parents; what is alike in all but its values is proven once."""

    def __init__(self) -> None:
        self.norms: dict[nn.Module, Norm] = {}
        self.outcomes: dict[nn.Module, _State | str | None] = {}
        self._known: list[tuple[Structure, dict[str, torch.Size], _State | str | None, Norm | None]] = []

    def outcome(self, module: nn.Module) -> _State | str | None:
        """What the module is to be swapped for, the reason why not, or None where there is nothing to swap in it."""
        if module not in self.outcomes:
            for child in module.children():
                self.outcome(child)
            self.outcomes[module] = self._alike(module)
        return self.outcomes[module]

    def _alike(self, module: nn.Module) -> _State | str | None:
        if _is_pytorchs(type(module)) or (isinstance(module, OperatorModule) and not module.eager):
            return None
        structure = Structure.of(module)
        shapes = {name: p.shape for name, p in module.named_parameters(remove_duplicate=False)}
        buffers = any(True for _ in module.buffers())
        alike = (
            (outcome, norm)
            for known, of, outcome, norm in self._known
            if shapes == of and not buffers and known.difference(module) is None
        )
        found = next(alike, None)
        if found is None:
            found = self._examine(module, structure)
            self._known.append((structure, shapes, *found))
        outcome, norm = found
        if norm is not None:
            self.norms[module] = norm
        return copy.deepcopy(outcome)  # each module has a state of its own

    def _examine(self, module: nn.Module, structure: Structure) -> tuple[_State | str | None, Norm | None]:
        try:
            with (
                torch.device("cpu"),
                torch.random.fork_rng(devices=[]),
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast("cpu", enabled=False),
            ):
                fusion, norm, reason = self._find(module)
                if fusion is not None:
                    hooked = structure.hooked()
                    reason = f"{hooked} has hooks" if hooked else _disagreement(module, fusion)
                if fusion is None or reason is not None:
                    return reason, None
                _stand_in(type(module))  # raises where no class can be derived from it
                return _State(fusion, structure), norm
        except Exception as error:
            return (f"it could not be tried: {_first_line(error)}" if self._holds(module) else None), None

    def _find(self, module: nn.Module) -> tuple[Fusion | None, Norm | None, str | None]:
        """A fusion to prove, or a reason why there is none."""
        name = type(module).__name__.lower()
        if recognise.is_norm_like(module):
            twin = _twin(module)
            if recognise.is_gate_like(module) and recognise.is_gate(twin):
                return recognise.GATE, None, None
            if norm := recognise.find_norm(twin):
                return recognise.norm_fusion(norm), norm, None
            if recognise.normalises(twin) or "norm" in name:
                return None, None, "its answers are not those of a LayerNorm over channels with weight and bias [C]"
        if not any(True for _ in module.children()) and not recognise.is_gate_like(module):
            return None, None, None
        copied = _copy(module, lambda tensor: tensor)
        pairs = zip(module.modules(), copied.modules(), strict=True)
        norms, gates, blocks = {}, set(), set()
        for original, part in pairs:
            outcome = self.outcomes.get(original)
            if original in self.norms:
                norms[part] = self.norms[original]
            elif isinstance(outcome, _State) and outcome.fusion.operator == "SimpleGate":
                gates.add(part)
            elif isinstance(outcome, _State) and outcome.fusion.operator == "NAFBlock":
                blocks.add(part)
        try:
            graph = Graph(copied, norms, gates, blocks)
        except Exception as error:
            held = self._holds(module)
            return None, None, f"its forward cannot be traced: {_first_line(error)}" if held else None
        if fusion := recognise.find_fusion(graph):
            for pool in fusion.pools:
                if reason := _pool_misfit(module.get_submodule(pool)):
                    return None, None, reason
            return fusion, None, None
        if recognise.has_gate(graph) or recognise.has_attention(graph):
            return None, None, graph.near or recognise.NO_BLOCK
        return None, None, None

    def _holds(self, module: nn.Module) -> bool:
        """Whether it calls a norm, a gate or a global mean itself, as far as its children tell."""
        inside = [
            m for child in module.children() for m in (child.modules() if type(child) is nn.Sequential else [child])
        ]
        own = "norm" in type(module).__name__.lower() or "gate" in type(module).__name__.lower()
        pools = any(isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1)) for m in inside)
        return (
            own or pools or any(self.outcomes.get(m) is not None for m in inside if not any(True for _ in m.children()))
        )


def _pool_misfit(pool: nn.Module) -> str | None:
    """What keeps a pool from being the mean over its window, on images that are larger along either axis."""
    window = window_of(pool)
    if window is None:
        return "its attention pools neither with AdaptiveAvgPool2d(1) nor over a window that is known (kernel_size)"
    if getattr(pool, "fast_imp", False):
        return "its attention pools with TLC's approximation (fast_imp), not with the local mean"
    pool = _twin(pool)
    random = torch.Generator().manual_seed(0)
    for size in ((window[0] + 6, 3), (3, window[1] + 5)):
        x = torch.rand((1, 2, *size), generator=random, dtype=torch.float64, device="cpu")
        try:
            agrees = _close(pool(x), fused.REFERENCE.local_mean_2d(x, window), TOLERANCE)
        except Exception as error:
            return f"its attention's pool could not be tried: {_first_line(error)}"
        if not agrees:
            return f"its attention's pool is not the mean over windows of {window[0]} x {window[1]}"
    return None


def _named(model: nn.Module, entered: Callable[[nn.Module], bool], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their names, parents first; what `entered` says no to is not entered."""
    yield prefix.removesuffix(".") or "(the model itself)", model
    if entered(model):
        for name, child in model._modules.items():
            if child is not None:
                yield from _named(child, entered, f"{prefix}{name}.")


def accelerate(model: nn.Module) -> Swaps:
    """Swap the NAF blocks, and the second halves, LayerNorm2d and SimpleGate outside them, for the fused operators, in
    place.

    Works for NAFNet, its variant with local attention (TLC) and what descends from them, whatever their modules are
    called. Print what it returns to see what was swapped and what was left alone, and why. A swapped module stays the
    same object with the same parameters, hooks and methods; where it is changed later (adapters, pruning, hooks inside,
    dropout at work) its own forward answers. Call it before compiling the model.
    """
    swaps = Swaps()
    devices = sorted({str(t.device) for t in (*model.parameters(), *model.buffers())})
    if len(devices) > 1:
        swaps.left["(the model itself)"] = f"its parameters are on several devices: {', '.join(devices)}"
        return swaps
    for module in model.modules():
        if _swapped(module) and vars(module)[MARK].difference(module) is not None:
            _undone(module)  # it was changed since, and is looked at anew
    examination = _Examination()
    examination.outcome(model)
    states: dict[nn.Module, _State] = {}

    def entered(module: nn.Module) -> bool:
        outcome = vars(module)[MARK] if _swapped(module) else examination.outcomes.get(module)
        return not (isinstance(outcome, _State) and outcome.fusion.whole)

    for name, module in _named(model, entered):
        outcome = None if _swapped(module) else examination.outcomes.get(module)
        if isinstance(outcome, _State):
            states[module] = outcome
            swaps.swapped[name] = outcome.fusion.operator
            if outcome.fusion.left:
                swaps.left[name] = outcome.fusion.left
        elif outcome is not None:
            swaps.left[name] = outcome
    try:
        for module, state in states.items():
            _swap(module, state)
    except BaseException:
        for module in states:
            _undone(module)
        raise
    return swaps


def decelerate(model: nn.Module) -> list[str]:
    """Make every module that `accelerate` swapped what it was; returns their names."""
    names = [name for name, module in _named(model, lambda _: True) if _swapped(module)]
    for module in model.modules():
        if _swapped(module):
            _undone(module)
    return names
