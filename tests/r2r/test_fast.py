"""The fast model against the eager one: answers, all gradients, mixed precision, memory, tracing, convergence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from r2r import R2R, TrainingOutput, fast
from r2r.losses import LossWeights, restoration_loss
from r2r_kernels.nn import NAFBlock
from tests.conftest import TINY, fill_randomly

TASKS = ("denoise", "derain", "dehaze")
Batch = tuple[Tensor, Tensor, Tensor]


def pair(**changes: Any) -> tuple[R2R, fast.R2R]:
    """An eager and a fast model with the same weights and bank, in training, that fill the same slots."""
    torch.manual_seed(0)
    eager = R2R(tasks=TASKS, **{**TINY, **changes})
    fill_randomly(eager)
    quick = fast.R2R(**eager.config)
    quick.load_state_dict(eager.state_dict())
    for model in (eager, quick):
        assert model.amalgamator is not None
        model.amalgamator.shuffle = False
    return eager.train(), quick.train()


def batch(number: int = 6, size: int = 32, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    hq = torch.rand(number, 3, size, size, generator=generator)
    lq = (hq + 0.1 * torch.randn(hq.shape, generator=generator)).clamp(0, 1)
    return lq, hq, torch.arange(number) % len(TASKS)


def loss_of(
    model: Callable[..., TrainingOutput], data: Batch, stage: int = 0, weights: LossWeights | None = None
) -> Tensor:
    """The loss of half of the batch on the bank that the other half builds."""
    lq, hq, labels = data
    half = len(lq) // 2
    output = model(lq[:half], labels[:half], reference=(lq[half:], hq[half:], labels[half:]), stage=stage)
    return restoration_loss(output, hq[:half], labels[:half], labels[half:], weights or LossWeights())["total"]


def gradients(model: R2R, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("changes", [{}, {"mixtures": True}, {"similarity": "published", "gate_kernel": 3}])
@pytest.mark.parametrize("stage", [0, 1])
def test_answers_and_all_gradients_are_the_eager_models(changes: dict[str, Any], stage: int) -> None:
    eager, quick = (model.double() for model in pair(**changes))
    lq, hq, labels = batch()
    data = (lq.double(), hq.double(), torch.eye(len(TASKS))[labels] if changes.get("mixtures") else labels)
    wanted, got = loss_of(eager, data, stage), loss_of(quick, data, stage)
    torch.testing.assert_close(got, wanted)
    truth = gradients(eager, wanted)
    for name, gradient in gradients(quick, got).items():
        torch.testing.assert_close(gradient, truth[name])

    # In float32, on the kernels: as near to float64 as the eager model.
    single = (lq, hq, data[2].float() if changes.get("mixtures") else labels)
    plain, native = (gradients(model, loss_of(model, single, stage)) for model in pair(**changes))
    largest = max(gradient.norm() for gradient in truth.values())
    for name, gradient in native.items():
        if truth[name].norm() < 1e-12 * largest:  # BatchNorm takes the bias before it away: all there is, is rounding
            assert gradient.norm() < 1e-4 * largest, name
        else:
            assert distance(gradient, truth[name]) <= max(1e-4, 2 * distance(plain[name], truth[name])), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype) -> None:
    eager, _ = pair()
    truth = gradients(eager, loss_of(eager, batch()))
    errors = []
    for model in pair():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, batch())
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        scaler.update()
        assert not scaler.is_enabled() or scaler.get_scale() == 2.0**10  # no overflow, no step left out
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        errors.append(distance(found, torch.cat([g.flatten() for g in truth.values()])))
    assert errors[1] <= max(2 * errors[0], 1e-3)
    assert errors[1] < 0.2


def test_a_training_step_never_waits_for_the_device() -> None:
    """On the meta device, which has shapes and no values, whatever reads a value fails."""
    for stage, mixtures in ((0, False), (1, False), (0, True), (1, True)):
        _, model = pair(mixtures=mixtures)
        model.to("meta")
        lq, hq, labels = (x.to("meta") for x in batch())
        if mixtures:
            labels = torch.empty(len(lq), len(TASKS), device="meta")
        loss_of(model, (lq, hq, labels), stage).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        torch.optim.Adam(model.parameters()).step()
        assert all(p.grad is not None for p in model.parameters())
        model(lq)
    with pytest.raises(RuntimeError, match="meta"):
        bool(lq.sum() > 0)


def saved_bytes(model: R2R, data: Batch) -> int:
    """Of the tensors that a forward pass keeps for the backward, without parameters and buffers, each storage once."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *data)}
    kept: dict[int, int] = {}
    alive = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of(model, data)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_take_at_most_half_of_the_eager_models_memory(dtype: torch.dtype) -> None:
    sizes = []
    for model in pair(width=16, encoder_blocks=(1, 1, 1, 4)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            sizes.append(saved_bytes(model, batch(size=64)))
    assert 0 < sizes[1] <= sizes[0] / 2


def test_a_training_step_compiles_into_one_graph() -> None:
    eager, quick = pair()
    wanted = gradients(eager, loss_of(eager, batch()))
    step = torch.compile(lambda data: loss_of(quick, data), fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(quick, step(batch())).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4)
    assert quick.bank.counts.tolist() == [9, 9, 9]


class Checkpointed(torch.nn.Module):
    def __init__(self, block: NAFBlock, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(use_reentrant: bool) -> None:
    _, quick = pair()
    wanted = list(gradients(quick, loss_of(quick, batch())).values())
    _, quick = pair()
    parameters = list(quick.parameters())
    for name, block in list(quick.named_modules()):
        if isinstance(block, NAFBlock):
            quick.set_submodule(name, Checkpointed(block, use_reentrant))
    loss_of(quick, batch()).backward()  # reentrant checkpointing knows no torch.autograd.grad
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_learn_the_same(dtype: torch.dtype) -> None:
    """100 steps from the same start on the same batches, through both stages: the mean loss of the last 20 steps is
    well below that of the first, and within 3 % of the eager model's."""
    batches = [batch(number=4, size=16, seed=index) for index in range(10)]
    ends = []
    for model in pair(encoder_blocks=(1, 1), decoder_blocks=(1, 1), memory_blocks=(1, 1), bank_size=4):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for step in range(100):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = loss_of(model, batches[step % len(batches)], stage=int(step >= 50))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        ends.append(sum(losses[-20:]) / 20)
        assert ends[-1] < 0.7 * sum(losses[:10]) / 10
    assert ends[1] == pytest.approx(ends[0], rel=0.03)


def test_compiles_and_exports_with_dynamic_sizes() -> None:
    quick = pair()[1].eval()
    size = torch.export.Dim.DYNAMIC
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            quick, (torch.rand(2, 3, 40, 56),), dynamic_shapes=({0: size, 2: size, 3: size},)
        ).module()
        twin = copy.deepcopy(quick)
        twin.bank._empty = True  # as where the bank was filled without a file, and nothing has asked yet
        compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
        for number, shape in enumerate(((2, 3, 40, 56), (1, 3, 33, 70), (3, 3, 64, 48), (1, 3, 5, 16))):
            lq = torch.rand(shape)
            torch.testing.assert_close(program(lq), quick(lq))
            known = number > 1  # PyTorch makes a graph for a batch of 1, and one for larger ones
            with torch.compiler.set_stance("fail_on_recompile" if known else "default"):
                torch.testing.assert_close(compiled(lq), quick(lq))
        twin.bank.counts.zero_()
        with pytest.raises(RuntimeError, match="the bank is empty"):
            compiled(lq)


def test_float16_is_right_on_large_activations() -> None:
    """Features of +-200, whose squares overflow float16, come through as exactly as float16 allows."""
    _, quick = pair()
    quick.eval()
    with torch.no_grad():
        quick.intro.weight.mul_(200 / quick.intro(torch.rand(1, 3, 32, 32)).abs().max())
    lq = torch.rand(2, 3, 40, 24)
    wanted = copy.deepcopy(quick).double()(lq.double())
    assert quick.intro(lq).abs().max() > 100
    restored = quick.freeze(torch.float16)(lq)
    assert distance(restored - lq, wanted - lq) < 1e-2
