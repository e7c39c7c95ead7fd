"""Registration: the choice of implementation, tracing, autocast, FLOPs, what is refused."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import r2r_kernels.functional as F
from r2r_kernels import extension, reference
from r2r_kernels.nn import NAFBlock
from r2r_kernels.operators import implementation
from r2r_kernels.reference import NAFBlockParams
from tests.r2r_kernels.rule import parameters

needs_extension = pytest.mark.skipif(extension.module() is None, reason=f"no extension: {extension.reason()}")


class Blocks(nn.Module):
    """Every operator on images, in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterList(parameters(4))
        self.up = nn.Parameter(torch.randn(8, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        params = NAFBlockParams(*self.params)
        x = F.naf_block(x, params) + F.naf_block(x, params, window=(3, 2)) + F.local_mean_2d(x, (2, 3))
        x = F.upsample_add(x, self.up, torch.cat((x, x), dim=3).unfold(3, 2, 2).mean(-1).repeat(1, 1, 2, 2)[:, :2])
        x = torch.cat((x, x), dim=1)
        hidden = torch.cat((x, F.layer_norm_2d(x, params.norm1_weight, params.norm1_bias)), dim=1)
        gated, mean = F.depthwise_gate(hidden, params.conv2_weight, params.conv2_bias)
        return F.simple_gate(torch.cat((gated * mean, x), dim=1))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_extension_runs_what_it_covers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 5, 6, dtype=dtype)
    assert implementation.of(x) == "native"
    assert implementation.of(x.double()) == "reference"
    monkeypatch.setenv("R2R_KERNELS", "native")
    assert implementation.of(x) == "native"
    for learning in (True, False):
        with (
            torch.set_grad_enabled(learning),
            pytest.raises(RuntimeError, match=r"R2R_KERNELS=native cannot run torch.float64 on cpu"),
        ):
            F.simple_gate(x.double())


def run(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TRITON_PROGRAM = """
import torch
import r2r_kernels.functional as F
from r2r_kernels import reference
from r2r_kernels.nn import LocalMean2d, NAFBlock
from r2r_kernels.operators import implementation
from r2r_kernels.reference import NAFBlockParams
from tests.r2r_kernels.rule import FORMATS, answers, parameters

torch.manual_seed(0)
assert implementation.of(torch.ones(1)) == "triton"
x, params = torch.randn(2, 8, 5, 6), parameters(8)
operators = {
    "layer_norm_2d": (lambda ops, t: (ops.layer_norm_2d(*t),), [x, params[0], params[1]]),
    "simple_gate": (lambda ops, t: (ops.simple_gate(*t),), [x]),
    "depthwise_gate": (lambda ops, t: ops.depthwise_gate(*t), [x, params[4][:8], params[5][:8]]),
    "naf_block": (lambda ops, t: (ops.naf_block(t[0], NAFBlockParams(*t[1:])),), [x, *params]),
    "local": (lambda ops, t: (ops.naf_block(t[0], NAFBlockParams(*t[1:]), window=(3, 2)),), [x, *params]),
    "local_mean_2d": (lambda ops, t: (ops.local_mean_2d(*t, (2, 3)),), [x]),
    "upsample_add": (lambda ops, t: (ops.upsample_add(*t),), [x, torch.randn(16, 8, 1, 1), torch.randn(2, 4, 10, 12)]),
}
for name, (operator, (images, *rest)) in operators.items():
    for memory_format in ("contiguous", "channels_last"):
        tensors = [FORMATS[memory_format](images), *rest]
        for got, wanted in zip(answers(operator, F, tensors), answers(operator, reference, tensors), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
block = NAFBlock(8)
with torch.no_grad():
    for parameter in block.parameters():
        parameter.normal_(std=0.3)
    folded = block.fold(torch.float32)
    assert folded is not None
    torch.testing.assert_close(folded(x), block(x), rtol=1e-4, atol=1e-4)
    assert folded(x[:0]).shape == (0, 8, 5, 6)
    own = block(x)
    folded.share_attention(torch.zeros_like(x))
    torch.testing.assert_close(folded(x), block(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(block(x), own)
    block.attention = None
    block.sca[0] = LocalMean2d((3, 3))
    assert block.fold(torch.float32) is None  # folded blocks pool over the whole image
print("all agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_triton_is_wired_in() -> None:
    assert run(TRITON_PROGRAM, TRITON_INTERPRET="1", R2R_KERNELS="triton") == "all agree"


NATIVE_PROGRAM = """
import sys
import torch
from r2r_kernels import extension, functional, reference
from r2r_kernels.reference import NAFBlockParams
from tests.r2r_kernels.rule import FORMATS, assert_follows, parameters

torch.manual_seed(0)
assert extension.module().instruction_set == sys.argv[1]
x, params = torch.randn(1, 23, 10, 37), parameters(23)
operators = [
    (lambda ops, t: (ops.layer_norm_2d(*t),), [x, params[0], params[1]]),
    (lambda ops, t: (ops.layer_norm_2d(*t),), [torch.randn(2, 23, 40, 40), params[0], params[1]]),  # long sums
    (lambda ops, t: (ops.simple_gate(*t),), [x[:, 1:]]),
    (lambda ops, t: ops.depthwise_gate(*t), [x[:, 1:], params[4][:22], params[5][:22]]),
    (lambda ops, t: (ops.naf_block(t[0], NAFBlockParams(*t[1:])),), [x, *params]),
    (lambda ops, t: (ops.local_mean_2d(*t, (4, 9)),), [x]),
    (lambda ops, t: (ops.upsample_add(*t),), [x[:, 1:], torch.randn(44, 22, 1, 1) / 5, torch.randn(1, 11, 20, 74)]),
]
for kernel, size in ((1, (10, 37)), (3, (10, 37)), (1, (4, 5)), (3, (4, 5))):
    weight = torch.randn(23, 2, kernel, kernel) / kernel
    operators.append((lambda ops, t: (ops.gated_conv(*t),), [x, torch.randn(1, 23, *size), weight, params[1]]))
for operator, (images, *rest) in operators:
    for memory_format in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            assert_follows(operator, [FORMATS[memory_format](images), *rest], dtype)
    block = NAFBlockParams(*params)
    got, wanted = (ops.naf_block(FORMATS[memory_format](x), block, window=(4, 9)) for ops in (functional, reference))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

def bank_retrieve(ops, t):
    return ops.bank_retrieve(*t, torch.tensor([7, 7]), 10.0)[:1]

bank = [torch.randn(2, 5, 3, 3), torch.randn(2, 7, 5, 3, 3), torch.randn(2, 7, 23, 3, 3)]
slots = [torch.randn(2, 9, 3, 8, 8), torch.randn(2, 3, 4, 3, 3), torch.randn(2, 3)]
for dtype in (torch.float32, torch.bfloat16):
    assert_follows(bank_retrieve, bank, dtype)
    assert_follows(lambda ops, t: (ops.slot_conv(*t),), slots, dtype)
print("all follow")
"""


@needs_extension
@pytest.mark.parametrize(("capability", "name"), [("default", "baseline"), ("avx2", "avx2"), ("avx512", "avx512")])
def test_the_lesser_instruction_sets_follow_too(capability: str, name: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip(f"one instruction set on {platform.machine()}")
    if name == "avx512" and not torch.cpu._is_avx512_supported():
        pytest.skip("this processor has no AVX-512")
    assert run(NATIVE_PROGRAM, name, ATEN_CPU_CAPABILITY=capability) == "all follow"


def test_forcing_the_reference_gives_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, params = torch.randn(2, 6, 9, 8), NAFBlockParams(*parameters(6))
    monkeypatch.setenv("R2R_KERNELS", "reference")
    assert torch.equal(F.naf_block(x, params), reference.naf_block(x, params))
    monkeypatch.setenv("R2R_KERNELS", "fastest")
    with pytest.raises(ValueError, match=r"R2R_KERNELS must be one of reference, native, triton, got 'fastest'"):
        F.naf_block(x, params)


def test_compiles_in_one_graph() -> None:
    model, x = Blocks(), torch.randn(2, 4, 6, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for images in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(3, 4, 9, 7)):
        wanted = torch.autograd.grad(model(images).sum(), list(model.params))
        got = torch.autograd.grad(compiled(images).sum(), list(model.params))
        torch.testing.assert_close(compiled(images), model(images))
        torch.testing.assert_close(got, wanted)


def test_exports_with_its_operators() -> None:
    model, x = Blocks().eval(), torch.randn(2, 4, 6, 5)
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: height, 3: width},))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"r2r.naf_block.default", "r2r.layer_norm_2d.default", "r2r.depthwise_gate.default"} <= names
    larger = torch.randn(2, 4, 11, 8)
    torch.testing.assert_close(program.module()(larger), model(larger))


def test_autocast() -> None:
    params, x = NAFBlockParams(*parameters(4)), torch.randn(1, 4, 6, 5)
    weight, bias = params.norm1_weight, params.norm1_bias
    with torch.autocast("cpu", torch.bfloat16):
        assert F.naf_block(x, params).dtype == torch.bfloat16  # as a convolution
        assert F.depthwise_gate(x, params.conv2_weight[:4], params.conv2_bias[:4])[0].dtype == torch.bfloat16
        assert F.upsample_add(x, torch.randn(8, 4, 1, 1), torch.randn(1, 2, 12, 10)).dtype == torch.bfloat16
        assert F.naf_block(x, params, window=(2, 2)).dtype == torch.bfloat16
        assert F.layer_norm_2d(x, weight, bias).dtype == torch.float32  # as its input
        assert F.local_mean_2d(x, (2, 2)).dtype == torch.float32
        assert F.layer_norm_2d(x.bfloat16(), weight, bias).dtype == torch.bfloat16
        weight.requires_grad_()
        F.naf_block(x, params).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("forced", ["native", "reference"])
def test_a_block_takes_float32_parameters_with_narrower_images(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it gets them under autocast on a GPU; gradients have the dtypes of what they belong to."""
    if forced == "native" and extension.module() is None:
        pytest.skip("no extension")
    monkeypatch.setenv("R2R_KERNELS", forced)
    params, x = parameters(4), torch.randn(1, 4, 6, 5, dtype=torch.bfloat16)

    def answers(given: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *given)]
        y = torch.ops.r2r.naf_block(leaves[0], leaves[1:], 1e-6)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    wide, narrow = answers(params), answers([p.bfloat16() for p in params])
    assert [t.dtype for t in wide] == [torch.bfloat16] * 2 + [torch.float32] * 18
    for one, other in zip(wide, narrow, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=0.02, atol=0.02)


def test_flops_are_those_of_plain_pytorch() -> None:
    x = torch.randn(2, 8, 6, 5)
    model = NAFBlock(8, eager=True)
    weight, skip = torch.randn(16, 8, 1, 1), torch.randn(2, 4, 12, 10)

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    assert count(lambda: F.naf_block(x, model.params())) == count(lambda: reference.naf_block(x, model.params())) > 0
    assert count(lambda: F.upsample_add(x, weight, skip)) == count(lambda: reference.upsample_add(x, weight, skip)) > 0
    local = count(lambda: F.naf_block(x, model.params(), window=(2, 2)))
    pooling = count(lambda: reference.local_mean_2d(x, (2, 2)))  # in plain PyTorch a matrix product, here additions
    assert local == count(lambda: reference.naf_block(x, model.params(), window=(2, 2))) - pooling


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad((F.simple_gate(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="r2r_kernels has no second derivatives"):
        first.sum().backward()


def test_a_second_derivative_is_refused_wherever_it_is_asked_for() -> None:
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    params = [p.requires_grad_() for p in parameters(4)]

    def penalty() -> torch.Tensor:
        y = F.naf_block(x, NAFBlockParams(*params))
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square().mean() + first.square().mean()

    for asked in (
        lambda: penalty().backward(),
        lambda: penalty().backward(inputs=params),
        lambda: torch.autograd.grad(penalty(), params, allow_unused=True),
        lambda: torch.autograd.functional.hessian(lambda t: F.simple_gate(t).square().sum(), x.detach()),
        lambda: torch.autograd.functional.vhp(lambda t: F.simple_gate(t).square().sum(), x.detach(), x.detach()),
    ):
        with pytest.raises(RuntimeError, match="r2r_kernels has no second derivatives"):
            asked()


def test_a_checkpointed_block_has_a_graph_of_its_gradients() -> None:
    x, params = torch.randn(1, 4, 3, 3, requires_grad=True), NAFBlockParams(*parameters(4))
    y = checkpoint(F.naf_block, x, params, use_reentrant=False)
    (got,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(F.naf_block(x, params).sum(), x)
    assert got.requires_grad
    assert torch.equal(got, wanted)


def test_parameters_of_any_stride() -> None:
    x, params = torch.randn(1, 4, 6, 5), parameters(4)
    odd = [torch.stack((p, p), dim=-1)[..., 0] for p in params]
    got = F.naf_block(x, NAFBlockParams(*odd))
    assert torch.equal(got, F.naf_block(x, NAFBlockParams(*params)))
