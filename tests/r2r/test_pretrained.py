"""Broken and hostile models are refused in one line, quickly, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2r import R2R, InputError
from r2r.convert import convert_files


class Hostile:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def folder(tiny_model: R2R, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, line: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=line) as caught:
        R2R.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("width", -8, "config.json does not describe an R2R model: "),
        ("width", 100_000, r"model.safetensors does not fit its config.json: .* is \[.*\], not \[.*\]"),
        ("width", "8", "config.json does not describe an R2R model: "),
        ("width", 4.5, "config.json does not describe an R2R model: "),
        ("capacity", 10**12, "config.json"),
        ("capacity", 10**30, "config.json"),
        ("bank_size", 10**6, r"does not fit its config.json: bank\.\w+ is \[.*\], not \[.*\]"),
        ("encoder_blocks", [10**9, 1, 1, 1], "it asks for more blocks than the .* tensors of model.safetensors hold"),
        ("encoder_blocks", None, "config.json does not describe an R2R model: "),
        ("middle_blocks", 10**9, "it asks for more blocks than"),
        ("tasks", [0, 1, 2], "tasks must be names of letters, digits"),
        ("tasks", [None, "a", "b"], "tasks must be names of letters, digits"),
        ("tasks", ["[/x]", "a", "b"], "tasks must be names of letters, digits"),
        ("tasks", ["\x1b[2Jx", "a", "b"], "tasks must be names of letters, digits"),
        ("tasks", ["a", "b"], r"does not fit its config.json: bank\.counts is \[3\], not \[2\]|bank"),
        ("colour", "red", "'colour' is unknown"),
        ("eager", True, "'eager' is unknown"),
    ],
)
def test_a_config_that_asks_for_something_else_than_the_file_holds(
    folder: Path, key: str, value: object, line: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    refused(folder, line)


def test_a_frozen_models_config_may_not_ask_for_more_slots_than_there_are(tiny_model: R2R, tmp_path: Path) -> None:
    bank = tiny_model.freeze_bank().bank
    bank.add_task("desnow", torch.rand(12, *bank.keys.shape[2:]), torch.rand(12, *bank.values.shape[2:]))
    tiny_model.save_pretrained(tmp_path)
    assert R2R.from_pretrained(tmp_path).bank.keys.shape[1] == 12  # more than a capacity of 10 makes are fine
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "capacity": 10**12}))
    refused(tmp_path, r"does not fit its config.json: bank.keys is \[4, 12, .*\], not \[4, 8\d+, ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ("[1, 2]", "it holds no names with values"),
        ("{", "does not describe an R2R model: "),
        ("{}", "tasks must be names"),
        (" " * 2**21, "larger than 1 MB"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: str, line: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, line)


def test_a_switch_is_true_or_false(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mixtures": "x"}))
    refused(folder, "mixtures must be true or false, got 'x'")


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("ending.weight", scaled(torch.nan), "model.safetensors holds NaN or infinite values, in ending.weight"),
        ("intro.weight", scaled(torch.inf), "model.safetensors holds NaN or infinite values, in intro.weight"),
        ("bank.counts", lambda x: x * 0 + 999, r"bank.counts must be 0 to 9, got \[999, 999, 999\]"),
        ("bank.counts", lambda x: x * 0 - 1, r"bank.counts must be 0 to 9, got \[-1, -1, -1\]"),
        ("bank.counts", lambda x: x.float(), "bank.counts holds floating point numbers, not int64"),
        ("bank.counts", lambda x: x.int(), "bank.counts holds I32 numbers, not int64"),
        ("intro.weight", lambda x: x.to(torch.float8_e4m3fn), "intro.weight holds F8_E4M3 numbers, not floating point"),
        ("intro.weight", lambda x: x.double() * 1e300, "holds NaN or infinite values, in intro.weight"),
        ("bank.keys", lambda x: x[:, :3].clone(), "does not fit its config.json"),
        ("intro.bias", lambda x: x[:1].clone(), r"intro.bias is \[1\], not \[4\]"),
    ],
)
def test_weights_that_are_none(folder: Path, name: str, change: Callable[[Tensor], Tensor], line: str) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name])
    save_file(state, folder / "model.safetensors")
    refused(folder, line)


def test_names_that_are_missing_or_unexpected(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    weight = state.pop("query_value.weight")
    save_file(state, folder / "model.safetensors")
    refused(folder, "query_value.weight is missing")
    save_file({**state, "query_value.weight": weight, "extra": weight.clone()}, folder / "model.safetensors")
    refused(folder, "extra is unexpected")
    del state["intro.bias"]
    save_file({**state, "query_value.weight": weight}, folder / "model.safetensors")
    refused(folder, "intro.bias")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, folder: data[: len(data) // 2],
        lambda data, folder: b"",
        lambda data, folder: struct.pack("<Q", 2**62) + b"{}",
        lambda data, folder: pickle.dumps(Hostile(folder / "executed")),
    ],
)
def test_files_that_are_damaged(folder: Path, damage: Callable[[bytes, Path], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes(), folder))
    refused(folder, "model.safetensors cannot be read, it is damaged or cut short")
    path.unlink()
    refused(folder, "is not a model: model.safetensors is missing")
    assert not (folder / "executed").exists()


def test_half_precision_is_read(folder: Path, tiny_model: R2R) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({k: x.half() if x.is_floating_point() else x for k, x in state.items()}, folder / "model.safetensors")
    weight = R2R.from_pretrained(folder).intro.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, tiny_model.intro.weight, atol=1e-3, rtol=1e-3)


def test_what_is_saved_can_be_read_by_others(tiny_model: R2R, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        tiny_model.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_a_repository_on_the_hub_has_the_name_of_the_folder(
    tiny_model: R2R, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(R2R, "push_to_hub", lambda self, repo_id, **_: pushed.append(repo_id))
    tiny_model.save_pretrained(tmp_path / "rainy", push_to_hub=True)
    tiny_model.save_pretrained(tmp_path / "rainy", push_to_hub=True, repo_id="jane/rain")
    assert pushed == ["rainy", "jane/rain"]


def test_checkpoints_that_are_none_are_refused_in_one_line(tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    bank.mkdir()
    for part in ("key", "value"):
        torch.save([torch.zeros(1, 16, 8, 8)] * 17, bank / f"denoise_{part}.pt")
    leaf = {"intro.weight": torch.zeros(8, 3, 3, 3), "dm.update_denoise_key_3Dconv.9.foo": torch.zeros(1)}
    known = {"intro.weight": torch.zeros(8, 3, 3, 3), "dm.update_denoise_key_3Dconv.0.weight": torch.zeros(1)}
    contents: dict[str, Any] = {
        "hostile": {"state_dict": Hostile(tmp_path / "executed")},
        "numbers": {"state_dict": {1: torch.zeros(3)}},
        "list": [1, 2],
        "leaf": {"state_dict": leaf},
        "shape": {"state_dict": known},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("hi")
    for name in (*contents, "empty", "text", "nowhere"):
        path = tmp_path / f"{name}.ckpt"
        with pytest.raises(InputError) as caught:
            convert_files(path, bank, tmp_path / "out")
        line = str(caught.value)
        assert line.startswith(str(path)), line
        assert "\n" not in line
        assert "weights_only" not in line
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()
