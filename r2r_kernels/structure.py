"""What a module is made of beside its tensors, and whether it still is.

A fused module computes from the tensors of its parts what their classes, attributes and hooks said when it was proven.
`Structure` records that, `Watch` asks before each call whether it still holds, in a microsecond or two.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from r2r_kernels import extension

MARK = "_fused"  # the attribute in which a fused module keeps what it needs
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, type(None))
_INTERNAL = {*vars(nn.Module()), "_is_replica", "_former_parameters", MARK}
_WRAPPERS = ("__composable_api_state_key_", "_is_fsdp_", "_fsdp_")  # what fully_shard and its like put on a module
_F = TypeVar("_F", bound=Callable[..., Any])
_GLOBAL_HOOKS = tuple(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS)


def constant_when_compiled(function: _F) -> _F:
    """As `torch.compiler.assume_constant_result`, but without its import of torch._dynamo: a second at each start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module was made of; a fused module's is derived from it."""
    return getattr(type(module), "_original_class", type(module))


def tensors(part: nn.Module) -> dict[str, Tensor | None]:
    """Parameters and buffers of the module itself; those of a replica (DataParallel) are plain attributes."""
    return {**part._parameters, **part._buffers, **part.__dict__.get("_former_parameters", {})}


def parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules inside with their names, itself first; one that is held twice comes twice."""
    return module.named_modules(remove_duplicate=False)


def _tells(name: Any) -> bool:
    """Whether an attribute of that name may decide what a module answers."""
    return isinstance(name, str) and name not in _INTERNAL and not name.startswith(_WRAPPERS)


class Part(NamedTuple):
    """A module without its values: `tensors` tells names, and whether each is there."""

    kind: type
    forward: Any
    attributes: dict[str, Any]
    tensors: dict[str, bool]
    hooked: bool

    @classmethod
    def of(cls, module: nn.Module) -> Part:
        own, kind = tensors(module), own_class(module)
        attributes = {name: value for name, value in vars(module).items() if _tells(name) and name not in own}
        hooked = any(getattr(module, name) for name in _HOOKS)
        return cls(kind, kind.forward, attributes, {n: t is not None for n, t in own.items()}, hooked)

    def difference(self, other: Part, free: frozenset[str] = frozenset()) -> str | None:
        """What of `other` is not as here, but for the attributes in `free`."""
        if self.kind is not other.kind:
            return f"is a {other.kind.__name__}, not a {self.kind.__name__}"
        if self.forward is not other.forward:
            return "has another forward"
        if other.hooked and not self.hooked:
            return "has hooks"
        for name in sorted((self.attributes.keys() | other.attributes.keys()) - free):
            if name not in self.attributes or name not in other.attributes:
                return f"has{'' if name in other.attributes else ' no'} {name}"
            if not alike(self.attributes[name], other.attributes[name]):
                return f"has another {name}"
        return None if self.tensors == other.tensors else "has other parameters or buffers"


def alike(one: Any, other: Any, depth: int = 8) -> bool:
    """Whether two attributes mean the same. Objects that are not known to be plain values are alike by their own
    attributes, functions and classes where they are the same."""
    if one is other:
        return True
    if type(one) is not type(other) or not depth or isinstance(one, Tensor):
        return False
    if isinstance(one, _PLAIN):
        return one == other
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[k], other[k], depth - 1) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(alike(a, b, depth - 1) for a, b in zip(one, other, strict=True))
    if isinstance(one, (set, frozenset)):
        return one == other
    if isinstance(one, types.MethodType):
        return one.__func__ is other.__func__ and alike(one.__self__, other.__self__, depth - 1)
    if isinstance(one, (nn.Module, types.FunctionType, types.BuiltinFunctionType, type)) or not hasattr(
        one, "__dict__"
    ):
        return False
    return alike(vars(one), vars(other), depth - 1)


class Structure(NamedTuple):
    """All parts of a module by name."""

    parts: dict[str, Part]

    @classmethod
    def of(cls, module: nn.Module) -> Structure:
        return cls({name: Part.of(part) for name, part in parts(module)})

    def difference(
        self, module: nn.Module, free: Mapping[str, frozenset[str]] | None = None, own: bool = True
    ) -> str | None:
        """What is not in `module` as it was here, in words; None where all is. `free` names attributes of parts that
        may differ; own=False leaves out the module itself. Its hooks run around its forward and are none of it."""
        now = Structure.of(module)
        for name in {**self.parts, **now.parts}:
            if not name and not own:
                continue
            if name not in now.parts or name not in self.parts:
                return f"{name} was {'added' if name in now.parts else 'removed'}"
            part = now.parts[name] if name else now.parts[name]._replace(hooked=False)
            if found := self.parts[name].difference(part, (free or {}).get(name, frozenset())):
                return f"{name or 'it'} {found}"
        return None

    def hooked(self) -> str | None:
        """The first part inside that has hooks."""
        return next((name for name, part in self.parts.items() if name and part.hooked), None)


@functools.cache
def _compiled() -> Any:
    module = extension.module()
    return getattr(module, "unchanged", _unchanged)


def _unchanged(
    objects: tuple[Any, ...],
    kinds: tuple[type, ...],
    dicts: tuple[dict[Any, Any] | list[Any], ...],
    snapshots: tuple[tuple[Any, ...], ...],
    classes: tuple[Any, ...],
    forwards: tuple[Any, ...],
) -> bool:
    """As the extension's `unchanged`, in Python."""
    if tuple(map(type, objects)) != kinds or tuple(c.forward for c in classes) != forwards:
        return False
    return all(map(_same, dicts, snapshots))


def _snapshot(now: dict[Any, Any] | list[Any]) -> tuple[Any, ...]:
    """What the dict or list holds: (key, value, key, value, ...), or the items."""
    return tuple(thing for item in now.items() for thing in item) if isinstance(now, dict) else tuple(now)


def _same(now: dict[Any, Any] | list[Any], snapshot: tuple[Any, ...]) -> bool:
    found = _snapshot(now)
    return len(found) == len(snapshot) and all(map(operator.is_, found, snapshot))


def _contents(value: Any, depth: int = 8) -> Iterator[dict[Any, Any] | list[Any]]:
    """The dicts and lists in an attribute that may change while it stays the same object."""
    if not depth or isinstance(
        value, (*_PLAIN, Tensor, nn.Module, types.FunctionType, types.BuiltinFunctionType, type)
    ):
        return
    if isinstance(value, (dict, list)):
        yield value
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _contents(item, depth - 1)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _contents(item, depth - 1)
    elif hasattr(value, "__dict__"):
        yield vars(value)
        yield from _contents(vars(value), depth - 1)


class Watch:
    """Whether a module's parts are the objects that they are now, with the same attributes and hooks.

    Parameters are none of it: they are looked up at each call, as optimizers, casts and loading replace them.
    """

    def __init__(self, module: nn.Module) -> None:
        inside = list(parts(module))
        objects = tuple(part for name, part in inside if name)
        contents = (
            content
            for _, part in inside
            for name, value in vars(part).items()
            if _tells(name)
            for content in _contents(value)
        )
        modules = (part._modules for _, part in inside if part._modules)
        hooks = (vars(part)[name] for part in objects for name in _HOOKS)
        dicts = (vars(module), *map(vars, objects), *modules, *hooks, *_GLOBAL_HOOKS, *contents)
        classes = tuple(dict.fromkeys(own_class(part) for _, part in inside))
        self.holds: Callable[[], bool] = functools.partial(
            _compiled(),
            *(objects, tuple(map(type, objects))),
            *(dicts, tuple(map(_snapshot, dicts))),
            *(classes, tuple(kind.forward for kind in classes)),
        )


class Sights:
    """What was found out about a module when it was looked at, for as long as it stays so; once for each mode.

    `own` is the module's __dict__. A copy of the module, or its replica (DataParallel), gets sights of its own.
    """

    def __init__(self, own: dict[str, Any] | None = None) -> None:
        self.own = own
        self._kept: dict[bool, tuple[Watch, Any]] = {}

    def see(self, module: nn.Module, look: Callable[[nn.Module], Any]) -> Any:
        """The answer of look(module), now or of before; None while there are hooks on all modules."""
        kept = self._kept.get(module.training)
        if kept is not None and kept[0].holds():
            return kept[1]
        found = None if any(_GLOBAL_HOOKS) else look(module)
        self._kept[module.training] = Watch(module), found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Sights:
        return Sights()

    def __reduce__(self) -> Any:
        return Sights, ()


def modes_fit(module: nn.Module, dropouts: Container[str], pools: Container[str] = ()) -> bool:
    """Whether none of these dropouts is at work, and all modules inside that are not PyTorch's are in the mode of the
    whole; the pools, which are alike in both, may be in another (NAFNetLocal makes them so)."""
    for name, part in parts(module):
        if isinstance(part, nn.modules.dropout._DropoutNd):
            if name in dropouts and part.training and part.p > 0:
                return False
        elif (
            part.training != module.training
            and name not in pools
            and not own_class(part).__module__.startswith("torch.nn.")
        ):
            return False
    return True


def homes(module: nn.Module, paths: Iterable[str]) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors of these names are kept, each as a dict and a key."""
    inside = dict(parts(module))
    found = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        part = inside[owner]
        kept = (part._parameters, part._buffers, part.__dict__.get("_former_parameters", {}))
        found.append((next(home for home in kept if name in home), name))
    return found
