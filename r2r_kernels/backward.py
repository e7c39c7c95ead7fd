"""Backward formulas in plain PyTorch, for what no kernel covers: explicit, because operators run below autograd.

They compute again what the forward did not keep. Gradients have the dtype of what they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels.reference import GatedFeedForwardParams, NAFBlockParams, window_averaging


def layer_norm_2d(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias; mean and rstd [N, H, W] are the forward's."""
    mean, rstd = mean[:, None], rstd[:, None]
    wide = dy.to(mean.dtype)
    normed = (x.to(mean.dtype) - mean) * rstd
    scaled = wide * weight[:, None, None]
    along = (scaled * normed).mean(1, keepdim=True)
    dx = (scaled - scaled.mean(1, keepdim=True) - normed * along) * rstd
    return dx.to(x.dtype), (wide * normed).sum((0, 2, 3)).to(weight.dtype), wide.sum((0, 2, 3)).to(weight.dtype)


def simple_gate(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of x."""
    first, second = x.chunk(2, dim=1)
    return torch.cat((dy * second, dy * first), dim=1)


def _convolution(
    dy: Tensor, x: Tensor, weight: Tensor, padding: int = 0, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    ones, pads = [1, 1], [padding, padding]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], ones, pads, ones, False, [0, 0], groups, [True, True, True]
    )


def depthwise_gate(
    dgated: Tensor, dmean: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    hidden = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    dgated = dgated + dmean / max(1, dgated.shape[2] * dgated.shape[3])
    dhidden = torch.ops.r2r.simple_gate_backward(dgated, hidden)
    return _convolution(dhidden, x, weight, padding=1, groups=x.shape[1])


def gated_conv(
    dy: Tensor, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, prior (of the size of x), weight and bias."""
    padding, groups = weight.shape[-1] // 2, x.shape[1]
    both = torch.stack((x, prior), dim=2).flatten(1, 2)
    logits = F.conv2d(both, weight, bias, padding=padding, groups=groups)
    gate = logits.to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
    dlogits = (dy * (prior - x) * gate * (1 - gate)).to(x.dtype)
    dboth, dweight, dbias = _convolution(dlogits, both, weight, padding, groups)
    dx, dprior = dy * (1 - gate) + dboth[:, 0::2], dy * gate + dboth[:, 1::2]
    return dx.to(x.dtype), dprior.to(x.dtype), dweight, dbias


def average(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """down @ x @ across.T on the planes of x [N, C, H, W], in its layout. With both matrices transposed: its gradient.

    PyTorch's pooling is slow in NCHW, and its products of planes in channels_last: hence one of pixels' rows there.
    """
    wide = x.to(down.dtype)
    if wide.is_contiguous() or not wide.is_contiguous(memory_format=torch.channels_last):
        return (down @ (wide @ across.T)).to(x.dtype)
    pixels = wide.permute(0, 2, 3, 1)
    rows = (down @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
    return (across @ rows).permute(0, 3, 1, 2).to(x.dtype)


def upsample_add(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; that of the skip is dy."""
    return _convolution(F.pixel_unshuffle(dy, 2), x, weight)[:2]


def local_mean_2d(dy: Tensor, window: Sequence[int]) -> Tensor:
    """Gradient of x: the averaging matrices, transposed."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    down, across = (window_averaging(dy.shape[dim], window[dim - 2], dy.device).to(wide) for dim in (2, 3))
    return average(dy, down.T, across.T)


def slot_conv(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    groups = weight.shape[0] * weight.shape[1]
    flat_dy, flat_x = (t.transpose(1, 2).reshape(1, groups, t.shape[1], *t.shape[3:]) for t in (dy, x))
    ones, pads = [1, 1, 1], [0, 1, 1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        flat_dy, flat_x, weight.flatten(0, 1)[:, None], [groups], ones, pads, ones, False, [0, 0, 0], groups, [True] * 3
    )
    dx = dx.view(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]).transpose(1, 2)
    return dx, dweight.view(weight.shape), dbias.view(weight.shape[:2])


def _normalise(dunit: Tensor, unit: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, of which unit = x / max(|x|, 1e-12) along the last dimension."""
    norm = x.norm(dim=-1, keepdim=True)
    along = torch.where(norm > 1e-12, (dunit * unit).sum(-1, keepdim=True), 0)
    return (dunit - unit * along) / norm.clamp(min=1e-12)


def _readings(weights: Tensor) -> list[tuple[Tensor | slice, slice]]:
    """Which images read which tasks, by their weights [N, T, S]: on a GPU all, as it would have to tell the host."""
    if weights.device.type != "cpu":
        return [(slice(None), slice(None))]
    read = weights.any(2)
    return [(read[:, t].nonzero().flatten(), slice(t, t + 1)) for t in range(read.shape[1]) if read[:, t].any()]


def bank_retrieve(
    dreadout: Tensor,
    dscores: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys, values and scale; weights [N, T, S] are the forward's. Matrix products of fixed order:
    what a kernel could save is small beside them."""
    wide = torch.promote_types(query.dtype, torch.float32)
    tasks, slots = weights.shape[1:]
    flat_query, flat_keys = query.to(wide).flatten(1), keys.to(wide).reshape(tasks * slots, -1)
    unit_query, unit_keys = F.normalize(flat_query, dim=1), F.normalize(flat_keys, dim=1)
    cosine = (unit_query @ unit_keys.T).view(weights.shape)

    used = torch.arange(slots, device=counts.device) < counts[:, None]
    dsimilarity = torch.where(used, (dscores / counts.clamp(min=1))[:, :, None], 0)

    dflat, dweights, dvalues = dreadout.to(wide).flatten(1), torch.zeros_like(weights), torch.zeros_like(values)
    for images, part in _readings(weights):
        rows, drows = (x[part].flatten(0, 1).flatten(1) for x in (values, dvalues))
        of_rows, of_images = weights[images, part].flatten(1), dflat[images]
        dweights[images, part] = (of_images @ rows.to(wide).T).unflatten(1, (-1, slots))
        drows.copy_(of_rows.T @ of_images)
    through = weights * (dweights - (weights * dweights).sum((1, 2), keepdim=True))
    dsimilarity = (dsimilarity + through).flatten(1)

    dcosine = dsimilarity * scale
    dquery = _normalise(dcosine @ unit_keys, unit_query, flat_query).view(query.shape)
    dkeys = _normalise(dcosine.T @ unit_query, unit_keys, flat_keys).view(keys.shape)
    precise = (
        wide if query.device.type == "mps" else torch.float64
    )  # terms of either sign: the sum is small beside them
    dscale = (dsimilarity.to(precise) * cosine.flatten(1).to(precise)).sum()
    return dquery.to(query.dtype), dkeys.to(keys.dtype), dvalues, dscale.to(scale.dtype)


def _scaled_convolution(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of (conv1x1(x, weight) + bias) * scale, the gradients of x, weight, bias and scale.

    The scale is folded into the weight, so that neither the convolution's output nor dy * scale is made.
    """
    factor = scale.view(-1, 1, 1, 1)
    dx, dweight, dbias = _convolution(dy, x, weight * factor)
    dscale = (weight * dweight).sum((1, 2, 3)) + bias * dbias
    return dx, dweight * factor, dbias * factor.flatten(), dscale.view(scale.shape)


def naf_block(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    """Gradients of x and of the 18 parameters, from the block's input alone."""
    p = NAFBlockParams(*params)
    ops = torch.ops.r2r
    normed, mean, rstd = ops.layer_norm_2d(x, p.norm1_weight, p.norm1_bias, eps)
    hidden = F.conv2d(normed, p.conv1_weight, p.conv1_bias)
    convolved = F.conv2d(hidden, p.conv2_weight, p.conv2_bias, padding=1, groups=hidden.shape[1])
    gated = ops.simple_gate(convolved)
    pooled = gated.mean((2, 3), keepdim=True)
    attention = F.conv2d(pooled, p.sca_weight, p.sca_bias)
    attended = gated * attention
    y = x + F.conv2d(attended, p.conv3_weight, p.conv3_bias) * p.beta
    dy, *second_half = gated_feed_forward(dy, y, GatedFeedForwardParams(*p[11:]), eps)

    dattended, dconv3_weight, dconv3_bias, dbeta = _scaled_convolution(
        dy, attended, p.conv3_weight, p.conv3_bias, p.beta
    )
    dattention = (dattended * gated).sum((2, 3), keepdim=True)
    dpooled, dsca_weight, dsca_bias = _convolution(dattention, pooled, p.sca_weight)
    dgated = torch.addcmul(dpooled / max(1, x.shape[2] * x.shape[3]), dattended, attention)
    dconvolved = ops.simple_gate_backward(dgated, convolved)
    dhidden, dconv2_weight, dconv2_bias = _convolution(dconvolved, hidden, p.conv2_weight, 1, hidden.shape[1])
    dnormed, dconv1_weight, dconv1_bias = _convolution(dhidden, normed, p.conv1_weight)
    dx, dnorm1_weight, dnorm1_bias = ops.layer_norm_2d_backward(dnormed, x, p.norm1_weight, mean, rstd)
    return [
        dy + dx,
        *(dnorm1_weight, dnorm1_bias, dconv1_weight, dconv1_bias, dconv2_weight, dconv2_bias),
        *(dsca_weight, dsca_bias, dconv3_weight, dconv3_bias, dbeta),
        *second_half,
    ]


def gated_feed_forward(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    """Gradients of x and of the seven parameters, from x alone."""
    p = GatedFeedForwardParams(*params)
    ops = torch.ops.r2r
    normed, mean, rstd = ops.layer_norm_2d(x, p.norm_weight, p.norm_bias, eps)
    hidden = F.conv2d(normed, p.conv1_weight, p.conv1_bias)
    dgated, dconv2_weight, dconv2_bias, dgamma = _scaled_convolution(
        dy, ops.simple_gate(hidden), p.conv2_weight, p.conv2_bias, p.gamma
    )
    dhidden = ops.simple_gate_backward(dgated, hidden)
    dnormed, dconv1_weight, dconv1_bias = _convolution(dhidden, normed, p.conv1_weight)
    dresidual, dnorm_weight, dnorm_bias = ops.layer_norm_2d_backward(dnormed, x, p.norm_weight, mean, rstd)
    parameters = (dnorm_weight, dnorm_bias, dconv1_weight, dconv1_bias, dconv2_weight, dconv2_bias, dgamma)
    return [dy + dresidual, *parameters]
