#!/usr/bin/env bash
# Builds, tests, measures and tunes on a machine with a GPU, offline, in under ten minutes; everything lands in one folder.
#
#   benchmarks/on_gpu.sh OUT                           build test sanitize bench sweep
#   benchmarks/on_gpu.sh OUT build bench-model ...     pieces, in the order given
#
# Pieces: build (the extension, for this GPU), test (the whole suite), sanitize (compute-sanitizer on the CUDA
# operators), bench (quick), bench-operators, bench-blocks, bench-model, bench-training, bench-scaling (full), sweep
# (fills r2r_kernels/configs/). Each has a time limit in seconds; LIMIT=N sets it for all. A failing piece does not stop
# the others; the exit code is 1 if any failed. OUT gets a log of each piece, summary.txt, the runs, the report, the
# stamp of the tests (tests.json) and the tuned configurations.
#
# PYTHON   the Python that has PyTorch (python3)
# WHEELS   a folder of wheels to install first, for packages that the machine lacks
# STAMP    tests.json of an earlier call at the same code: bench pieces may then be reported without running the tests
# R2R_COMMIT   the commit, where the folder is a copy without git
set -uo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
export OUT PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
STAMP_FILE=.pytest_cache/v/r2r/tests
export STAMP_FILE

piece_build() {
    if [ -n "${WHEELS:-}" ]; then
        "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
    fi
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c '
import torch
print("%d.%d" % torch.cuda.get_device_capability() if torch.version.cuda else "")')}
    export TORCH_CUDA_ARCH_LIST
    # Editable, so that what is tested and measured is this folder, and the sweep fills its configs.
    "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --editable .
    "$PYTHON" -m pip check | grep '^r2r-restore' || true
    "$PYTHON" -c '
from r2r_kernels import env
facts = env.facts()
print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
raise SystemExit(facts["native operators"] != "yes")'
}

piece_test() {
    local spread=()
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        local processes=$((($(nproc) + 1) / 2))
        spread=(-n "$((processes > 8 ? 8 : processes))" --dist loadfile)
        export OMP_NUM_THREADS=2
    fi
    local rc=0
    "$PYTHON" -m pytest -p benchmarks.stamp "${spread[@]}" --durations=15 || rc=$?
    cp "$STAMP_FILE" "$OUT/tests.json" || true
    return "$rc"
}

piece_sanitize() {
    local names=()
    for source in csrc/*_cuda.cu; do
        [ -e "$source" ] && names+=("$(basename "$source" _cuda.cu)")
    done
    if [ ${#names[@]} -eq 0 ] || ! command -v compute-sanitizer; then
        echo "nothing to do: ${#names[@]} CUDA operators in csrc/, compute-sanitizer $(command -v compute-sanitizer || echo absent)"
        return 0
    fi
    local chosen="${names[0]}" tool rc=0
    for name in "${names[@]:1}"; do chosen+=" or $name"; done
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else an access beside one tensor falls into another
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" -m pytest tests/r2r_kernels -q -m gpu -k "$chosen" -p no:cacheprovider || rc=$?
    done
    return "$rc"
}

measure() { # name, pytest arguments
    local name=$1 rc=0
    shift
    "$PYTHON" -m pytest "$@" -q --time-limit "$((LIMIT_NOW * 7 / 10))" --benchmark-json "$OUT/$name.json" || rc=$?
    "$PYTHON" -m benchmarks.report "$OUT"/bench*.json --out "$OUT/report" || rc=$?
    return "$rc"
}

piece_bench() { measure bench benchmarks --quick; }
piece_bench-operators() {
    measure bench-operators benchmarks/test_{layer_norm_2d,simple_gate,depthwise_gate,upsample_add,local_mean_2d,bank_retrieve,slot_conv,gated_conv}.py
}
piece_bench-blocks() { measure bench-blocks benchmarks/test_naf_block.py; }
piece_bench-model() { measure bench-model benchmarks/test_model.py benchmarks/test_nafnet.py; }
piece_bench-training() { measure bench-training benchmarks/test_training_step.py; }
piece_bench-scaling() { measure bench-scaling benchmarks/test_scaling.py; }

piece_sweep() {
    local rc=0
    "$PYTHON" -m benchmarks.sweep --time-limit "$((LIMIT_NOW - 15))" || rc=$?
    mkdir -p "$OUT/configs"
    cp r2r_kernels/configs/*.json "$OUT/configs/"
    return "$rc"
}

limit_of() {
    case $1 in
    build) echo 90 ;;
    test) echo 210 ;;
    sanitize) echo 50 ;;
    bench) echo 140 ;;
    sweep) echo 80 ;;
    bench-*) echo 540 ;;
    esac
}

if [ -n "${STAMP:-}" ]; then
    mkdir -p "$(dirname "$STAMP_FILE")"
    cp "$STAMP" "$STAMP_FILE"
fi
[ $# -gt 0 ] || set -- build test sanitize bench sweep
export -f measure piece_build piece_test piece_sanitize piece_bench piece_bench-operators piece_bench-blocks \
    piece_bench-model piece_bench-training piece_bench-scaling piece_sweep
failed=0
: >"$OUT/summary.txt"
for piece in "$@"; do
    LIMIT_NOW=${LIMIT:-$(limit_of "$piece")}
    if [ -z "$LIMIT_NOW" ] || ! declare -F "piece_$piece" >/dev/null; then
        echo "$piece: no such piece" | tee -a "$OUT/summary.txt"
        failed=1
        continue
    fi
    export LIMIT_NOW
    begin=$SECONDS
    timeout --signal=INT --kill-after=10 "$LIMIT_NOW" bash -eo pipefail -c "piece_$piece" 2>&1 | tee "$OUT/$piece.log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] || failed=1
    case $rc in 0) how=well ;; 124 | 137) how="stopped at its limit of $LIMIT_NOW s" ;; *) how="failed ($rc)" ;; esac
    echo "$piece: $how, $((SECONDS - begin)) s" | tee -a "$OUT/summary.txt"
done
exit "$failed"
