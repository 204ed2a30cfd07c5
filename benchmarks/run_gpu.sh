#!/usr/bin/env bash
# What only a GPU can show, in pieces of under ten minutes each, on a machine that may be offline:
#
#   benchmarks/run_gpu.sh parity        every test of the kernels and the ops, on CUDA; the first thing to run
#   benchmarks/run_gpu.sh tune          configs for this GPU: $OUT/tuned.json, a table like kernels/configs.json
#   benchmarks/run_gpu.sh attention     TFLOP/s and memory against everything else: $OUT/attention-*.json
#   benchmarks/run_gpu.sh blocks        the ops between attentions: kernels, bytes, GB/s of a copy's: $OUT/launches.*
#
# It needs a Python 3.11 or newer with torch, triton and numpy, and installs nothing from a network. Whatever else is
# missing (pytest; jvp-flash-attention, to compare with) can be brought along as wheels in a folder, named by WHEELS:
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest wheels \
#       pytest pluggy iniconfig packaging Pygments jvp-flash-attention
# Other variables: OUT, the folder for results (runs/gpu); PYTHON; COMMIT, for the JSON where there is no repository;
# CONFIGS, a table that an earlier `tune` left, which the other pieces then use; BUDGET, in seconds (480).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
BUDGET=${BUDGET:-480}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} XDG_CACHE_HOME=${XDG_CACHE_HOME:-$(mktemp -d)}

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

cache_path() { "$PYTHON" -c 'from fastdistill.kernels import configs; print(configs.cache_path())'; }

if [ -n "${CONFIGS:-}" ]; then
    mkdir -p "$(dirname "$(cache_path)")"
    cp "$CONFIGS" "$(cache_path)"
fi

describe() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
    "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)'
}

parity() {
    timeout $((BUDGET + 60)) "$PYTHON" -m pytest -p no:cacheprovider -q -W default --maxfail=20 --durations=10 \
        tests/kernels tests/ops tests/gpu 2>&1 | tee "$OUT/parity.log"
}

# The shapes that matter most come first: each call goes on where the time of the one before ended.
tune() {
    local started=$SECONDS
    left() { echo $((BUDGET - SECONDS + started)); }
    run_tune() { "$PYTHON" -m fastdistill.tune --budget "$(left)" "$@" 2>&1 | tee -a "$OUT/tune.log"; }
    run_tune --head-dims 64 128 72 --lengths 4096 --kernels forward
    run_tune --head-dims 64 128 72 --lengths 4096 --kernels backward_kv backward_q
    run_tune --head-dims 80 96 --lengths 4096
    run_tune --head-dims 64 72 128 --lengths 256 16384
    run_tune --head-dims 64 72 128 --lengths 4096 --masks band mask
    run_tune --head-dims 32 256 --lengths 4096
    run_tune --head-dims 64 128 --lengths 1024 --dtypes float32
    cp "$(cache_path)" "$OUT/tuned.json" && wc -l "$OUT/tuned.json"
}

attention() {
    local started=$SECONDS
    bench() {
        local out=$1; shift
        "$PYTHON" -m benchmarks.gpu_attention --out "$OUT/$out" --budget $((BUDGET - SECONDS + started)) \
            ${COMMIT:+--commit "$COMMIT"} "$@" 2>&1 | tee -a "$OUT/attention.log"
    }
    bench attention-main.json --dims 64 72 128 --lengths 256 1024 4096 16384
    bench attention-wide.json --dims 80 96 --lengths 1024 4096
    bench attention-rest.json --lengths 512 2048 8192 32768
}

blocks() {
    timeout "$BUDGET" "$PYTHON" -m benchmarks.launches --batch 32 --out "$OUT/launches" 2>&1 | tee "$OUT/launches.log"
}

case "${1:-}" in
    parity | tune | attention | blocks) describe; "$1" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
