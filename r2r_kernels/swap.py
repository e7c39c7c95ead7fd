"""`accelerate` puts the fused operators into anyone's NAFNet-like model, in place; `decelerate` takes them out again.

Modules are found by the names and shapes of their parameters, and swapped only where a copy with random parameters
gives the same answers in float64, in training and in evaluation. Parameters, `state_dict` and submodules stay what they
are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from r2r_kernels import functional
from r2r_kernels.nn import NAFBlock, OperatorModule, pools_globally
from r2r_kernels.reference import NAFBlockParams

_TOLERANCE = 1e-6  # some norms compute in float32 whatever they are given


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


class Swapped(nn.Module):
    """Stands in for `original`, and shares its parameters, buffers and submodules."""

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "original", original)  # no submodule: its names are this module's own
        self._parameters, self._buffers, self._modules = original._parameters, original._buffers, original._modules
        self.training = original.training

    def restored(self) -> nn.Module:
        self.original.training = self.training
        return self.original


class SwappedLayerNorm2d(Swapped):
    """A LayerNorm over channels on the fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm_2d(x, self.weight, self.bias, _eps(self.original))  # type: ignore[arg-type]


class SwappedSimpleGate(Swapped):
    """A SimpleGate on the fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.simple_gate(x)


class SwappedNAFBlock(Swapped):
    """A NAF block on the fused operator, with global or with local attention (TLC). Where dropout is at work, or the
    attention's pool was replaced after the swap, the original's own forward."""

    params = NAFBlock.params

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        object.__setattr__(self, "proven", _pool(original))

    def forward(self, x: Tensor) -> Tensor:
        pool = _pool(self)
        dropping = self.training and any(dropout.p > 0 for dropout in _dropouts(self))
        window = _window(pool) if pool is self.proven else None
        if dropping or (window is None and not pools_globally(pool)):
            return self.restored()(x)
        return functional.naf_block(x, self.params(), _eps(self.norm1), window)  # type: ignore[arg-type, misc]


def _pool(block: nn.Module) -> nn.Module | None:
    return block.get_submodule("sca")._modules.get("0")


def _window(pool: nn.Module | None) -> tuple[int, int] | None:
    """The window of NAFNet's local pool, which knows it once it has seen an image, or of one alike."""
    size = getattr(pool, "kernel_size", None)
    known = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)
    return (size[0], size[1]) if known else None  # type: ignore[index]


def _dropouts(module: nn.Module) -> Iterator[nn.modules.dropout._DropoutNd]:
    return (m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd))


def _eps(norm: nn.Module) -> float:
    return getattr(norm, "eps", 1e-6)


def _path(name: str) -> str:
    """Where a NAF block keeps the parameter that NAFBlockParams calls `name`."""
    if name in ("beta", "gamma"):
        return name
    module, _, leaf = name.rpartition("_")
    return f"sca.1.{leaf}" if module == "sca" else f"{module}.{leaf}"


def _candidate(module: nn.Module) -> type[Swapped] | None:
    """Which operator the module looks like, by the names of its parameters; nothing of PyTorch's own is one."""
    if type(module).__module__.startswith("torch.") or isinstance(module, Swapped):
        return None
    if isinstance(module, OperatorModule) and not module.eager:
        return None
    names = {name for name, _ in module.named_parameters()}
    if names == {_path(name) for name in NAFBlockParams._fields}:
        return SwappedNAFBlock
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    if names == {"weight", "bias"} and "norm" in type(module).__name__.lower():
        return SwappedLayerNorm2d
    return SwappedSimpleGate if not names and "gate" in type(module).__name__.lower() else None


def _misfit(module: nn.Module, kind: type[Swapped]) -> str | None:
    """What, by its structure, keeps the module from being what it looks like."""
    for part in module.modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(hooks):
            return "it has hooks"
    parameters = dict(module.named_parameters())
    if kind is SwappedLayerNorm2d:
        shapes = {tuple(p.shape) for p in parameters.values()}
        return None if len(shapes) == 1 and len(next(iter(shapes))) == 1 else "weight and bias are not both [C]"
    if kind is SwappedNAFBlock:
        wanted = functional.naf_block_shapes(parameters["beta"].numel())
        for name, shape in zip(map(_path, NAFBlockParams._fields), wanted, strict=True):
            if parameters[name].shape != shape:
                return f"{name} is {list(parameters[name].shape)}, not {list(shape)}"
        pool = _pool(module)
        if not pools_globally(pool):
            return _pool_misfit(pool)
    return None


def _pool_misfit(pool: nn.Module | None) -> str | None:
    """What keeps a pool from being the mean over its window, on images that are larger along either axis."""
    window = _window(pool)
    if pool is None or window is None:
        return "its attention pools neither with AdaptiveAvgPool2d(1) nor over a window that is known (kernel_size)"
    if getattr(pool, "fast_imp", False):
        return "its attention pools with TLC's approximation (fast_imp), not with the local mean"
    pool = copy.deepcopy(pool)
    random = torch.Generator().manual_seed(0)
    for size in ((window[0] + 6, 3), (3, window[1] + 5)):
        x = torch.rand((1, 2, *size), generator=random, dtype=torch.float64)
        try:
            agrees = torch.allclose(pool(x), functional.local_mean_2d(x, window), rtol=_TOLERANCE, atol=_TOLERANCE)
        except Exception as error:
            return f"its attention's pool could not be tried: {_first_line(error)}"
        if not agrees:
            return f"its attention's pool is not the mean over windows of {window[0]} x {window[1]}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _disagreement(module: nn.Module, kind: type[Swapped]) -> str | None:
    """What a copy with random parameters answers otherwise than the operator, if anything."""
    try:
        original = copy.deepcopy(module).to("cpu", torch.float64)
        for dropout in _dropouts(original):
            dropout.p = 0.0
        if kind is SwappedNAFBlock and not pools_globally(_pool(original)):
            _pool(original).kernel_size = [4, 3]  # type: ignore[union-attr]  # less than the image below
        random = torch.Generator().manual_seed(0)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for parameter in original.parameters():
                scale = max(1, parameter[0].numel()) ** -0.5
                parameter.copy_((torch.rand(parameter.shape, generator=random, dtype=torch.float64) - 0.3) * scale)
            channels = next((p.numel() for name, p in original.named_parameters() if name in ("beta", "weight")), 6)
            swapped = kind(original)
            # Small values, so that another eps shows.
            x = 0.1 * torch.randn((2, channels, 9, 7), generator=random, dtype=torch.float64)
            for training in (True, False):
                wanted, got = original.train(training)(x.clone()), swapped.train(training)(x)
                if not isinstance(wanted, Tensor) or wanted.shape != got.shape:
                    return "it answers another shape"
                if not torch.allclose(got, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                    return f"its answers differ by {(got - wanted).abs().max():.1e}"
    except Exception as error:
        return f"it could not be tried: {_first_line(error)}"
    return None


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Parent, attribute, full name and module, parents first; what was swapped is not entered."""
    for attribute, child in list(module._modules.items()):
        if child is not None:
            yield module, attribute, prefix + attribute, child
            if not isinstance(module._modules[attribute], Swapped):
                yield from _children(child, f"{prefix}{attribute}.")


def accelerate(model: nn.Module) -> Swaps:
    """Swap the NAF blocks, and the LayerNorm2d and SimpleGate outside them, for the fused operators, in place.

    Works for NAFNet, its variant with local attention (TLC) and what descends from them. Print what it returns to see
    what was swapped and what was left alone, and why. Dropout keeps its meaning. Call it before compiling the model.
    """
    swaps = Swaps()
    outcomes: dict[nn.Module, Swapped | str] = {}
    kind = _candidate(model)
    if kind is not None:
        swaps.left["(the model itself)"] = "only what is inside a model can be swapped in place"
    for parent, attribute, name, module in _children(model):
        kind = _candidate(module)
        if kind is None:
            continue
        if module not in outcomes:
            outcomes[module] = _misfit(module, kind) or _disagreement(module, kind) or kind(module)
        outcome = outcomes[module]
        if isinstance(outcome, Swapped):
            parent._modules[attribute] = outcome
            swaps.swapped[name] = kind.__name__.removeprefix("Swapped")
        else:
            swaps.left[name] = outcome
    return swaps


def decelerate(model: nn.Module) -> list[str]:
    """Put every module that `accelerate` swapped back, the same objects; returns their names."""
    names = []
    for parent, attribute, name, module in _children(model):
        if isinstance(module, Swapped):
            parent._modules[attribute] = module.restored()
            names.append(name)
    return names
