"""The analytic model agrees with PyTorch's FLOP counter, with the registered formulas, and with counting by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.rivals import GatedFeedForward, UpsampleAdd
from benchmarks.roofline import Limits, Work
from r2r import R2R
from r2r.presets import PRESETS
from r2r_kernels import functional, reference
from r2r_kernels.nn import GatedConv2d, LayerNorm2d, LocalMean2d, NAFBlock, SimpleGate, SlotConv3d
from tests.conftest import TINY, fill_randomly

N, C, H, W = 2, 8, 12, 10


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def seen(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes of inputs, parameters and outputs together."""
    with torch.no_grad():
        out = module(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    return sum(x.nbytes for x in (*inputs, *outputs, *module.parameters()))


@pytest.mark.parametrize("ops", [reference, functional])
def test_flops_of_a_block(ops: Any) -> None:
    block = NAFBlock(C)
    x = torch.rand(N, C, H, W)
    assert flops(lambda: ops.naf_block(x, block.params())) == roofline.naf_block(N, C, H, W, 4).flops


def test_flops_of_a_block_with_its_backward_pass() -> None:
    block = NAFBlock(C)
    x = torch.rand(N, C, H, W, requires_grad=True)
    counted = flops(lambda: functional.naf_block(x, block.params()).sum().backward())
    assert counted == roofline.naf_block(N, C, H, W, 4, backward=True).flops


@pytest.mark.parametrize("ops", [reference, functional])
def test_flops_of_depthwise_gate(ops: Any) -> None:
    x, weight, bias = torch.rand(N, 2 * C, H, W), torch.rand(2 * C, 1, 3, 3), torch.rand(2 * C)
    assert flops(lambda: ops.depthwise_gate(x, weight, bias)) == roofline.depthwise_gate(N, 2 * C, H, W, 4).flops


def test_gated_feed_forward() -> None:
    module, x = GatedFeedForward(C, eager=False), torch.rand(N, C, H, W, requires_grad=True)
    work = roofline.gated_feed_forward(N, C, H, W, 4)
    assert flops(lambda: module(x)) == work.flops
    assert seen(module, x) == work.bytes
    both = roofline.gated_feed_forward(N, C, H, W, 4, backward=True)
    assert flops(lambda: module(x).sum().backward()) == both.flops


def test_upsample_add_and_local_mean_2d() -> None:
    x, skip = torch.rand(N, 2 * C, H // 2, W // 2), torch.rand(N, C, H, W)
    module, work = UpsampleAdd(C), roofline.upsample_add(N, C, H, W, 4)
    assert flops(lambda: module(x, skip)) == work.flops
    assert seen(module, x, skip) == work.bytes
    assert seen(LocalMean2d((3, 3)), skip) == roofline.local_mean_2d(N, C, H, W, 4).bytes


def test_flops_of_slot_and_gated_convolution() -> None:
    slots, kernel = 10, 3
    x = torch.rand(2, slots, C, 4, 5)
    module = SlotConv3d(2, C, kernel, eager=True)
    work = roofline.slot_conv(2, slots, C, kernel, 4, 5, 4)
    assert flops(lambda: module(x)) == work.flops
    assert seen(module, x) == work.bytes
    for size in (1, 3):
        gated, y = GatedConv2d(C, size, eager=True), torch.rand(N, C, H, W)
        work = roofline.gated_conv(N, C, H, W, size, 4)
        assert flops(lambda gated=gated, y=y: gated(y, y)) == work.flops  # type: ignore[misc]
        assert seen(gated, y, y) == work.bytes


def test_bytes_of_one_pass() -> None:
    x = torch.rand(N, C, H, W, dtype=torch.bfloat16)
    assert seen(LayerNorm2d(C, eager=True).bfloat16(), x) == roofline.layer_norm_2d(N, C, H, W, 2).bytes
    assert seen(SimpleGate(eager=True), x) == roofline.simple_gate(N, C, H, W, 2).bytes


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "stride"), [(3, 8, 3, 1), (8, 16, 2, 2), (16, 32, 1, 1)])
def test_convolution(inputs: int, outputs: int, kernel: int, stride: int) -> None:
    conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 * (stride == 1), bias=False)
    x = torch.rand(N, inputs, H, W)
    work = roofline.conv2d(N, inputs, outputs, H // stride, W // stride, kernel, 4, stride)
    assert flops(lambda: conv(x)) == work.flops
    assert seen(conv, x) == work.bytes


def test_whole_model() -> None:
    """All but the retrieval, whose plain form multiplies the values of every task."""
    sizes = {**TINY, "middle_blocks": 1}
    model = R2R(tasks=("a", "b", "c"), **sizes).eval()
    fill_randomly(model)
    parts = roofline.model(2, 40, 24, 4, sizes, tasks=3)
    slots, key, value = model.bank.keys.shape[1], model.bank.keys[0, 0].numel(), model.bank.values[0, 0].numel()
    with torch.no_grad():
        counted = flops(lambda: model(torch.rand(2, 3, 40, 24)))
    plain_retrieval = 2 * 2 * 3 * slots * (key + value)
    assert counted - plain_retrieval == roofline.total(parts).flops - parts["bank_retrieve"].flops
    assert parts["bank_retrieve"].flops == 2 * 2 * slots * (3 * key + value)


def test_published_figure() -> None:
    """12.75 GMAC at 224 x 224."""
    work = roofline.total(roofline.model(1, 224, 224, 4, PRESETS["base"], tasks=5))
    assert work.flops / 2e9 == pytest.approx(12.75, abs=0.1)


def test_cost_is_linear_in_pixels_and_retrieval_flat_in_values() -> None:
    small, large = (roofline.naf_block(1, 32, side, side, 2) for side in (512, 1024))
    assert large.bytes / small.bytes == pytest.approx(4, rel=0.01)
    one, many = (roofline.bank_retrieve(1, tasks, 53, 4096, 32768, 4) for tasks in (1, 64))
    assert many.bytes - one.bytes == 63 * 53 * 4096 * 4


def test_training_takes_more_than_inference() -> None:
    forward, both = (
        roofline.total(roofline.amalgamator(4, 64, 64, 4, PRESETS["tiny"], 5, backward)) for backward in (False, True)
    )
    assert 2.5 < both.flops / forward.flops < 4.5
    assert both.bytes > 2 * forward.bytes


def test_limits() -> None:
    limits = Limits({10**6: 100.0, 10**8: 10.0}, {"float32": 1000.0})
    assert limits.bandwidth(2 * 10**6) == 100.0
    assert limits.bandwidth(10**9) == 10.0
    assert limits.floor(Work(2 * 10**6, 1), "float32") == (2 * 10**4, "memory")
    assert limits.floor(Work(100, 10**6), "float32") == (1000.0, "arithmetic")
    better = limits.best(Limits({10**6: 50.0, 10**8: 20.0}, {"float32": 2000.0}))
    assert better == Limits({10**6: 100.0, 10**8: 20.0}, {"float32": 2000.0})
