from __future__ import annotations

import pytest
import torch

from r2r_kernels.operators.layout import memory_format
from r2r_kernels.reference import NAFBlockParams, layer_norm_2d
from r2r_kernels.reference import naf_block as reference
from r2r_kernels.triton import configs, naf_block
from tests.r2r_kernels.triton.launches import params

# Each way through the block: `gated` in one kernel (16-bit, up to 64 channels), `hidden` on its own (more channels, or
# float32), PyTorch's products (the backward in float32).
CASES = [
    ((2, 7, 2, 5), torch.contiguous_format),
    ((1, 48, 5, 2), torch.channels_last),
    ((1, 100, 1, 1), torch.contiguous_format),
]


def _block(x: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
    return reference(x, NAFBlockParams(*p))


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_follows_the_reference(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    x, dy = (torch.randn(shape).to(device, dtype).to(memory_format=layout) for _ in range(2))
    p = params(shape[1], dtype, device)
    y, saved = naf_block.forward_training(x, p, 1e-6)
    dx, grads = naf_block.backward(dy, x, saved, p, 1e-6)
    assert y.is_contiguous(memory_format=memory_format(x))
    assert torch.equal(y, naf_block.forward(x, naf_block.fold(p, dtype), 1e-6))
    exact = [t.double() for t in (x, *p)]
    wanted = _gradients(exact, dy.double())
    plain = _gradients([x, *p], dy)
    # Some of 18 small gradients are exact by luck in plain PyTorch: those are compared as one.
    for ours, other, right in zip(_groups([y, dx, *grads]), _groups(plain), _groups(wanted), strict=True):
        allowed = max(2 * _distance(other, right), 4 * torch.finfo(dtype).eps)
        assert _distance(ours, right) <= allowed
    assert [g.dtype for g in grads] == [t.dtype for t in p]


def _gradients(tensors: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = _block(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _groups(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [tensors[:1], tensors[1:2], tensors[2:]]


def _distance(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(((g - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("split", [1, 3, 8])
def test_columns_are_shared_out(split: int, device: str) -> None:
    """More shares than blocks of columns too, and tiles wider than the padded matrix."""
    p, x = params(20, torch.float32, device), torch.randn(2, 20, 2, 3, device=device)
    folded = naf_block.fold(p, torch.float32)
    config = {"BM": 16, "BN": 64 if split == 8 else 16, "SPLIT": split, "num_warps": 4}
    got = naf_block.make_hidden(x.permute(0, 2, 3, 1).contiguous(), folded.conv1, folded.conv1_bias, 1e-6, config)
    normed = layer_norm_2d(x.double(), p.norm1_weight.double(), p.norm1_bias.double(), 1e-6)
    wanted = torch.nn.functional.conv2d(normed, p.conv1_weight.double(), p.conv1_bias.double()).permute(0, 2, 3, 1)
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-6


def test_each_program_makes_the_attention_itself(device: str) -> None:
    """More partial sums than are read at once, two images."""
    p = params(20, torch.float32, device)
    rows, gated = (torch.randn(2, 3, 6, 20, device=device) for _ in range(2))
    pool = torch.randn(2, 18, 20, device=device)
    folded = naf_block.fold(p, torch.float32)
    config = {"BM": 16, "BH": 16, "num_warps": 4}
    apart = naf_block.attend(rows, gated, pool, folded, 1e-6, config)
    at_once = naf_block.attend(rows, gated, pool, folded, 1e-6, {**config, "ATTEND": 1})
    for one, other in zip(at_once, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(at_once[1], pool.sum(1) / 18)


def test_bias_of_conv1_stays_inside(device: str) -> None:
    """The depthwise convolution pads conv1's output: a large bias must not leak in from outside of the image."""
    p = params(16, torch.float32, device)
    p = p._replace(conv1_bias=p.conv1_bias + 100)
    x = torch.randn(1, 16, 3, 17, device=device)  # two strips
    config = {"BW": 16, "BH": 16, "num_warps": 4}
    rows = x.permute(0, 2, 3, 1).contiguous()
    folded = naf_block.fold(p, torch.float32)
    gated, pool = naf_block.make_gated(rows, folded, 1e-6, config)
    _, scale = naf_block.make_attention(pool, folded, 51)
    y = naf_block.make_result(rows, gated, scale, folded, 1e-6).permute(0, 3, 1, 2)
    wanted = _block(*(t.double() for t in (x, *p)))
    assert ((y - wanted).norm() / wanted.norm()).item() < 1e-6


def test_large_activations(device: str) -> None:
    """Trained blocks reach +-200: fp16 must neither overflow nor lose the small pixels."""
    x = (70 * torch.randn(1, 32, 2, 7)).clamp(-200, 200).to(device, torch.float16)
    p = params(32, torch.float16, device)
    wanted = _block(*(t.double() for t in (x, *p)))
    y = naf_block.forward(x, p, 1e-6)
    assert ((y - wanted).norm() / wanted.norm()).item() < 2e-3


def test_half_activations_with_float32_parameters(device: str) -> None:
    x = torch.randn(1, 16, 2, 7).to(device, torch.float16)
    p = params(16, torch.float32, device)
    y, saved = naf_block.forward_training(x, p, 1e-6)
    dx, grads = naf_block.backward(torch.randn_like(x), x, saved, p, 1e-6)
    wanted = _block(*(t.double() for t in (x, *p)))
    assert ((y - wanted).norm() / wanted.norm()).item() < 2e-3
    assert (y.dtype, dx.dtype, {g.dtype for g in grads}) == (torch.float16, torch.float16, {torch.float32})


def test_same_bits_twice(device: str) -> None:
    x, dy = (torch.randn(2, 16, 2, 5).to(device, torch.float16) for _ in range(2))
    p = params(16, torch.float16, device)
    runs = []
    for _ in range(2):
        y, saved = naf_block.forward_training(x, p, 1e-6)
        dx, grads = naf_block.backward(dy, x, saved, p, 1e-6)
        runs.append([y, dx, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty_batch(device: str) -> None:
    p = params(7, torch.float32, device)
    x = torch.empty(0, 7, 3, 5, device=device)
    y, saved = naf_block.forward_training(x, p, 1e-6)
    dx, grads = naf_block.backward(x, x, saved, p, 1e-6)
    assert (y.shape, dx.shape) == (x.shape, x.shape)
    assert not any(g.any() for g in grads)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [32, 128])
def test_captured_in_a_graph(channels: int, gpu: str) -> None:
    p = params(channels, torch.bfloat16, gpu)
    folded = naf_block.fold(p, torch.bfloat16)
    x = torch.randn(2, channels, 40, 56, device=gpu, dtype=torch.bfloat16)
    wanted = naf_block.forward(x, folded, 1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = naf_block.forward(x, folded, 1e-6)
    y.zero_()
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu: str) -> None:
    """Two equal images of which the second lies beyond 2^31 elements: equal answers."""
    p = params(32, torch.bfloat16, gpu)
    image = torch.randn(1, 32, 8192, 8200, device=gpu, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    y = naf_block.forward(image.repeat(2, 1, 1, 1), p, 1e-6)
    assert torch.equal(y[0], y[1])
    assert y.isfinite().all()


def test_configurations_name_what_exists() -> None:
    """A file for one architecture replaces entries of the default, and names no others."""
    default = configs.table("default")
    for file in configs.FOLDER.glob("*.json"):
        assert configs.table(file.stem).keys() == default.keys()


def test_configurations_go_by_channels_and_pixels() -> None:
    few, many = {"BM": 16}, {"BM": 64}
    table = {"32": many, "256": {"4096": few, "more": many}}
    found = [
        configs.within(configs.by_pixels(configs.within(table, c)), n) for c, n in ((20, 9), (64, 4096), (64, 4097))
    ]
    assert found == [many, few, many]
    assert configs.within(table, 257) is None
    x = torch.empty(0, dtype=torch.bfloat16)
    assert configs.lookup("naf_block.result", 256, x, 784) == {
        "BM": 16, "BH": 32, "ATTEND": 1, "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    assert configs.lookup("naf_block.result", 2048, x, 784) is None
