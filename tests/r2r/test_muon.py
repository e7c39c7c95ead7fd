"""Muon: orthogonal steps for matrices, PyTorch's Adam for the rest, and a state that goes on exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from r2r.muon import Muon, is_matrix, orthogonal


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),  # Adam: few inputs
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),  # Adam: depthwise
        nn.Conv2d(32, 64, 2, stride=2),
        nn.Conv2d(64, 64, 3, padding=1),  # Adam: a wide kernel
        nn.Conv2d(64, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, target = (torch.rand(*shape, generator=generator) for shape in ((4, 3, 16, 16), (4, 10)))
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 40), (2, 48, 8)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_out_the_values(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1, 20, left.shape[2], dtype=torch.float64)
    turned = left.mT @ orthogonal((left * values @ right).float()).double() @ right.mT
    diagonal = turned.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.3
    torch.testing.assert_close(turned, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 8, 8)), torch.zeros(2, 8, 8))


def test_which_parameters_are_matrices() -> None:
    assert [name for name, p in network().named_parameters() if is_matrix(p)] == [
        "1.weight", "3.weight", "5.weight", "8.weight",
    ]  # fmt: skip


def test_matrices_step_as_with_the_muon_of_pytorch() -> None:
    torch.manual_seed(2)
    ours, theirs = (
        nn.ParameterList([nn.Parameter(torch.zeros(24, 16)), nn.Parameter(torch.zeros(16, 40))]) for _ in "ab"
    )
    own = Muon(ours.parameters(), lr=1.0)
    published = torch.optim.Muon(theirs.parameters(), lr=1.0, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        own.step()
        published.step()
    for a, b in zip(ours, theirs, strict=True):  # theirs computes in bfloat16
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_convolution_steps_as_its_matrix_does() -> None:
    torch.manual_seed(3)
    matrix = nn.Parameter(torch.randn(16, 32))
    kernel = nn.Parameter(matrix.detach().clone().view(16, 8, 2, 2).to(memory_format=torch.channels_last))
    for parameter in (matrix, kernel):
        parameter.grad = torch.arange(512.0).sin().view(parameter.shape)
        Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().reshape(16, 32), matrix.detach())


def test_the_rest_steps_as_with_adam() -> None:
    ours = network()
    theirs = copy.deepcopy(ours)
    rest = [p for p in theirs.parameters() if not is_matrix(p)]
    optimizers = [(ours, Muon(ours.parameters(), lr=1e-3)), (theirs, torch.optim.Adam(rest, lr=1e-3, fused=True))]
    for model, optimizer in optimizers:
        for step in range(3):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.arange(1.0 * parameter.numel()).add(index + step).cos().view_as(parameter)
            optimizer.step()
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other) is not is_matrix(own), name


def test_the_loss_falls() -> None:
    model = network()
    losses = train(model, Muon(model.parameters(), lr=3e-3), range(60))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_its_state_goes_on_bit_for_bit() -> None:
    whole, halves = network(), network()
    train(whole, Muon(whole.parameters(), lr=1e-3), range(6))
    first = Muon(halves.parameters(), lr=1e-3)
    train(halves, first, range(3))
    second = Muon(halves.parameters(), lr=1e-3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(halves, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_parameters_without_a_gradient_stay() -> None:
    model = network()
    before = copy.deepcopy(model)
    weight = dict(model.named_parameters())["1.weight"]
    weight.grad = torch.ones_like(weight)
    Muon(model.parameters(), lr=0.1).step()
    changed = [
        name for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True) if not a.equal(b)
    ]
    assert changed == ["1.weight"]
