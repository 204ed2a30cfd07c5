#!/usr/bin/env bash
# Run what only a GPU can show, in pieces of under ten minutes each, on a machine that may be offline:
#
#   benchmarks/run_gpu.sh first      for a GPU lent for a quarter of an hour: nine minutes (BUDGET=540) of what matters
#                                    most: the core of parity, configs of the headline shapes, `dit` of XL, B, launches
#   benchmarks/run_gpu.sh second     four minutes (BUDGET=230) of the rest: all of parity, then norms
#   benchmarks/run_gpu.sh parity     every test of the kernels, on CUDA, in a process for a few each: $OUT/parity.json
#   benchmarks/run_gpu.sh tune       configs for this GPU: $OUT/tuned.json, a table like kernels/configs.json
#   benchmarks/run_gpu.sh dit        a suite of `fastdistill bench` against everything that is installed: $OUT/dit.json;
#                                    so, too, video, mmdit, norms, block, step, scaling
#   benchmarks/run_gpu.sh compiled   the same cases by torch.compile, half a minute each: added to those files
#   benchmarks/run_gpu.sh launches   kernels, bytes and GB/s of every op between attentions: $OUT/launches.json and .md
#   benchmarks/run_gpu.sh merge      all of $OUT as one file in $RESULTS, ready to be committed
#
# A suite goes on where its file ends, and so does parity: where time was short, run the same piece again with the same
# OUT. All files are whole at every moment, so nothing is lost where a machine is taken back; `first` leaves at most 8.
#
# It needs a Python 3.11 or newer with torch, triton and numpy, and installs nothing from a network. Whatever else is
# missing (pytest and pytest-benchmark, without which nothing runs; nvidia-ml-py, for clocks, power and energy; peers to
# compare with) can be brought along as wheels in a folder, named by WHEELS:
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest wheels pytest pluggy iniconfig \
#       packaging Pygments pytest-benchmark nvidia-ml-py jvp-flash-attention liger-kernel
# Other variables: OUT, the folder for results (runs/gpu); RESULTS, for the merged file (benchmarks/results); PYTHON;
# COMMIT, for the JSON where there is no repository; CONFIGS, a table that an earlier `tune` left, which the other pieces
# then use; BUDGET, in seconds (480); JOBS, how many processes test at a time; SMOKE=1, which runs the suites at tiny
# shapes on a CPU, to try this script itself. FASTDISTILL_DESCRIPTORS=0: attention without the copy engine (TMA).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
case "${1:-}" in first) BUDGET=${BUDGET:-540} ;; second) BUDGET=${BUDGET:-230} ;; *) BUDGET=${BUDGET:-480} ;; esac
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

started=$SECONDS until=$BUDGET
left() { local rest=$((until - SECONDS + started)); echo $((rest > 0 ? rest : 0)); }

# The next step may run until this many hundredths of the budget have passed; time that earlier steps left is its own, too.
share() {
    until=$((BUDGET * $1 / 100))
    echo "[$((SECONDS - started)) s] $2, until $until s" >>"$LOG"
}

# A step that fails, or dies, stops no other step.
parity() {
    local tests=() status=0
    [ -z "${SMOKE:-}" ] || tests=(tests/kernels/test_tiles.py)
    TRITON_INTERPRET=${SMOKE:-0} timeout -k 5 $(($(left) + 30)) "$PYTHON" -m fastdistill.benchmarks.gpu.parity \
        --json "$OUT/parity.json" --budget "$(left)" ${JOBS:+--jobs "$JOBS"} "$@" "${tests[@]}" 2>&1 |
        tee -a "${LOG:-$OUT/parity.log}" || status=$?
    return $status
}

# The shapes that matter most come first: each call goes on where the time of the one before ended.
tune() {
    run_tune() { "$PYTHON" -m fastdistill.tune --budget "$(left)" "$@" 2>&1 | tee -a "${LOG:-$OUT/tune.log}"; }
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
    timeout -k 5 $(($(left) + ${SLACK:-110})) "$PYTHON" -m fastdistill.cli bench --suite "$name" --json "$OUT/$name.json" \
        --budget "$(left)" "${device[@]}" ${COMMIT:+--commit "$COMMIT"} "$@" 2>&1 | tee -a "${LOG:-$OUT/$name.log}"
}

# These are all providers except the compiled ones: they take half a minute each, and have a piece of their own.
suite() { bench "$@" --providers '^(?!.*compiled)'; }

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
    "$PYTHON" -m fastdistill.benchmarks.gpu.merge "${files[@]}" ${RESULTS:+--into "$RESULTS"}
}

launches() {
    local options=(--batch 32)
    [ -z "${SMOKE:-}" ] || options=(--device cpu --batch 1 --tokens 4 --width 64)
    timeout $(($(left) + 30)) "$PYTHON" -m fastdistill.benchmarks.count.launches "${options[@]}" --out "$OUT/launches" 2>&1 |
        tee -a "${LOG:-$OUT/launches.log}"
}

# The headline shapes' configs, in the order of what a training step takes; the table comes back after each.
tune_headline() {
    [ -z "${SMOKE:-}" ] || { echo "nothing to tune without a GPU"; return 0; }
    local table keeper kernels
    table=$(cache_path)
    (while sleep 3; do cp "$table" "$OUT/.tuned" && mv "$OUT/.tuned" "$OUT/tuned.json"; done 2>/dev/null) &
    keeper=$!
    for kernels in forward backward_kv backward_q; do
        timeout -k 5 $(($(left) + 20)) "$PYTHON" -m fastdistill.tune --budget "$(left)" --head-dims 64 72 128 \
            --lengths 4096 --tangents qkv --kernels "$kernels" 2>&1 | tee -a "$LOG" || true
    done
    kill $keeper
    rm -f "$OUT/.tuned"
    cp "$table" "$OUT/tuned.json"
}

# Check that attention runs at all. If it runs only without the copy engine, all that follows does without it.
attend() {
    [ -z "${SMOKE:-}" ] || return 0
    timeout -k 5 60 "$PYTHON" - <<'END'
import torch, fastdistill as fd
from fastdistill import reference
q, k, v, *tangents = (torch.randn(1, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6))
found = fd.attention_jvp(q, k, v, *tangents, impl="triton")
exact = [x.double() for x in (q, k, v, *tangents)]
truth = torch.func.jvp(reference.attention, tuple(exact[:3]), tuple(exact[3:]))
errors = [float((x - y).norm() / y.norm()) for x, y in zip(found, truth)]
print("attention runs, relative errors", errors)
assert max(errors) < 0.02
END
}

first() {
    export LOG=$OUT/first.log SLACK=25
    if ! attend 2>&1 | tee -a "$LOG"; then
        export FASTDISTILL_DESCRIPTORS=0
        echo "attention fails: from here on without tensor descriptors" | tee -a "$LOG"
        attend 2>&1 | tee -a "$LOG" || true
    fi
    share 28 "parity, the core"
    parity --core || true
    share 60 "tuning"
    tune_headline || true
    share 92 "dit, XL/2; then B/2, whose heads of 64 more of the others can do"
    suite dit --cases 'XL/2-(256|1024)px|quick' || true
    suite dit --cases 'B/2-(256|1024)px|quick' || true
    share 100 "launches"
    launches || true
}

second() {
    export LOG=$OUT/second.log SLACK=25
    share 75 "parity, all of it"
    parity || true
    share 100 "norms"
    suite norms || true
}

case "${1:-}" in
    first | second | parity | tune | compiled | merge | launches) prepare; "$1" ;;
    dit | video | mmdit | norms | block | step | scaling) prepare; suite "$1" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
