"""A bank that grows: a new task is learnt on the frozen network, as keys and values alone (R2R, section 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from r2r.calibration import logistic
from r2r.data.dataset import EvaluationPairs, Source, TrainingPairs
from r2r.data.degradations import TASK_DEGRADATIONS, parse_degradation
from r2r.data.folders import Pair
from r2r.data.sampler import EpochSampler
from r2r.device import device_of
from r2r.errors import InputError
from r2r.evaluation import Evaluation, EvaluationSet, evaluate, evaluation_set
from r2r.losses import log_error
from r2r.model import R2R, Features
from r2r.pretrained import is_task_name
from r2r_kernels.reference import area_resize

HELD_OUT = 8  # photos that are not learnt from, at most; a fifth of all where they are few
_LOGIT = 2.0  # weight of recognising the task beside restoring


@dataclass(frozen=True)
class Learning:
    """How long and on what a task is learnt: `steps` of `batch` crops of `crop` pixels, half of them of the new task;
    `slots` that it gets; the rate `lr`; `seed`."""

    steps: int = 300
    batch: int = 8
    crop: int = 128
    slots: int = 8
    lr: float = 0.01
    seed: int = 0


def split(pairs: Sequence[Pair]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """What is learnt from, and what is held out: evenly spread, at most a fifth. Raises InputError for one photo."""
    if len(pairs) < 2:
        raise InputError("one photo; accepted: two or more, as one is held out")
    number = max(1, min(HELD_OUT, len(pairs) // 5))
    held_out = {index * len(pairs) // number for index in range(number)}
    return (
        tuple(pair for index, pair in enumerate(pairs) if index not in held_out),
        tuple(pairs[index] for index in sorted(held_out)),
    )


def old_sources(model: R2R, pairs: Sequence[Pair]) -> list[Source]:
    """The model's own tasks on the clean photos of `pairs`, and for mixtures the photos themselves: what a new task
    must not take for its own. Tasks whose degradation is not known are left out."""
    clean = tuple(Pair(pair.name, pair.clean) for pair in pairs)
    known = [(index, TASK_DEGRADATIONS[task]) for index, task in enumerate(model.tasks) if task in TASK_DEGRADATIONS]
    sources = [Source(model.tasks[index], (index,), clean, parse_degradation(spec)) for index, spec in known]
    if model.mixtures:
        sources.append(Source("clean", (), clean, parse_degradation("jpeg:quality=90..100,chance=0.5")))
    return sources


def learn_task(
    model: R2R,
    name: str,
    source: Source,
    others: Sequence[Source],
    learning: Learning = Learning(),
    progress: Callable[[int, float], object] | None = None,
) -> R2R:
    """A copy of `model` whose bank holds one task more. Nothing else in it changes: what was found and restored before
    is so afterwards, unless the new task is found as well.

    source: pairs of the new task, with the label `len(model.tasks)`. others: of the old tasks, see `old_sources`.
    progress: called after each step with its number and the loss.
    Raises InputError where the name is taken or no name, no task of the model is known, or photos are smaller than the
    crop.
    """
    if name in model.tasks:
        raise InputError(f"the bank already has a task {name!r}; its tasks are {', '.join(model.tasks)}")
    if not is_task_name(name):
        raise InputError(f"task {name!r}; accepted: names of letters, digits, - and _")
    if not others:
        raise InputError(f"none of the model's tasks is known ({', '.join(model.tasks)}); name photos of theirs")
    model = copy.deepcopy(model).freeze_bank().eval().requires_grad_(False)
    number, device = len(model.tasks), device_of(model)
    sources = [replace(source, share=float(len(others))), *(replace(one, share=1.0) for one in others)]
    data = TrainingPairs(sources, learning.crop, number + 1, learning.seed, model.mixtures)
    sampler = EpochSampler(sources, learning.batch, number + 1, learning.seed, steps=learning.steps, bank=False)
    torch.manual_seed(learning.seed)
    entry = _Entry(model, learning.slots)
    entry.start_from(model, [data[0, index % len(source.pairs), index][0] for index in range(learning.slots)])
    entry.to(device)
    optimiser = torch.optim.Adam(entry.parameters(), lr=learning.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, learning.steps)
    seen: list[tuple[Tensor, Tensor]] = []
    for step, (lq, hq, labels) in enumerate(DataLoader(data, batch_sampler=sampler), start=1):
        own = labels[:, number] == 1 if model.mixtures else labels == number
        loss = entry.loss(model, lq.to(device), hq.to(device), labels.to(device), own.to(device))
        if step > learning.steps // 2:
            seen.append((entry.score.detach().cpu(), own.float()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step, float(loss.detach()))
    model.bank.add_task(name, entry.keys.detach(), entry.values.detach())
    gain, offset = float(entry.gain.detach()), float(entry.offset.detach())
    scores, labels = (torch.cat(part) for part in zip(*seen, strict=True))
    if model.mixtures and 0 < int(labels.sum()) < len(labels):  # the threshold moves slower than keys do
        gain, offset = logistic(scores, labels, torch.ones_like(labels), name)
    model.bank.gain[-1], model.bank.offset[-1] = gain, offset
    return model


class _Entry(nn.Module):
    """Keys, values, and the scale of the scores of one task."""

    def __init__(self, model: R2R, slots: int) -> None:
        super().__init__()
        bank = model.bank
        self.keys = nn.Parameter(bank.keys.new_zeros(slots, *bank.keys.shape[2:]))
        self.values = nn.Parameter(bank.values.new_zeros(slots, *bank.values.shape[2:]))
        self.gain = nn.Parameter(bank.gain.mean())
        self.offset = nn.Parameter(bank.offset.mean())

    @torch.no_grad()
    def start_from(self, model: R2R, images: Sequence[Tensor]) -> None:
        """Keys that are the queries of these images, and the mean values of the task that these queries like best."""
        queries = torch.cat([_query(model, image[None].to(device_of(model))) for image in images])
        scores = model.retrieval.scores(queries.flatten(1)[:, None], model.bank.keys, model.bank.counts)
        likest = int(scores.mean((0, 1)).argmax())
        self.keys.copy_(queries)
        self.values.copy_(model.bank.values[likest, : int(model.bank.counts[likest])].mean(0).expand_as(self.values))

    def loss(self, model: R2R, lq: Tensor, hq: Tensor, labels: Tensor, own: Tensor) -> Tensor:
        """Restoring the images of the task (`own`, bool [N]), and telling them from the others."""
        bank = model.bank
        with torch.no_grad():
            features = model.encode(lq)
            key, value = model.query(features.deep)
            pooled = area_resize(key, bank.size, bank.size)
            old = bank.calibrated(model.retrieval.scores(pooled.flatten(1)[:, None], bank.keys, bank.counts)[:, 0])
        count = bank.counts.new_tensor([len(self.keys)])
        score = model.retrieval.scores(pooled.flatten(1)[:, None], self.keys[None], count)[:, 0, 0]
        self.score = score
        score = score * self.gain + self.offset
        if model.mixtures:
            match = F.binary_cross_entropy_with_logits(score, own.to(score))
        else:
            match = F.cross_entropy(torch.cat((old, score[:, None]), dim=1), labels)
        if not bool(own.any()):
            return _LOGIT * match
        kept = [pooled[own], self.keys[None], self.values[None], count]
        readout, _ = model.retrieval(*kept, torch.zeros(int(own.sum()), dtype=torch.int64, device=lq.device))
        part = Features(features.deep[own], [skip[own] for skip in features.skips])
        restored = model.decode(lq[own], part, value[own], readout)
        return log_error(restored.clamp(0, 1), hq[own]) + _LOGIT * match


def _query(model: R2R, lq: Tensor) -> Tensor:
    return area_resize(model.query(model.encode(lq).deep)[0], model.bank.size, model.bank.size)


def growth(before: R2R, after: R2R, new: Source, old: Sequence[Source]) -> tuple[Evaluation, Evaluation]:
    """Whole photos of the new task and of the old ones, before it was learnt and after; before, nothing can be told of
    the new one, so that its photos are only restored blind."""
    tasks = len(before.tasks)
    unknown = EvaluationSet(new.name, (), EvaluationPairs(replace(new, labels=(0,)), tasks))
    former = [unknown, *(evaluation_set(one, tasks, before.mixtures) for one in old)]
    sets = [evaluation_set(one, tasks + 1, after.mixtures) for one in (new, *old)]
    return evaluate(before, former, told=False), evaluate(after, sets)
