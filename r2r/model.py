"""R2R, retrieve to restore: one model for several degradations (CVPR 2026). `r2r.R2R` is the eager reference."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from r2r.amalgamator import Amalgamator, Residual, recomputing
from r2r.backbone import Decoder, Encoder
from r2r.bank import DegradationBank, Slots
from r2r.errors import InputError
from r2r.files import umask
from r2r.overview import UNDONE_SIDE, Overview, exposure, gain_and_offset, small_copy
from r2r.pretrained import CONFIG, HUB, WEIGHTS, is_task_name, read_config, read_model
from r2r.sizes import settled
from r2r.weights import default_weights
from r2r_kernels.nn import BankRetrieval, GatedConv2d, Similarity
from r2r_kernels.reference import area_resize, task_mask

Task = str | int | Sequence[str | int] | Tensor | None


class TrainingOutput(NamedTuple):
    """`restored` [N, 3, H, W]; matching `scores` [N, T]; classifier `logits` [R, T] of the R reference pairs, or None
    where the bank was used as it is."""

    restored: Tensor
    scores: Tensor
    logits: Tensor | None


class Restoration(NamedTuple):
    """`image` [N, 3, H, W]; `task` int64 [N], or for mixtures bool [N, T], all False where nothing was found; `scores`
    [N, T], see `R2R.probabilities`."""

    image: Tensor
    task: Tensor
    scores: Tensor


class Features(NamedTuple):
    """`deep` [N, C, h, w], the encoder's deepest features of the padded input; `skips`, one for each level."""

    deep: Tensor
    skips: list[Tensor]


class Match(NamedTuple):
    """`readout` [N, Cv, b, b] at the bank's resolution; `task` and `scores` as in `Restoration`; `strength` float32
    [N], how much of what the readout restores is mixed in. It is 0 where the readout is of no task that was found.
    `exposure` as in `Overview`."""

    readout: Tensor
    task: Tensor
    scores: Tensor
    strength: Tensor
    exposure: Tensor | None


class Cleared(NamedTuple):
    """`image` [N, 3, H, W] without what lies smoothly over it, by the `overview`, None for a model that takes none.
    What was changed is in [0, 1]. `features` of what the model is to see, where they are known already."""

    image: Tensor
    overview: Overview | None
    features: Features | None

    @property
    def exposed(self) -> Tensor:
        """What the model is to see of the image."""
        return self.image if self.overview is None else self.overview.exposed(self.image)


class R2R(nn.Module, PyTorchModelHubMixin):
    """The whole model on plain PyTorch; `r2r.fast.R2R` is the same on fused kernels.

    tasks: names, in the order of the labels. width: channels of the first level, doubled on each. encoder_blocks,
    decoder_blocks: NAF blocks of each level; middle_blocks: of the deepest. memory_blocks: the amalgamator's levels.
    capacity: slots M a task, M >= 5, of which M - M//5 + 1 are left in the bank. bank_size: height and width of a slot,
    the training crop over 2^levels. similarity: "cosine" (with a learnt scale) or "published" (see `BankRetrieval`).
    residual: what the amalgamator sees of it, "mean" or "full". mixtures: images may carry several degradations, or
    none; labels are then masks [N, T], every task that scores above 0 takes part, and an image for which none does is
    given back as it is. matching: without mixtures, blind, the best task's slots are mixed ("hard") or those of all
    tasks ("soft"). gate_kernel: 1 or 3. padding: at the right and lower border, "mirror" or "zeros" (published); see
    `padded`. window: side, in pixels, of the windows over which channel attention takes its means and
    from which tasks are voted for when the model restores; 0 takes the whole image (published). smooth_tasks: those of
    mixtures whose fault varies smoothly over a photo, as haze does. When the model restores, it looks for them first,
    in a small copy, and removes them from there (`r2r.overview`); the other tasks see what is left. light_tasks: those
    of mixtures that change how bright an image is. Where one is suspected in the small copy, but not found, or
    others are told, the model sees a dark image brightened, and what it changes there is darkened again. strengths: by
    task, how much of its restoration is mixed in when the model restores, in [0, 1], where that is not 1; of several
    tasks found together the mean. amalgamator: False leaves it out; such a model restores, and trains on a fixed bank.
    """

    eager = True
    _stored_in: torch.dtype | None = None  # while it is saved

    def __init__(
        self,
        tasks: Sequence[str],
        width: int = 32,
        encoder_blocks: Sequence[int] = (1, 1, 1, 28),
        middle_blocks: int = 1,
        decoder_blocks: Sequence[int] = (1, 1, 1, 1),
        memory_blocks: Sequence[int] = (2, 2, 4, 8),
        capacity: int = 64,
        bank_size: int = 8,
        similarity: Similarity = "cosine",
        residual: Residual = "mean",
        mixtures: bool = False,
        matching: Literal["hard", "soft"] = "hard",
        gate_kernel: int = 1,
        padding: Literal["mirror", "zeros"] = "mirror",
        window: int = 0,
        smooth_tasks: Sequence[str] = (),
        light_tasks: Sequence[str] = (),
        strengths: Mapping[str, float] | None = None,
        amalgamator: bool = True,
    ) -> None:
        super().__init__()
        if not tasks or isinstance(tasks, str) or len(set(tasks)) != len(tasks) or not all(map(is_task_name, tasks)):
            raise ValueError(f"tasks must be one or more different names of letters, digits, - and _, got {tasks!r}")
        if not len(encoder_blocks) == len(decoder_blocks) == len(memory_blocks) >= 2:
            raise ValueError(
                "encoder_blocks, decoder_blocks and memory_blocks must name the same number of levels, 2 or more; got "
                f"{len(encoder_blocks)}, {len(decoder_blocks)} and {len(memory_blocks)}"
            )
        if matching not in ("hard", "soft"):
            raise ValueError(f'matching must be "hard" or "soft", got {matching!r}; mixtures choose by themselves')
        if capacity < 5:
            raise ValueError(f"capacity must be 5 or more, got {capacity}")
        for name, some in (("smooth_tasks", smooth_tasks), ("light_tasks", light_tasks)):
            if not set(some) <= set(tasks if mixtures else ()):
                accepted = ", ".join(tasks) if mixtures else "none, as this is no model for mixtures"
                raise ValueError(f"{name} are {', '.join(some)}; accepted: {accepted}")
        strengths = dict(strengths or {})
        if not all(task in tasks and 0 <= strength <= 1 for task, strength in strengths.items()):
            raise ValueError(f"strengths must be 0..1, of tasks among {', '.join(tasks)}; got {strengths}")
        if padding not in ("mirror", "zeros"):
            raise ValueError(f'padding must be "mirror" or "zeros", got {padding!r}')
        eager = self.eager
        levels = len(encoder_blocks)
        deepest = width << levels
        key_channels = 2 * width
        self.stride = 1 << levels
        self.mixtures = mixtures
        self.padding = padding
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.encoder = Encoder(width, encoder_blocks, middle_blocks, eager)
        self.query_key = nn.Conv2d(deepest, key_channels, 3, padding=1)
        self.query_value = nn.Conv2d(deepest, deepest, 3, padding=1)
        slots = capacity - capacity // 5 + 1
        self.bank = DegradationBank(
            tasks, slots, key_channels, deepest, bank_size, smooth_tasks, strengths, light_tasks
        )
        self.retrieval = BankRetrieval(similarity, "multi" if mixtures else matching, eager)
        self.fusion = GatedConv2d(deepest, gate_kernel, eager)
        self.decoder = Decoder(width, decoder_blocks, eager)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        for parameter in self.ending.parameters():
            nn.init.zeros_(parameter)  # a new model gives back its input
        self.amalgamator: Amalgamator | None = None
        self._held_before: Slots | None = None  # what the last pass of stage 1 started from
        if amalgamator:
            self.amalgamator = Amalgamator(
                len(tasks), width, memory_blocks, capacity, key_channels, deepest, residual, eager
            )
        self._sizes = {
            "width": width,
            "encoder_blocks": list(encoder_blocks),
            "middle_blocks": middle_blocks,
            "decoder_blocks": list(decoder_blocks),
            "memory_blocks": list(memory_blocks),
            "capacity": capacity,
            "bank_size": bank_size,
            "similarity": similarity,
            "residual": residual,
            "mixtures": mixtures,
            "matching": matching,
            "gate_kernel": gate_kernel,
            "padding": padding,
        }
        self.window = window

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.bank.tasks

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this model anew."""
        bank = {
            "smooth_tasks": list(self.bank.smooth_tasks),
            "light_tasks": list(self.bank.light_tasks),
            "strengths": dict(self.bank.strengths),
        }
        own = {"window": self.window, **bank, "amalgamator": self.amalgamator is not None}
        return {"tasks": list(self.tasks), **self._sizes, **own}

    @property
    def window(self) -> int:
        """See the class. It may be set at any time, as it changes no weights."""
        return self._window

    @window.setter
    def window(self, side: int) -> None:
        if side < 0 or side % self.stride:
            raise ValueError(f"window must be 0 or a multiple of {self.stride}, got {side}")
        self._window = side
        levels = len(self.encoder.levels)
        parts = [*self.encoder.levels, self.encoder.middle, *self.decoder.levels]
        for level, part in zip([*range(levels + 1), *reversed(range(levels))], parts, strict=True):
            for block in part:
                block.window = side >> level

    def fingerprint(self) -> str:
        """Of all weights and the bank."""
        digest = hashlib.sha256()
        for name, x in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def backbone_fingerprint(self) -> str:
        """Of the weights that make queries: banks of models that share it may be exchanged."""
        digest = hashlib.sha256()
        for part in (self.intro, self.encoder, self.query_key, self.query_value):
            for x in part.state_dict().values():
                digest.update(x.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def freeze_bank(self) -> R2R:
        """Drop the amalgamator: from here on the bank is read-only. Raises ValueError where it is empty."""
        self.bank.check_filled()
        self.amalgamator = None
        return self

    # -- the model, in the order of the paper -------------------------------------------------------------------

    def encode(self, lq: Tensor) -> Features:
        """[N, 3, H, W] -> features of the input, padded right and below (see `padded`)."""
        down, across = (self.padded(length) - length for length in lq.shape[2:])
        padded = F.pad(lq, (0, across, 0, down)) if self.padding == "zeros" else _mirrored(lq, down, across)
        deep, skips, _ = self.encoder(self.intro(padded))
        return Features(deep, skips)

    def padded(self, length: int) -> int:
        """What a height or width is padded to: the next multiple of `stride`. Where borders are mirrored, an image to
        restore becomes at least as large as the crop whose query fills a slot: less shows too little to match."""
        least = 0 if self.training or self.padding == "zeros" else self.bank.size
        return self.stride * settled(torch.sym_max((length + self.stride - 1) // self.stride, least), 1)

    def query(self, deep: Tensor) -> tuple[Tensor, Tensor]:
        """The deepest features -> D_K [N, Ck, h, w] and D_V [N, Cv, h, w] (R2R, equation 1)."""
        return self.query_key(deep), self.query_value(deep)

    def clear(self, lq: Tensor, task: Task = None) -> Cleared:
        """lq [N, 3, H, W] without what lies over it smoothly; lq itself for a model without smooth tasks."""
        if not self.takes_overview:
            return Cleared(lq, None, None)
        if torch.compiler.is_dynamo_compiling():  # no decorator, as that takes two seconds when this file is imported
            why = "Inductor reasons about the sizes of small copies for more than ten minutes"
            return torch.compiler.disable(self._cleared, reason=why)(lq, task)
        return self._cleared(lq, task)

    def _cleared(self, lq: Tensor, task: Task) -> Cleared:
        small = small_copy(lq)
        features = self.encode(small)
        overview = self.overview(small, features, lq.shape[2:], task)
        image = overview.taken_off(lq, lq.shape[2:])
        return Cleared(image, overview, features if overview.exposed(image) is small else None)

    @property
    def takes_overview(self) -> bool:
        """Whether there are tasks that are looked for in a small copy."""
        return bool(self.bank.smooth_tasks or self.bank.light_tasks)

    def overview(self, small: Tensor, features: Features, whole: Sequence[int], task: Task = None) -> Overview:
        """Of photos of the height and width `whole` with the small copies `small` [N, 3, h, w] and their features;
        `task` as in `restore`, of which only smooth ones and those of light count."""
        self.bank.check_filled()
        bank = self.bank
        scores = bank.calibrated(self.vote(self.query(features.deep)[0]))
        told = self._told(task, small.shape[0], small.device)
        brighter = None
        if bank.light_tasks:
            brighter = exposure(small, bank.of_light(scores), None if told is None else bank.of_light(told), whole)
            if _may_ask(small) and bool((brighter == 1).all()):
                brighter = None
        found = (scores > 0 if told is None else told) & bank.smooth
        if not bank.smooth_tasks or (_may_ask(small) and not bool(found.any())):
            return Overview(found, scores, None, None, brighter)
        smaller = small_copy(small, UNDONE_SIDE)
        features = self.encode(smaller)
        key, value = self.query(features.deep)
        restored = self.decode(smaller, features, value, self._readout(key, found, scores)).clamp(0, 1)
        layer = gain_and_offset(smaller, mixed(smaller, restored, bank.strength(found)))
        return Overview(found, scores, *layer, brighter)

    def settles_all(self, overview: Overview, task: Task) -> bool:
        """Whether no photo has to be looked at beyond its small copy; `task` as in `restore`."""
        told = self._told(task, overview.task.shape[0], overview.task.device)
        return bool(overview.settles(self.bank.smooth, self.bank.light, told).all())

    def match(self, query: Tensor, task: Task = None, overview: Overview | None = None) -> Match:
        """D_K -> what the bank holds for it. Queries of any size are area-pooled to the bank's resolution.

        Each window of the image has a score of its own, their mean settles the tasks. The readout is the whole image's.
        overview: what `clear` gives with the image that asks. It settles the smooth tasks, those of light where the
        image is seen brightened, and all where only smooth ones are told. The readout is of all but the smooth ones.
        Raises ValueError where the bank is empty or `task` does not name tasks of it.
        """
        self.bank.check_filled()
        bank = self.bank
        told = self._told(task, query.shape[0], query.device)
        if self.mixtures:
            scores = bank.calibrated(self.vote(query))
            if overview is not None:
                settled = overview.settles(bank.smooth, bank.light, told)
                scores = torch.where(settled, overview.scores, scores)
            found = scores > 0 if told is None else told
            left = found if overview is None else found & ~bank.smooth
            brighter = None if overview is None else overview.exposure
            return Match(self._readout(query, left, scores), found, scores, bank.strength(left), brighter)
        slots = bank.slots
        pooled = area_resize(query, bank.size, bank.size)
        if not self.window:
            readout, scores = self.retrieval(pooled, *slots, told)
            found = scores.argmax(1) if told is None else told
        else:
            scores = bank.calibrated(self.vote(query))
            found = scores.argmax(1) if told is None else told
            soft = told is None and self.retrieval.mode == "soft"
            readout, _ = self.retrieval(pooled, *slots, None if soft else found)
        return Match(readout, found, scores, bank.strength(F.one_hot(found, len(self.tasks)).bool()), None)

    def _readout(self, query: Tensor, tasks: Tensor, scores: Tensor) -> Tensor:
        """What the bank of a model for mixtures holds for these tasks, bool [N, T]: [N, Cv, b, b]. Where an image has
        none the readout is not used, but it has to be one."""
        bank = self.bank
        taking = tasks | (~tasks.any(1, keepdim=True) & (scores > -torch.inf))
        pooled = area_resize(query, bank.size, bank.size)
        return self.retrieval(pooled, *bank.slots, taking)[0]

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores [N, T] as `match` gives them -> how likely each task is, in [0, 1]; without mixtures they sum to 1."""
        return scores.sigmoid() if self.mixtures else scores.softmax(1)

    def vote(self, query: Tensor) -> Tensor:
        """The score of each task [N, T] before calibration: the mean over windows that overlap by half, or of the whole
        image where `window` is 0."""
        size = self.bank.size
        if not self.window:
            windows = area_resize(query, size, size).flatten(1)[:, None]
        else:
            step = max(1, size // 2)
            cells = [size + step * settled(_more(length * self.stride, self.window), 0) for length in query.shape[2:]]
            pooled = area_resize(query, *cells)
            windows = F.unfold(pooled, size, stride=step).transpose(1, 2)
        return self.retrieval.scores(windows, self.bank.keys, self.bank.counts).mean(1)

    def decode(
        self, lq: Tensor, features: Features, value: Tensor, readout: Tensor, exposure: Tensor | None = None
    ) -> Tensor:
        """Fuse D_V with the readout (at the bank's or at D_V's resolution) and restore: -> [N, 3, H, W]. exposure, as
        in `Overview`: how much brighter than lq the image was of which the features are."""
        fused = self.fusion(value, readout)
        residual = self.ending(self.decoder(fused, features.skips))
        if exposure is not None:
            residual = residual / exposure[:, None, None, None]
        height, width = lq.shape[2:]
        if torch.compiler.is_compiling():
            # A slice's layout depends on whether it cuts anything off; a graph is to hold for both cases.
            rows, columns = (torch.arange(size, device=lq.device) for size in (height, width))
            return lq + residual.index_select(2, rows).index_select(3, columns)
        return lq + residual[:, :, :height, :width]

    def forward(
        self,
        lq: Tensor,
        labels: Tensor | None = None,
        reference: tuple[Tensor, Tensor, Tensor] | None = None,
        stage: int = 0,
    ) -> Tensor | TrainingOutput:
        """Without labels: restore lq [N, 3, H, W] blind -> [N, 3, H, W].

        With labels (indices, integers [N]; for mixtures a mask [N, T], in which an image without any task gets what the
        model finds by itself): one training pass -> TrainingOutput. An image of a task that the bank holds nothing for
        yet gets what it holds for another. The bank is then built from `reference` = (LQ, HQ,
        labels), pairs of their own; stage 0 builds it anew, stage 1 goes on from the one it holds (R2R, section 3.5).
        Without a reference the bank is used as it is (finetuning).
        """
        self._check_images(lq, "lq")
        if labels is None:
            return self._restored(lq, None).image

        labels = self._checked_labels(labels, len(lq), "labels")
        bank = self.bank
        keys, values, counts, logits = bank.keys, bank.values, bank.counts, None
        if reference is not None:
            keys, values, logits = self._build_bank(*reference, stage)
        else:
            self.bank.check_filled()
        features = self.encode(lq)
        key, value = self.query(features.deep)
        pooled = area_resize(key, bank.size, bank.size)
        held = counts > 0
        if self.mixtures:
            with torch.no_grad():
                own = self.retrieval.scores(pooled.flatten(1)[:, None], keys, counts).squeeze(1)
                told = labels & held
                told = torch.where(told.any(1, keepdim=True), told, task_mask(own, None, "multi"))
        else:
            told = torch.where(held[labels], labels, held.long().argmax())
        readout, scores = self.retrieval(pooled, keys, values, counts, told)
        return TrainingOutput(self.decode(lq, features, value, readout), scores, logits)

    @torch.no_grad()
    def restore(self, lq: Tensor, task: Task = None, strength: float = 1.0) -> Restoration:
        """Restore lq [N, 3, H, W] in [0, 1], blind or told the task: a name, an index, or one of these for each image
        (for mixtures also several names joined by +, or a bool mask [N, T]). strength, in [0, 1]: how much of the
        restoration is mixed in; at 0 the image comes out as it went in.

        Raises ValueError for NaN, infinities, values outside [0, 1], unknown tasks, an empty bank, other strengths, and
        TypeError for another dtype than the model's, which a frozen model takes.
        """
        self._check_images(lq, "lq")
        self._check_dtype(lq)
        if not 0 <= strength <= 1:
            raise InputError(f"strength must be in 0..1, got {strength}")
        self.bank.check_filled()
        told = self._told(task, lq.shape[0], lq.device)
        fine = ((lq >= 0) & (lq <= 1)).all()
        if not lq.is_cuda:
            self._check_values(lq, fine)
        image, chosen, scores = self._restored(lq, told)
        if lq.is_cuda:  # asked once all work is under way: the GPU must not wait for the host
            self._check_values(lq, fine)
        if strength != 1:
            image = torch.lerp(lq.to(image.dtype), image, strength)
        return Restoration(image, chosen, scores)

    def _restored(self, lq: Tensor, told: Tensor | None) -> Restoration:
        cleared = self.clear(lq, told)
        if _may_ask(lq) and cleared.overview is not None and self.settles_all(cleared.overview, told):
            return Restoration(cleared.image.clone(), cleared.overview.task, cleared.overview.scores)
        features = cleared.features or self.encode(cleared.exposed)
        key, value = self.query(features.deep)
        match = self.match(key, told, cleared.overview)
        return Restoration(self.finish(cleared.image, features, value, match), match.task, match.scores)

    def finish(self, lq: Tensor, features: Features, value: Tensor, match: Match) -> Tensor:
        """`decode`, mixed in as the match says; images in which nothing was found are given back as they are."""
        if _may_ask(lq) and not bool(match.strength.any()):
            return lq.clone()
        image = self.decode(lq, features, value, match.readout, match.exposure)
        return mixed(lq, image, match.strength) if self.mixtures or self.bank.strengths else image

    def _build_bank(self, lq: Tensor, hq: Tensor, labels: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.amalgamator is None:
            raise ValueError("this model has no amalgamator (its bank is frozen); train it without a reference")
        if stage not in (0, 1):
            raise ValueError(f"stage must be 0 or 1, got {stage}")
        self._check_images(lq, "reference LQ")
        if hq.shape != lq.shape:
            raise ValueError(f"reference HQ must be {[*lq.shape]} as LQ is, got {[*hq.shape]}")
        labels = self._checked_labels(labels, len(lq), "reference labels")
        held = self.bank.slots
        if stage == 1 and recomputing():
            assert self._held_before is not None  # the first run left it
            held = self._held_before
        elif stage == 1:
            self._held_before = held.clone()
        keys, values, present, logits = self.amalgamator(lq, hq, labels, held, stage)
        if not recomputing():
            self.bank.replace(keys.detach(), values.detach(), present)
        return keys, values, logits

    # -- checks -------------------------------------------------------------------------------------------------

    def _check_images(self, x: Tensor, name: str) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 4 or x.shape[1] != 3 or not x.shape[2] or not x.shape[3]:
            raise ValueError(f"{name} must be [N, 3, H, W] with H, W >= 1, got {[*x.shape]}")

    def _check_dtype(self, lq: Tensor) -> None:
        wanted = next(self.parameters()).dtype
        if lq.dtype != wanted and not torch.is_autocast_enabled(lq.device.type):
            raise TypeError(f"lq must be {wanted} as the model is, got {lq.dtype}")

    def _check_values(self, lq: Tensor, fine: Tensor) -> None:
        if lq.numel() and not bool(fine):
            bad = "NaN or infinity" if not bool(lq.isfinite().all()) else f"{lq.amin():.9g} to {lq.amax():.9g}"
            raise InputError(f"lq must hold values in [0, 1], got {bad}")

    def _checked_labels(self, labels: Tensor, number: int, name: str) -> Tensor:
        """int64 [N], or for mixtures bool [N, T]."""
        wanted = (number, len(self.tasks)) if self.mixtures else (number,)
        if labels.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {[*labels.shape]}")
        if self.mixtures:
            return labels.bool()
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {labels.dtype}")
        if _may_ask(labels) and not bool(((labels >= 0) & (labels < len(self.tasks))).all()):
            raise ValueError(f"{name} must be 0 to {len(self.tasks) - 1}, got {labels.tolist()}")
        return labels.long()

    def _told(self, task: Task, number: int, device: torch.device) -> Tensor | None:
        """Names and indices as a tensor: int64 [N], or bool [N, T] for mixtures; None stays blind."""
        if task is None:
            return None
        if isinstance(task, Tensor):
            wanted = ([number, len(self.tasks)],) if task.dtype == torch.bool else ([number], [])
            if task.is_floating_point() or [*task.shape] not in wanted or (task.dtype == torch.bool) > self.mixtures:
                raise InputError(f"a task tensor must be int64 [{number}], or for mixtures bool [{number}, tasks]")
            if task.dtype == torch.bool:
                return task
            task = task.expand(number)
            if not self.mixtures:
                return task
            if not task.is_cuda and not bool(((task >= 0) & (task < len(self.tasks))).all()):
                raise ValueError(f"told tasks must be 0 to {len(self.tasks) - 1}")
            return task[:, None] == torch.arange(len(self.tasks), device=device)
        given = [task] if isinstance(task, str | int) else list(task)
        if len(given) not in (1, number):
            raise InputError(f"task must be one name or index, or {number} of them, got {len(given)}")
        named = [self._indices(one) for one in given]
        if self.mixtures:
            mask = [[index in indices for index in range(len(self.tasks))] for indices in named]
            return torch.tensor(mask, device=device).expand(number, -1)
        several = next((one for one, indices in zip(given, named, strict=True) if len(indices) > 1), None)
        if several is not None:
            raise InputError(f"{several!r} are several tasks; this model restores one at a time")
        return torch.tensor([index for (index,) in named], device=device).expand(number)

    def _indices(self, task: str | int) -> list[int]:
        """Of a name, of several joined by +, or of an index."""
        if isinstance(task, int):
            if 0 <= task < len(self.tasks):
                return [task]
            raise InputError(f"unknown task {task}; the model knows 0 to {len(self.tasks) - 1}")
        names = dict.fromkeys(name.strip() for name in task.split("+"))
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise InputError(f"unknown task {unknown[0]!r}; the model knows {', '.join(self.tasks)}")
        return [self.tasks.index(name) for name in names]

    # -- saving and loading -------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | Path, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> str | None:
        """Write `model.safetensors` (weights and bank) and `config.json` into a folder, beside and renamed.

        dtype: what floating-point numbers are stored in, by default their own; loading widens them again.
        """
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
                kwargs.setdefault("config", self.config)
                kwargs.setdefault("repo_id", folder.resolve().name)  # on the Hub; not the name of the folder beside
                self._stored_in = dtype
                url = super().save_pretrained(beside, **kwargs)
                for written in sorted(Path(beside).iterdir(), reverse=True):  # the weights before their config
                    written.chmod(0o666 & ~umask())
                    os.replace(written, folder / written.name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot save the model in {folder}: {error}") from error
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: x.contiguous() for name, x in self.state_dict().items()}
        if self._stored_in is not None:
            state = {name: x.to(self._stored_in) if x.is_floating_point() else x for name, x in state.items()}
        save_file(state, save_directory / WEIGHTS)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None = None, map_location: str = "cpu", **download: Any
    ) -> R2R:
        """Load, in eval mode: the model that comes with the package, one from a folder, or `hf://OWNER/NAME` from the
        Hugging Face Hub. A folder that is missing is never looked for there.

        `download`: arguments of `huggingface_hub.snapshot_download` (revision, token, local_files_only ...). Only
        safetensors and JSON are read. Raises InputError where the model is missing, damaged or of other sizes.
        """
        name = default_weights() if pretrained_model_name_or_path is None else pretrained_model_name_or_path
        if str(name).startswith(HUB):
            try:
                name = snapshot_download(str(name)[len(HUB) :], allow_patterns=[CONFIG, WEIGHTS], **download)
            except Exception as error:  # the hub's errors have no common base
                raise InputError(f"{name} cannot be had from the Hub: {error}") from error
        elif not Path(name).is_dir():
            raise InputError(f"{name} is not a model: no such folder (one on the Hub is {HUB}OWNER/NAME)")
        return cls._from_folder(Path(name), map_location)

    @classmethod
    def _from_folder(cls, folder: Path, device: str) -> R2R:
        weights = folder / WEIGHTS
        model, state = read_model(folder, read_config(folder, cls), cls)
        wide = {name: torch.float32 if x.is_floating_point() else x.dtype for name, x in state.items()}
        # Copies, as those of the file lie unaligned in memory, where products are slower and round otherwise.
        state = {name: x.to(device, wide[name], copy=True) for name, x in state.items()}
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
            raise InputError(f"{weights} does not fit its config.json: {first}") from error
        return model.eval()


def mixed(before: Tensor, after: Tensor, strength: Tensor) -> Tensor:
    """Images [N, 3, H, W] with so much [N] of what was changed, in the dtype of `after`. 0 and 1 give one's bits."""
    return torch.lerp(before.to(after.dtype), after, strength[:, None, None, None].to(after.dtype))


def _may_ask(images: Tensor) -> bool:
    """Whether work may depend on values. A GPU must not wait for the host, and a program is to hold for all cases."""
    return images.device.type == "cpu" and not torch.compiler.is_compiling()


def _mirrored(x: Tensor, down: int, across: int) -> Tensor:
    """x [N, C, H, W] with that many more rows below and columns to the right, mirrored at the border, however small."""
    for dim, more in ((2, down), (3, across)):
        length = x.shape[dim]
        if torch.compiler.is_compiling() or more:  # a graph is to hold for both cases
            period = torch.scalar_tensor(max(2 * length - 2, 1), dtype=torch.int64, device=x.device)
            index = torch.arange(length + more, device=x.device) % period  # by a tensor, as ONNX has it
            x = x.index_select(dim, torch.where(index < length, index, 2 * length - 2 - index))
    return x


def _more(length: int, window: int) -> int:
    """How many windows beyond the first cover a length, overlapping by half: 2 (length / window - 1), rounded."""
    return torch.sym_max(0, (4 * length + window) // (2 * window) - 2)
