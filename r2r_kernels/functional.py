"""The fused operators: names, signatures and answers of `r2r_kernels.reference`, on any device.

Activations are float tensors [N, C, H, W] of any memory format, which the results keep; parameters have the same dtype
(under autocast: any float dtype) and device. What does not fit raises a ValueError, or a TypeError for a dtype, in one
line that names the argument, what was got and what is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import implementation  # the package registers torch.ops.r2r
from r2r_kernels.operators.layout import dense
from r2r_kernels.reference import GatedFeedForwardParams, Mode, NAFBlockParams, task_mask

__all__ = [
    "GatedFeedForwardParams",
    "NAFBlockParams",
    "bank_retrieve",
    "depthwise_gate",
    "gated_conv",
    "gated_feed_forward",
    "layer_norm_2d",
    "local_mean_2d",
    "naf_block",
    "simple_gate",
    "slot_conv",
    "task_mask",
    "upsample_add",
]


def _check_images(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a float dtype, got {x.dtype}")


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
    if parameter.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} to fit x {list(x.shape)}, got {list(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as x is, got {parameter.device}")
    if parameter.dtype != x.dtype:
        cast = torch.is_autocast_enabled(x.device.type)
        if not (cast and parameter.is_floating_point()):
            raise TypeError(f"{name} must be {x.dtype} as x is, got {parameter.dtype}")


def _check_even(name: str, x: Tensor) -> None:
    if x.shape[1] % 2:
        raise ValueError(f"{name} must have an even number of channels, got {list(x.shape)}")


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise each pixel of x [N, C, H, W] over its channels; weight, bias [C] (NAFNet's LayerNorm2d)."""
    _check_images("x", x)
    _check_parameter("weight", weight, (x.shape[1],), x)
    _check_parameter("bias", bias, (x.shape[1],), x)
    return torch.ops.r2r.layer_norm_2d(x, weight, bias, eps)[0]


def simple_gate(x: Tensor) -> Tensor:
    """First half of the channels times the second half: [N, 2C, H, W] -> [N, C, H, W] (NAFNet, section 3.4)."""
    _check_images("x", x)
    _check_even("x", x)
    plain = x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if plain and implementation.of(x) != "triton":
        return dense(reference.simple_gate(x), x)  # one pass as well, and 0.1 ms less on the way there
    return torch.ops.r2r.simple_gate(x)


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """3x3 depthwise convolution, SimpleGate, and the spatial mean of the result, in one pass.

    x [N, 2C, H, W], weight [2C, 1, 3, 3], bias [2C] -> gated [N, C, H, W], mean [N, C, 1, 1].
    """
    _check_images("x", x)
    _check_even("x", x)
    _check_parameter("weight", weight, (x.shape[1], 1, 3, 3), x)
    _check_parameter("bias", bias, (x.shape[1],), x)
    return torch.ops.r2r.depthwise_gate(x, weight, bias)


def upsample_add(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    """1x1 convolution without bias, PixelShuffle(2), and the skip added, in one pass (the decoder of NAFNet and R2R).

    x [N, 2C, h, w], weight [4C, 2C, 1, 1], skip [N, C, 2h, 2w] -> [N, C, 2h, 2w].
    """
    _check_images("x", x)
    _check_even("x", x)
    n, wide, h, w = x.shape
    _check_parameter("weight", weight, (2 * wide, wide, 1, 1), x)
    _check_parameter("skip", skip, (n, wide // 2, 2 * h, 2 * w), x)
    return torch.ops.r2r.upsample_add(x, weight, skip)


def local_mean_2d(x: Tensor, window: Sequence[int]) -> Tensor:
    """The mean over a window (height, width) around each pixel, moved inside the image at its borders.

    x [N, C, H, W] -> [N, C, H, W]; a window larger than the image is the image. Local inference pools so (TLC, Chu et
    al., ECCV 2022). The cost does not depend on the window.
    """
    _check_images("x", x)
    _check_window(window)
    return torch.ops.r2r.local_mean_2d(x, window)


def _check_window(window: Sequence[int]) -> None:
    if not isinstance(window, (tuple, list)) or any(isinstance(w, bool) or not isinstance(w, int) for w in window):
        raise TypeError(f"window must be a pair of whole numbers, got {window!r}")
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"window must be (height, width), both 1 or more, got {tuple(window)}")


def _check_parameters(kind: Any, params: Sequence[Tensor], shapes: tuple[tuple[int, ...], ...], x: Tensor) -> None:
    """As many as the named tuple `kind` has, of these shapes."""
    if not isinstance(params, (tuple, list)):
        raise TypeError(f"params must be a {kind.__name__}, got {type(params).__name__}")
    if len(params) != len(kind._fields):
        raise ValueError(f"params must be the {len(kind._fields)} of {kind.__name__}, got {len(params)}")
    for name, parameter, shape in zip(kind._fields, params, shapes, strict=True):
        _check_parameter(name, parameter, shape, x)


def naf_block_shapes(channels: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a NAF block's parameters, in the order of NAFBlockParams."""
    c = channels
    norm, wide, narrow, scale = ((c,), (c,)), ((2 * c, c, 1, 1), (2 * c,)), ((c, c, 1, 1), (c,)), ((1, c, 1, 1),)
    depthwise = ((2 * c, 1, 3, 3), (2 * c,))
    return (*norm, *wide, *depthwise, *narrow, *narrow, *scale, *norm, *wide, *narrow, *scale)


def naf_block(x: Tensor, params: NAFBlockParams, eps: float = 1e-6, window: Sequence[int] | None = None) -> Tensor:
    """A whole NAF block without dropout: x [N, C, H, W] -> [N, C, H, W] (NAFNet, figure 3 and section 3.4).

    With a window (height, width) the channel attention of a pixel comes from the mean over the window around it
    (`local_mean_2d`) instead of the image's: NAFNet's local inference (TLC). Training keeps x alone and computes the
    rest again in the backward pass; with a window smaller than the image it keeps what its parts keep.
    """
    _check_images("x", x)
    _check_parameters(NAFBlockParams, params, naf_block_shapes(x.shape[1]), x)
    if window is not None:
        _check_window(window)
        return torch.ops.r2r.local_naf_block(x, list(params), eps, window)
    return torch.ops.r2r.naf_block(x, list(params), eps)


def gated_feed_forward_shapes(channels: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of the parameters of a NAF block's feed-forward branch, in the order of GatedFeedForwardParams."""
    return naf_block_shapes(channels)[11:]


def gated_feed_forward(x: Tensor, params: GatedFeedForwardParams, eps: float = 1e-6) -> Tensor:
    """The feed-forward branch of a NAF block, its second half (NAFNet, figure 3).

    x + gamma * conv2(simple_gate(conv1(layer_norm_2d(x)))).

    x [N, C, H, W] -> [N, C, H, W]. Training keeps x alone and computes the rest again in the backward pass.
    """
    _check_images("x", x)
    _check_parameters(GatedFeedForwardParams, params, gated_feed_forward_shapes(x.shape[1]), x)
    return torch.ops.r2r.gated_feed_forward(x, list(params), eps)


def gated_conv(x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Blend x with the prior through a gate computed from both (R2R, section 3.4), in one pass.

    x [N, C, H, W]; prior [N, C, H, W], or [N, C, h, w] which is then area-resized; weight [C, 2, k, k], k = 1 or 3;
    bias [C] -> [N, C, H, W].
    """
    _check_images("x", x)
    _check_images("prior", prior)
    n, channels = x.shape[:2]
    if prior.shape[:2] != (n, channels) or not (prior.shape[2] and prior.shape[3]):
        wanted = f"[{n}, {channels}, h, w] with h, w >= 1"
        raise ValueError(f"prior must be {wanted} to fit x {list(x.shape)}, got {list(prior.shape)}")
    _check_parameter("prior", prior, tuple(prior.shape), x)
    kernel = 1 if isinstance(weight, Tensor) and weight.shape[-1:] == (1,) else 3
    if isinstance(weight, Tensor) and weight.shape != (channels, 2, kernel, kernel):
        wanted = f"[{channels}, 2, k, k] with k = 1 or 3"
        raise ValueError(f"weight must be {wanted} to fit x {list(x.shape)}, got {list(weight.shape)}")
    _check_parameter("weight", weight, (channels, 2, kernel, kernel), x)
    _check_parameter("bias", bias, (channels,), x)
    return torch.ops.r2r.gated_conv(x, prior, weight, bias)


def _check_slots(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 5:
        raise ValueError(f"{name} must be [T, S, C, h, w], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a float dtype, got {x.dtype}")


def slot_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise (k, 3, 3) convolution along the slots, with weights of its own for each task (R2R, section 3.2).

    x [T, S, C, h, w], weight [T, C, k, 3, 3], bias [T, C] -> [T, S - k + 1, C, h, w], contiguous. Zero padding in space
    only.
    """
    _check_slots("x", x)
    tasks, slots, channels = x.shape[:3]
    kernel = weight.shape[2] if isinstance(weight, Tensor) and weight.dim() == 5 else 1
    if not 1 <= kernel <= slots:
        raise ValueError(f"weight must have 1 to {slots} slots as x {list(x.shape)} has, got {list(weight.shape)}")
    _check_parameter("weight", weight, (tasks, channels, kernel, 3, 3), x)
    _check_parameter("bias", bias, (tasks, channels), x)
    return torch.ops.r2r.slot_conv(x, weight, bias)


def _check_told(task: Tensor | int, number: int, tasks: int, device: torch.device) -> Tensor:
    """The told task as a tensor on `device`; what the host knows is checked here, the rest by the operator."""
    if not isinstance(task, Tensor):
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"task must be an index, a tensor or None, got {type(task).__name__}")
        if not 0 <= task < tasks:
            raise ValueError(f"told tasks must be 0 to {tasks - 1}, got {task}")
        return torch.full((), task, dtype=torch.int64, device=device)
    if task.dtype == torch.bool:
        wanted: tuple[tuple[int, ...], ...] = ((number, tasks), (1, tasks), (tasks,))
    elif task.is_floating_point() or task.is_complex():
        raise TypeError(f"task must be of an integer dtype or bool, got {task.dtype}")
    else:
        wanted = ((number,), (1,), ())
    if tuple(task.shape) not in wanted:
        raise ValueError(f"task must be {list(wanted[0])} for {number} queries, got {list(task.shape)}")
    if task.device != device:
        if task.device.type != "cpu":
            raise ValueError(f"task must be on {device} as query is, got {task.device}")
        if task.dtype != torch.bool and not ((task >= 0) & (task < tasks)).all():
            raise ValueError(f"told tasks must be 0 to {tasks - 1}, got {task.tolist()}")
    return task.to(device, non_blocking=True)


def bank_retrieve(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor | float,
    task: Tensor | int | None = None,
    mode: Mode = "hard",
) -> tuple[Tensor, Tensor]:
    """Retrieve from the bank what fits the query (R2R, section 3.3); see `reference.bank_retrieve` for the meaning.

    query [N, Ck, h, w]; keys [T, S, Ck, h, w]; values [T, S, Cv, h, w]; counts int64 [T], the slots in use of each
    task; scale, a number or a 0-d tensor; task: None, an index, indices [N], or a bool mask [N, T]; mode "hard",
    "multi" or "soft". Under autocast the query takes the bank's dtype. Returns the readout [N, Cv, h, w] and the scores
    [N, T].

    Tasks told by a tensor on a GPU, and whether they hold slots, are checked there, as the host must not wait: the
    device stops with an assertion, seen as a RuntimeError at the next synchronisation. All else is a ValueError or a
    TypeError.
    """
    _check_images("query", query)
    _check_slots("keys", keys)
    _check_slots("values", values)
    tasks, slots = keys.shape[:2]
    if keys.shape[2:] != query.shape[1:]:
        raise ValueError(f"keys must be {['T', 'S', *query.shape[1:]]} to fit the query, got {list(keys.shape)}")
    if values.shape[:2] != keys.shape[:2] or values.shape[3:] != keys.shape[3:]:
        wanted = [tasks, slots, "Cv", *keys.shape[3:]]
        raise ValueError(f"values must be {wanted} to fit the keys, got {list(values.shape)}")
    if not tasks or not slots:
        raise ValueError(f"keys must hold a task and a slot at least, got {list(keys.shape)}")
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
        raise TypeError(f"counts must be an int64 tensor, got {getattr(counts, 'dtype', type(counts).__name__)}")
    if counts.shape != (tasks,):
        raise ValueError(f"counts must be {[tasks]} to fit the keys, got {list(counts.shape)}")
    if mode not in ("hard", "multi", "soft"):
        raise ValueError(f'mode must be "hard", "multi" or "soft", got {mode!r}')
    for name, tensor in (("keys", keys), ("values", values), ("counts", counts)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as query is, got {tensor.device}")
    if values.dtype != keys.dtype:
        raise TypeError(f"values must be {keys.dtype} as keys are, got {values.dtype}")
    if query.dtype != keys.dtype:
        if not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"keys must be {query.dtype} as query is, got {keys.dtype}")
        query = query.to(keys.dtype)
    wide = torch.promote_types(query.dtype, torch.float32)
    if not isinstance(scale, Tensor):
        scale = torch.full((), float(scale), dtype=wide, device=query.device)
    elif scale.dim() or not scale.is_floating_point() or scale.device != query.device:
        raise ValueError(
            f"scale must be a number or a 0-d float tensor on {query.device}, got {scale.dtype} {list(scale.shape)} on "
            f"{scale.device}"
        )
    told = None if task is None else _check_told(task, query.shape[0], tasks, query.device)
    readout, scores, _ = torch.ops.r2r.bank_retrieve(query, keys, values, counts, scale, told, mode)
    return readout, scores
