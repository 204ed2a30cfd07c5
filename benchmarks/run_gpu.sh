#!/usr/bin/env bash
# What only a GPU can show, in pieces of under ten minutes each, on a machine that may be offline:
#
#   benchmarks/run_gpu.sh parity     every test of the kernels and the ops, on CUDA; the first thing to run
#   benchmarks/run_gpu.sh tune       configs for this GPU: $OUT/tuned.json, a table like kernels/configs.json
#   benchmarks/run_gpu.sh dit        a suite of `fastdistill bench` against everything that is installed: $OUT/dit.json;
#                                    so, too, video, mmdit, norms, block, step, scaling
#   benchmarks/run_gpu.sh compiled   the same cases by torch.compile, half a minute each: added to those files
#   benchmarks/run_gpu.sh merge      all of $OUT as one file in $RESULTS, ready to be committed
#
# A suite goes on where its file ends: where time was short, run the same piece again with the same OUT.
#
# It needs a Python 3.11 or newer with torch, triton and numpy, and installs nothing from a network. Whatever else is
# missing (pytest and pytest-benchmark, without which nothing runs; nvidia-ml-py, for clocks, power and energy; peers to
# compare with) can be brought along as wheels in a folder, named by WHEELS:
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest wheels pytest pluggy iniconfig \
#       packaging Pygments pytest-benchmark nvidia-ml-py jvp-flash-attention liger-kernel
# Other variables: OUT, the folder for results (runs/gpu); RESULTS, for the merged file (benchmarks/results); PYTHON;
# COMMIT, for the JSON where there is no repository; CONFIGS, a table that an earlier `tune` left, which the other pieces
# then use; BUDGET, in seconds (480); SMOKE=1, which runs the suites at tiny shapes on a CPU, to try this script itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
BUDGET=${BUDGET:-480}
SUITES="dit video mmdit norms block step scaling"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} XDG_CACHE_HOME=${XDG_CACHE_HOME:-$(mktemp -d)}

describe() {
    [ -z "${SMOKE:-}" ] || return 0
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
    "$PYTHON" -c 'import sys, torch; print(sys.version, torch.__version__)'
}

prepare() {
    mkdir -p "$OUT"
    if [ -n "${WHEELS:-}" ]; then
        site=$(mktemp -d)
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    fi
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    if [ -n "${CONFIGS:-}" ]; then
        mkdir -p "$(dirname "$(cache_path)")"
        cp "$CONFIGS" "$(cache_path)"
    fi
    describe
}

cache_path() { "$PYTHON" -c 'from fastdistill.kernels import configs; print(configs.cache_path())'; }

started=$SECONDS
left() { local rest=$((BUDGET - SECONDS + started)); echo $((rest > 0 ? rest : 0)); }

parity() {
    timeout $((BUDGET + 60)) "$PYTHON" -m pytest -p no:cacheprovider -q -W default --maxfail=20 --durations=10 \
        tests/kernels tests/ops tests/gpu 2>&1 | tee "$OUT/parity.log"
}

# The shapes that matter most come first: each call goes on where the time of the one before ended.
tune() {
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

# Status 3 says that a provider broke this process, and was noted: another process goes on without it.
bench() {
    local status=3
    while [ $status = 3 ]; do
        status=0
        bench_once "$@" || status=$?
    done
    return $status
}

bench_once() {
    local name=$1 device=(--device cuda); shift
    [ -z "${SMOKE:-}" ] || device=(--device cpu --quick)
    timeout $(($(left) + 110)) "$PYTHON" -m fastdistill.cli bench --suite "$name" --json "$OUT/$name.json" \
        --budget "$(left)" "${device[@]}" ${COMMIT:+--commit "$COMMIT"} "$@" 2>&1 | tee -a "$OUT/$name.log"
}

# Everybody but what takes half a minute to compile: that is a piece of its own.
suite() { bench "$1" --providers '^(?!.*compiled)'; }

compiled() {
    local failed=0
    bench dit --providers compiled --cases 'XL/2-(256|1024)px.*/(forward|mixed)|quick' || failed=1
    bench block --providers compiled --cases '(B|XL)/2-256px.*/(forward|mixed)|quick' || failed=1
    bench norms --providers compiled --cases 'XL/2.*/(forward|mixed)|FLUX.1.*/(forward|mixed)|quick' || failed=1
    bench step --providers compiled --cases '-b/2|quick' || failed=1
    return $failed
}

merge() {
    local name files=()
    for name in $SUITES; do
        [ ! -e "$OUT/$name.json" ] || files+=("$OUT/$name.json")
    done
    "$PYTHON" -m fastdistill.benchmarks.merge "${files[@]}" ${RESULTS:+--into "$RESULTS"}
}

case "${1:-}" in
    parity | tune | compiled | merge) prepare; "$1" ;;
    dit | video | mmdit | norms | block | step | scaling) prepare; suite "$1" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
