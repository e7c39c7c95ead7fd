"""setuptools' build backend, which asks for PyTorch where the environment has none to compile against."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_pytorch()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_pytorch()]


def _pytorch() -> list[str]:
    # pip's build isolation hides the environment's packages from imports only.
    folders = [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    there = importlib.util.find_spec("torch") or any(folder.is_dir() for folder in folders)
    return [] if there else ["torch>=2.10"]
