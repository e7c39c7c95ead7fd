"""Which samples a training batch is made of, as keys for TrainingPairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from r2r import ranks
from r2r.data.dataset import Key, Source
from r2r.errors import InputError


class EpochSampler(Sampler[list[Key]]):
    """Batches of keys (`batch_sampler` of a DataLoader) from any place of any epoch, the same ones every time.

    With `bank`, the first batch_size // 2 samples of a batch are restored and the others build the bank, so every task
    comes at least once among those: where one is missing, a sample that is not the only one of its task makes way.

    An epoch shows each pair of each source `repeat` times in an order of its own and drops what does not fill a batch.
    With `steps` it is that many batches instead, with equal chances for each task (each set of labels, for mixtures);
    where sources name a `share`, each comes as often as its share of their sum (1 where it names none).
    Iteration starts at the position last set and goes to the end of that epoch; it does not move the position. Of
    several processes (`r2r.ranks`) each gets its share of what is restored and of what builds the bank.
    Raises InputError, with `bank`, for a batch too small to hold every task in its second half, and for a task without
    photos; always for sources that do not fill one batch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        num_tasks: int,
        seed: int = 0,
        epoch: int = 0,
        steps: int | None = None,
        bank: bool = True,
    ) -> None:
        reference = batch_size - batch_size // 2
        if bank and reference < num_tasks:
            raise InputError(
                f"batch size {batch_size}: its second half, which builds the bank, is {reference} samples for "
                f"{num_tasks} tasks; accepted: {2 * num_tasks - 1} or more"
            )
        missing = set(range(num_tasks)) - {label for source in sources for label in source.labels}
        if bank and missing:
            raise InputError(f"tasks {sorted(missing)} have no photos; accepted: at least one source for each task")
        if seed < 0 or (steps is not None and steps < 1):
            raise InputError(f"seed {seed}, steps {steps}; accepted: a seed of 0 or more, at least 1 step")
        self.sources = tuple(sources)
        self.batch_size = batch_size
        self.num_tasks = num_tasks
        self.seed = seed
        self.steps = steps
        self.bank = bank
        self._sizes = np.array([len(source.pairs) for source in self.sources])
        self._shown = self._sizes * [source.repeat for source in self.sources]
        self._chances = self._balanced_chances()
        if self.steps_per_epoch == 0:
            raise InputError(
                f"{self._shown.sum()} samples do not fill a batch of {batch_size}; accepted: more or repeat"
            )
        self.set_position(epoch, 0)

    @property
    def steps_per_epoch(self) -> int:
        return self.steps if self.steps is not None else int(self._shown.sum()) // self.batch_size

    def set_position(self, epoch: int, batch: int) -> None:
        """Start the next iteration at this batch of this epoch, both counted from 0."""
        if epoch < 0 or not 0 <= batch <= self.steps_per_epoch:
            raise InputError(f"epoch {epoch}, batch {batch}; accepted: batches 0 to {self.steps_per_epoch}")
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        """Batches from the position to the end of the epoch."""
        return self.steps_per_epoch - self.batch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        order = self._epoch_order(epoch) if self.steps is None else None
        for batch in range(self.batch, self.steps_per_epoch):
            rng = np.random.default_rng([self.seed, epoch, batch])
            if order is None:
                samples = self._draw(self._chances, self.batch_size, rng)
            else:
                samples = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.bank:
                samples = self._complete(samples, rng)
            draws = rng.integers(2**63, size=self.batch_size, dtype=np.uint64)
            keys = [(int(source), int(pair), int(draw)) for (source, pair), draw in zip(samples, draws, strict=True)]
            restored = self.batch_size // 2 if self.bank else self.batch_size
            yield [*ranks.share(keys[:restored]), *ranks.share(keys[restored:])]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """All (source, pair) of an epoch, int64 [samples, 2], shuffled."""
        source = np.repeat(np.arange(len(self.sources)), self._shown)
        pair = np.concatenate([np.arange(shown) % size for shown, size in zip(self._shown, self._sizes, strict=True)])
        return np.random.default_rng([self.seed, epoch]).permutation(np.stack([source, pair], axis=1))

    def _balanced_chances(self) -> np.ndarray:
        """The chance of each source: by their shares, or such that each set of labels is equally likely; sources of one
        set then share by samples."""
        if any(source.share is not None for source in self.sources):
            shares = np.array([1.0 if source.share is None else source.share for source in self.sources])
            return shares / shares.sum()
        chances = self._shown.astype(np.float64)
        for labels in {source.labels for source in self.sources}:
            same = np.array([source.labels == labels for source in self.sources])
            chances[same] /= chances[same].sum()
        return chances / chances.sum()

    def _draw(self, chances: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        source = rng.choice(len(self.sources), count, p=chances)
        return np.stack([source, rng.integers(self._sizes[source])], axis=1)

    def _complete(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`samples` with every task in the second half."""
        samples = samples.copy()
        reference = samples[self.batch_size // 2 :]  # a view
        for task in range(self.num_tasks):
            counts = np.zeros(self.num_tasks, int)
            for source in reference[:, 0]:
                counts[list(self.sources[source].labels)] += 1
            if counts[task]:
                continue
            # The last sample all of whose tasks come again; there is one, as samples outnumber the tasks present.
            spare = next(
                place
                for place in reversed(range(len(reference)))
                if all(counts[label] > 1 for label in self.sources[reference[place, 0]].labels)
            )
            having = np.array([task in source.labels for source in self.sources])
            chances = np.where(having, self._chances, 0)
            reference[spare] = self._draw(chances / chances.sum(), 1, rng)[0]
        return samples
