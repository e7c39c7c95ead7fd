"""Read the published R2R checkpoints (`last.ckpt` and the pickled bank beside it) into this project's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2r.errors import InputError
from r2r.model import R2R
from r2r.pretrained import check_finite, check_folder

# modules of the published model -> ours; "*" stands for a number
_MODULES = {
    "intro": "intro",
    "ending": "ending",
    "encoder.encoders.*.*": "encoder.levels.*.*",
    "encoder.downs.*": "encoder.downs.*",
    "encoder.middle_blks.*": "encoder.middle.*",
    "decoder.decoders.*.*": "decoder.levels.*.*",
    "decoder.ups.*.0": "decoder.ups.*.0",
    "key_proj.key_proj": "query_key",
    "key_comp": "query_value",
    "fuse_gate": "fusion",
    "mem_encoder.intro": "amalgamator.intro",
    "mem_encoder.encoders.*.*": "amalgamator.encoder.levels.*.*",
    "mem_encoder.downs.*": "amalgamator.encoder.downs.*",
    "mem_encoder.middle_blks.*": "amalgamator.encoder.middle.*",
    "mem_encoder.classify.fc.0": "amalgamator.classifier",
    "value_proj.value_proj": "amalgamator.key",
    "value_comp.value_proj": "amalgamator.value",
}
# tensors of a task's `update_<task>_<key|value>_3Dconv` -> ours, where all tasks are stacked
_SLOTS = {
    "0.weight": "depthwise.weight",
    "0.bias": "depthwise.bias",
    "1.weight": "pointwise_weight",
    "1.bias": "pointwise_bias",
    "2.weight": "norm.weight",
    "2.bias": "norm.bias",
    "2.running_mean": "norm.running_mean",
    "2.running_var": "norm.running_var",
}
_SLOT_NAME = re.compile(r"dm\.update_(?P<task>\w+)_(?P<part>key|value)_3Dconv\.(?P<leaf>.+)")
TASKS = ("denoise", "derain", "dehaze", "deblur", "lowlight")
MIXTURE_TASKS = ("dehaze", "derain", "desnow", "lowlight")


def convert(state: Mapping[str, Tensor], banks: Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]]) -> R2R:
    """A model in eval mode from a published state dict ("net." prefixes allowed) and its bank.

    banks: for each task its keys and values, lists of [1, C, h, w]. Sizes and tasks are read off the tensors; mixtures
    are recognised by the task "desnow", as published. Raises InputError where they are not a published R2R's.
    """
    state = {name.removeprefix("net."): x for name, x in state.items()}
    named = {match["task"] for match in map(_SLOT_NAME.match, state) if match}
    mixtures = "desnow" in named
    tasks = [task for task in (MIXTURE_TASKS if mixtures else TASKS) if task in named]
    if "intro.weight" not in state or not tasks or set(tasks) != named:
        raise InputError("not a checkpoint of the published R2R: its tensors are not the ones expected")
    missing = [task for task in tasks if task not in banks]
    if missing:
        raise InputError(
            f"the bank has nothing for {', '.join(missing)}; the checkpoint's tasks are {', '.join(tasks)}"
        )

    def blocks(stem: str, levels: int) -> tuple[int, ...]:
        return tuple(len({n.split(".")[len(stem.split(".")) + 1] for n in state if n.startswith(f"{stem}.{i}.")})
                     for i in range(levels))  # fmt: skip

    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.encoders.")})
    kernel = state[f"dm.update_{tasks[0]}_key_3Dconv.0.weight"].shape[2]
    slots, size = len(banks[tasks[0]][0]), banks[tasks[0]][0][0].shape[-1]
    model = R2R(
        tasks=tasks,
        width=state["intro.weight"].shape[0],
        encoder_blocks=blocks("encoder.encoders", levels),
        middle_blocks=len({n.split(".")[2] for n in state if n.startswith("encoder.middle_blks.")}),
        decoder_blocks=blocks("decoder.decoders", levels),
        memory_blocks=blocks("mem_encoder.encoders", levels),
        capacity=slots + kernel - 1,
        bank_size=size,
        similarity="published",
        padding="zeros",
        residual="mean" if state["mem_encoder.intro.weight"].shape[1] == 4 else "full",
        mixtures=mixtures,
        gate_kernel=state["fuse_gate.weight"].shape[-1],
    )
    if model.amalgamator is not None and model.amalgamator.key_slots.depthwise.weight.shape[2] != kernel:
        raise InputError(f"a bank of {slots} slots does not fit a slot convolution of length {kernel}")
    model.load_state_dict(_rename(state, tasks, banks))
    return model.eval()


def _rename(state: Mapping[str, Tensor], tasks: Sequence[str], banks: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for name, x in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        if match := _SLOT_NAME.match(name):
            leaf = f"amalgamator.{match['part']}_slots.{_SLOTS[match['leaf']]}"
            stacked.setdefault(leaf, {})[match["task"]] = x.squeeze(1) if match["leaf"] == "0.weight" else x
            continue
        renamed[_translate(name)] = x
    for leaf, by_task in stacked.items():
        x = torch.stack([by_task[task] for task in tasks])
        renamed[leaf] = x.flatten(2) if leaf.endswith("pointwise_weight") else x
    renamed["bank.keys"] = torch.stack([torch.cat(list(banks[task][0])) for task in tasks]).float()
    renamed["bank.values"] = torch.stack([torch.cat(list(banks[task][1])) for task in tasks]).float()
    renamed["bank.counts"] = torch.tensor([len(banks[task][0]) for task in tasks])
    return renamed


def _translate(name: str) -> str:
    for published, ours in _MODULES.items():
        pattern = re.escape(published).replace(r"\*", r"(\d+)") + r"\.(.+)"
        if match := re.fullmatch(pattern, name):
            *numbers, leaf = match.groups()
            for number in numbers:
                ours = ours.replace("*", number, 1)
            return f"{ours}.{leaf}"
    raise InputError(f"not a checkpoint of the published R2R: unexpected tensor {name!r}")


def convert_files(checkpoint: Path, bank: Path, out: Path) -> R2R:
    """Convert a published checkpoint file and its bank folder (`<task>_key.pt`, `<task>_value.pt`), save in `out`.

    Nothing in the files is executed (`weights_only=True`). Raises InputError where something is missing or foreign.
    """
    check_folder(out)
    content = _load(checkpoint)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in state.items()
    ):
        raise InputError(f"{checkpoint} is not a checkpoint: no state_dict of tensors in it")
    if not bank.is_dir():
        raise InputError(f"{bank} is not a folder of <task>_key.pt and <task>_value.pt")
    banks = {}
    for key_file in sorted(bank.glob("*_key.pt")):
        task = key_file.name.removesuffix("_key.pt")
        banks[task] = (_load_slots(key_file), _load_slots(bank / f"{task}_value.pt"))
    try:
        model = convert(state, banks)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint} is not a checkpoint of the published R2R: its tensors do not fit") from error
    check_finite(checkpoint, model.state_dict())
    model.save_pretrained(out)
    return model


def _load_slots(path: Path) -> list[Tensor]:
    slots = _load(path)
    if not isinstance(slots, list) or not slots or not all(isinstance(x, Tensor) and x.dim() == 4 for x in slots):
        raise InputError(f"{path} is not a published bank: a list of [1, C, h, w] tensors is wanted")
    return slots


def _load(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged in any way, or with objects that would have to be executed
        raise InputError(f"{path} cannot be read as tensors alone: it is damaged, or holds other objects") from error
