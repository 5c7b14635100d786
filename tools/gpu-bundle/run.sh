#!/usr/bin/env bash
# Proves the CUDA backend on this machine's GPU, then times it. Writes a folder record-<date>.
#
#   ./run.sh                       parity, compute-sanitizer, bench (every launch timed one by one, too)
#   ./run.sh parity sanitizer      these steps alone
#   ./run.sh tune                  the Hopper forward with and without clusters, with leads of 0 to 3 steps and with shorter sweeps; the exact
#                                  path with chunks of 16 to 128 MiB, leads, and without clusters; both with all rows gathered; sparse
#                                  gradients with tiles and without
#   ./run.sh --emulated ...        on the emulated driver in ./emulated, if the bundle has it: small, and without times
#   ./run.sh --seconds S ...       begins nothing after S seconds, and ends then what still runs; steps go in the order given, so that on a
#                                  machine lent for a while the first come first:  ./run.sh --seconds 560 parity bench tune sanitizer
#
#   PARITY_FILTER=word             only the parity tests whose names have it
#   BENCH_ANYWAY=1                 bench and tune after failures, too
#   BENCH_SHAPES, BENCH_ARGS       other shapes; more arguments for `cce bench`
set -uo pipefail
cd "$(dirname "$0")"
here=$PWD
export REQUIRE_CUDA=1

emulated=no
seconds=
steps=()
while [ $# -gt 0 ]; do
    case $1 in
        --emulated) emulated=yes ;;
        --seconds)
            seconds=${2:-}
            [[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "--seconds takes a number of seconds, not '$seconds'" >&2; exit 2; }
            shift
            ;;
        parity | sanitizer | bench | tune) steps+=("$1") ;;
        *) echo "unknown argument $1" >&2; exit 2 ;;
    esac
    shift
done
[ ${#steps[@]} -eq 0 ] && steps=(parity sanitizer bench)

if [ $emulated = yes ]; then
    [ -d emulated ] || { echo "this bundle has no emulated driver" >&2; exit 2; }
    export LD_LIBRARY_PATH=$here/emulated${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
else
    # cuBLAS: of the toolkit, or of Python's packages, where the loader does not find it by itself.
    for folder in /usr/local/cuda/lib64 $(python3 -c 'import nvidia; print(*nvidia.__path__)' 2>/dev/null |
        tr ' ' '\n' | sed 's,$,/cu13/lib,p;s,/cu13/lib$,/cublas/lib,'); do
        if compgen -G "$folder/libcublas.so*" >/dev/null; then
            export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
        fi
    done
fi

record=$here/record-$(date -u +%Y-%m-%d-%H%M%S)
mkdir "$record"
failed=()
late=()

describe() {
    cat MANIFEST
    date -u
    if [ $emulated = yes ]; then
        echo "emulated driver: nothing here is a measurement"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --format=csv --query-gpu=name,driver_version,vbios_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current,mig.mode.current
        nvidia-smi -q -d CLOCK,PERFORMANCE
    else
        echo "nvidia-smi is not installed: driver and clocks unknown"
    fi
    uname -a
    grep -m 1 'model name' /proc/cpuinfo
    ./bin/cce info --shape gemma2_2b
}
describe >"$record/machine.txt" 2>&1
head -n 4 "$record/machine.txt"

# Runs a command, shows and keeps what it prints, and remembers whether it failed, or had no time.
step() {
    local name=$1 limit=() left
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    if [ -n "$seconds" ]; then
        left=$((seconds - SECONDS))
        if [ $left -le 0 ]; then
            echo "not begun: the $seconds seconds are over" | tee "$record/$name.txt"
            late+=("$name (not begun)")
            return 1
        fi
        limit=(timeout "$left")
    fi
    "${limit[@]}" "$@" </dev/null 2>&1 | tee "$record/$name.txt"
    local status=${PIPESTATUS[0]}
    if [ -n "$seconds" ] && [ "$status" -eq 124 ]; then
        echo "ended: the $seconds seconds are over" | tee -a "$record/$name.txt"
        late+=("$name (ended)")
    elif [ "$status" -ne 0 ]; then
        failed+=("$name (exit status $status)")
    fi
    return "$status"
}

# Each test in a process of its own: after a fault everything else in its process fails, too.
parity() {
    local tests test
    tests=$(./bin/cuda_device --list --format terse | sed -n 's/: test$//p' | grep -F -- "${PARITY_FILTER:-}")
    [ -n "$tests" ] || failed+=("parity (no test is named like $PARITY_FILTER)")
    for test in $tests; do
        step "parity-${test##*::}" ./bin/cuda_device --exact "$test"
    done
}

sanitizer() {
    local tool cases name status
    if [ $emulated = yes ]; then
        echo "skipped compute-sanitizer: the emulated driver has a checker of its own, which these steps ran under"
        return
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        for tool in /usr/local/cuda/bin /opt/cuda/bin; do
            [ -x $tool/compute-sanitizer ] && PATH=$tool:$PATH
        done
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        echo "skipped compute-sanitizer: it is not installed (it comes with the CUDA toolkit)" | tee "$record/sanitizer.txt"
        return
    fi
    # Ragged and even shapes, one tile and several, every type of element and every filter; then the options of the loss.
    for tool in memcheck racecheck initcheck synccheck; do
        for cases in "N=67 V=1000" "N=64 V=256" "N=300 V=515" softcap smoothing; do
            name=sanitizer-$tool-${cases// /-}
            step "$name" compute-sanitizer --tool "$tool" --error-exitcode 9 ./bin/cce verify --only "$cases" >/dev/null
            status=$?
            if [ $status -eq 0 ] && ! grep -q '^ok *cuda' "$record/$name.txt"; then
                failed+=("$name (nothing ran on the GPU)")
                status=1
            fi
            [ ${#late[@]} -gt 0 ] && return
            echo "$tool, $cases: $([ $status -eq 0 ] && echo clean || echo "FAILED, see $record/$name.txt")"
        done
    done
}

bench() {
    local common=(bench --backend cuda --methods unbiased,threshold,exact,evaluation,baseline)
    if [ $emulated = yes ]; then
        step bench-emulated ./bin/cce "${common[@]}" --shape gpt2 --tokens 48 --vocab 700 --hidden 40 --dtype f32,bf16,f16 \
            --softcap 0,30 --ignored 0,0.3 --rounds 1 --profile --csv "$record/emulated.csv" ${BENCH_ARGS:-}
        return
    fi
    # Clocks all along: a GPU that slows down while it is measured shows here.
    local watcher=
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi -i 0 -l 1 --format=csv --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active \
            >"$record/clocks.csv" &
        watcher=$!
    fi
    # shellcheck disable=SC2086
    if [ -n "${BENCH_SHAPES:-}" ]; then
        step bench ./bin/cce "${common[@]}" --shape "$BENCH_SHAPES" --csv "$record/bench.csv" --chart "$record/bench.svg" ${BENCH_ARGS:-}
    else
        step bench-gemma2 ./bin/cce "${common[@]}" --shape gemma2_2b --softcap 0,30 --rounds 10 --profile \
            --csv "$record/gemma2.csv" --chart "$record/gemma2.svg" ${BENCH_ARGS:-}
        step bench-others ./bin/cce "${common[@]}" --shape llama3_8b,qwen2_5_0_5b,qwen2_5_7b --rounds 10 --profile \
            --csv "$record/others.csv" --chart "$record/others.svg" ${BENCH_ARGS:-}
        step bench-tokens ./bin/cce "${common[@]}" --shape llama3_8b --tokens 1024,2048,4096,8192,16384 --rounds 10 \
            --csv "$record/tokens.csv" --chart "$record/tokens.svg" ${BENCH_ARGS:-}
        step bench-ignored ./bin/cce "${common[@]}" --shape llama3_8b --ignored 0.1,0.5 --rounds 10 --csv "$record/ignored.csv" ${BENCH_ARGS:-}
        step bench-types ./bin/cce "${common[@]}" --shape qwen2_5_0_5b --dtype f32,f16 --rounds 5 \
            --csv "$record/types.csv" ${BENCH_ARGS:-}
        step bench-gradient-error ./bin/cce "${common[@]}" --shape gpt2 --tokens 2048 --dtype f32 --rounds 0 --gradient-error ${BENCH_ARGS:-}
    fi
    [ -n "$watcher" ] && kill "$watcher" 2>/dev/null
}

# What no planner should have to guess: every choice in one process, in turn within a round. The forward alone, and with capture.
tune() {
    local forward=(bench --backend cuda --methods evaluation,unbiased) exact=(bench --backend cuda --methods exact)
    local sparse=(bench --backend cuda --methods unbiased --kernels auto --kernels auto:tiles=off) kernels shapes
    for kernels in hopper:cluster=on,lead={0,1,2,3} hopper:cluster=off,lead={0,2} hopper:cluster=on,sweep={20,40} hopper:gather=on; do
        forward+=(--kernels "$kernels")
    done
    for kernels in hopper:lead=2,chunk={16,32,64,128} hopper:lead={0,3},chunk=64 hopper:cluster=off,lead={0,2,3} hopper:gather=on portable; do exact+=(--kernels "$kernels"); done
    if [ $emulated = yes ]; then
        local small="--shape gpt2 --tokens 300 --vocab 700 --hidden 40 --dtype bf16 --rounds 1"
        # shellcheck disable=SC2086
        step tune-emulated ./bin/cce "${forward[@]}" $small --csv "$record/tune.csv" ${BENCH_ARGS:-}
        # shellcheck disable=SC2086
        step tune-emulated-exact ./bin/cce "${exact[@]}" $small --csv "$record/tune-exact.csv" ${BENCH_ARGS:-}
        # shellcheck disable=SC2086
        step tune-emulated-sparse ./bin/cce "${sparse[@]}" $small --csv "$record/tune-sparse.csv" ${BENCH_ARGS:-}
        return
    fi
    for shapes in "gemma2_2b --softcap 0,30" "llama3_8b --tokens 1024,8192" "qwen2_5_0_5b"; do
        # shellcheck disable=SC2086
        step "tune-${shapes%% *}" ./bin/cce "${forward[@]}" --shape $shapes --rounds 20 --csv "$record/tune-${shapes%% *}.csv" ${BENCH_ARGS:-}
        # shellcheck disable=SC2086
        step "tune-${shapes%% *}-exact" ./bin/cce "${exact[@]}" --shape $shapes --rounds 10 --csv "$record/tune-${shapes%% *}-exact.csv" ${BENCH_ARGS:-}
        # shellcheck disable=SC2086
        step "tune-${shapes%% *}-sparse" ./bin/cce "${sparse[@]}" --kept 30,200,900 --shape $shapes --rounds 10 \
            --csv "$record/tune-${shapes%% *}-sparse.csv" ${BENCH_ARGS:-}
    done
}

for name in "${steps[@]}"; do
    # What is wrong is not timed; `cce bench` leaves out a method that disagrees with f64, whatever the tests said.
    if [[ $name = bench || $name = tune ]] && [ ${#failed[@]} -gt 0 ] && [ -z "${BENCH_ANYWAY:-}" ]; then
        echo "no $name after failures; BENCH_ANYWAY=1 would do it"
        continue
    fi
    "$name"
done

echo
[ ${#late[@]} -gt 0 ] && printf 'NO TIME for %s\n' "${late[@]}" | tee "$record/LATE"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" | tee "$record/FAILED"
    exit 1
fi
[ ${#late[@]} -gt 0 ] && { echo "what ended in time passed; record in $record"; exit 3; }
echo "all passed; record in $record"
