"""The degradation bank: key-value priors of each task, outside the backbone, saved with it (R2R, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r.errors import InputError
from r2r_kernels.nn import KeepsLayout


class Slots(NamedTuple):
    """The buffers of a bank that a model retrieves from."""

    keys: Tensor
    values: Tensor
    counts: Tensor

    def clone(self) -> Slots:
        return Slots(*(x.clone() for x in self))


class DegradationBank(KeepsLayout):
    """Slots of keys and values for each of T named tasks.

    Buffers: `keys` [T, S, Ck, h, w] and `values` [T, S, Cv, h, w], float; `counts` int64 [T], how many of the S slots
    each task uses (the first ones). A new bank is empty. The buffers travel with `state_dict()` and `.to()`; loading
    takes on the number of slots of what is loaded. `gain` and `offset` float32 [T] turn a task's score into the
    logarithm of its odds (`r2r.calibration`); 1 and 0 at first. `smooth_tasks`: names of those whose fault varies
    smoothly over a photo, `light_tasks` of those that change how bright it is (`r2r.overview`). `strengths`: how much
    of a task's restoration is mixed in, in [0, 1], by name, where that is not 1.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    gain: Tensor
    offset: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        slots: int,
        key_channels: int,
        value_channels: int,
        size: int,
        smooth_tasks: Sequence[str] = (),
        strengths: Mapping[str, float] | None = None,
        light_tasks: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.smooth_tasks = tuple(name for name in self.tasks if name in smooth_tasks)
        self.light_tasks = tuple(name for name in self.tasks if name in light_tasks)
        self.strengths = dict(strengths or {})
        self._empty = True
        self.register_buffer("keys", torch.zeros(len(self.tasks), slots, key_channels, size, size))
        self.register_buffer("values", torch.zeros(len(self.tasks), slots, value_channels, size, size))
        self.register_buffer("counts", torch.zeros(len(self.tasks), dtype=torch.int64))
        self.register_buffer("gain", torch.ones(len(self.tasks)))
        self.register_buffer("offset", torch.zeros(len(self.tasks)))

    @property
    def empty(self) -> bool:
        """Whether no task has slots. The device is asked only until one has: a bank is not emptied again."""
        if self._empty:
            self._empty = not bool(self.counts.any())
        return self._empty

    def check_filled(self) -> None:
        """Raises InputError where no task has slots. A compiled graph asks while it runs, and raises a RuntimeError, or
        the retrieval's ValueError."""
        message = "the bank is empty: train the model, or load one that was trained"
        if self._empty and torch.compiler.is_compiling():
            torch._assert_async(self.counts.any(), message)
        elif self.empty:
            raise InputError(message)

    @property
    def slots(self) -> Slots:
        return Slots(self.keys, self.values, self.counts)

    @property
    def size(self) -> int:
        """Height and width of a slot."""
        return self.keys.shape[-1]

    @property
    def smooth(self) -> Tensor:
        """bool [T]: which tasks are smooth."""
        return self._mask(self.smooth_tasks)

    @property
    def light(self) -> Tensor:
        """bool [T]: which tasks change how bright a photo is."""
        return self._mask(self.light_tasks)

    def of_light(self, values: Tensor) -> Tensor:
        """[N, T] -> [N, L]: those of the tasks that change how bright a photo is."""
        # Not by a list of indices, which a GPU would have to fetch from the host.
        return torch.stack([values[:, self.tasks.index(name)] for name in self.light_tasks], 1)

    def _mask(self, names: Sequence[str]) -> Tensor:
        mask = torch.zeros_like(self.counts, dtype=torch.bool)
        for name in names:  # one by one, as a GPU that records a graph takes no list from the host
            mask[self.tasks.index(name)] = True
        return mask

    def strength(self, tasks: Tensor) -> Tensor:
        """bool [N, T] -> float32 [N]: how much of the restoration of these tasks together is mixed in, the mean of
        their strengths; 0 for none."""
        each = tasks.float()
        for name, strength in self.strengths.items():
            each[:, self.tasks.index(name)] *= strength
        return each.sum(1) / tasks.sum(1).clamp(min=1)

    def calibrated(self, scores: Tensor) -> Tensor:
        """[N, T] -> [N, T]; tasks without slots keep their -inf."""
        return scores * self.gain + self.offset

    @torch.no_grad()
    def replace(self, keys: Tensor, values: Tensor, present: Tensor) -> None:
        """Take over the slots of the tasks that are `present` (bool [T]); the others stay as they are."""
        self.keys.copy_(torch.where(present[:, None, None, None, None], keys, self.keys))
        self.values.copy_(torch.where(present[:, None, None, None, None], values, self.values))
        self.counts.copy_(torch.where(present, keys.shape[1], self.counts))

    @torch.no_grad()
    def add_task(self, name: str, keys: Tensor, values: Tensor) -> None:
        """Add a task with keys [S, Ck, h, w] and values [S, Cv, h, w]; S may differ from the other tasks'.

        Raises ValueError where the name is taken, S is 0, or the shapes do not fit the bank's.
        """
        if name in self.tasks:
            raise ValueError(f"the bank already has a task {name!r}; its tasks are {', '.join(self.tasks)}")
        for label, given, own in (("keys", keys, self.keys), ("values", values, self.values)):
            if given.shape[1:] != own.shape[2:] or len(given) != len(keys) or not len(given):
                raise ValueError(f"{label} must be [slots, {', '.join(map(str, own.shape[2:]))}], got {[*given.shape]}")
        slots = max(len(keys), self.keys.shape[1])
        self.keys = torch.cat((_pad_slots(self.keys, slots), _pad_slots(keys.to(self.keys)[None], slots)))
        self.values = torch.cat((_pad_slots(self.values, slots), _pad_slots(values.to(self.values)[None], slots)))
        self.counts = torch.cat((self.counts, self.counts.new_tensor([len(keys)])))
        self.gain = torch.cat((self.gain, self.gain.new_ones(1)))
        self.offset = torch.cat((self.offset, self.offset.new_zeros(1)))
        self.tasks += (name,)

    def remove_task(self, name: str) -> None:
        """Drop a task. Raises ValueError where it is unknown or the last one."""
        kept = [index for index, task in enumerate(self.tasks) if task != name]
        if len(kept) == len(self.tasks):
            raise ValueError(f"the bank has no task {name!r}; its tasks are {', '.join(self.tasks)}")
        if not kept:
            raise ValueError(f"{name!r} is the bank's last task and cannot be removed")
        self.keys, self.values, self.counts = self.keys[kept], self.values[kept], self.counts[kept]
        self.gain, self.offset = self.gain[kept], self.offset[kept]
        self.tasks = tuple(self.tasks[index] for index in kept)
        self.smooth_tasks = tuple(task for task in self.smooth_tasks if task != name)
        self.light_tasks = tuple(task for task in self.light_tasks if task != name)
        self.strengths.pop(name, None)
        self._empty = True  # ask again

    def take_over(self, other: DegradationBank) -> tuple[str, ...]:
        """Add the tasks of another bank that this one lacks, with their scale of scores and strengths, smooth ones and
        those of light as such; returns their names."""
        added = tuple(name for name in other.tasks if name not in self.tasks)
        for index, name in enumerate(other.tasks):
            if name in added:
                slots = int(other.counts[index])
                self.add_task(name, other.keys[index, :slots], other.values[index, :slots])
                self.gain[-1], self.offset[-1] = other.gain[index], other.offset[index]
        self.smooth_tasks += tuple(name for name in added if name in other.smooth_tasks)
        self.light_tasks += tuple(name for name in added if name in other.light_tasks)
        self.strengths |= {name: strength for name, strength in other.strengths.items() if name in added}
        return added

    def likeness(self) -> Tensor:
        """[T, T]: cosine of the tasks' mean keys, 0 where a task holds no slots."""
        slots = torch.arange(self.keys.shape[1], device=self.keys.device) < self.counts[:, None]
        mean = F.normalize((self.keys.flatten(2) * slots[:, :, None]).sum(1), dim=1)
        return mean @ mean.T

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        keys, values = state_dict.get(prefix + "keys"), state_dict.get(prefix + "values")
        if keys is not None and values is not None and keys.dim() == 5 == values.dim():
            slots = keys.shape[1]
            if slots == values.shape[1] != self.keys.shape[1]:
                self.keys = self.keys.new_zeros(len(self.tasks), slots, *self.keys.shape[2:])
                self.values = self.values.new_zeros(len(self.tasks), slots, *self.values.shape[2:])
        # Files of earlier versions have neither.
        state_dict.setdefault(prefix + "gain", torch.ones(len(self.tasks)))
        state_dict.setdefault(prefix + "offset", torch.zeros(len(self.tasks)))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._empty = not bool(self.counts.any())

    def extra_repr(self) -> str:
        return f"tasks={', '.join(self.tasks)}; slots={self.keys.shape[1]}, size={self.size}"


def _pad_slots(x: Tensor, slots: int) -> Tensor:
    return torch.cat((x, x.new_zeros(len(x), slots - x.shape[1], *x.shape[2:])), dim=1)
