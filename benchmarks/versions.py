"""What a machine holds, for the head of a summary: python -m benchmarks.versions"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch


def main() -> None:
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.processor() or platform.machine()}"
    )
    wanted = ("triton", "pytest", "pytest-xdist", "setuptools", "pybind11", "ninja", "omegaconf")
    held = {}
    for name in wanted:
        try:
            held[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            held[name] = "absent"
    print(", ".join(f"{name} {version}" for name, version in held.items()))
    for tool in ("nvcc", "c++", "compute-sanitizer"):
        path = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")
        shown = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.split("\n") if path else []
        print(f"{tool}: {next((line for line in shown if any(c.isdigit() for c in line)), 'absent')}")
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        print(f"GPU {index}: {one.name}, {one.multi_processor_count} SMs, {one.total_memory >> 30} GiB")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    if shutil.which(query[0]):
        print(f"driver, clocks: {subprocess.run(query, capture_output=True, text=True).stdout.strip()}")


if __name__ == "__main__":
    main()
