"""accelerate and decelerate, on a NAFNet written as the paper describes it, its local variant and look-alikes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2r_kernels
from r2r_kernels import functional
from r2r_kernels.swap import Swapped


class LayerNorm2d(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class SimpleGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b


class NAFBlock(nn.Module):
    def __init__(self, c: int, expand: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        wide = c * expand
        self.conv1, self.conv2 = nn.Conv2d(c, wide, 1), nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.conv3 = nn.Conv2d(wide // 2, c, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide // 2, wide // 2, 1))
        self.sg = SimpleGate()
        self.conv4, self.conv5 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.norm1, self.norm2 = LayerNorm2d(c), LayerNorm2d(c)
        self.dropout1 = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.dropout2 = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.beta, self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1)), nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.sg(self.conv2(self.conv1(self.norm1(x))))
        y = x + self.dropout1(self.conv3(h * self.sca(h))) * self.beta
        return y + self.dropout2(self.conv5(self.sg(self.conv4(self.norm2(y))))) * self.gamma


class NAFNet(nn.Module):
    def __init__(self, width: int = 8, blocks: tuple[int, ...] = (1, 2), block: Any = NAFBlock, **options: Any) -> None:
        super().__init__()
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        c = width
        for count in blocks:
            self.encoders.append(nn.Sequential(*(block(c, **options) for _ in range(count))))
            self.downs.append(nn.Conv2d(c, 2 * c, 2, 2))
            c *= 2
        self.middle_blks = nn.Sequential(block(c, **options))
        for count in reversed(blocks):
            self.ups.append(nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.PixelShuffle(2)))
            c //= 2
            self.decoders.append(nn.Sequential(*(block(c, **options) for _ in range(count))))
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith(("beta", "gamma")):
                    p.normal_(std=0.3)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = self.intro(image), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle_blks(x)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            x = decoder(up(x) + skip)
        return image + self.ending(x)


class LocalPool(nn.Module):
    """A local window's mean in place of the image's, as TLC puts into `sca`, but of a window that nobody can see."""

    def __init__(self, window: int = 32) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return pooled(x, (self.window, self.window))


def pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    mean = F.avg_pool2d(x, [min(k, s) for k, s in zip(size, x.shape[2:], strict=True)], stride=1)
    spare = [s - p for s, p in zip(x.shape[2:], mean.shape[2:], strict=True)]
    return F.pad(mean, [n for s in reversed(spare) for n in (s // 2, (s + 1) // 2)], mode="replicate")


class AvgPool2d(nn.Module):
    """The pool of NAFNet's local variant, by its attributes: the window comes with the first image that it sees."""

    def __init__(self, base_size: int, train_size: tuple[int, ...], fast_imp: bool = False, factor: float = 1) -> None:
        super().__init__()
        self.kernel_size: list[int] | None = None
        self.base_size, self.train_size, self.auto_pad, self.fast_imp = base_size, train_size, True, fast_imp
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size is None:
            pairs = zip(x.shape[2:], self.train_size[2:], strict=True)
            self.kernel_size = [s * self.base_size // t for s, t in pairs]
        if self.kernel_size[0] >= x.shape[2] and self.kernel_size[1] >= x.shape[3]:
            return F.adaptive_avg_pool2d(x, 1)
        return pooled(x, (self.kernel_size[0], self.kernel_size[1])) * self.factor


def local(model: NAFNet, **options: Any) -> NAFNet:
    """As NAFNet's Local_Base.convert: the pools replaced, and an image of the training size seen."""
    size = (1, 3, 16, 16)
    for block in [m for m in model.modules() if isinstance(m, NAFBlock)]:
        block.sca[0] = AvgPool2d(24, size, **options)
    with torch.no_grad():
        model(torch.rand(size))
    return model


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def test_accelerate_keeps_answers_and_names_and_decelerate_undoes_it() -> None:
    model = NAFNet()
    x = torch.rand(1, 3, 24, 20)
    before, state, parameters = modules(model), list(model.state_dict()), list(model.parameters())
    wanted = model(x)
    gradients = torch.autograd.grad(wanted.square().sum(), parameters)
    swaps = r2r_kernels.accelerate(model)
    assert len(swaps.swapped) == 7
    assert set(swaps.swapped.values()) == {"NAFBlock"}
    assert not swaps.left
    assert "swapped 7 NAFBlock" in str(swaps)
    assert isinstance(modules(model)["encoders.1.1"], Swapped)
    assert list(model.state_dict()) == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), parameters), gradients, rtol=1e-3, atol=1e-3
    )
    assert r2r_kernels.accelerate(model).swapped == {}  # once is enough

    model.eval()
    assert len(r2r_kernels.decelerate(model)) == 7
    after = modules(model)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(x), wanted)


def test_a_swapped_model_saves_loads_copies_and_compiles() -> None:
    model, other = NAFNet(), NAFNet()
    r2r_kernels.accelerate(model)
    x = torch.rand(1, 3, 16, 16)
    copied = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x))
    assert not torch.allclose(copied(x), other(x))
    r2r_kernels.decelerate(copied)
    assert not any(isinstance(m, Swapped) for m in copied.modules())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), other(x))
    torch.testing.assert_close(model.double()(x.double()), other.double()(x.double()))


def test_dropout_is_honoured() -> None:
    model = NAFNet(dropout=0.5)
    x = torch.rand(1, 3, 16, 16)
    torch.manual_seed(1)
    wanted, evaluated = model.train()(x), model.eval()(x)
    assert len(r2r_kernels.accelerate(model).swapped) == 7
    torch.manual_seed(1)
    assert torch.equal(model.train()(x), wanted)
    torch.testing.assert_close(model.eval()(x), evaluated)


def test_local_attention_is_swapped() -> None:
    model = local(NAFNet())
    before = modules(model)
    images = [torch.rand(1, 3, *size) for size in ((80, 72), (20, 60), (16, 16))]  # windows of 24, 12 and 6
    wanted = [model(x) for x in images]
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(images[0]).square().sum(), parameters)
    swaps = r2r_kernels.accelerate(model)
    assert list(swaps.swapped.values()) == 7 * ["NAFBlock"]
    assert not swaps.left
    for x, y in zip(images, wanted, strict=True):
        torch.testing.assert_close(model(x), y)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), y)
    got = torch.autograd.grad(model(images[0]).square().sum(), parameters)
    torch.testing.assert_close(got, gradients, rtol=1e-3, atol=1e-3)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images[0]), wanted[0])
    assert len(r2r_kernels.decelerate(model)) == 7
    after = modules(model)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(model(images[0]), wanted[0])


def test_a_swapped_pool_is_obeyed_in_what_it_says_later() -> None:
    model = local(NAFNet())
    r2r_kernels.accelerate(model)
    for name, pool in model.named_modules():
        if name.endswith("sca.0"):
            pool.kernel_size = [5, 7]
    other = copy.deepcopy(model)
    r2r_kernels.decelerate(other)
    x = torch.rand(1, 3, 40, 36)
    torch.testing.assert_close(model(x), other(x))


def test_a_pool_in_another_mode_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, operator = local(NAFNet()).eval(), [], functional.naf_block
    for name, pool in model.named_modules():
        if name.endswith("sca.0"):
            pool.train()  # as NAFNetLocal comes from its constructor
    x = torch.rand(1, 3, 40, 36)
    wanted = model(x)
    r2r_kernels.accelerate(model)

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return operator(*args)

    monkeypatch.setattr(functional, "naf_block", counted)
    torch.testing.assert_close(model(x), wanted)
    assert len(calls) == 7


def test_a_pool_put_in_after_the_swap_is_obeyed() -> None:
    model = local(NAFNet())
    r2r_kernels.accelerate(model)
    pool = AvgPool2d(24, (1, 3, 16, 16), factor=2)
    pool.kernel_size = [6, 6]
    block: Any = model.middle_blks[0]
    block.sca[0] = pool
    other = copy.deepcopy(model)
    r2r_kernels.decelerate(other)
    x = torch.rand(1, 3, 80, 72)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (LocalPool(), "nor over a window that is known"),
        (AvgPool2d(24, (1, 3, 16, 16)), "nor over a window that is known"),  # has not seen an image
        ({"fast_imp": True}, "TLC's approximation"),
        ({"factor": 1.001}, "is not the mean over windows of 6 x 6"),
    ],
)
def test_other_local_attention_keeps_its_blocks_and_swaps_what_is_in_them(pool: Any, reason: str) -> None:
    model = NAFNet() if isinstance(pool, nn.Module) else local(NAFNet(), **pool)
    if isinstance(pool, nn.Module):
        for block in [m for m in model.modules() if isinstance(m, NAFBlock)]:
            block.sca[0] = copy.deepcopy(pool)
    x = torch.rand(1, 3, 80, 72)
    untouched = copy.deepcopy(model)
    swaps = r2r_kernels.accelerate(model)
    assert sorted(swaps.swapped.values()) == 14 * ["LayerNorm2d"] + 7 * ["SimpleGate"]
    assert reason in swaps.left["middle_blks.0"]
    assert isinstance(model.middle_blks[0].norm1, Swapped)
    assert isinstance(model.middle_blks[0].sg, Swapped)
    wanted = untouched(x)
    torch.testing.assert_close(model(x), wanted)
    assert len(r2r_kernels.decelerate(model)) == 21
    assert torch.equal(model(x), wanted)


def test_a_pool_replaced_after_the_swap_is_obeyed() -> None:
    model, x = NAFNet(), torch.rand(1, 3, 80, 72)
    other = copy.deepcopy(model)
    r2r_kernels.accelerate(model)
    for local in (model, other):
        for pooling in [m for name, m in local.named_modules() if name.endswith("sca")]:
            setattr(pooling, "0", LocalPool())
    torch.testing.assert_close(model(x), other(x))


class Scaled(NAFBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


class Conditioned(NAFBlock):
    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if time is None:
            raise RuntimeError("where is the time?")
        return super().forward(x) + time


class Loop(NAFBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 4 else x


class Clamped(NAFBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.sg(self.conv2(self.conv1(self.norm1(x))))
        y = x + (self.conv3(h * self.sca(h)) * self.beta).clamp(-5, 5)
        return y + self.conv5(self.sg(self.conv4(self.norm2(y)))) * self.gamma


class MeanNorm(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * (x - x.mean(1, keepdim=True)) + self.bias[:, None, None]


class ClampedNorm(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-5, 5))


class RowsNorm(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x[:, :, :64]), x[:, :, 64:]), dim=2)


class DetachedNorm(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.movedim(1, -1), (x.shape[1],), self.weight.detach(), self.bias, self.eps)
        return normed.movedim(-1, 1)


class DetachedGate(SimpleGate):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b.detach()


class DetachedAttention(NAFBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.sg(self.conv2(self.conv1(self.norm1(x))))
        y = x + self.conv3(h * self.sca(h.detach())) * self.beta
        return y + self.conv5(self.sg(self.conv4(self.norm2(y)))) * self.gamma


class SigmoidGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b.sigmoid()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Conditioned(4), "its forward cannot be traced: where is the time"),
        (Loop(4), "its forward cannot be traced: symbolically traced variables cannot be used"),
        (MeanNorm(4), "its answers are not those of a LayerNorm over channels"),
        (ClampedNorm(4), "its answers differ by .* on images of 7 x 9"),
        (RowsNorm(4), "its answers differ by .* on images of 66 x 2"),
        (DetachedNorm(4), "its gradient stops before weight"),
        (DetachedGate(), "its gradients differ by .* at its input"),
        (SigmoidGate(), "its computation is not that of a NAF block"),
    ],
)
def test_what_is_not_equal_is_left_alone_and_named(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), module)
    swaps = r2r_kernels.accelerate(model)
    assert "1" not in swaps.swapped
    assert type(model[1]) is type(module)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(swaps.left["1"])
    assert "left 1:" in str(swaps)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: setattr(b.norm2, "eps", 1e-4), "its norms have different eps, 1e-06 and 0.0001"),
        (lambda b: setattr(b, "conv1", nn.Conv2d(4, 8, 3, padding=1)), "conv1 is not a plain 1 x 1 convolution"),
        (lambda b: setattr(b.conv2, "padding_mode", "reflect"), "conv2 pads with 'reflect'"),
        (lambda b: nn.utils.parametrizations.weight_norm(b.conv1), "conv1 is a ParametrizedConv2d, not a Conv2d"),
    ],
)
def test_where_the_first_half_is_another_the_second_is_swapped(change: Callable[[Any], Any], reason: str) -> None:
    block: Any = NAFBlock(4)
    change(block)
    swaps = r2r_kernels.accelerate(nn.Sequential(block))
    assert swaps.swapped["0"] == "GatedFeedForward"
    assert swaps.left["0"] == f"but for its second half: {reason}"


def test_more_around_a_block_is_kept() -> None:
    clamped = Clamped(4)
    model, x = nn.Sequential(Scaled(4), clamped), 100 * torch.rand(1, 4, 9, 8)
    with torch.no_grad():
        clamped.beta.fill_(1)
    wanted = model(x)
    swaps = r2r_kernels.accelerate(model)
    assert swaps.swapped["0"] == "NAFBlock"
    assert swaps.swapped["1"] == "GatedFeedForward"
    torch.testing.assert_close(model(x), wanted)


def test_a_stop_gradient_inside_is_kept() -> None:
    block = DetachedAttention(4)
    model = nn.Sequential(block)
    with torch.no_grad():
        block.beta.fill_(1)
    x, parameters = torch.rand(1, 4, 9, 8), list(model.parameters())
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    assert r2r_kernels.accelerate(model).swapped["0"] == "GatedFeedForward"
    got = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def _without_biases(block: Any) -> None:
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        getattr(block, name).bias = None


def _scales_as_buffers(block: Any) -> None:
    beta = block.beta.data
    del block.beta
    block.register_buffer("beta", beta)


@pytest.mark.parametrize(
    "change", [_without_biases, _scales_as_buffers, lambda block: setattr(block, "norm2", block.norm1)]
)
def test_a_block_without_biases_or_with_one_norm_or_scales_as_buffers_is_a_block(change: Callable[[Any], Any]) -> None:
    block = NAFBlock(4)
    with torch.no_grad():
        block.beta.fill_(1)
        block.gamma.fill_(1)
    change(block)
    model, x = nn.Sequential(block), torch.rand(1, 4, 9, 8)
    wanted = model(x)
    assert r2r_kernels.accelerate(model).swapped == {"0": "NAFBlock"}
    torch.testing.assert_close(model(x), wanted)


def test_hooks_inside_are_respected() -> None:
    block = NAFBlock(4)
    block.conv1.register_forward_hook(lambda *_: None)
    assert r2r_kernels.accelerate(nn.Sequential(block)).left["0"] == "conv1 has hooks"


def test_the_proof_leaves_no_trace() -> None:
    model = NAFNet()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    r2r_kernels.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_shared_block_stays_shared() -> None:
    block = NAFBlock(4)
    model = nn.Sequential(block, nn.Identity(), block)
    assert len(r2r_kernels.accelerate(model).swapped) == 2
    assert model[0] is model[2]
    assert isinstance(model[0], Swapped)


# What it takes beyond the names of NAFNet


class Norm(nn.Module):
    """The same norm with weights [1, C, 1, 1] and no bias."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt() * self.g


class WrappedNorm(nn.Module):
    """PyTorch's own norm, inside."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(c, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class FeedForward(nn.Module):
    """The second half as a module of its own, with a gate of its own and no scale."""

    def __init__(self, c: int, norm: Any = LayerNorm2d) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = norm(c), nn.Conv2d(c, 2 * c, 1, bias=False), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(self.widen(self.norm(x)), 2, dim=1)
        return x + self.narrow(b * a)


class FirstHalf(nn.Module):
    def __init__(self, c: int, norm: Any = LayerNorm2d) -> None:
        super().__init__()
        self.norm_1, self.attention, self.scale = norm(c), Attention(c), nn.Parameter(torch.randn(c, 1, 1))
        self.project = nn.Conv2d(c, c, 1)
        self.dwconv = nn.Sequential(
            nn.Conv2d(c, 2 * c, 1, bias=False), nn.Conv2d(2 * c, 2 * c, 3, padding="same", groups=2 * c, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.dwconv(self.norm_1(x)).chunk(2, 1)
        return self.scale * self.project(self.attention(first * second)) + x


class Renamed(FirstHalf):
    def __init__(self, c: int, norm: Any = LayerNorm2d) -> None:
        super().__init__(c, norm)
        self.ffn1 = FeedForward(c, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(super().forward(x))


class HalvesApart(nn.Module):
    """Both halves as modules of their own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.halves = nn.Sequential(FirstHalf(c), FeedForward(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.halves(x)


class Timed(NAFBlock):
    """As in IR-SDE: a pair of image and embedding, scale and shift after each norm."""

    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.mlp = nn.Sequential(SimpleGate(), nn.Linear(5, 4 * c))

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, time = pair
        shift1, scale1, shift2, scale2 = self.mlp(time)[:, :, None, None].chunk(4, dim=1)
        h = self.sg(self.conv2(self.conv1(self.norm1(x) * (scale1 + 1) + shift1)))
        y = x + self.conv3(h * self.sca(h)) * self.beta
        h = self.norm2(y) * (scale2 + 1) + shift2
        return y + self.conv5(self.sg(self.conv4(h))) * self.gamma, time


class Unlike(NAFBlock):
    """Another first half, as in KBNet, MLWNet or DarkIR."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.conv3(self.sg(F.gelu(self.conv1(self.norm1(x))))) * self.beta
        a, b = self.conv4(self.norm2(y)).chunk(2, dim=1)
        return y + self.dropout2(self.conv5(a * b)) * self.gamma


class EvenOnly(NAFBlock):
    """A first half that takes no odd sizes, as MLWNet's wavelets."""

    def forward(self, x: Tensor) -> Tensor:
        quarters = F.pixel_unshuffle(self.norm1(x), 2)
        y = x + self.conv3(F.pixel_shuffle(quarters.relu(), 2)) * self.beta
        return y + self.conv5(self.sg(self.conv4(self.norm2(y)))) * self.gamma


IMAGE = torch.rand(2, 4, 9, 7)


@pytest.mark.parametrize(
    ("module", "argument", "operator"),
    [
        (Renamed(4), IMAGE, "NAFBlock"),
        (Renamed(4, Norm), IMAGE, "NAFBlock"),
        (Renamed(4, WrappedNorm), IMAGE, "NAFBlock"),
        (HalvesApart(4), IMAGE, "NAFBlock"),
        (Timed(4), (IMAGE, torch.rand(2, 10)), "NAFBlock"),
        (Unlike(4), IMAGE, "GatedFeedForward"),
        (EvenOnly(4), torch.rand(2, 4, 6, 8), "GatedFeedForward"),
        (FeedForward(4), IMAGE, "GatedFeedForward"),
        (Norm(4), IMAGE, "LayerNorm2d"),
    ],
)
def test_the_same_computation_is_swapped_whatever_its_parts_are_called(
    module: nn.Module, argument: Any, operator: str
) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand_like(parameter) - 0.3)
    model = nn.Sequential(copy.deepcopy(module))
    swaps = r2r_kernels.accelerate(model)
    assert swaps.swapped["0"] == operator
    answers = [m(argument) for m in (module, model)]
    wanted, got = (a[0] if isinstance(a, tuple) else a for a in answers)
    torch.testing.assert_close(got, wanted)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(m.parameters()), allow_unused=True)
        for m, y in ((module, wanted), (model, got))
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


def test_a_norm_over_channels_and_pixels_is_another() -> None:
    class Grouped(NAFBlock):
        def __init__(self, c: int) -> None:
            super().__init__(c)
            self.norm1, self.norm2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)  # type: ignore[assignment]

    swaps = r2r_kernels.accelerate(nn.Sequential(Grouped(4)))
    assert swaps.swapped == {"0.sg": "SimpleGate"}
    assert "0" in swaps.left


class Held(nn.Module):
    """An attention in its own forward, and nothing else that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.second(F.relu(self.first(x.mean((2, 3), keepdim=True)))).sigmoid()


class Mutating(NAFBlock):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = 1
        return super().forward(x)


class Locked(NAFBlock):
    """What cannot be copied."""

    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Held(), "its computation is not that of a NAF block"),
        (Mutating(4), "it changes the module"),
        (Locked(4), "it could not be tried: cannot pickle '_thread.lock' object"),
    ],
)
def test_what_is_left_is_named_by_its_structure(module: nn.Module, reason: str) -> None:
    assert reason in r2r_kernels.accelerate(nn.Sequential(module)).left["0"]


def test_a_model_on_several_devices_and_one_without_anything_are_left_as_they_are() -> None:
    model = nn.Sequential(NAFBlock(4), NAFBlock(4).to("meta"))
    swaps = r2r_kernels.accelerate(model)
    assert swaps.left == {"(the model itself)": "its parameters are on several devices: cpu, meta"}
    assert not any(isinstance(m, Swapped) for m in model.modules())
    nothing = r2r_kernels.accelerate(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    assert str(nothing) == "swapped nothing"


def test_a_block_alone_is_swapped_in_place() -> None:
    block = NAFBlock(4)
    assert r2r_kernels.accelerate(block).swapped == {"(the model itself)": "NAFBlock"}
    assert r2r_kernels.decelerate(block) == ["(the model itself)"]
    assert type(block) is NAFBlock


def test_the_proof_does_not_mind_defaults_and_modes() -> None:
    for context in (
        torch.device("meta"),
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model = NAFNet()
        with context:
            assert len(r2r_kernels.accelerate(model).swapped) == 7


def test_models_without_values_are_swapped() -> None:
    with torch.device("meta"):
        model = NAFNet()
    assert len(r2r_kernels.accelerate(model).swapped) == 7


def test_nothing_is_half_swapped_where_the_proof_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(LayerNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(NAFBlock(4), Stops(4))
    with pytest.raises(KeyboardInterrupt):
        r2r_kernels.accelerate(model)
    assert not any(isinstance(m, Swapped) for m in model.modules())
