"""Watching whether a module stays what it is, in C++ and in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from r2r_kernels import extension, structure
from r2r_kernels.structure import Structure, Watch

CHECKS = [
    pytest.param(structure._unchanged, id="python"),
    pytest.param(
        getattr(extension.module(), "unchanged", None),
        id="extension",
        marks=pytest.mark.skipif(extension.module() is None, reason=f"no extension: {extension.reason()}"),
    ),
]


class Options:
    def __init__(self) -> None:
        self.values = {"scale": [1.0, 2.0]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inside = nn.Conv2d(2, 2, 1), nn.Sequential(nn.Dropout(0.1), nn.BatchNorm2d(2))
        self.sizes, self.options = [1, 2], Options()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(self.conv(x))


CHANGES: list[tuple[str, Callable[[Any], Any]]] = [
    ("a part replaced", lambda m: setattr(m, "conv", nn.Conv2d(2, 2, 1))),
    ("a part added", lambda m: m.inside.append(nn.Identity())),
    ("a part removed", lambda m: m.inside.pop(0)),
    ("an attribute set", lambda m: setattr(m.conv, "padding_mode", "circular")),
    ("an attribute added", lambda m: setattr(m, "skip", True)),
    ("a list changed", lambda m: m.sizes.append(3)),
    ("an item replaced", lambda m: m.sizes.__setitem__(0, 5)),
    ("an object's list changed", lambda m: m.options.values["scale"].append(3.0)),
    ("a forward patched", lambda m: setattr(m.conv, "forward", lambda x: x)),
    ("a class", lambda m: setattr(m.conv, "__class__", type("Other", (nn.Conv2d,), {}))),
    ("a hook", lambda m: m.conv.register_forward_hook(lambda *_: None)),
    ("a hook before", lambda m: m.inside[1].register_forward_pre_hook(lambda *_: None)),
    ("a backward hook", lambda m: m.conv.register_full_backward_hook(lambda *_: None)),
    ("a mode", lambda m: m.inside[0].eval()),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("change", [c for _, c in CHANGES], ids=[name for name, _ in CHANGES])
def test_changes_are_noticed(
    change: Callable[[Any], Any], check: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "_compiled", lambda: check)
    model = Model()
    watch = Watch(model)
    assert watch.holds()
    change(model)
    assert not watch.holds()


@pytest.mark.parametrize("check", CHECKS)
def test_what_runs_outside_and_what_training_does_is_no_change(
    check: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "_compiled", lambda: check)
    model = Model()
    watch = Watch(model)
    model.register_forward_hook(lambda *_: None)
    model(torch.rand(1, 2, 3, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.load_state_dict(Model().state_dict(), assign=True)
    model.to(torch.bfloat16)
    assert watch.holds()


@pytest.mark.parametrize("check", CHECKS)
def test_a_forward_patched_in_the_class_and_hooks_on_all_modules_are_noticed(
    check: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "_compiled", lambda: check)
    watch = Watch(Model())
    with monkeypatch.context() as patched:
        patched.setattr(nn.Dropout, "forward", lambda self, x: x)
        assert not watch.holds()
    assert watch.holds()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not watch.holds()
    handle.remove()
    assert watch.holds()


def test_structures_are_equal_by_what_attributes_mean() -> None:
    one, other = Model(), Model()
    assert Structure.of(one).difference(other) is None
    other.options.values["scale"][0] = 3.0
    assert Structure.of(one).difference(other) == "it has another options"
