"""What the operators and the model are held against, each under one name everywhere.

"eager as published" computes as the published code does, on contiguous images. "eager channels_last" is the plain
PyTorch of `r2r_kernels.reference` in that memory format ("eager reference": where there are no images), and what
`torch.compile` compiles. "ours" is
`r2r_kernels.functional` or `r2r.fast`, in channels_last where there are images. A rival is prepared (built, compiled,
captured) before it is timed; one that cannot be is a row that says why.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import r2r_kernels
from benchmarks.published import AS_PUBLISHED, as_published
from benchmarks.runs import EAGER, OURS
from benchmarks.runtimes import ONNX_RUNTIME, OPENVINO, onnx_runtime, openvino
from benchmarks.timing import QUICK, Contender, Effort, Unavailable
from r2r import R2R
from r2r.fast import R2R as FastR2R
from r2r.losses import LossWeights, restoration_loss
from r2r.presets import PRESETS
from r2r.tiling import restore_photo
from r2r_kernels import functional, reference
from r2r_kernels.nn import LayerNorm2d, NAFBlock, OperatorModule
from r2r_kernels.reference import GatedFeedForwardParams

CHANNELS_LAST = "eager channels_last"
REFERENCE = "eager reference"
COMPILE = "torch.compile"
MAX_AUTOTUNE = "torch.compile max-autotune"
FROZEN = "ours frozen"
EXACT = "eager in float32"
GRAPH = "ours CUDA graph"

TOO_LONG = "left out of a {} run: preparing the whole model takes a minute or more"
NOT_TUNED = "left out of a {} run"

TASKS = ("denoise", "derain", "dehaze", "deblur", "lowlight")

Function = Callable[..., Any]


@dataclass(frozen=True)
class Rival:
    """timed: False for one that is only there for its answers, the first."""

    name: str
    prepare: Callable[[], Contender]
    timed: bool = True


def unavailable(name: str, reason: str) -> Rival:
    def prepare() -> Contender:
        raise Unavailable(reason)

    return Rival(name, prepare)


def tensors_of(answer: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, dict):
        answer = list(answer.values())
    return [t for one in answer for t in tensors_of(one)] if isinstance(answer, list | tuple) else []


# -- operators ----------------------------------------------------------------------------------------------------


def published_form(module: nn.Module) -> nn.Module:
    """A copy that computes as the published code does."""
    module = copy.deepcopy(module)
    for part in module.modules():
        part.__class__ = AS_PUBLISHED.get(type(part), type(part))
    return module


def operator_rivals(
    operator: str,
    module: OperatorModule,
    inputs: Sequence[Tensor],
    published: nn.Module | None = None,
    backward: bool = False,
    images: bool = True,
    effort: Effort = QUICK,
    compiling: bool = True,
) -> list[Rival]:
    """The rivals of one operator, given its eager module and what that is called with.

    operator: its name in `r2r_kernels.functional`. published: the module as published, where it is not known by its
    class. backward: float inputs and parameters get gradients. images: channels_last means something. compiling: with
    the rivals that compile. In half precision answers are compared with those of float32, as sums over a large image
    leave eager's own gradients with few digits.
    """
    gpu = inputs[0].is_cuda
    fused = copy.deepcopy(module)
    for part in fused.modules():
        if isinstance(part, OperatorModule):
            part.eager = False
    same = getattr(functional, operator) is getattr(reference, operator)
    note = "plain PyTorch so far" if same else ""

    def call(
        source: nn.Module, channels_last: bool, mode: str | None = "", dtype: torch.dtype | None = None
    ) -> Callable[[], Any]:
        layout = torch.channels_last if channels_last and images else torch.contiguous_format
        given = [x.detach().clone(memory_format=layout if x.dim() == 4 else torch.contiguous_format) for x in inputs]
        given = [x.to(dtype) if dtype and x.is_floating_point() else x for x in given]
        owned = copy.deepcopy(source).to(dtype=dtype)
        if layout is torch.channels_last:
            owned = owned.to(memory_format=layout)  # type: ignore[call-overload]
        function = owned if mode == "" else torch.compile(owned, mode=mode, dynamic=False)
        if not backward:
            return functools.partial(forward, function, given)
        wanted = [x.requires_grad_() for x in given if x.is_floating_point()] + list(owned.parameters())
        start = [seed.to(dtype or seed.dtype) for seed in seeds(module, inputs)]
        start = [seed.contiguous(memory_format=layout) if seed.dim() == 4 else seed for seed in start]
        return functools.partial(forward_backward, function, given, wanted, start)

    def rival(name: str, source: nn.Module, channels_last: bool, mode: str | None = "", note: str = "") -> Rival:
        return Rival(name, lambda: Contender({"": call(source, channels_last, mode)}, note, compiles=mode != ""))

    rivals = [rival(EAGER, published or published_form(module), False)]
    if inputs[0].dtype != torch.float32:
        exact = Rival(EXACT, lambda: Contender({"": call(module, False, dtype=torch.float32)}), timed=False)
        rivals.insert(0, exact)
    rivals.append(rival(CHANNELS_LAST if images else REFERENCE, module, True))
    if compiling:
        rivals.append(rival(COMPILE, module, True, None))
    if compiling and gpu:
        tuned = rival(MAX_AUTOTUNE, module, True, "max-autotune")
        rivals.append(tuned if effort.tunes else unavailable(MAX_AUTOTUNE, NOT_TUNED.format(effort.name)))
    rivals.append(rival(OURS, fused, True, note=note))
    if gpu and not backward:
        rivals.append(Rival(GRAPH, lambda: captured(call(fused, True), note)))
    return rivals


class DepthwiseGate(OperatorModule):
    """The operator with parameters; as a module it exists only inside a NAF block."""

    def __init__(self, channels: int, eager: bool = True) -> None:
        super().__init__(eager)
        self.conv = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)

    def forward(self, x: Tensor) -> Any:
        return self.ops.depthwise_gate(x, self.conv.weight, self.conv.bias)


class PublishedDepthwiseGate(DepthwiseGate):
    def forward(self, x: Tensor) -> Any:
        first, second = self.conv(x).chunk(2, dim=1)
        gated = first * second
        return gated, nn.functional.adaptive_avg_pool2d(gated, 1)


class GatedFeedForward(OperatorModule):
    """As above; the second half of a block."""

    def __init__(self, channels: int, eager: bool = True) -> None:
        super().__init__(eager)
        self.norm = LayerNorm2d(channels, eager=eager)
        self.conv1, self.conv2 = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Any:
        norm, conv1, conv2 = ((part.weight, part.bias) for part in (self.norm, self.conv1, self.conv2))
        params: Any = (*norm, *conv1, *conv2, self.gamma)
        return self.ops.gated_feed_forward(x, GatedFeedForwardParams(*params), self.norm.eps)


class PublishedGatedFeedForward(GatedFeedForward):
    def forward(self, x: Tensor) -> Any:
        first, second = self.conv1(self.norm(x)).chunk(2, dim=1)
        return x + self.conv2(first * second) * self.gamma


class UpsampleAdd(OperatorModule):
    """As above; in the model it is a part of the decoder."""

    def __init__(self, channels: int, eager: bool = True) -> None:
        super().__init__(eager)
        self.conv = nn.Conv2d(2 * channels, 4 * channels, 1, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.ops.upsample_add(x, self.conv.weight, skip)


@torch.inference_mode()
def forward(function: Function, inputs: Sequence[Tensor]) -> Any:
    return function(*inputs)


def forward_backward(
    function: Function, inputs: Sequence[Tensor], wanted: Sequence[Tensor], start: Sequence[Tensor]
) -> Any:
    """Outputs, and the gradients of what is `wanted` that `start` from these gradients of the outputs."""
    outputs = tensors_of(function(*inputs))
    return outputs, torch.autograd.grad(outputs, wanted, start)


@torch.no_grad()
def seeds(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient for each output, the same for all rivals."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out) for out in tensors_of(function(*inputs))]


def captured(call: Callable[[], Any], note: str = "") -> Contender:
    """Replays of a CUDA graph of the call; its answers lie in the graph's own memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = call()

    def replay() -> Any:
        graph.replay()
        return answer

    return Contender({"": replay}, note)


# -- the whole model ----------------------------------------------------------------------------------------------


@functools.cache
def _weights(preset: str) -> R2R:
    """A model with blocks that do something, and a bank whose second task every photo clearly matches, so that no
    rounding changes the choice. The published similarity: all rivals compute the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = R2R(tasks=TASKS, similarity="published", **PRESETS[preset])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("beta", "gamma")) or name.startswith("ending."):  # which start at 0
                    parameter.normal_(std=0.1)
            size = model.bank.size * model.stride
            query, _ = model.query(model.encode(torch.rand(1, 3, size, size)).deep)
            keys = query.std() * torch.randn_like(model.bank.keys)
            keys[1] += query[0]
        model.bank.replace(keys, torch.rand_like(model.bank.values), torch.ones(len(TASKS), dtype=torch.bool))
    return model


def build_model(rival: str, preset: str, device: torch.device, dtype: torch.dtype, training: bool = False) -> R2R:
    """The model of that rival, not yet compiled or captured; the same weights and bank for each."""
    source = _weights(preset)
    if rival.startswith(OURS):
        model: R2R = FastR2R(**source.config)
        model.load_state_dict(source.state_dict())
    else:
        model = copy.deepcopy(source)
    model.train(training)
    if training:
        assert model.amalgamator is not None
        model.amalgamator.shuffle = False  # all rivals fill the same slots
    else:
        model.freeze_bank()
    model.to(device=device, dtype=dtype)
    if rival == EAGER:
        return as_published(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def freeze(model: nn.Module, dtype: torch.dtype) -> Any:
    if not hasattr(model, "freeze"):
        raise Unavailable("r2r.fast.R2R has no freeze() yet")
    return model.freeze(dtype=dtype)  # type: ignore[operator]


def inference_rivals(
    preset: str, lq: Tensor, dtype: torch.dtype, effort: Effort = QUICK, compiling: bool = True
) -> list[Rival]:
    """Restoring lq [N, 3, H, W], blind. compiling: also the rivals that compile the whole model, minutes on a CPU."""
    device = lq.device

    def call(function: Function, channels_last: bool) -> Callable[[], Any]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return functools.partial(forward, function, [lq.to(dtype).contiguous(memory_format=layout)])

    def eager(name: str) -> Rival:
        return Rival(name, lambda: Contender({"": call(build_model(name, preset, device, dtype), name != EAGER)}))

    def compiled(name: str, mode: str | None) -> Rival:
        if not (effort.compiles_models if name == COMPILE else effort.tunes):
            return unavailable(name, TOO_LONG.format(effort.name))

        def prepare() -> Contender:
            model = build_model(name, preset, device, dtype)
            return Contender({"": call(torch.compile(model, mode=mode, dynamic=False), True)}, compiles=True)

        return Rival(name, prepare)

    def frozen() -> Contender:
        return Contender({"": call(freeze(build_model(FROZEN, preset, device, torch.float32), dtype), True)})

    rivals = [eager(EAGER), eager(CHANNELS_LAST)]
    if compiling:
        rivals.append(compiled(COMPILE, None))
        if device.type == "cuda":
            rivals.append(compiled(MAX_AUTOTUNE, "max-autotune"))
    if compiling and device.type == "cpu":
        source = functools.partial(build_model, CHANNELS_LAST, preset, device, torch.float32)
        for name, make in ((ONNX_RUNTIME, onnx_runtime), (OPENVINO, openvino)):
            rivals.append(
                Rival(name, functools.partial(make, source, preset, lq, dtype))
                if effort.compiles_models
                else unavailable(name, TOO_LONG.format(effort.name))
            )
    rivals += [eager(OURS), Rival(FROZEN, frozen)]
    if device.type == "cuda":
        rivals.append(Rival(GRAPH, lambda: captured(call(build_model(GRAPH, preset, device, dtype), True))))
    return rivals


def nafnet_rivals(net: nn.Module, image: Tensor, effort: Effort = QUICK) -> list[Rival]:
    """Restoring image [N, 3, H, W] with a published NAFNet; ours is that, accelerated, and nothing else changed."""

    def call(
        build: Callable[[], Function], channels_last: bool = False, compiles: bool = False
    ) -> Callable[[], Contender]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        given = [image.contiguous(memory_format=layout)]
        return lambda: Contender({"": functools.partial(forward, build(), given)}, compiles=compiles)

    def channels_last() -> nn.Module:
        return copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def accelerated() -> nn.Module:
        swapped = published_form(net)
        r2r_kernels.accelerate(swapped)
        return swapped

    compiled = Rival(COMPILE, call(lambda: torch.compile(channels_last(), dynamic=False), True, True))
    return [
        Rival(EAGER, call(lambda: published_form(net))),
        Rival(CHANNELS_LAST, call(channels_last, True)),
        compiled if effort.compiles_models else unavailable(COMPILE, TOO_LONG.format(effort.name)),
        Rival(OURS, call(accelerated)),
    ]


def photo_rivals(
    preset: str, pixels: np.ndarray, device: torch.device, effort: Effort = QUICK, compiling: bool = True
) -> list[Rival]:
    """Restoring one photo, float32 [H, W, 3], as `r2r restore` does: in tiles where it is large."""

    def restoring(model: Any, compiles: bool = False) -> Contender:
        return Contender({"": lambda: torch.from_numpy(restore_photo(model, pixels).pixels)}, compiles=compiles)

    def plain(name: str) -> Rival:
        return Rival(name, lambda: restoring(build_model(name, preset, device, torch.float32)))

    def compiled() -> Contender:
        model = build_model(COMPILE, preset, device, torch.float32)
        for part in (model.encoder, model.decoder):
            part.compile(dynamic=False)  # one compilation for each shape of tile
        return restoring(model, compiles=True)

    def frozen() -> Contender:
        return restoring(freeze(build_model(FROZEN, preset, device, torch.float32), torch.float32))

    rivals = [plain(EAGER), plain(CHANNELS_LAST)]
    if compiling:
        left_out = unavailable(COMPILE, TOO_LONG.format(effort.name))
        rivals.append(Rival(COMPILE, compiled) if effort.compiles_models else left_out)
    return [*rivals, plain(OURS), Rival(FROZEN, frozen)]


def training_rivals(
    preset: str, device: torch.device, dtype: torch.dtype, batch: Sequence[Tensor], effort: Effort = QUICK
) -> list[Rival]:
    """One step of pretraining. batch: (LQ, HQ, labels); the first half is restored, the second builds the bank. dtype:
    of autocast. Where nothing is tuned the NAF blocks are compiled one by one, as PyTorch advises for a model that
    repeats blocks, since compiling the whole model takes minutes."""

    def step(name: str, mode: str | None = "") -> Contender:
        model = build_model(name, preset, device, torch.float32, training=True)
        layout = torch.contiguous_format if name == EAGER else torch.channels_last
        lq, hq = (x.contiguous(memory_format=layout) for x in batch[:2])
        labels, half = batch[2], len(batch[2]) // 2
        reference_pairs = (lq[half:], hq[half:], labels[half:])
        optimiser = torch.optim.Adam(model.parameters(), lr=0.0)
        run: Callable[..., Any] = model
        note = ""
        if mode != "" and not effort.tunes:
            note = "block by block"
            torch._dynamo.config.recompile_limit = 64  # blocks of every size share their code
            for block in model.modules():
                if isinstance(block, NAFBlock):
                    block.compile(mode=mode, dynamic=False)
        elif mode != "":
            run = torch.compile(model, mode=mode, dynamic=False)
        loss: list[Tensor] = []

        def run_forward() -> Tensor:
            optimiser.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = run(lq[:half], labels[:half], reference_pairs)
            losses = restoration_loss(output, hq[:half], labels[:half], labels[half:], LossWeights())
            loss[:] = [losses["total"]]
            return output.restored

        def run_backward() -> list[Tensor]:
            loss.pop().backward()
            return [model.intro.weight.grad] if model.intro.weight.grad is not None else []

        phases = {"forward": run_forward, "backward": run_backward, "optimiser": optimiser.step}
        return Contender(phases, note, compiles=mode != "")

    def compiled(name: str, mode: str | None) -> Rival:
        if not (effort.compiles_models if name == COMPILE else effort.tunes):
            return unavailable(name, TOO_LONG.format(effort.name))
        return Rival(name, lambda: step(name, mode))

    rivals = [Rival(name, functools.partial(step, name)) for name in (EAGER, CHANNELS_LAST)]
    rivals.append(compiled(COMPILE, None))
    if device.type == "cuda":
        rivals.append(compiled(MAX_AUTOTUNE, "max-autotune-no-cudagraphs"))
    return [*rivals, Rival(OURS, lambda: step(OURS))]
