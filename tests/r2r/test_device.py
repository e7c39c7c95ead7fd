"""Where a model runs, and what memory it finds there."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES_OF_TENSORS = """
import resource
import sys
import torch
from r2r.device import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(16):  # the first ones may not fit again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep it")
def test_what_tensors_free_is_kept_for_the_next_ones() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", PAGES_OF_TENSORS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") * 10 < faults("given back")
