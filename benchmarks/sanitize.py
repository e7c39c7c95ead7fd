"""The CUDA operators under compute-sanitizer: python -m benchmarks.sanitize

Starts itself under memcheck and racecheck. The script does little else, as importing PyTorch alone takes a while there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck")
CUDA = "/usr/local/cuda/bin"


def operators() -> None:
    """Forward and backward of gated_conv in every dtype, layout and kernel size, at odd sizes."""
    import torch

    import r2r_kernels.functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kernel, dtype in ((1, torch.bfloat16), (3, torch.float16), (3, torch.float32)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, prior = (
                torch.randn(2, 20, 13, 19, device=device, dtype=dtype).to(memory_format=layout).requires_grad_()
                for _ in range(2)
            )
            weight = torch.randn(20, 2, kernel, kernel, device=device, dtype=dtype, requires_grad=True)
            bias = torch.randn(20, device=device, dtype=dtype, requires_grad=True)
            F.gated_conv(x, prior, weight, bias).sum().backward()
    print(f"gated_conv ran on {device}")


def main() -> int:
    if sys.argv[1:] == ["operators"]:
        operators()
        return 0
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA)
    command = [sys.executable, "-m", "benchmarks.sanitize", "operators"]
    if tool is None:
        print("compute-sanitizer is absent; the operators just run")
        return subprocess.run(command).returncode
    # Without PyTorch's cache an access beside one tensor does not fall into another.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    worst = 0
    for name in TOOLS:
        done = subprocess.run([tool, "--tool", name, "--error-exitcode", "9", *command], env=environment)
        print(f"{name}: {'well' if done.returncode == 0 else f'exit code {done.returncode}'}", flush=True)
        worst = worst or done.returncode
    return worst


if __name__ == "__main__":
    sys.exit(main())
