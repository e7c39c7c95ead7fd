"""Other methods are measured beside ours, all alike."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from rich.console import Console
from torch import nn

from r2r import R2R, InputError
from r2r.comparison import Comparison, compare
from r2r.complexity import measure, measure_apart, settings
from r2r.data.images import read_rgb, write_rgb
from r2r.data.sources import build_source
from r2r.evaluation import EvaluationSet, evaluate, evaluation_set, load_sets
from r2r.extras import import_after_torchvision
from r2r.files import write_csv
from r2r.methods import Kind, method_of
from r2r.metrics import Measures, centre_crop, psnr

CPU = torch.device("cpu")


def darker(image: torch.Tensor) -> torch.Tensor:
    return image * 0.5


def smaller(image: torch.Tensor) -> torch.Tensor:
    return image[..., :8]


def nothing(image: torch.Tensor) -> torch.Tensor:
    return image * torch.nan


network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1))


@pytest.fixture
def sets(tmp_path: Path) -> list[EvaluationSet]:
    """Two sets of the same two photos, 70 x 90 pixels."""
    for name, photo in (("cat", skimage.data.chelsea()), ("more/cup", skimage.data.coffee())):
        write_rgb(tmp_path / "clean" / f"{name}.png", photo[60:130, 100:190] / np.float32(255))
    noisy = {"task": "denoise", "clean": tmp_path / "clean"}
    entries = [{**noisy, "name": f"noise {sigma}", "sigma": sigma} for sigma in (15, 50)]
    return [evaluation_set(build_source(entry, ["denoise"]), 1) for entry in entries]


def test_methods_stand_beside_each_other(tiny_model: R2R, sets: list[EvaluationSet], tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "ours")
    ours = method_of(str(tmp_path / "ours"), eager=True)
    half = method_of("half=tests.r2r.test_comparison:darker")
    result = compare([ours, half], sets, CPU, Measures(), save=tmp_path / "saved")
    assert [one.name for one in result.methods] == ["input", "ours", "half"]
    alone = evaluate(tiny_model, sets)
    for number, one in enumerate(alone.sets):
        assert result.methods[0].means(one.name)["psnr"] == pytest.approx(one.input.psnr)
        assert result.methods[1].means(one.name)["psnr"] == pytest.approx(one.blind.psnr, abs=1e-3)
        assert result.methods[1].means(one.name)["ssim"] == pytest.approx(one.blind.ssim, abs=1e-4)
        pair = sets[number].pairs[1]
        by_hand = psnr(centre_crop(pair.lq) * 0.5, centre_crop(pair.hq))
        assert result.methods[2].images[2 * number + 1].measures["psnr"] == pytest.approx(by_hand.item(), abs=1e-4)
    given, ours_cost, half_cost = (one.complexity for one in result.methods)
    assert given is None
    assert ours_cost is not None
    assert ours_cost.parameters == alone.parameters
    assert ours_cost.gmacs == pytest.approx(alone.gmacs)
    assert half_cost is not None
    assert half_cost.parameters is None

    again = compare(
        [method_of(f"again={tmp_path / 'saved' / 'ours'}")], sets, CPU, Measures()
    )  # what one method left is another one's folder of outputs, but for 8 bits
    for name in result.sets:
        assert again.methods[1].means(name) == pytest.approx(result.methods[1].means(name), abs=0.05)
    assert again.methods[1].complexity is None
    shown = said(result)
    assert "noise 50" in shown
    assert "mean over sets" in shown
    assert "GMAC" in shown
    assert "GMAC" not in said(again)

    write_csv(tmp_path / "all.csv", result.rows())
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2
    assert {row["image"] for row in rows} == {"cat", "more/cup"}
    assert float(rows[0]["psnr_y"]) == result.methods[0].images[0].measures["psnr_y"]
    assert rows[0]["seconds"] == ""
    assert float(rows[-1]["seconds"]) > 0
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["sets"] == ["noise 15", "noise 50"]


def test_sets_with_nothing_wrong_have_no_part_in_the_mean(sets: list[EvaluationSet], tmp_path: Path) -> None:
    clean = replace(sets[0], name="clean", labels=())
    half = method_of("half=tests.r2r.test_comparison:darker")
    assert compare([half], [*sets, clean], CPU, Measures()).averaged == ("noise 15", "noise 50")
    assert "mean over sets" not in said(compare([half], [sets[0], clean], CPU, Measures()))


def said(result: Comparison) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    result.render(console)
    return console.export_text()


def test_parameters_and_multiply_accumulates_are_those_of_what_ran() -> None:
    cost = measure(method_of("tests.r2r.test_comparison:network"), CPU, 32)
    assert cost.parameters == 3 * 6 + 6 + 6 * 3 + 3
    assert cost.gmacs == pytest.approx((3 * 6 + 6 * 3) * 32 * 32 / 1e9)
    assert cost.buffers == 0
    assert cost.seconds > 0


def test_an_untrained_model_of_the_papers_sizes_has_the_papers_parameters() -> None:
    method = settings("base", ["a", "b", "c"])
    assert method.kind is Kind.SIZES
    cost = measure(method, CPU, 32)
    assert cost.parameters is not None
    assert 19.7e6 < cost.parameters < 19.8e6
    assert cost.gmacs == pytest.approx(12.75 * (128 / 224) ** 2, rel=0.02)  # it pads to the crop it was trained on
    assert cost.buffers > 3 * 53 * (64 + 512) * 64 * 4
    with pytest.raises(InputError, match="unknown preset 'huge'; accepted: base, small, tiny"):
        settings("huge", ["a"])


def test_a_checkpoint_that_spandrel_reads_is_a_method(sets: list[EvaluationSet], tmp_path: Path) -> None:
    if not hasattr(import_after_torchvision("torchvision"), "models"):
        pytest.skip("torchvision, of the extra `metrics`, is not installed")
    made = import_after_torchvision("spandrel.architectures.NAFNet").NAFNet(
        width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]
    )
    torch.save(made.state_dict(), tmp_path / "nafnet.pth")
    method = method_of(str(tmp_path / "nafnet.pth"))
    assert (method.name, method.kind) == ("nafnet", Kind.SPANDREL)
    restore = method.load(CPU)
    image = centre_crop(sets[0].pairs[0].lq)[None]
    with torch.inference_mode():
        assert torch.allclose(restore(image), made.eval()(image).clamp(0, 1), atol=1e-6)
    assert measure(method, CPU, 32).parameters == sum(one.numel() for one in made.parameters())
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"broken\.pth: "):
        method_of(str(tmp_path / "broken.pth")).load(CPU)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "strange.pth")
    with pytest.raises(InputError, match=r"strange\.pth: no architecture that spandrel knows"):
        method_of(str(tmp_path / "strange.pth")).load(CPU)


def test_what_is_no_method_is_named(sets: list[EvaluationSet], tmp_path: Path) -> None:
    for text, line in (
        ("nowhere", "nowhere: not a method; accepted: a folder of an R2R model"),
        ("none.pth", r"none\.pth: no such file"),
    ):
        with pytest.raises(InputError, match=line):
            method_of(text)
    for text, line in (
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("tests.r2r.test_comparison:f", "has no attribute 'f'"),
        ("tests.r2r.test_comparison:CPU", "is not a function"),
        ("tests.r2r.test_comparison:smaller", r"smaller answered \[1, 3, 224, 8\]"),
        ("tests.r2r.test_comparison:nothing", "nothing answered NaN"),
    ):
        with pytest.raises(InputError, match=line):
            measure(method_of(text), CPU)
    twice = [method_of("sys:exit"), method_of("sys:exit")]
    with pytest.raises(InputError, match="two methods are called 'exit'"):
        compare(twice, sets, CPU, Measures())
    with pytest.raises(InputError, match=r"^no_such_module:f: No module named 'no_such_module'$"):
        compare([method_of("mine=no_such_module:f")], sets, CPU, Measures())


def test_a_folder_of_images_has_to_fit(sets: list[EvaluationSet], tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    theirs = [method_of(str(folder))]
    with pytest.raises(InputError, match="no folder 'noise 15'; with several sets each has a folder of its own"):
        compare(theirs, sets, CPU, Measures())
    write_rgb(folder / "cat.png", read_rgb(tmp_path / "clean" / "cat.png"))
    with pytest.raises(InputError, match="theirs: no image 'more/cup'"):
        compare(theirs, sets[:1], CPU, Measures())
    write_rgb(folder / "more" / "cup.png", read_rgb(tmp_path / "clean" / "more" / "cup.png"))
    assert compare(theirs, sets[:1], CPU, Measures()).methods[1].means("noise 15")["psnr"] == 100
    write_rgb(folder / "cat.png", np.zeros((70, 91, 3), np.float32))
    with pytest.raises(InputError, match=r"cat\.png: 91 x 70, but the degraded image is 90 x 70"):
        compare(theirs, sets[:1], CPU, Measures())


def test_sets_need_no_model(tmp_path: Path, sets: list[EvaluationSet]) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text(
        "sets: [{task: deflare, clean: clean, sigma: 15}, {task: [denoise, deflare], clean: clean, sigma: 5}]"
    )
    assert [one.labels for one in load_sets(path, None, mixtures=True)] == [(0,), (1, 0)]


def test_a_module_beside_the_person_is_found_and_its_memory_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_me.py").write_text("def darker(image):\n    return image * 0.5\n")
    monkeypatch.chdir(tmp_path)
    cost = measure_apart(method_of("beside_me:darker"), CPU, 2048)
    image = 2048 * 2048 * 3 * 4
    assert image < cost.memory < 6 * image
    assert cost.gmacs == 0
