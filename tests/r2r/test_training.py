"""Training: the loss falls, both phases run, an interrupted run ends as if it had not been, bad settings are named."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from r2r import R2R, InputError
from r2r.config import PhaseConfig, TrainConfig, load_config
from r2r.data import sizes
from r2r.data.images import write_rgb
from r2r.evaluation import evaluate
from r2r.figures import plot_curves
from r2r.training import CHECKPOINTS, Silent, Trainer, learning_rate
from tests.conftest import TINY


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, photo in (("astronaut", data.astronaut()), ("coffee", data.coffee())):
        write_rgb(folder / f"{name}.png", photo[:128, :160].astype("float32") / 255)
    return folder


def configuration(photos: Path, out: Path, **changes: Any) -> TrainConfig:
    sources = [{"task": task, "clean": str(photos)} for task in ("denoise", "lowlight")]
    config = TrainConfig(
        out=str(out),
        tasks=["denoise", "lowlight"],
        data=sources,
        validation=[{"task": "denoise", "clean": str(photos), "sigma": 25}],
        preset="tiny",
        model=dict(TINY),
        pretrain=PhaseConfig(epochs=2, steps=3, crop=32, batch_size=8, lr=1e-3, warmup_epochs=0.5),
        finetune=PhaseConfig(epochs=1, steps=2, crop=48, batch_size=4, lr=1e-4),
        clip_norm=0.5,
        workers=0,
        log_every=1,
        save_every=2,
        device="cpu",
    )
    return replace(config, **changes)


class Killed(Exception):
    pass


class KillAt(Silent):
    """A display that ends the run after a number of updates."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def update(self, done: int, row: dict[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def weights(model: R2R) -> dict[str, torch.Tensor]:
    return model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def test_both_phases_leave_a_model_that_restores(photos: Path, tmp_path: Path) -> None:
    model = Trainer(configuration(photos, tmp_path / "run")).run()
    assert model.amalgamator is None
    assert model.bank.counts.tolist() == [9, 9]
    for name in ("last", "best"):
        again = R2R.from_pretrained(tmp_path / "run" / name)
        assert again(torch.rand(1, 3, 20, 20)).isfinite().all()
    assert same(weights(R2R.from_pretrained(tmp_path / "run" / "last")), weights(model))
    rows = log(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["pretrain"] * 3 + ["pretrain"] * 4 + ["pretrain"] + ["finetune"] * 3
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("updates", "optimizer"), [(1, "adam"), (3, "adam"), (5, "adam"), (7, "adam"), (3, "muon"), (7, "muon")]
)
def test_a_killed_run_goes_on_bit_for_bit(photos: Path, tmp_path: Path, updates: int, optimizer: str) -> None:
    whole = Trainer(configuration(photos, tmp_path / "whole", optimizer=optimizer)).run()
    config = configuration(photos, tmp_path / "killed", optimizer=optimizer)
    with pytest.raises(Killed):
        Trainer(config, KillAt(updates)).run()
    torch.rand(7)  # other random numbers were drawn in between
    assert same(weights(Trainer(config).run()), weights(whole))
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_a_process_killed_without_warning_goes_on(photos: Path, tmp_path: Path) -> None:
    config = configuration(photos, tmp_path / "whole", workers=1, validation=[])
    whole = Trainer(config).run()
    script = (
        "import sys; from tests.r2r.test_training import configuration; from r2r.training import Trainer; from pathlib "
        "import Path; Trainer(configuration(Path(sys.argv[1]), Path(sys.argv[2]), workers=1, validation=[])).run()"
    )
    command = [sys.executable, "-c", script, str(photos), str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    checkpoint = tmp_path / "killed" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    assert same(weights(Trainer(replace(config, out=str(tmp_path / "killed"))).run()), weights(whole))


def test_loss_falls(photos: Path, tmp_path: Path) -> None:
    pretrain = PhaseConfig(epochs=2, steps=30, crop=32, batch_size=8, lr=3e-3)
    config = configuration(
        photos, tmp_path, pretrain=pretrain, finetune=PhaseConfig(), validation=[], log_every=10, ema=0.9
    )
    Trainer(config).run()
    losses = [float(row["total"]) for row in log(tmp_path)]
    assert min(losses[-2:]) < 0.9 * losses[0]


def test_accumulation_takes_fewer_updates(photos: Path, tmp_path: Path) -> None:
    phase = PhaseConfig(epochs=1, steps=4, crop=32, batch_size=4, accumulate=4)
    config = configuration(photos, tmp_path, pretrain=phase, finetune=PhaseConfig(), validation=[])
    trainer = Trainer(config)
    trainer.run()
    steps = {int(state["step"]) for state in trainer.optimiser.state.values()}
    assert steps == {1}


def test_the_last_group_of_an_epoch_counts_as_much_as_the_others(photos: Path, tmp_path: Path) -> None:
    class Recording(Trainer):
        def _update(self) -> None:
            gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]))
            super()._update()

    gradients: list[torch.Tensor] = []
    for accumulate in (1, 4):
        phase = PhaseConfig(epochs=1, steps=1, crop=32, batch_size=4, accumulate=accumulate)
        config = configuration(
            photos, tmp_path / str(accumulate), pretrain=phase, finetune=PhaseConfig(), validation=[]
        )
        Recording(config).run()
    torch.testing.assert_close(*gradients)


def test_bf16_trains(photos: Path, tmp_path: Path) -> None:
    model = Trainer(configuration(photos, tmp_path, precision="bf16", validation=[])).run()
    assert all(x.isfinite().all() for x in model.state_dict().values())


def test_mixtures_train(photos: Path, tmp_path: Path) -> None:
    sources = [
        {"task": "denoise", "clean": str(photos)},
        {"task": ["lowlight", "denoise"], "clean": str(photos), "degradation": "lowlight+noise"},
    ]
    model = Trainer(configuration(photos, tmp_path, data=sources)).run()
    assert model.mixtures
    assert model.restore(torch.rand(1, 3, 16, 16)).task.dtype == torch.bool


def test_photos_with_nothing_wrong_train_too(photos: Path, tmp_path: Path) -> None:
    sources = [
        {"task": "denoise", "clean": str(photos), "optional": "lowlight", "share": 2},
        {"task": "lowlight", "clean": str(photos)},
        {"task": [], "clean": str(photos), "reduce": "0.7..1", "degradation": "jpeg:quality=90..100"},
    ]
    trainer = Trainer(configuration(photos, tmp_path, data=sources, mislead=0.5))
    assert trainer.mixtures
    assert trainer.run().mixtures


def test_a_share_of_the_images_is_misled(photos: Path, tmp_path: Path) -> None:
    sources = [{"task": task, "clean": str(photos)} for task in (["denoise", "lowlight"], "lowlight", [])]
    trainer = Trainer(configuration(photos, tmp_path, data=sources, mislead=0.4, validation=[]))
    torch.manual_seed(0)
    labels = torch.tensor([[True, True]] * 4000 + [[False, False]] * 4000)
    told = trainer._misled(labels)
    own, wrong = told[:4000], told[4000:]
    assert own.all(1).float().mean() == pytest.approx(0.6, abs=0.03)
    assert (own.sum(1) == 1).float().mean() == pytest.approx(0.2, abs=0.03)
    assert (own.sum(1) == 0).float().mean() == pytest.approx(0.2, abs=0.03)  # by the model's own choice
    assert (wrong.sum(1) == 1).float().mean() == pytest.approx(0.5, abs=0.03)
    assert not wrong.all(1).any()
    assert trainer._known(torch.tensor([[1.0, 0.5], [0.0, 1.0]])).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("share", [0, 1])
def test_images_to_restore_are_cut_into_quarters(photos: Path, tmp_path: Path, share: float) -> None:
    trainer = Trainer(configuration(photos, tmp_path, quarters=share, validation=[]))
    seen: list[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...] | None]] = []
    forward = trainer.network.forward

    def noted(lq: torch.Tensor, labels: torch.Tensor, reference: tuple[torch.Tensor, ...] | None, stage: int) -> Any:
        seen.append((lq, labels, reference))
        return forward(lq, labels, reference=reference, stage=stage)

    trainer.network.forward = noted
    lq = torch.rand(8, 3, 32, 48)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    trainer._forward_backward("pretrain", [lq, lq, labels], 0, 1)
    (given, told, reference), half = seen[0], lq[:4]
    assert reference is not None
    assert torch.equal(reference[0], lq[4:])  # the bank is built from whole images
    if share:
        parts = [half[:, :, y : y + 16, x : x + 24] for y in (0, 16) for x in (0, 24)]
        assert torch.equal(given, torch.stack(parts, 1).flatten(0, 1))
        assert told.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    else:
        assert torch.equal(given, half)
        assert told.tolist() == [0, 1, 0, 1]


def test_a_run_starts_from_a_model_tasks_by_name(photos: Path, tmp_path: Path) -> None:
    first = Trainer(configuration(photos, tmp_path / "first", validation=[])).run()
    first.save_pretrained(tmp_path / "model")
    tasks = ["derain", "lowlight"]
    data = [{"task": task, "clean": str(photos)} for task in tasks]
    changes = {"tasks": tasks, "data": data, "init": str(tmp_path / "model"), "validation": [], "model": {}}
    trainer = Trainer(configuration(photos, tmp_path / "second", preset="base", **changes))
    model = trainer.model
    assert model.config["width"] == TINY["width"]
    torch.testing.assert_close(model.intro.weight, first.intro.weight)
    torch.testing.assert_close(model.bank.keys[1], first.bank.keys[1])
    assert model.bank.counts.tolist() == [0, 9]
    assert trainer.run().bank.counts.tolist() == [9, 9]

    only = {**changes, "tasks": ["lowlight"], "data": data[1:], "pretrain": PhaseConfig()}
    finetuned = Trainer(configuration(photos, tmp_path / "third", **only)).run()
    torch.testing.assert_close(finetuned.bank.values[0], first.bank.values[1])
    assert not torch.equal(finetuned.intro.weight, first.intro.weight)
    with pytest.raises(InputError, match=r"the bank holds nothing for derain; pretrain\.epochs above 0"):
        Trainer(configuration(photos, tmp_path / "fourth", **{**changes, "pretrain": PhaseConfig()})).run()
    with pytest.raises(InputError, match="does not fit"):
        Trainer(configuration(photos, tmp_path / "fifth", **{**changes, "model": {"width": 8}}))


def test_the_bank_can_be_built_from_worse_images(photos: Path, tmp_path: Path) -> None:
    lq, hq = torch.rand(2, 4, 3, 64, 64)
    built = {}
    for kind in ("clean", "noise15", "lq"):
        trainer = Trainer(configuration(photos, tmp_path / kind, reference_hq=kind, validation=[]))
        torch.manual_seed(0)
        built[kind] = trainer._reference_hq(lq, hq)
    assert built["clean"] is hq
    assert built["lq"] is lq
    assert 255 * (built["noise15"] - hq).std() == pytest.approx(15, rel=0.05)
    with pytest.raises(InputError, match="reference_hq must be clean, noise15 or lq"):
        load_config(None, ["tasks=[a]", "data=[{task: a}]", "reference_hq=best"])


def test_a_run_can_be_made_longer(photos: Path, tmp_path: Path) -> None:
    Trainer(configuration(photos, tmp_path, validation=[])).run()
    longer = configuration(photos, tmp_path, validation=[])
    longer.finetune.epochs, longer.finetune.lr = 2, 1e-5
    trainer = Trainer(longer)
    assert (trainer.phase, trainer.epoch) == ("finetune", 1)
    trainer.run()
    assert trainer.step == 2 * 3 + 2 * 2
    assert float(log(tmp_path)[-1]["lr"]) <= 1e-5


def test_the_rate_holds_before_it_falls() -> None:
    phase = PhaseConfig(epochs=10, lr=1.0, final_lr=0.2, hold=6.0)
    assert [learning_rate(phase, epoch) for epoch in (0, 3, 6)] == [1.0, 1.0, 1.0]
    assert learning_rate(phase, 8) == pytest.approx(0.6)
    assert learning_rate(phase, 10) == pytest.approx(0.2)


def test_learning_rate_follows_the_paper() -> None:
    phase = TrainConfig().pretrain
    assert learning_rate(phase, 0) == pytest.approx(1e-7)
    assert learning_rate(phase, 15) == pytest.approx(2e-4)
    assert learning_rate(phase, 15 + 255 / 2) == pytest.approx(1e-4)
    assert learning_rate(phase, 240) == pytest.approx(1e-4 * (1 + math.cos(math.pi * 225 / 255)))
    phase = TrainConfig().finetune
    assert learning_rate(phase, 0) == pytest.approx(1e-6)
    assert learning_rate(phase, 30) == pytest.approx(1e-8)


@pytest.mark.parametrize("epochs", [8, 40, 240])
def test_warm_up_and_cosine_follow_from_the_epochs(photos: Path, epochs: int) -> None:
    data = f"data=[{{task: denoise, clean: {photos}}}]"
    config = load_config(None, ["tasks=[denoise]", data, f"pretrain.epochs={epochs}"])
    published = TrainConfig().pretrain
    for share in (0, 0.03, 1 / 16, 0.3, 0.5, 1):
        assert learning_rate(config.pretrain, share * epochs) == pytest.approx(learning_rate(published, share * 240))
    given = load_config(None, ["tasks=[denoise]", data, "pretrain.epochs=40", "pretrain.horizon=0"]).pretrain
    assert learning_rate(given, 40) == pytest.approx(0)
    with pytest.raises(InputError, match=r"pretrain\.warmup_epochs is 15, which 5 epochs never get past"):
        load_config(None, ["tasks=[denoise]", data, "pretrain.epochs=5", "pretrain.warmup_epochs=15"])


def test_other_settings_in_the_same_folder_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Trainer(configuration(photos, tmp_path), KillAt(3)).run()
    Trainer(configuration(photos, tmp_path, workers=1, log_every=5))  # these may change
    Trainer(
        configuration(photos, tmp_path, finetune=PhaseConfig(epochs=1, steps=2, crop=32, batch_size=4))
    )  # not begun
    with pytest.raises(InputError, match=r"holds a run with clip_norm = 0\.5, now it is 1\.0.*accept=\[clip_norm\]"):
        Trainer(configuration(photos, tmp_path, clip_norm=1.0))
    Trainer(configuration(photos, tmp_path, clip_norm=1.0, accept=["clip_norm"]))
    smaller = PhaseConfig(epochs=2, steps=3, crop=24, batch_size=8, lr=1e-3, warmup_epochs=0.5)
    with pytest.raises(InputError, match=r"holds a run with pretrain\.crop = 32, now it is 24"):
        Trainer(configuration(photos, tmp_path, pretrain=smaller))
    with pytest.raises(InputError, match="does not fit these settings"):
        Trainer(configuration(photos, tmp_path, model={**TINY, "width": 8}, accept=["model"]))
    with pytest.raises(InputError, match="accept names 'clip', which is no setting"):
        load_config(None, ["tasks=[a]", "data=[{task: a}]", "accept=[clip]"])


def short(photos: Path, out: Path, **changes: Any) -> TrainConfig:
    """Two epochs of pretraining in two steps each."""
    pretrain = PhaseConfig(epochs=2, steps=2, crop=32, batch_size=4, lr=1e-3)
    return configuration(photos, out, **{"pretrain": pretrain, "finetune": PhaseConfig(), "save_every": 1, **changes})


def test_a_run_goes_on_from_any_folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Killed):
        Trainer(short(Path("photos"), Path("run")), KillAt(3)).run()
    monkeypatch.chdir("elsewhere")
    assert Trainer(short(Path("../photos"), Path("../run"))).step == 2
    recorded = load_config(Path("../run/config.yaml"))
    trainer = Trainer(recorded)
    assert (trainer.step, trainer.out) == (2, tmp_path / "run")
    trainer.run()
    assert not any(Path().iterdir())


def test_other_photos_are_refused_or_accepted(photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    with pytest.raises(Killed):
        Trainer(short(own, tmp_path / "run", validation=[]), KillAt(3)).run()
    shutil.copytree(own, tmp_path / "moved")
    Trainer(short(own, tmp_path / "run", validation=[]))
    (own / "coffee.png").rename(own / "tea.png")
    with pytest.raises(InputError, match=r"other photos for denoise: 2 then, 2 now.*accept=\[data\]"):
        Trainer(short(own, tmp_path / "run", validation=[]))
    with pytest.raises(InputError, match="holds a run with data = "):
        Trainer(short(tmp_path / "moved", tmp_path / "run", validation=[]))
    trainer = Trainer(short(own, tmp_path / "run", validation=[], accept=["data"]))
    assert trainer.step == 2
    trainer.run()


def test_fewer_photos_end_an_epoch_early(photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    changes = {"validation": [], "pretrain": PhaseConfig(epochs=1, crop=32, batch_size=4)}
    data = [{"task": task, "clean": str(own), "repeat": 4} for task in ("denoise", "lowlight")]
    with pytest.raises(Killed):
        Trainer(short(own, tmp_path / "run", data=data, **changes), KillAt(4)).run()  # of four steps
    (own / "coffee.png").unlink()
    trainer = Trainer(short(own, tmp_path / "run", data=data, accept=["data"], **changes))
    assert trainer.batch == 3
    trainer.run()
    assert trainer.step == 3  # two steps fill an epoch now


def test_another_validation_set_starts_a_new_best(photos: Path, tmp_path: Path) -> None:
    config = short(photos, tmp_path / "run")
    Trainer(config).run()
    assert Trainer(config).best > 0
    config.validation[0]["sigma"] = 50
    assert Trainer(config).best == -math.inf


class Damage(Silent):
    """Cuts a photo short at the first update."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def update(self, done: int, row: dict[str, float]) -> None:
        self.path.write_bytes(self.path.read_bytes()[:1000])


def test_validation_that_fails_loses_no_epoch(photos: Path, tmp_path: Path) -> None:
    whole = Trainer(short(photos, tmp_path / "whole", save_every=100)).run()
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    image = (own / "coffee.png").read_bytes()
    validation = [{"task": "denoise", "clean": str(own), "sigma": 25}]
    config = short(photos, tmp_path / "run", save_every=100, validation=validation)
    with pytest.raises(InputError, match=r"coffee\.png: damaged or cut short"):
        Trainer(config, Damage(own / "coffee.png")).run()
    for _ in range(2):
        trainer = Trainer(config)
        assert (trainer.epoch, trainer.batch, trainer.step) == (0, 2, 2)
        with pytest.raises(InputError, match=r"coffee\.png: damaged or cut short"):
            trainer.run()
    (own / "coffee.png").write_bytes(image)
    assert same(weights(Trainer(config).run()), weights(whole))
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_a_damaged_validation_photo_is_refused_before_the_first_step(photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    path = own / "coffee.png"
    path.write_bytes(path.read_bytes()[:-200])
    trainer = Trainer(short(photos, tmp_path / "run", validation=[{"task": "denoise", "clean": str(own), "sigma": 25}]))
    with pytest.raises(InputError, match=r"coffee\.png: damaged or cut short"):
        trainer.run()
    assert trainer.step == 0


def test_a_disk_too_small_for_the_checkpoints_is_refused_at_the_start(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short(photos, tmp_path / "run")
    trainer = Trainer(config)
    trainer.run()
    written = {path.name: path.stat().st_size for path in (tmp_path / "run").glob("*.ckpt")}
    model = (tmp_path / "run" / "last" / "model.safetensors").stat().st_size
    needed = 3 * max(written.values()) + 3 * model
    usage = namedtuple("usage", "total used free")

    def disk(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 0, free))

    disk(int(0.7 * needed))
    with pytest.raises(InputError, match=r"checkpoints and models need 0\.0\d GB, 0\.0\d GB are free"):
        Trainer(replace(config, out=str(tmp_path / "new")))
    disk(int(1.3 * needed))
    Trainer(replace(config, out=str(tmp_path / "new")))
    disk(int(0.6 * needed))  # what the run holds already is not needed again
    Trainer(config)


def test_each_validation_set_has_a_curve_blind_and_told(photos: Path, tmp_path: Path) -> None:
    dark = {"name": "dark", "task": "lowlight", "clean": str(photos)}
    config = configuration(photos, tmp_path / "run")
    config.validation.append(dark)
    trainer = Trainer(config)
    model = trainer.run()
    rows = [*csv.DictReader((tmp_path / "run" / "validation.csv").read_text().splitlines())]
    assert [(row["phase"], row["step"], row["set"]) for row in rows] == [
        (phase, step, name) for phase, step in (("pretrain", "3"), ("pretrain", "6"), ("finetune", "8"))
        for name in ("denoise", "dark")
    ]  # fmt: skip
    result = evaluate(model, trainer.held_out, misled=False)
    for row, one in zip(rows[-2:], result.sets, strict=True):
        assert one.told is not None
        assert one.misled is None
        expected = (one.blind.psnr, one.blind.ssim, one.told.psnr, one.told.ssim, one.accuracy)
        found = [float(row[key]) for key in ("psnr", "ssim", "told_psnr", "told_ssim", "accuracy")]
        assert found == pytest.approx(expected, rel=1e-4)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert len(board.Scalars("valid/dark/told_psnr")) == 3
    plot_curves(tmp_path / "run", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    with pytest.raises(InputError, match="has validated nothing yet"):
        plot_curves(tmp_path, tmp_path / "curves.png")


def test_a_run_is_reported_to_weights_and_biases_where_asked(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    config = configuration(photos, tmp_path / "run", wandb="restoration")
    with pytest.raises(
        InputError, match=r"wandb=restoration needs the package wandb: pip install 'r2r-restore\[wandb\]'"
    ):
        Trainer(config).run()


@pytest.mark.parametrize("by_epoch", [False, True])
def test_the_rate_moves_with_every_batch_or_once_an_epoch(photos: Path, tmp_path: Path, by_epoch: bool) -> None:
    config = configuration(photos, tmp_path, validation=[], finetune=PhaseConfig())
    config.pretrain.by_epoch = by_epoch
    Trainer(config).run()
    rates = [float(row["lr"]) for row in log(tmp_path)]
    expected = [
        learning_rate(config.pretrain, epoch if by_epoch else epoch + i / 3) for epoch in (0, 1) for i in range(3)
    ]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = short(photos, out, validation=[])
    whole = Trainer(config).run()
    newest, before = (out / name for name in CHECKPOINTS)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # which torch.load does not notice
    newest.write_bytes(content)
    trainer = Trainer(config)
    assert (trainer.epoch, trainer.step) == (1, 4)  # saved in the epoch's last step
    assert same(weights(trainer.run()), weights(whole))
    assert (out / "last.damaged").read_bytes() == content
    newest.unlink()
    assert Trainer(config).step == 4
    before.write_bytes(content[:1000])
    with pytest.raises(InputError, match=r"previous\.ckpt cannot be read"):
        Trainer(config)
    before.unlink()
    with pytest.raises(InputError, match=r"no checkpoint to go on from, and a new run would replace the model .*last"):
        Trainer(config)
    assert R2R.from_pretrained(out / "last").bank.counts.tolist() == [9, 9]


def test_a_checkpoint_of_the_version_before_goes_on(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Trainer(short(photos, tmp_path), KillAt(3)).run()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    free = ("out", "validation", "device", "eager", "workers", "cache", "log_every", "save_every", "validate_every")
    for key in (*free, "accept"):
        del state["config"][key]
    for phase in ("pretrain", "finetune"):
        for key in ("epochs", "lr", "final_lr", "hold", "horizon"):
            del state["config"][phase][key]
    del state["files"]
    torch.save(state, tmp_path / "last.ckpt")
    assert Trainer(short(photos, tmp_path)).step == 2


class SignalAt(Silent):
    """A display that sends this process a signal at its second update."""

    def __init__(self, number: int) -> None:
        self.number, self.updates = number, 0

    def update(self, done: int, row: dict[str, float]) -> None:
        self.updates += 1
        if self.updates == 2:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_before_it_ends(photos: Path, tmp_path: Path, number: int) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    whole = Trainer(short(photos, tmp_path / "whole", save_every=100)).run()
    config = short(
        photos, tmp_path / "run", save_every=100, pretrain=PhaseConfig(epochs=1, steps=4, crop=32, batch_size=4)
    )
    former = signal.signal(number, end)
    try:
        with pytest.raises(KeyboardInterrupt):
            Trainer(config, SignalAt(number)).run()
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, former)
    trainer = Trainer(config)
    assert (trainer.batch, trainer.step) == (2, 2)
    assert whole.bank.counts.tolist() == trainer.run().bank.counts.tolist()


def test_rows_that_were_not_written_to_their_end_are_dropped(photos: Path, tmp_path: Path) -> None:
    config = short(photos, tmp_path / "run")
    Trainer(config).run()
    path = tmp_path / "run" / "log.csv"
    before = log(tmp_path / "run")
    for half in ("pretrain,1", "pretrain,1,4,0.001,0.5,,,,,,,,,31", "\0\0\0", "pretrain,1,,,\n"):
        with path.open("a") as file:
            file.write(half)
        Trainer(config)
        assert log(tmp_path / "run") == before


def test_headers_are_read_once_a_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    config = short(own, tmp_path / "run")
    Trainer(config)
    stat = (own / "coffee.png").stat()
    (own / "coffee.png").write_bytes(b"x" * stat.st_size)
    os.utime(own / "coffee.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    monkeypatch.setattr(sizes, "_known", {})  # as in another process
    assert Trainer(config).datasets["pretrain"].skipped == 0
    (tmp_path / "run" / "sizes.json").unlink()
    monkeypatch.setattr(sizes, "_known", {})
    with pytest.raises(InputError, match=r"coffee\.png: not an image"):
        Trainer(config)


def test_what_killed_processes_left_is_removed(photos: Path, tmp_path: Path) -> None:
    config = short(photos, tmp_path)
    Trainer(config).run()
    left = [tmp_path / ".0123456789abcdef.ckpt", tmp_path / "last" / ".saving-a1b2" / "model.safetensors"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    (tmp_path / ".hidden").write_text("somebody's own")
    Trainer(config)
    assert not any(path.exists() for path in left)
    assert R2R.from_pretrained(tmp_path / "last").bank.counts.tolist() == [9, 9]
    assert (tmp_path / ".hidden").exists()


def test_a_checkpoint_that_cannot_be_written_says_why(photos: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # only Unix limits the size of files
    trainer = Trainer(short(photos, tmp_path))
    trainer._save()
    before = (tmp_path / "last.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*last\.ckpt: File too large"):
            trainer._save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "sizes.json"}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(photos: Path, tmp_path: Path) -> None:
    trainer = Trainer(configuration(photos, tmp_path, validation=[]), KillAt(3))
    with pytest.raises(Killed):
        trainer.run()
    before = (tmp_path / "last.ckpt").read_bytes()
    trainer = Trainer(configuration(photos, tmp_path, validation=[]))
    with torch.no_grad():
        trainer.model.ending.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="not finite at step 3"):
        trainer.run()
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda p: {"data": [{"task": "denoise", "clean": str(p)}]}, "no data source for the task 'lowlight'"),
        (lambda p: {"data": [{"task": "snow", "clean": str(p)}]}, "unknown task 'snow'"),
        (lambda p: {"data": [{"task": "denoise", "clean": str(p), "sigm": 3}]}, "unknown key 'sigm'"),
        (lambda p: {"preset": "huge"}, "unknown preset 'huge'; accepted: base, small, tiny"),
        (lambda p: {"model": {"widht": 8}, "data": [{"task": "denoise", "clean": str(p / "none")}]}, "model: .*widht"),
        (lambda p: {"device": "cuda:7"}, "device 'cuda:7' cannot be used"),
        (lambda p: {"pretrain": PhaseConfig(epochs=1, steps=1, crop=512, batch_size=4)}, "smaller than the crop"),
        (lambda p: {"pretrain": PhaseConfig(epochs=1, steps=1, crop=32, batch_size=2)}, "batch size 2"),
    ],
)
def test_bad_settings_are_named(
    photos: Path, tmp_path: Path, changes: Callable[[Path], dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(configuration(photos, tmp_path, **changes(photos))).run()


def test_configuration_files_and_overrides(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"tasks: [denoise]\ndata:\n  - {{task: denoise, clean: {photos.name}}}\npretrain: {{epochs: 3}}\n")
    config = load_config(path, ["pretrain.lr=0.001", "model.capacity=10"])
    assert config.pretrain.epochs == 3
    assert config.pretrain.lr == 0.001
    assert config.pretrain.batch_size == 64
    assert config.model == {"capacity": 10}
    assert config.data == [{"task": "denoise", "clean": str(tmp_path / photos.name)}]
    for override, message in (
        ("epochs=3", "epochs"),
        ("pretrain.epochs=many", "many"),
        ("pretrain.crop=0", "pretrain.crop must be 1 or more"),
        ("precision=fp8", "precision must be fp32 or bf16"),
        ("optimizer=sgd", "optimizer must be adam or muon"),
        ("quarters=2", r"quarters must be in 0\.\.1, got 2"),
        ("mislead=-1", r"mislead must be in 0\.\.1, got -1"),
        ("tasks=[]", "tasks is empty"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_config(path, [override])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "other.yaml")
    path.write_text("tasks: [")
    with pytest.raises(InputError, match=r"run\.yaml"):
        load_config(path)
