"""Every kernel: right or wrong, and how fast: python -m benchmarks.kernels ROWS [--dry]

Appends a line to ROWS for each thing found, as `on_gpu.py` shows them. First each operator, forward and backward, in
bfloat16 at odd sizes, against the reference in float64: right is at most twice the error of plain PyTorch in the same
dtype. Then the time of each kernel as a replayed graph, at the sizes of the model that fill the chip and at the size
that 28 of its 36 blocks have, with the share of what this GPU's copy or matrix product could do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.roofline import Limits, Work
from r2r_kernels import functional, reference
from r2r_kernels.reference import GatedFeedForwardParams, NAFBlockParams
from r2r_kernels.triton import configs
from tests.r2r_kernels.rule import answers, error, parameters

Size = tuple[int, int, int, int]
Operator = Callable[[ModuleType, Sequence[Tensor]], tuple[Tensor, ...]]
Call = Callable[[], Any]

PREDICTED = Path(__file__).with_name("predicted.json")
DEEP: Size = (1, 256, 28, 28)
LEVELS: list[Size] = [(32, 32 << level, 224 >> level, 224 >> level) for level in range(5)]


def write(rows: Path, **row: Any) -> None:
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def size_name(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


# -- right or wrong ---------------------------------------------------------------------------------------------------


def _retrieve(ops: ModuleType, t: Sequence[Tensor]) -> tuple[Tensor, ...]:
    counts = torch.full((len(t[1]),), t[1].shape[1], device=t[0].device)
    return ops.bank_retrieve(t[0], t[1], t[2], counts, 4.0)


OPERATORS: dict[str, Operator] = {
    "layer_norm_2d": lambda ops, t: (ops.layer_norm_2d(*t),),
    "simple_gate": lambda ops, t: (ops.simple_gate(t[0]),),
    "depthwise_gate": lambda ops, t: ops.depthwise_gate(*t),
    "naf_block": lambda ops, t: (ops.naf_block(t[0], NAFBlockParams(*t[1:]), 1e-6),),
    "gated_feed_forward": lambda ops, t: (ops.gated_feed_forward(t[0], GatedFeedForwardParams(*t[1:]), 1e-6),),
    "upsample_add": lambda ops, t: (ops.upsample_add(t[0], t[2], t[1]),),
    "local_mean_2d": lambda ops, t: (ops.local_mean_2d(t[0], (5, 4)),),
    "bank_retrieve": _retrieve,
    "slot_conv": lambda ops, t: (ops.slot_conv(*t),),
    "gated_conv": lambda ops, t: (ops.gated_conv(*t),),
}


def inputs(operator: str, c: int, h: int, w: int, n: int = 2) -> list[Tensor]:
    """The tensors an operator is called with, the images first; random, on the CPU."""
    random = torch.randn
    return {
        "layer_norm_2d": lambda: [random(n, c, h, w), random(c), random(c)],
        "simple_gate": lambda: [random(n, 2 * c, h, w)],
        "depthwise_gate": lambda: [random(n, 2 * c, h, w), random(2 * c, 1, 3, 3), random(2 * c)],
        "naf_block": lambda: [random(n, c, h, w), *parameters(c)],
        "gated_feed_forward": lambda: [random(n, c, h, w), *parameters(c)[11:]],
        "upsample_add": lambda: [random(n, 2 * c, h, w), random(n, c, 2 * h, 2 * w), random(4 * c, 2 * c, 1, 1) / c],
        "local_mean_2d": lambda: [random(n, c, h, w)],
        "bank_retrieve": lambda: [random(n, c, h, w), random(3, 9, c, h, w), random(3, 9, 2 * c, h, w)],
        "slot_conv": lambda: [random(2, 9, c, h, w), random(2, c, 3, 3, 3), random(2, c)],
        "gated_conv": lambda: [random(n, c, h, w), random(n, c, h, w), random(c, 2, 1, 1), random(c)],
    }[operator]()


def judge(operator: str, channels: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Any:
    """Whether results, gradients of images and of parameters are right; the largest error, and how many times that of
    plain PyTorch it is where that is worst (2 are allowed)."""
    torch.manual_seed(0)
    call = OPERATORS[operator]
    tensors = [t.to(device, dtype) for t in inputs(operator, channels, *size)]
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    exact = answers(call, reference, [t.double() for t in tensors])
    plain = answers(call, reference, tensors)
    ours = answers(call, functional, tensors)
    worst, ratio = 0.0, 0.0
    for got, other, wanted in zip(ours, plain, exact, strict=True):
        if not got:
            continue
        off, allowed = error(got, wanted), max(2 * error(other, wanted), torch.finfo(dtype).eps)
        worst, ratio = max(worst, off), max(ratio, off / allowed if off == off else float("inf"))
    return {"right": ratio <= 1, "error": worst, "ratio": 2 * ratio}


def judgements(dry: bool) -> Iterator[tuple[str, int, tuple[int, int]]]:
    for operator in OPERATORS:
        if dry:
            yield operator, 4, (2, 3)
            continue
        for channels in (48, 32, 64, 128, 256, 512) if operator == "naf_block" else (20, 256):
            yield operator, channels, (7, 5) if operator == "bank_retrieve" else (29, 37)


# -- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is timed: `prepare(device, dtype)` makes the tensors and returns the call; `work` is what has to be moved
    and multiplied."""

    name: str
    size: Size
    work: Work
    prepare: Callable[[torch.device, torch.dtype], Call]

    @property
    def key(self) -> str:
        return f"{self.name} {size_name(self.size)}"


def _rows(size: Size, factor: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    n, c, h, w = size
    return torch.randn(n, h, w, factor * c, device=device, dtype=torch.float32).to(dtype)


def _images(size: Size, factor: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _rows(size, factor, device, dtype).permute(0, 3, 1, 2)


def _operator(name: str, size: Size, backward: bool) -> Callable[[torch.device, torch.dtype], Call]:
    """The operator's own forward or backward, below autograd."""

    def prepare(device: torch.device, dtype: torch.dtype) -> Call:
        n, c, h, w = size
        ops = torch.ops.r2r

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

        x = _images(size, 2 if name in ("simple_gate", "depthwise_gate", "upsample_add") else 1, device, dtype)
        if name == "layer_norm_2d":
            given: list[Any] = [x, new(c), new(c), 1e-6]
            if backward:
                _, mean, rstd = ops.layer_norm_2d(*given)
                return lambda: ops.layer_norm_2d_backward(x, x, given[1], mean, rstd)
        elif name == "simple_gate":
            given = [x]
            if backward:
                dy = ops.simple_gate(x)
                return lambda: ops.simple_gate_backward(dy, x)
        elif name == "depthwise_gate":
            given = [x, new(2 * c, 1, 3, 3), new(2 * c)]
            if backward:
                gated, mean = ops.depthwise_gate(*given)
                return lambda: ops.depthwise_gate_backward(gated, mean, *given)
        elif name == "naf_block":
            given = [x, [p.to(device, dtype) for p in parameters(c)], 1e-6]
            if backward:
                y, mean = ops.naf_block_training(*given)
                return lambda: ops.naf_block_backward(y, x, mean, given[1], 1e-6)
        elif name == "gated_feed_forward":
            given = [x, [p.to(device, dtype) for p in parameters(c)[11:]], 1e-6]
            if backward:
                return lambda: ops.gated_feed_forward_backward(x, *given)
        elif name == "upsample_add":
            given = [x, new(4 * c, 2 * c, 1, 1), _images((n, c, 2 * h, 2 * w), 1, device, dtype)]
            if backward:
                dy = ops.upsample_add(*given)
                return lambda: ops.upsample_add_backward(dy, *given[:2])
        elif name == "local_mean_2d":
            given = [x, [max(1, 3 * h // 8), max(1, 3 * w // 8)]]
        else:
            given = [x, x.flip(2).contiguous(memory_format=torch.channels_last), new(c, 2, 1, 1), new(c)]
            if backward:
                return lambda: ops.gated_conv_backward(x, *given)
        return lambda: getattr(ops, name)(*given)

    return prepare


def _bank(name: str, n: int, tasks: int, slots: int, key: int, value: int, side: int) -> Any:
    def prepare(device: torch.device, dtype: torch.dtype) -> Call:
        def new(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

        if name == "slot_conv":
            x, weight, bias = new(tasks, slots, value, side, side), new(tasks, value, 12, 3, 3), new(tasks, value)
            return lambda: torch.ops.r2r.slot_conv(x, weight, bias)
        query = new(n, key, side, side)
        keys, values = new(tasks, slots, key, side, side), new(tasks, slots, value, side, side)
        counts, scale = torch.full((tasks,), slots, device=device), torch.tensor(4.0, device=device)
        return lambda: torch.ops.r2r.bank_retrieve(query, keys, values, counts, scale, None, "hard")

    return prepare


def _part(name: str, size: Size) -> Callable[[torch.device, torch.dtype], Call]:
    """One launch of a NAF block, on what the launches before it leave."""

    def prepare(device: torch.device, dtype: torch.dtype) -> Call:
        from r2r_kernels.triton import depthwise_gate, naf_block

        eps, raw = 1e-6, NAFBlockParams(*(p.to(device, dtype) for p in parameters(size[1])))
        if name == "fold":
            return lambda: naf_block.fold(raw, dtype)
        p, rows = naf_block.fold(raw, dtype), _rows(size, 1, device, dtype)
        if name == "gated":
            config = configs.lookup("naf_block.gated", size[1], rows, size[0] * size[2] * size[3])
            if config is not None:
                return lambda: naf_block.make_gated(rows, p, eps, config)
        hidden = naf_block.make_hidden(rows, p.conv1, p.conv1_bias, eps)
        gated, pool = depthwise_gate.on_rows(hidden, p.taps, p.conv2_bias)
        _mean, scale = naf_block.make_attention(pool, p, size[2] * size[3])
        steps: dict[str, Call] = {
            "gated": lambda: depthwise_gate.on_rows(
                naf_block.make_hidden(rows, p.conv1, p.conv1_bias, eps), p.taps, p.conv2_bias
            ),
            "hidden": lambda: naf_block.make_hidden(rows, p.conv1, p.conv1_bias, eps),
            "depthwise": lambda: depthwise_gate.on_rows(hidden, p.taps, p.conv2_bias),
            "attention": lambda: naf_block.make_attention(pool, p, size[2] * size[3]),
            "result": lambda: naf_block.attend(rows, gated, pool, p, eps),
            "result_backward": lambda: naf_block.result_backward(rows, rows, gated, scale, p, eps),
            "hidden_backward": lambda: naf_block.hidden_backward(hidden, rows, rows, p.conv1, eps),
        }
        return steps[name]

    return prepare


def block_work(name: str, size: Size, itemsize: int) -> Work:
    """What a stage of a NAF block has to do."""
    n, c, h, w = size
    image = n * c * h * w
    passes, products, taps = {
        "fold": (0, 0, 0),
        "gated": (2, 2, 2),
        "hidden": (3, 2, 0),
        "depthwise": (3, 0, 2),
        "attention": (0, 0, 0),
        "result": (3, 4, 0),
        "result_backward": (9, 8, 0),
        "hidden_backward": (6, 2, 0),
    }[name]
    weights = {"fold": 12 * c * c, "attention": c * c}.get(name, products * c * c)
    flops = 2 * image * (products * c + 9 * taps) + (2 * n * c * c if name == "attention" else 0)
    return Work((passes * image + weights) * itemsize, flops)


STAGES = ("fold", "gated", "hidden", "depthwise", "attention", "result", "result_backward",
          "hidden_backward")  # fmt: skip


def cases(sizes: Sequence[Size] | None = None) -> list[Case]:
    levels, deep = (LEVELS, DEEP) if sizes is None else (list(sizes), sizes[-1])
    item, found = 2, []
    for backward in (False, True):
        way = " backward" if backward else ""
        names = ("layer_norm_2d", "simple_gate", "depthwise_gate", "gated_feed_forward", "gated_conv", "local_mean_2d",
                 "upsample_add")  # fmt: skip
        for name in names:
            if name == "local_mean_2d" and backward:
                continue  # the same walk
            for n, c, h, w in dict.fromkeys((levels[0], *levels[3:4], deep)):
                double = {"simple_gate": 2 * c, "depthwise_gate": 2 * c}.get(name, c)
                extra = {"gated_conv": (1,)}.get(name, ())
                up = 2 if name == "upsample_add" else 1
                if name == "upsample_add":  # of half the size, so that the result is one of the level
                    h, w = max(1, h // 2), max(1, w // 2)
                kind = getattr(roofline, name)
                args = (n, double, up * h, up * w, *extra, item)
                work = kind(*args, backward=True) - kind(*args) if backward else kind(*args)
                found.append(Case(name + way, (n, c, h, w), work, _operator(name, (n, c, h, w), backward)))
        for size in dict.fromkeys((*levels, deep)):
            args = (*size, item)
            forward, both = roofline.naf_block(*args), roofline.naf_block(*args, backward=True)
            found.append(Case(f"naf_block{way}", size, both - forward if backward else forward,
                              _operator("naf_block", size, backward)))  # fmt: skip
    found += [
        Case(f"naf_block.{stage}", size, block_work(stage, size, item), _part(stage, size))
        for size in dict.fromkeys((*levels, deep))
        for stage in STAGES
    ]
    n, tasks, slots, key, value, side = (1, 5, 53, 64, 512, 8) if sizes is None else (1, 2, 5, 2, 4, 3)
    found += [
        Case("bank_retrieve", (n, value, side, side),
             roofline.bank_retrieve(n, tasks, slots, key * side * side, value * side * side, item),
             _bank("bank_retrieve", n, tasks, slots, key, value, side)),
        Case("slot_conv", (tasks, value, side, side),
             roofline.slot_conv(tasks, slots + 11, value, 12, side, side, item),
             _bank("slot_conv", n, tasks, slots + 11, key, value, side)),
    ]  # fmt: skip
    return found


def replayed(call: Call) -> float:
    """Seconds a call takes in a replayed graph: the median of some replays of as many calls as take a millisecond."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
        call()
    torch.cuda.current_stream().wait_stream(side)

    def captured(times: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph

    def sample(graph: Any) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    graph = captured(1)
    sample(graph)
    times = max(1, min(100, int(1e-3 / max(sample(graph), 1e-6))))
    graph = captured(times)
    sample(graph)
    return statistics.median(sample(graph) for _ in range(7)) / times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter; no times")
    given = parser.parse_args(argv)
    device, dtype = (torch.device("cpu"), torch.float16) if given.dry else (torch.device("cuda"), torch.bfloat16)
    wrong = 0
    for operator, channels, size in judgements(given.dry):
        name, where = operator, f"2x{channels}x{size_name(size)}"
        try:
            found = judge(operator, channels, size, device, dtype)
        except Exception as problem:
            traceback.print_exc()
            found = {"right": False, "note": f"{type(problem).__name__}: {problem}"[:120]}
        wrong += not found["right"]
        write(given.rows, name=name, size=where, **found)
    if not given.dry:
        float32_products(given.rows, device)
    limits = None if given.dry else roofline.measure_limits(device)
    if limits:
        for what, rate in (("copy", max(limits.copy.values()) / 1e9), ("product", limits.gemm["bfloat16"] / 1e9)):
            write(given.rows, name=f"limit: {what}", size="", note=f"{rate:.0f} G/s")
    predicted = json.loads(PREDICTED.read_text()) if PREDICTED.exists() else {}
    for case in cases([(1, 4, 3, 2)] if given.dry else None):
        try:
            measure(case, given.rows, device, dtype, limits, predicted)
        except Exception as problem:
            traceback.print_exc()
            wrong += 1
            write(
                given.rows, name=case.name, size=size_name(case.size), note=f"{type(problem).__name__}: {problem}"[:120]
            )
            if "CUDA error" in str(problem):  # nothing works in this process any more
                break
    return int(wrong > 0)


def float32_products(rows: Path, device: torch.device) -> None:
    """Whether three TF32 products on tensor cores could take the place of float32 FMAs: errors and times of both."""
    from r2r_kernels.triton import products

    own = products.precision
    for mode in ("ieee", "tf32x3"):
        row: dict[str, Any] = {"name": f"naf_block float32 {mode}", "size": size_name(DEEP)}
        products.precision = lambda x, mode=mode: mode  # type: ignore[misc]
        try:
            write(rows, **row, **judge("naf_block", 256, (28, 28), device, torch.float32))
            call = _operator("naf_block", DEEP, False)(device, torch.float32)
            with torch.no_grad():
                write(rows, **row, us=replayed(call) * 1e6)
        except Exception as problem:
            traceback.print_exc()
            write(rows, **row, note=f"{type(problem).__name__}: {problem}"[:120])
        finally:
            products.precision = own


@torch.no_grad()
def measure(
    case: Case, rows: Path, device: torch.device, dtype: torch.dtype, limits: Limits | None, predicted: dict[str, float]
) -> None:
    call = case.prepare(device, dtype)
    row: dict[str, Any] = {"name": case.name, "size": size_name(case.size)}
    if limits is None:
        call()
        write(rows, **row, note="ran")
        return
    floor, bound = limits.floor(case.work, "bfloat16")
    row |= {"us": replayed(call) * 1e6, "bytes": case.work.bytes, "flops": case.work.flops}
    row |= {"limit_us": floor * 1e6, "bound": bound}
    if case.key in predicted:
        row["predicted_us"] = predicted[case.key]
    write(rows, **row)


if __name__ == "__main__":
    raise SystemExit(main())
