"""What a training run is made of: one YAML file, or the same names as `key=value` on the command line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from r2r.data.sources import anchor
from r2r.errors import InputError
from r2r.pretrained import HUB


@dataclass
class PhaseConfig:
    """One phase of training. The learning rate warms up linearly from `warmup_lr` to `lr` over `warmup_epochs`, then
    stays there up to epoch `hold`, then follows a cosine that would reach `final_lr` at epoch `horizon` (0: at the last
    epoch). Where they are None, both follow from `epochs` as the paper's do: 15 and 270 of 240. `steps`: batches an
    epoch, drawn with every source equally likely, or by their shares; 0: every image as often as its source repeats
    it."""

    epochs: int = 0
    steps: int = 0
    crop: int = 128
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 2e-4
    final_lr: float = 0.0
    warmup_epochs: float | None = 0.0
    warmup_lr: float = 1e-7
    hold: float = 0.0
    horizon: float | None = 0.0
    by_epoch: bool = False

    @property
    def warmup_end(self) -> float:
        """The epoch at which the learning rate has warmed up."""
        return self.epochs * 15 / 240 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def cosine_end(self) -> float:
        """The epoch at which the cosine reaches `final_lr`; never before the last one."""
        return max(self.epochs * 270 / 240 if self.horizon is None else self.horizon, self.epochs)


@dataclass
class LossConfig:
    """See `r2r.losses.LossWeights`."""

    pixel: float = 1.0
    fft: float = 0.125
    log_error: float = 0.0
    degradation: float = 0.1
    match: float = 0.1
    label_smoothing: float = 0.1


@dataclass
class TrainConfig:
    """A training run; the defaults are the paper's (section 4.1) for three tasks, save what `docs/training.md` names.

    tasks: their names. data: training sources and validation: held-out sets, see `docs/training.md` for their keys.
    preset: sizes of the model, `model` overrides single ones. init: the folder of a model to start from; its sizes then
    take the preset's place, tasks are those of the same name, others are new. In pretraining half of each batch is
    restored and half builds the bank, in stage 0 during the first half of the epochs and in stage 1 during the second;
    in finetuning the bank is frozen and the whole batch is restored. mislead: the share of mixtures' images that are
    restored with what the bank holds for other tasks than theirs, half of them by the model's own choice, so that a
    wrong match costs little. quarters: the share of the steps in which each image to restore is cut into its four
    quarters, so that small images are learnt as well. reference_hq: what the bank is built from beside the degraded
    images: clean images, the same with noise of 15 of 255 ("noise15"), or the degraded images themselves ("lq"; the
    paper's ablation). optimizer: adam, the paper's, or muon (`r2r.muon`). precision: fp32 or bf16. cache: GB of decoded
    photos that each worker keeps. wandb: a project of Weights & Biases that the run is reported to beside TensorBoard;
    none by default. accept: settings in which a continuation may differ from the run it goes on with; "data" also
    stands for the photos in the folders.
    """

    out: str = "runs/r2r"
    tasks: list[str] = field(default_factory=list)
    data: list[Any] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)
    preset: str = "base"
    init: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    pretrain: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(epochs=240, warmup_epochs=None, horizon=None, batch_size=64)
    )
    finetune: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(epochs=30, crop=224, batch_size=32, lr=1e-6, final_lr=1e-8)
    )
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: str = "adam"
    clip_norm: float = 0.01
    ema: float = 0.999
    mislead: float = 0.0
    quarters: float = 0.0
    reference_hq: str = "clean"
    precision: str = "fp32"
    seed: int = 0
    device: str = "auto"
    eager: bool = False
    workers: int = 2
    cache: float = 0.25
    log_every: int = 10
    save_every: int = 500
    validate_every: int = 1
    wandb: str = ""
    accept: list[str] = field(default_factory=list)


# may change between a run and its continuation, as may the length and the rates of its phases
FREE = ("out", "validation", "device", "eager", "workers", "cache", "log_every", "save_every", "validate_every",
        "wandb", "accept")  # fmt: skip
SCHEDULE = ("epochs", "lr", "final_lr", "warmup_epochs", "hold", "horizon")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Merge the defaults, a YAML file and `key=value` overrides; relative paths in the file are meant from its folder.

    Raises InputError that names the unknown key or the value of a wrong type.
    """
    try:
        merged = OmegaConf.structured(TrainConfig)
        if path is not None:
            loaded = OmegaConf.load(path)
            if not isinstance(loaded, DictConfig):
                raise InputError(f"{path} must hold keys and values")
            merged = OmegaConf.merge(merged, loaded)
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except ConfigKeyError as error:
        near = [f"{phase}.{error.key}" for phase in ("pretrain", "finetune") if hasattr(PhaseConfig, str(error.key))]
        hint = f"; there are {' and '.join(near)}" if near else ""
        raise InputError(f"{path or 'the options'}: {error.full_key} is no setting{hint}") from error
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise InputError(f"{path or 'the options'}: {' '.join(str(error).split())}") from error
    assert isinstance(config, TrainConfig)
    if path is not None:
        assert isinstance(loaded, DictConfig)
        given = config.init
        config = anchored(config, path.parent)
        if loaded.get("init") != given:  # from the command line
            config.init = given
    _check(config)
    return config


def anchored(config: TrainConfig, folder: Path) -> TrainConfig:
    """A copy in which the relative paths of `data`, `validation` and `init` start at `folder`."""
    config = copy.deepcopy(config)
    for entry in (*config.data, *config.validation):
        anchor(entry, folder)
    if config.init and not config.init.startswith(HUB):
        config.init = str(folder / Path(config.init).expanduser())
    return config


def _check(config: TrainConfig) -> None:
    if not config.tasks:
        raise InputError("tasks is empty; name at least one, e.g. tasks=[denoise,derain]")
    if not config.data:
        raise InputError("data is empty; name at least one source of training images")
    unknown = {name.partition(".")[0] for name in config.accept} - {one.name for one in fields(TrainConfig)}
    if unknown:
        raise InputError(f"accept names {min(unknown)!r}, which is no setting")
    for name in ("mislead", "quarters"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{name} must be in 0..1, got {getattr(config, name)}")
    if config.reference_hq not in ("clean", "noise15", "lq"):
        raise InputError(f"reference_hq must be clean, noise15 or lq, got {config.reference_hq}")
    if config.optimizer not in ("adam", "muon"):
        raise InputError(f"optimizer must be adam or muon, got {config.optimizer}")
    if config.precision not in ("fp32", "bf16"):
        raise InputError(f"precision must be fp32 or bf16, got {config.precision}")
    for name, phase in (("pretrain", config.pretrain), ("finetune", config.finetune)):
        for key in ("crop", "batch_size", "accumulate"):
            if getattr(phase, key) < 1:
                raise InputError(f"{name}.{key} must be 1 or more, got {getattr(phase, key)}")
        if config.quarters and phase.epochs and phase.crop % 2:
            raise InputError(f"{name}.crop is {phase.crop}, which quarters cannot halve; accepted: an even one")
        if phase.epochs < 0 or phase.steps < 0:
            raise InputError(f"{name}.epochs and {name}.steps must not be negative")
        if phase.epochs and phase.warmup_end >= phase.epochs:
            raise InputError(
                f"{name}.warmup_epochs is {phase.warmup_end:g}, which {phase.epochs} epochs never get past; accepted: "
                "less, or null for a sixteenth of the epochs"
            )
    if config.pretrain.epochs + config.finetune.epochs == 0:
        raise InputError("pretrain.epochs and finetune.epochs are both 0: there is nothing to train")
