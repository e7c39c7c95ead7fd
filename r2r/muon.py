"""Muon: Adam for all but the weights that are matrices, whose steps are made orthogonal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

# A polynomial x (a + b x^2 + c x^4) that brings singular values near 1, applied five times (Jordan 2024).
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
STEPS = 5
SMALLEST, LARGEST_KERNEL = 8, 4


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon takes it: Linear weights, and those of dense convolutions with kernels of at most 2 x 2.

    Larger kernels are left to Adam, as their matrices are wide and making them orthogonal takes long.
    """
    kernel = math.prod(parameter.shape[2:])
    return parameter.ndim >= 2 and min(parameter.shape[:2]) >= SMALLEST and kernel <= LARGEST_KERNEL


def orthogonal(matrices: Tensor) -> Tensor:
    """[B, M, N] -> nearly orthogonal ones with the same singular vectors: singular values of about 0.7 to 1.2.

    In bfloat16 on a GPU, else in float32.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = POLYNOMIAL
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (K. Jordan, 2024) for matrices, Adam for all other parameters.

    lr is Adam's: an orthogonal step is scaled by 0.2 sqrt(max(M, N)), which gives it the size of one of Adam's (Liu et
    al., arXiv 2502.16982, equation 4). betas: Adam's. momentum: Nesterov's, of the matrices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
        every = list(parameters)
        kinds = [[p for p in every if is_matrix(p) is matrices] for matrices in (True, False)]
        groups: list[dict[str, Any]] = [
            {"params": params, "orthogonal": matrices}
            for matrices, params in zip((True, False), kinds, strict=True)
            if params
        ]
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is needed here
        """One step for all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self._step_matrices(params, group["lr"], group["momentum"])
            elif params:
                self._step_adam(params, group["lr"], group["betas"])

    def _step_matrices(self, params: list[Tensor], lr: float, momentum: float) -> None:
        alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param in params:
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            assert param.grad is not None
            state["momentum"].lerp_(param.grad, 1 - momentum)
            update = param.grad.lerp(state["momentum"], momentum).flatten(1)
            alike[*update.shape, update.dtype, update.device].append((param, update))
        for (rows, columns, *_), members in alike.items():
            updates = orthogonal(torch.stack([update for _, update in members]))
            for (param, _), update in zip(members, updates, strict=True):
                param.add_(update.view_as(param), alpha=-lr * 0.2 * math.sqrt(max(rows, columns)))

    def _step_adam(self, params: list[Tensor], lr: float, betas: tuple[float, float]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        states = [self.state[param] for param in params]
        adam(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
