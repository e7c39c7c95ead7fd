"""The drop-in modules, beyond what the operators' own tests prove."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2r_kernels import reference
from r2r_kernels.nn import LayerNorm2d, LocalMean2d, NAFBlock, SimpleGate

EAGER = pytest.mark.parametrize("eager", [False, True])


def block(eager: bool, dropout: float = 0.0) -> NAFBlock:
    made = NAFBlock(6, eager=eager, dropout=dropout)
    with torch.no_grad():
        made.beta.normal_()
        made.gamma.normal_()
    return made


@EAGER
def test_a_new_block_is_the_identity(eager: bool) -> None:
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(NAFBlock(6, eager=eager)(x), x)


def test_the_parameters_are_named_as_in_nafnets_checkpoints() -> None:
    convolutions = [
        f"{name}.{leaf}"
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "sca.1", "norm1", "norm2")
        for leaf in ("weight", "bias")
    ]
    assert set(NAFBlock(4).state_dict()) == {*convolutions, "beta", "gamma"}
    assert set(LayerNorm2d(4).state_dict()) == {"weight", "bias"}
    assert not SimpleGate().state_dict()


@EAGER
def test_a_bias_may_be_taken_away(eager: bool) -> None:
    made, x = block(eager), torch.randn(2, 6, 5, 4)
    made(x)
    without = block(eager)
    without.load_state_dict(made.state_dict())
    nn.init.zeros_(without.get_parameter("conv3.bias"))
    made.conv3.bias = None
    torch.testing.assert_close(made(x), without(x))


@EAGER
@pytest.mark.parametrize("changed", [False, True], ids=["whole", "with an adapter"])
@pytest.mark.parametrize("size", [(7, 5), (2, 5), (2, 3)])
def test_a_window_makes_attention_local_in_evaluation_alone(eager: bool, changed: bool, size: tuple[int, int]) -> None:
    made, x = block(eager), torch.randn(2, 6, *size)
    params = made.params()
    local, plain = (reference.naf_block(x, params, window=window) for window in ((3, 3), None))
    made.window = 3
    if changed:
        made.conv1 = nn.Sequential(made.conv1)  # type: ignore[assignment]
        assert made.seen() is None
    compiled: nn.Module = torch.compile(made, backend="eager")  # type: ignore[assignment]
    for run in (made, compiled):
        torch.testing.assert_close(run.eval()(x), local)
        torch.testing.assert_close(run.train()(x), plain)
    assert made.eval().fold(torch.float32) is None
    assert torch.allclose(local, plain) == (max(size) <= 3)


@EAGER
@pytest.mark.parametrize("changed", [False, True], ids=["whole", "with an adapter"])
def test_a_shared_attention_takes_the_place_of_an_images_own(eager: bool, changed: bool) -> None:
    made, shared, x = block(eager).eval(), torch.randn(3, 6, 17, 9), torch.randn(2, 6, 8, 7)

    def gated(x: Tensor) -> Tensor:
        return SimpleGate()(made.conv2(made.conv1(made.norm1(x))))

    inner = gated(shared)[:, :, 2:15, 1:8]
    attention = made.sca[1](inner.mean((0, 2, 3))[:, None, None])
    y = x + made.conv3(gated(x) * attention) * made.beta
    wanted = y + made.conv5(SimpleGate()(made.conv4(made.norm2(y)))) * made.gamma
    if changed:
        made.conv1 = nn.Sequential(made.conv1)  # type: ignore[assignment]
    made.share_attention(shared)
    compiled: nn.Module = torch.compile(made, backend="eager")  # type: ignore[assignment]
    for run in (made, compiled):
        torch.testing.assert_close(run(x), wanted)
    made.window = 3
    torch.testing.assert_close(made(x), wanted)
    made.attention = None
    assert not torch.allclose(made(x), wanted)


@EAGER
def test_dropout_drops_in_training_alone(eager: bool) -> None:
    dropping = block(eager, dropout=0.4)
    plain = NAFBlock(6, eager=True)
    plain.load_state_dict(dropping.state_dict())
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(dropping.eval()(x), plain(x))

    def by_hand(x: Tensor) -> Tensor:
        b = plain
        h = SimpleGate()(b.conv2(b.conv1(b.norm1(x))))
        y = x + F.dropout(b.conv3(h * b.sca(h)), 0.4) * b.beta
        return y + F.dropout(b.conv5(SimpleGate()(b.conv4(b.norm2(y)))), 0.4) * b.gamma

    torch.manual_seed(3)
    wanted = by_hand(x)
    torch.manual_seed(3)
    torch.testing.assert_close(dropping.train()(x), wanted)
    assert not torch.allclose(dropping(x), wanted)


@EAGER
def test_a_replaced_pool_is_obeyed(eager: bool) -> None:
    local, other, by_hand = block(eager), block(eager), block(True)
    for made in (local, other):
        made.load_state_dict(by_hand.state_dict())
    local.sca[0] = LocalMean2d((3, 2), eager=eager)
    other.sca[0] = torch.nn.AdaptiveMaxPool2d(1)
    x = torch.randn(2, 6, 7, 5)

    def wanted(pool: torch.nn.Module) -> Tensor:
        b = by_hand
        h = SimpleGate()(b.conv2(b.conv1(b.norm1(x))))
        y = x + b.conv3(h * b.sca[1](pool(h))) * b.beta
        return y + b.conv5(SimpleGate()(b.conv4(b.norm2(y)))) * b.gamma

    torch.testing.assert_close(local(x), wanted(LocalMean2d((3, 2), eager=True)))
    torch.testing.assert_close(other(x), wanted(torch.nn.AdaptiveMaxPool2d(1)))
