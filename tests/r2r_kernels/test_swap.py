"""accelerate and decelerate, on a NAFNet written as the paper describes it, its local variant and look-alikes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2r_kernels
from r2r_kernels.swap import SwappedLayerNorm2d, SwappedNAFBlock, SwappedSimpleGate


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
    assert isinstance(modules(model)["encoders.1.1"], SwappedNAFBlock)
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
    assert not any(isinstance(m, SwappedNAFBlock) for m in copied.modules())
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
    assert isinstance(model.middle_blks[0].norm1, SwappedLayerNorm2d)
    assert isinstance(model.middle_blks[0].sg, SwappedSimpleGate)
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


class MeanNorm(LayerNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * (x - x.mean(1, keepdim=True)) + self.bias[:, None, None]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Scaled(4), "its answers differ by"),
        (Conditioned(4), "it could not be tried: where is the time?"),
        (NAFBlock(4, expand=4), r"conv1.weight is \[16, 4, 1, 1\], not \[8, 4, 1, 1\]"),
        (MeanNorm(4), "its answers differ by"),
    ],
)
def test_what_is_not_equal_is_left_alone_and_named(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), module)
    swaps = r2r_kernels.accelerate(model)
    assert model[1] is module
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(swaps.left["1"])
    assert "left 1:" in str(swaps)


def test_a_wrong_eps_is_noticed_and_hooks_are_respected() -> None:
    other_eps, hooked = NAFBlock(4), NAFBlock(4)
    other_eps.norm2.eps = 1e-4
    hooked.conv1.register_forward_hook(lambda *_: None)
    model = nn.Sequential(other_eps, hooked)
    swaps = r2r_kernels.accelerate(model)
    assert "differ" in swaps.left["0"]
    assert swaps.left["1"] == "it has hooks"


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
    assert isinstance(model[0], SwappedNAFBlock)
