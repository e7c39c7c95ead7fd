"""bank_retrieve: three launches, and nothing that the host has to wait for: the task is known only on the device.

`_similarities`: a program for each key and BN queries; it reads the key once, and takes the norms of key and query from
the same reading as their product. `_select`: a program for each sample turns its similarities [T, S] into scores, the
tasks that take part and softmax weights, 0 for all others. `_gather`: a program for BD neighbours of the readout of all
samples walks over the tasks that any sample takes part in, and reads BS slots of the values at once, each once for all
samples; values of other tasks are never touched. A program adds to its own part of the readout only: two runs give the
same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config

CANDIDATES: dict[str, list[Config]] = {
    "gather": [
        {"BD": bd, "BS": bs, "num_warps": warps}
        for bd, bs, warps in ((64, 64, 4), (128, 64, 4), (128, 32, 4), (256, 32, 8))
    ],
    "similarities": [{"BN": bn, "BD": bd, "num_warps": w} for bn, bd, w in ((1, 1024, 4), (4, 1024, 4), (8, 512, 4))],
}

MODES = {"hard": 0, "multi": 1, "soft": 2}


@triton.jit(do_not_specialize=["number", "slots", "total"])
def _similarities(
    query_ptr, keys_ptr, counts_ptr, scale_ptr, out_ptr, number, slots, depth, total, BN: tl.constexpr, BD: tl.constexpr
):
    """scale * cosine of a key and BN queries, -inf where the key is not in use.

    query [N, depth], keys [T * slots, depth], counts int64 [T], scale [] -> out float32 [N, total], total = T * slots.
    """
    key = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    exists = n < number
    used = key % slots < tl.load(counts_ptr + key // slots)
    product = tl.zeros((BN,), tl.float32)
    of_query = tl.zeros((BN,), tl.float32)
    of_key = 0.0
    if used:
        for first in range(0, depth, BD):
            d = first + tl.arange(0, BD)
            k = tl.load(keys_ptr + key.to(tl.int64) * depth + d, mask=d < depth, other=0.0).to(tl.float32)
            offsets = n[:, None].to(tl.int64) * depth + d[None, :]
            q = tl.load(query_ptr + offsets, mask=exists[:, None] & (d < depth)[None, :], other=0.0).to(tl.float32)
            product += tl.sum(q * k[None, :], 1)
            of_query += tl.sum(q * q, 1)
            of_key += tl.sum(k * k, 0)
    # The eps of torch.nn.functional.normalize.
    norms = tl.maximum(tl.sqrt(of_query), 1e-12) * tl.maximum(tl.sqrt(of_key), 1e-12)
    similarity = tl.where(used, tl.load(scale_ptr).to(tl.float32) * (product / norms), float("-inf"))
    tl.store(out_ptr + n.to(tl.int64) * total + key, similarity, mask=exists)


@triton.jit(do_not_specialize=["tasks", "slots"])
def _select(
    similarity_ptr,
    counts_ptr,
    told_ptr,
    scores_ptr,
    taking_ptr,
    tasks,
    slots,
    TOLD: tl.constexpr,
    MODE: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):
    """The scores of a sample, the tasks that take part, and the softmax weights, which replace its similarities.

    similarity float32 [N, T, slots], counts int64 [T], told int8 [N, T] -> scores float32 [N, T], taking int8 [N, T].
    """
    n = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BT)
    s = tl.arange(0, BS)
    counts = tl.minimum(tl.load(counts_ptr + t, mask=t < tasks, other=0), slots).to(tl.int32)
    used = s[None, :] < counts[:, None]
    offsets = n * tasks * slots + t[:, None] * slots + s[None, :]
    similarity = tl.load(similarity_ptr + offsets, mask=used, other=float("-inf"))

    scores = tl.sum(tl.where(used, similarity, 0.0), 1) / tl.maximum(counts, 1)
    scores = tl.where(counts > 0, scores, float("-inf"))
    tl.store(scores_ptr + n * tasks + t, scores, mask=t < tasks)

    if TOLD:
        taking = tl.load(told_ptr + n * tasks + t, mask=t < tasks, other=0) != 0
    else:
        # The first NaN, else the first of the largest, as argmax.
        rank = tl.where(scores != scores, float("inf"), scores)
        highest = tl.max(tl.where(t < tasks, rank, float("-inf")), 0)
        best = t == tl.min(tl.where((rank == highest) & (t < tasks), t, BT), 0)
        if MODE == 2:
            taking = scores > float("-inf")
        elif MODE == 1:
            above = scores > 0
            taking = tl.where(tl.max(above.to(tl.int32), 0) > 0, above, best)
        else:
            taking = best
    tl.store(taking_ptr + n * tasks + t, taking.to(tl.int8), mask=t < tasks)

    kept = tl.where(taking[:, None] & used, similarity, float("-inf"))
    weights = tl.exp(kept - tl.max(tl.max(kept, 1), 0))
    weights = weights / tl.sum(tl.sum(weights, 1), 0)
    tl.store(similarity_ptr + offsets, weights, mask=(t < tasks)[:, None] & (s < slots)[None, :])


@triton.jit(do_not_specialize=["number", "tasks", "slots"])
def _gather(
    values_ptr,
    weights_ptr,
    taking_ptr,
    counts_ptr,
    readout_ptr,
    number,
    tasks,
    slots,
    length,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """readout = the sum of weights times values of the tasks that take part: a program takes BD values of all samples.

    values [T, slots, length], weights float32 [N, T, slots], taking int8 [N, T], counts int64 [T] -> readout float32
    [N, length], which holds zeros before.
    """
    d = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)
    exists = d < length
    n_all = tl.arange(0, BN)
    t_all = tl.arange(0, BT)
    flags = tl.load(
        taking_ptr + n_all[:, None] * tasks + t_all[None, :],
        mask=(n_all < number)[:, None] & (t_all < tasks)[None, :],
        other=0,
    ).to(tl.int32)
    counts = tl.minimum(tl.load(counts_ptr + t_all, mask=t_all < tasks, other=0), slots).to(tl.int32)
    wanted = tl.where(tl.max(flags, 0) > 0, counts, 0)
    line = length + tl.zeros((1,), tl.int64)
    for t in range(tasks):
        count = tl.sum(tl.where(t_all == t, wanted, 0), 0)
        for first in range(0, count, BS):
            s = (first + tl.arange(0, BS)).to(tl.int64)
            rows = (t * slots + s)[:, None] * length + d[None, :]
            v = tl.load(values_ptr + rows, mask=(s < count)[:, None] & exists[None, :], other=0.0).to(tl.float32)
            for n in range(number):
                if tl.load(taking_ptr + n * tasks + t) != 0:
                    at = (n * tasks + t) * slots + s
                    weights = tl.load(weights_ptr + at, mask=s < count, other=0.0)
                    out = readout_ptr + n * line + d
                    total = tl.load(out, mask=exists, other=0.0) + tl.sum(weights[:, None] * v, 0)
                    # Several threads may hold the same element, and one of them stores it: the others must read it
                    # before that, and next time after.
                    tl.debug_barrier()
                    tl.store(out, total, mask=exists)
                    tl.debug_barrier()


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor,
    told: Tensor | None,
    mode: str,
    config: Config | None = None,
    config_keys: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [N, Ck, h, w], keys [T, S, Ck, h, w], values [T, S, Cv, h, w], counts int64 [T], scale 0-d, told bool
    [N, T] or None, all contiguous -> readout [N, Cv, h, w] like values, scores [N, T] and weights [N, T, S] float32."""
    number, (tasks, slots) = query.shape[0], keys.shape[:2]
    depth, length = query[0].numel(), values[0, 0].numel()
    config_keys = config_keys or configs.require("bank_retrieve.similarities", depth, query)
    config = config or configs.require("bank_retrieve.gather", length, values)
    device = query.device
    weights = torch.empty((number, tasks, slots), dtype=torch.float32, device=device)
    scores = torch.empty((number, tasks), dtype=torch.float32, device=device)
    taking = torch.empty((number, tasks), dtype=torch.int8, device=device)
    readout = torch.zeros((number, length), dtype=torch.float32, device=device)
    across, down = triton.next_power_of_2(tasks), triton.next_power_of_2(slots)
    with torch.cuda.device_of(query):
        _similarities[(tasks * slots, triton.cdiv(number, config_keys["BN"]))](
            query, keys, counts, scale, weights, number, slots, depth, tasks * slots, **config_keys
        )
        _select[(number,)](
            weights, counts, taking if told is None else told.to(torch.int8), scores, taking, tasks, slots,
            TOLD=told is not None, MODE=MODES[mode], BT=across, BS=down, num_warps=4,
        )  # fmt: skip
        _gather[(triton.cdiv(length, config["BD"]),)](
            values, weights, taking, counts, readout, number, tasks, slots, length,
            BN=triton.next_power_of_2(number), BT=across, **config,
        )  # fmt: skip
    return readout.view(number, *values.shape[2:]).to(values.dtype), scores, weights
