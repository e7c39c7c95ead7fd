"""What every operator means: short, differentiable functions in plain PyTorch.

`r2r_kernels.functional` has the same names and signatures on fused kernels, and is tested against this page. All
functions take any memory format and any float dtype. Statistics, similarities and the sigmoid of half-precision
inputs are computed in float32, because activations of trained NAFNets reach +-175, whose squares overflow float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["hard", "multi", "soft"]


class NAFBlockParams(NamedTuple):
    """Parameters of one NAF block with C channels, named as in NAFNet's checkpoints (ECCV 2022).

    `norm*` [C]; `conv1`, `conv4` [2C, C, 1, 1]; `conv2` [2C, 1, 3, 3]; `sca`, `conv3`, `conv5` [C, C, 1, 1]; biases
    of the same number of outputs; `beta`, `gamma` [1, C, 1, 1].
    """

    norm1_weight: Tensor
    norm1_bias: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor
    sca_weight: Tensor
    sca_bias: Tensor
    conv3_weight: Tensor
    conv3_bias: Tensor
    beta: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    conv4_weight: Tensor
    conv4_bias: Tensor
    conv5_weight: Tensor
    conv5_bias: Tensor
    gamma: Tensor


class GatedFeedForwardParams(NamedTuple):
    """Parameters of the feed-forward branch of a NAF block with C channels, its second half.

    `norm_*` [C]; `conv1_weight` [2C, C, 1, 1]; `conv2_weight` [C, C, 1, 1]; biases of the same number of outputs;
    `gamma` [1, C, 1, 1].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor
    gamma: Tensor


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require(condition: Tensor, message: str) -> None:
    """ValueError on a CPU. On a GPU the device stops with an assertion, because the host must not wait to find out."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def averaging(inner: int, outer: int, like: Tensor) -> Tensor:
    """[outer, inner], rows that sum to 1: adaptive average pooling of `inner` values to `outer`, as a matrix."""
    place, pixel = torch.arange(outer, device=like.device)[:, None], torch.arange(inner, device=like.device)
    inside = (pixel >= place * inner // outer) & (pixel < ((place + 1) * inner + outer - 1) // outer)
    return inside.to(torch.promote_types(like.dtype, torch.float32)) / inside.sum(1, keepdim=True)


def area_resize(x: Tensor, height: int, width: int) -> Tensor:
    """[N, C, H, W] -> [N, C, height, width], each value the mean of the area it covers."""
    if torch.compiler.is_compiling():  # pooling, and the question whether it is needed, would hold for some sizes only
        down, across = averaging(x.shape[2], height, x), averaging(x.shape[3], width, x)
        return (down @ x.to(down.dtype) @ across.T).to(x.dtype)
    return x if (height, width) == x.shape[2:] else F.adaptive_avg_pool2d(x, (height, width))


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise each pixel of x [N, C, H, W] over its channels; weight, bias [C] (NAFNet's LayerNorm2d)."""
    wide = _at_least_float32(x)
    centred = wide - wide.mean(1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    return (normed * weight[:, None, None] + bias[:, None, None]).to(x.dtype)


def simple_gate(x: Tensor) -> Tensor:
    """First half of the channels times the second half: [N, 2C, H, W] -> [N, C, H, W] (NAFNet, section 3.4)."""
    first, second = x.chunk(2, dim=1)
    return first * second


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """3x3 depthwise convolution, SimpleGate, and the spatial mean of the result.

    x [N, 2C, H, W], weight [2C, 1, 3, 3], bias [2C] -> gated [N, C, H, W], mean [N, C, 1, 1].
    """
    gated = simple_gate(F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]))
    return gated, gated.mean((2, 3), keepdim=True)


def upsample_add(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    """1x1 convolution without bias, PixelShuffle(2), and the skip added (the decoder of NAFNet and R2R).

    x [N, 2C, h, w], weight [4C, 2C, 1, 1], skip [N, C, 2h, 2w] -> [N, C, 2h, 2w].
    """
    return F.pixel_shuffle(F.conv2d(x, weight), 2) + skip


def window_averaging(length: int, window: int, device: torch.device) -> Tensor:
    """Which pixels of an axis the window around each one holds, as a float64 matrix [length, length] of weights.

    The window begins (window - 1) // 2 pixels before its own, and is moved inside where it would cross an end of the
    axis; one that is longer than the axis holds all of it.
    """
    window = min(window, length)
    pixel = torch.arange(length, device=device)
    begin = (pixel - (window - 1) // 2).clamp(max=length - window).clamp(min=0)[:, None]
    return ((pixel >= begin) & (pixel < begin + window)).double() / window


def local_mean_2d(x: Tensor, window: Sequence[int]) -> Tensor:
    """The mean over a window (height, width) around each pixel, moved inside the image at its borders; see
    `window_averaging`.

    x [N, C, H, W] -> [N, C, H, W]. Local inference pools so (TLC, Chu et al., ECCV 2022; the borders as in NAFNet's
    code).
    """
    wide = _at_least_float32(x)
    down, across = (window_averaging(x.shape[dim], window[dim - 2], x.device).to(wide.dtype) for dim in (2, 3))
    return (down @ wide @ across.T).to(x.dtype)


def naf_block(x: Tensor, params: NAFBlockParams, eps: float = 1e-6, window: Sequence[int] | None = None) -> Tensor:
    """A whole NAF block without dropout: x [N, C, H, W] -> [N, C, H, W] (NAFNet, figure 3 and section 3.4).

    With a window (height, width) the channel attention of a pixel comes from the mean over the window around it
    (`local_mean_2d`) instead of the image's: NAFNet's local inference (TLC).
    """
    y = x + _attention_branch(x, params, eps, window) * params.beta
    return gated_feed_forward(y, GatedFeedForwardParams(*params[11:]), eps)


def _attention_branch(x: Tensor, p: NAFBlockParams, eps: float, window: Sequence[int] | None) -> Tensor:
    hidden = F.conv2d(layer_norm_2d(x, p.norm1_weight, p.norm1_bias, eps), p.conv1_weight, p.conv1_bias)
    gated, mean = depthwise_gate(hidden, p.conv2_weight, p.conv2_bias)
    if window is not None:
        mean = local_mean_2d(gated, window)
    return F.conv2d(gated * F.conv2d(mean, p.sca_weight, p.sca_bias), p.conv3_weight, p.conv3_bias)


def gated_feed_forward(x: Tensor, params: GatedFeedForwardParams, eps: float = 1e-6) -> Tensor:
    """The feed-forward branch of a NAF block, its second half (NAFNet, figure 3).

    x + gamma * conv2(simple_gate(conv1(layer_norm_2d(x)))).

    x [N, C, H, W] -> [N, C, H, W].
    """
    p = params
    hidden = F.conv2d(layer_norm_2d(x, p.norm_weight, p.norm_bias, eps), p.conv1_weight, p.conv1_bias)
    return x + F.conv2d(simple_gate(hidden), p.conv2_weight, p.conv2_bias) * p.gamma


def task_mask(scores: Tensor, task: Tensor | int | None, mode: Mode) -> Tensor:
    """Which tasks take part: scores [N, T] -> bool [N, T].

    A told `task` (an index, indices [N], or a bool mask [N, T]) settles it. Blind, "hard" takes the best score,
    "multi" every score above 0 (the best one where none is), "soft" all that hold slots (score above -inf).
    """
    number, tasks = scores.shape
    best = F.one_hot(scores.argmax(1), tasks).bool() if number else torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(task, Tensor) and task.dtype == torch.bool:
        return task.expand(number, tasks)
    if task is not None:
        index = torch.as_tensor(task, device=scores.device).expand(number)
        return index[:, None] == torch.arange(tasks, device=scores.device)
    if mode == "hard":
        return best
    if mode == "multi":
        above = scores > 0
        return torch.where(above.any(1, keepdim=True), above, best)
    return scores > -torch.inf


def bank_retrieve(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor | float,
    task: Tensor | int | None = None,
    mode: Mode = "hard",
) -> tuple[Tensor, Tensor]:
    """Retrieve from the bank what fits the query (R2R, section 3.3).

    query [N, Ck, h, w]; keys [T, S, Ck, h, w]; values [T, S, Cv, h, w]; counts [T], the slots in use of each task;
    scale, a number or a 0-d tensor; task and mode as in `task_mask`. Returns the readout [N, Cv, h, w] and the
    scores [N, T].

    Raises ValueError where a told task is out of range or holds no slots; on a GPU, where the host must not wait to
    find out, the device stops with an assertion instead.

    S = scale * cosine(query, key). A task's score is the mean of S over its slots, -inf where it holds none. The
    readout is the sum of the values weighted by the softmax of S over all slots of the tasks that take part.
    """
    tasks, slots = keys.shape[:2]
    if isinstance(task, Tensor) and task.dtype != torch.bool:
        require(((task >= 0) & (task < tasks)).all(), f"told tasks must be 0 to {tasks - 1}")
    unit_query = F.normalize(_at_least_float32(query).flatten(1), dim=1)
    unit_keys = F.normalize(_at_least_float32(keys).flatten(2), dim=2)
    used = torch.arange(slots, device=keys.device) < counts[:, None]
    similarity = scale * torch.einsum("nd,tsd->nts", unit_query, unit_keys)
    scores = torch.where(used, similarity, 0).sum(2) / counts.clamp(min=1)
    scores = scores.masked_fill(counts == 0, -torch.inf)
    similarity = similarity.masked_fill(~used, -torch.inf)

    taking_part = task_mask(scores, task, mode)
    require((taking_part & (counts > 0)).any(1).all(), "a task that takes part holds no slots in the bank")
    weights = similarity.masked_fill(~taking_part[:, :, None], -torch.inf).flatten(1).softmax(1)
    readout = weights @ _at_least_float32(values).flatten(0, 1).flatten(1)
    return readout.view(-1, *values.shape[2:]).to(values.dtype), scores


def slot_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise (k, 3, 3) convolution along the slots, with weights of its own for each task (R2R, section 3.2).

    x [T, S, C, h, w], weight [T, C, k, 3, 3], bias [T, C] -> [T, S - k + 1, C, h, w]. Zero padding in space only.
    """
    tasks, slots, channels, height, width = x.shape
    flat = x.transpose(1, 2).reshape(1, tasks * channels, slots, height, width)
    out = F.conv3d(flat, weight.flatten(0, 1)[:, None], bias.flatten(), padding=(0, 1, 1), groups=tasks * channels)
    return out.view(tasks, channels, -1, height, width).transpose(1, 2)


def gated_conv(x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Blend x with the prior through a gate computed from both (R2R, section 3.4).

    x [N, C, H, W]; prior [N, C, H, W], or [N, C, h, w] which is then area-resized; weight [C, 2, k, k], k = 1 or 3;
    bias [C]. gate = sigmoid(grouped convolution of the channels (x_0, prior_0, x_1, prior_1, ...)), C groups;
    returns x * (1 - gate) + prior * gate.
    """
    prior = area_resize(prior, x.shape[2], x.shape[3])
    both = torch.stack((x, prior), dim=2).flatten(1, 2)
    logits = F.conv2d(both, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    gate = _at_least_float32(logits).sigmoid().to(x.dtype)
    return x * (1 - gate) + prior * gate
