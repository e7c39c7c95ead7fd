"""A swapped module is the module: the same answers whatever is done to it, with it and by other tools afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import r2r_kernels
from r2r_kernels import functional
from r2r_kernels.nn import NAFBlock as OwnBlock
from r2r_kernels.swap import Swapped
from tests.r2r_kernels.adapters import Lora
from tests.r2r_kernels.test_swap import LayerNorm2d, NAFBlock, SimpleGate


def lora(block: Any) -> None:
    torch.manual_seed(1)
    block.conv1 = Lora(block.conv1)


def old_weight_norm(block: Any) -> None:
    nn.utils.weight_norm(block.conv1)
    with torch.no_grad():
        block.conv1.weight_g.mul_(1.5)


def new_weight_norm(block: Any) -> None:
    parametrizations.weight_norm(block.conv1)
    with torch.no_grad():
        block.conv1.parametrizations.weight.original0.mul_(1.5)


def spectral_norm(block: Any) -> None:
    torch.manual_seed(1)
    nn.utils.spectral_norm(block.conv4)


def dilated(block: Any) -> None:
    torch.manual_seed(1)
    block.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)


def patched(block: Any) -> None:
    own = block.conv5.forward
    block.conv5.forward = lambda x: 2 * own(x)


def dropout_at_work(block: Any) -> None:
    block.dropout1 = nn.Dropout(0.5)  # Monte-Carlo dropout: only its own flag is set
    block.eval()
    block.dropout1.train()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "lora": lora,
    "old weight_norm": old_weight_norm,
    "new weight_norm": new_weight_norm,
    "spectral_norm": spectral_norm,
    "pruning": lambda b: prune.l1_unstructured(b.conv3, "weight", 0.5),
    "dilation": dilated,
    "padding_mode": lambda b: setattr(b.conv2, "padding_mode", "reflect"),
    "another norm": lambda b: setattr(b, "norm1", nn.GroupNorm(2, 4)),
    "no norm": lambda b: setattr(b, "norm2", nn.Identity()),
    "eps": lambda b: setattr(b.norm2, "eps", 1.0),
    "a patched forward": patched,
    "a hook": lambda b: b.conv1.register_forward_hook(lambda _m, _x, y: 2 * y),
    "a hook before": lambda b: b.sca.register_forward_pre_hook(lambda _m, x: (2 * x[0],)),
    "dropout": dropout_at_work,
}


def pair(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """The same model twice, eager and swapped."""
    torch.manual_seed(0)
    eager: Any = nn.Sequential(nn.Conv2d(3, 4, 1), make())
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_()
    swapped = copy.deepcopy(eager)
    assert "1" in r2r_kernels.accelerate(swapped).swapped
    return eager, swapped


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_inside_a_swapped_block_is_obeyed(change: Callable[[Any], Any], called: bool) -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x = torch.rand(1, 3, 7, 6)
    for model in (eager, swapped):
        if called:
            model(x)
        change(model[1])
    answers = []
    for model in (eager, swapped):
        torch.manual_seed(2)
        answers.append(model(x))
        answers[-1].square().sum().backward()
    assert torch.equal(*answers)
    for one, other in zip(eager.parameters(), swapped.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("change", list(CHANGES.values())[:-1], ids=list(CHANGES)[:-1])
def test_what_changes_inside_a_block_of_ours_is_obeyed(change: Callable[[Any], Any], eager: bool, called: bool) -> None:
    torch.manual_seed(0)
    ours, plain = OwnBlock(4, eager), NAFBlock(4)
    with torch.no_grad():
        ours.beta.normal_()
        ours.gamma.normal_()
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(1, 4, 7, 6)
    answers = []
    for block in (ours, plain):
        if called:
            block(x)
        change(block)
        torch.manual_seed(2)
        answers.append(block(x))
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("eager", [False, True])
def test_a_block_of_ours_drops_where_dropout_alone_is_at_work(eager: bool) -> None:
    block = OwnBlock(4, eager, dropout=0.5).eval()
    with torch.no_grad():
        block.beta.fill_(1)
    x = torch.rand(1, 4, 7, 6)
    assert torch.equal(block(x), block(x))
    block.dropout1.train()
    assert not torch.equal(block(x), block(x))
    block.dropout1.p = 0.0
    assert torch.equal(block(x), block(x))


def test_the_operator_answers_again_where_the_change_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, swapped = pair(lambda: NAFBlock(4))
    x, calls, operator = torch.rand(1, 3, 6, 5), [], functional.naf_block

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return operator(*args)

    monkeypatch.setattr(functional, "naf_block", counted)
    swapped(x)
    handle = swapped[1].conv1.register_forward_hook(lambda *_: None)
    swapped(x)
    handle.remove()
    swapped(x)
    assert len(calls) == 2


def test_a_forward_patched_in_the_class_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x = torch.rand(1, 3, 6, 5)
    swapped(x)
    monkeypatch.setattr(NAFBlock, "forward", lambda self, x: 3 * x)
    assert torch.equal(swapped(x), eager(x))


class Extended(NAFBlock):
    skip = False

    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.width = c

    def forward(self, inp: Tensor, shift: Tensor | float | None = None) -> Tensor:
        if self.skip:
            return inp
        y = super().forward(inp)
        return y if shift is None else y + shift

    def extra_loss(self) -> Tensor:
        return self.beta.square().sum()

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_arguments_attributes_methods_and_class_are_the_modules() -> None:
    eager, swapped = pair(lambda: Extended(4))
    h = torch.rand(1, 4, 6, 5)
    one, other = eager[1], swapped[1]
    torch.testing.assert_close(other(h), one(h))
    torch.testing.assert_close(other(h, 1.0), one(h, 1.0))
    torch.testing.assert_close(other(inp=h, shift=h), one(inp=h, shift=h))
    assert isinstance(other, Extended)
    assert type(other).__name__ == "Extended"
    assert repr(other) == repr(one)
    assert other.width == 4
    assert torch.equal(other.extra_loss(), one.extra_loss())
    other.skip = True
    assert torch.equal(other(h), h)


def test_the_state_dict_protocol_is_the_modules() -> None:
    eager, swapped = pair(lambda: Extended(4))
    calls = []
    assert list(swapped.state_dict()) == list(eager.state_dict())
    swapped[1].register_state_dict_post_hook(lambda *_: calls.append("saved"))
    swapped[1].register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    swapped.load_state_dict(swapped.state_dict())
    assert calls == ["saved", "loaded"]


class OldNames(LayerNorm2d):
    """Reads checkpoints of an older version."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "g" in state:
            state[prefix + "weight"] = state.pop(prefix + "g")
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_module_that_reads_old_checkpoints_goes_on_reading_them() -> None:
    model: Any = nn.Sequential(OldNames(3))
    assert r2r_kernels.accelerate(model).swapped
    model.load_state_dict({"0.g": torch.full((3,), 2.0), "0.bias": torch.zeros(3)})
    assert torch.equal(model[0].weight, torch.full((3,), 2.0))


def test_hooks_and_attributes_put_on_it_stay_after_decelerate() -> None:
    _, swapped = pair(lambda: NAFBlock(4))
    block, seen = swapped[1], []
    block.register_forward_hook(lambda *_: seen.append(1))
    block.tag = 5
    swapped(torch.rand(1, 3, 6, 5))
    assert r2r_kernels.decelerate(swapped) == ["1"]
    assert swapped[1] is block
    assert type(block) is NAFBlock
    assert not [name for name in vars(block) if "fused" in name]
    swapped(torch.rand(1, 3, 6, 5))
    assert len(seen) == 2
    assert block.tag == 5


def test_blocks_in_a_plain_list_are_swapped_too() -> None:
    block = NAFBlock(4)
    model = nn.ModuleList([block])
    order = list(model)
    r2r_kernels.accelerate(model)
    assert isinstance(order[0], Swapped)


def replica(module: nn.Module) -> Any:
    """As torch.nn.parallel.replicate makes one, with parameters of zeros."""
    made = module._replicate_for_data_parallel()
    made._former_parameters = {}
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = torch.zeros_like(parameter)
            setattr(made, name, value)
            made._former_parameters[name] = value
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_replica_computes_with_its_own_parameters(dropout: float) -> None:
    _, swapped = pair(lambda: NAFBlock(4, dropout=dropout))
    x = torch.rand(1, 4, 6, 5)
    swapped[1](x)
    copied = replica(swapped[1])
    assert torch.equal(copied(x), x)
    assert not torch.equal(swapped[1](x), x)


def test_copies_and_pickles_are_swapped_and_their_own() -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x = torch.rand(1, 3, 6, 5)
    other: Any
    for other in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert isinstance(other[1], Swapped)
        torch.testing.assert_close(other(x), eager(x))
        with torch.no_grad():
            other.get_parameter("1.beta").zero_()
            other.get_parameter("1.gamma").zero_()
        assert torch.equal(other(x), eager[0](x))
        torch.testing.assert_close(swapped(x), eager(x))
        r2r_kernels.decelerate(other)
        assert type(other[1]) is NAFBlock


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: NAFBlock(4), lambda: LayerNorm2d(4), SimpleGate])
def test_under_autocast_answers_have_the_dtype_and_precision_of_the_modules(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    eager, swapped = pair(make)
    with torch.no_grad():
        x = torch.randn(2, 4, 9, 8)
        wanted = eager[1](x)
        with torch.autocast("cpu", torch.bfloat16):
            one, other = eager[1](x.to(dtype)), swapped[1](x.to(dtype))
    assert one.dtype == other.dtype
    assert (other.float() - wanted).norm() <= 1.1 * (one.float() - wanted).norm() + 1e-5


def test_under_autocast_gradients_are_float32_and_reach_all_parameters() -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x = torch.rand(1, 3, 9, 8)
    wanted = torch.autograd.grad(eager(x).square().sum(), list(eager.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        answer = swapped(x).square().sum()
    got = torch.autograd.grad(answer, list(swapped.parameters()))
    assert all(g.dtype == torch.float32 for g in got)
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one, rtol=0.1, atol=0.1 * float(one.abs().max()))


class CastNorm(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        centred = x.float() - x.float().mean(1, keepdim=True)
        normed = centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def test_norms_of_float32_in_a_model_of_bfloat16_work() -> None:
    class Block(NAFBlock):
        def __init__(self, c: int) -> None:
            super().__init__(c)
            self.norm1, self.norm2 = CastNorm(c), CastNorm(c)

    eager, swapped = pair(lambda: Block(4))
    x = torch.rand(1, 3, 6, 5, dtype=torch.bfloat16)
    for model in (eager, swapped):
        model.bfloat16()
        for norm in (model[1].norm1, model[1].norm2):
            norm.float()
    assert torch.equal(swapped(x), eager(x))


class EpsOfDtype(LayerNorm2d):
    """IR-SDE's: eps depends on what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        centred = x - x.mean(1, keepdim=True)
        normed = centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


def test_an_eps_that_depends_on_the_dtype_is_obeyed() -> None:
    model: Any = nn.Sequential(EpsOfDtype(4))
    swapped = copy.deepcopy(model)
    assert r2r_kernels.accelerate(swapped).swapped
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = 0.03 * torch.randn(1, 4, 6, 5).to(dtype)
        torch.testing.assert_close(swapped.to(dtype)(x), model.to(dtype)(x), rtol=0.05, atol=1e-2)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 3, 4, 5)])
def test_gates_take_input_of_any_rank(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(SimpleGate())
    assert r2r_kernels.accelerate(model).swapped == {"0": "SimpleGate"}
    x = torch.rand(shape)
    assert torch.equal(model(x), SimpleGate()(x))


class NormOfAnyRank(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x.movedim(1, -1), (x.shape[1],), self.weight, self.bias, self.eps)
        return normed.movedim(-1, 1)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 3, 4, 5), (2, 8, 3, 4)])
def test_norms_take_input_of_any_rank(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(NormOfAnyRank(8))
    assert r2r_kernels.accelerate(model).swapped == {"0": "LayerNorm2d"}
    x = torch.rand(shape)
    torch.testing.assert_close(model(x), NormOfAnyRank(8)(x))


# Other tools


def test_transformations_of_functions_give_the_modules_answers() -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x = torch.rand(1, 3, 6, 5)
    one, other = (torch.func.jvp(model, (x,), (x,))[1] for model in (eager, swapped))
    torch.testing.assert_close(other, one)
    torch.testing.assert_close(torch.func.vmap(swapped)(x[None]), torch.func.vmap(eager)(x[None]))

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)

    torch.testing.assert_close(gradients(swapped), gradients(eager))


def test_tracing_scripting_and_symbolic_tracing_work() -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x, other = torch.rand(1, 3, 6, 5), torch.rand(2, 3, 9, 8)
    for tool in (lambda m: torch.jit.trace(m, x), torch.fx.symbolic_trace):
        torch.testing.assert_close(tool(swapped)(other), eager(other))
    gate = nn.Sequential(nn.Conv2d(3, 8, 1), SimpleGate())
    wanted = gate(x)
    r2r_kernels.accelerate(gate)
    torch.testing.assert_close(torch.jit.script(gate)(x), wanted)


def test_exporting_keeps_the_operator_and_the_answers() -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x, other = torch.rand(2, 3, 6, 5), torch.rand(1, 3, 9, 8)
    size = {2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    program = torch.export.export(swapped.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1), **size},))
    assert any("naf_block" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(other), eager(other))


def test_second_derivatives_and_forward_mode_are_refused_by_the_operators() -> None:
    x = torch.rand(1, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(functional.simple_gate(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="r2r_kernels has no second derivatives"):
        (gradient.square().sum() + x.sum()).backward()
    with pytest.raises(NotImplementedError, match="r2r_kernels has no forward-mode derivatives"):
        torch.func.jvp(functional.simple_gate, (x.detach(),), (x.detach(),))


def test_an_input_changed_in_place_is_one_clear_error() -> None:
    _, swapped = pair(lambda: NAFBlock(4))
    total = swapped[0](torch.rand(1, 3, 6, 5))
    swapped[1](total)
    y = swapped[1](total).sum()
    total += 1
    with pytest.raises(RuntimeError, match=r"changed in place after the forward: write y = x \+ z"):
        y.backward()


def test_a_compiled_model_notices_what_changes() -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    compiled = torch.compile(swapped, fullgraph=True, backend="eager")
    x = torch.rand(1, 3, 6, 5)
    torch.testing.assert_close(compiled(x), eager(x))
    for change in (lora, lambda b: setattr(b.norm2, "eps", 1.0), lambda b: setattr(b.conv2, "padding_mode", "reflect")):
        for model in (eager, swapped):
            change(model[1])
        torch.testing.assert_close(compiled(x), eager(x))


def test_parameters_replaced_later_are_taken() -> None:
    eager, swapped = pair(lambda: NAFBlock(4))
    x = torch.rand(1, 3, 6, 5)
    swapped(x)
    for model in (eager, swapped):
        torch.manual_seed(3)
        model[1].conv1.weight = nn.Parameter(torch.randn(8, 4, 1, 1))
        model[1].conv3.bias = None
    torch.testing.assert_close(swapped(x), eager(x))
