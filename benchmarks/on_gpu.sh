#!/usr/bin/env bash
# Builds, tests, measures and tunes on a machine with a GPU, offline, in at most eight minutes; see benchmarks/on_gpu.py.
#
#   benchmarks/on_gpu.sh OUT                    all pieces
#   benchmarks/on_gpu.sh OUT build kernels ...  some of them, in the order of the whole
#   benchmarks/on_gpu.sh OUT --dry              practise it on a CPU: every piece, no times
#
# PYTHON   the Python that has PyTorch (python3)
# WHEELS   a folder of wheels to install first, for packages that the machine lacks (omegaconf)
# R2R_COMMIT   the commit, where the folder is a copy without git
set -uo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
cd "$(dirname "$0")/.." || exit 2
if [ -n "${WHEELS:-}" ]; then
    "${PYTHON:-python3}" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
exec "${PYTHON:-python3}" -u benchmarks/on_gpu.py "$@"
