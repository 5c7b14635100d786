#!/usr/bin/env bash
# Proves the CUDA backend on this machine's GPU, then times it. Writes a folder record-<date>.
#
#   ./run.sh                       parity, compute-sanitizer, bench (every launch timed one by one, too)
#   ./run.sh parity sanitizer      these steps alone
#   ./run.sh tune                  the Hopper forward with and without clusters, with leads of 0 to 3 steps and with shorter sweeps; the exact
#                                  path with chunks of 16 to 128 MiB, leads, and without clusters; both with all rows gathered; sparse
#                                  gradients with tiles and without
#   ./run.sh --emulated ...        on the emulated driver in ./emulated, if the bundle has it: small, and without times
#   ./run.sh --seconds S ...       begins nothing after S seconds, and ends then what still runs; steps go in the order given, and go on after
#                                  failures, so that on a machine lent for a while the first come first:
#                                  ./run.sh --seconds 560 --pack record.tgz parity bench tune sanitizer
#   ./run.sh --pack FILE ...       the record in one file, made again after each step: what is done is not lost with the machine
#
#   PATIENCE=N                     each step may take N times as long as it is given, which is for an H200: a minute or two
#   PARITY_FILTER=word             only the parity tests whose names have it
#   BENCH_ANYWAY=1                 bench and tune after parity failed, too
#   BENCH_SHAPES, BENCH_ARGS       other shapes; more arguments for `cce bench`
set -uo pipefail
started=$PWD
cd "$(dirname "$0")"
here=$PWD
export REQUIRE_CUDA=1

emulated=no
seconds=
pack=
steps=()
while [ $# -gt 0 ]; do
    case $1 in
        --emulated) emulated=yes ;;
        --seconds)
            seconds=${2:-}
            [[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "--seconds takes a number of seconds, not '$seconds'" >&2; exit 2; }
            shift
            ;;
        --pack)
            [ -n "${2:-}" ] || { echo "--pack takes a file" >&2; exit 2; }
            case $2 in /*) pack=$2 ;; *) pack=$started/$2 ;; esac
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
parity=right
# What bench runs by: the planner's choice, unless a family fails.
family=()

# Status 1 of tar: the clocks have changed meanwhile.
keep() {
    [ -z "$pack" ] && return
    tar -C "$here" -czf "$pack.part" "${record##*/}"
    [ $? -le 1 ] && mv "$pack.part" "$pack"
}

describe() {
    cat MANIFEST
    date -u
    if [ $emulated = yes ]; then
        echo "emulated driver: nothing here is a measurement"
    elif command -v nvidia-smi >/dev/null; then
        timeout -k 5 30 nvidia-smi --format=csv --query-gpu=name,driver_version,vbios_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current,mig.mode.current
        timeout -k 5 30 nvidia-smi -q -d CLOCK,PERFORMANCE
    else
        echo "nvidia-smi is not installed: driver and clocks unknown"
    fi
    uname -a
    grep -m 1 'model name' /proc/cpuinfo
    timeout -k 5 60 ./bin/cce info --shape gemma2_2b || echo "cce info: exit status $?"
}
describe >"$record/machine.txt" 2>&1
head -n 4 "$record/machine.txt"
grep -m 1 '^backend cuda' "$record/machine.txt"
grep -m 1 'exact kernels at once' "$record/machine.txt"

# Runs a command for at most so many seconds (on the emulated driver: for as long as it takes), shows and keeps what it prints, and
# remembers whether it failed, hung, or had no time.
step() {
    local most=$1 name=$2 left limit
    shift 2
    printf '\n== %s: %s\n' "$name" "$*"
    most=$((most * ${PATIENCE:-1}))
    [ $emulated = yes ] && most=86400
    limit=$most
    if [ -n "$seconds" ]; then
        left=$((seconds - SECONDS))
        if [ $left -le 0 ]; then
            echo "not begun: the $seconds seconds are over" | tee "$record/$name.txt"
            late+=("$name (not begun)")
            return 1
        fi
        [ $left -lt "$limit" ] && limit=$left
    fi
    local began=$SECONDS
    # A kernel that hangs may not let its process end at a signal that it could catch.
    timeout -k 5 "$limit" "$@" </dev/null 2>&1 | tee "$record/$name.txt"
    local status=${PIPESTATUS[0]}
    if [ "$status" -eq 124 ] || { [ "$status" -eq 137 ] && [ $((SECONDS - began)) -ge "$limit" ]; }; then
        if [ "$limit" -lt "$most" ]; then
            echo "ended: the $seconds seconds are over" | tee -a "$record/$name.txt"
            late+=("$name (ended)")
        else
            echo "ended: it hangs, or takes more than $most seconds" | tee -a "$record/$name.txt"
            failed+=("$name (no end in $most s)")
        fi
    elif [ "$status" -ne 0 ]; then
        failed+=("$name (exit status $status)")
    fi
    keep
    return "$status"
}

# Small cases by these kernels, on the GPU.
verified() {
    step 60 "$1" ./bin/cce verify --only "D=40 bf16" --kernels "$2" || return
    grep -q '^ok *cuda' "$record/$1.txt" && return
    failed+=("$1 (nothing ran on the GPU)")
    return 1
}

# First each family of kernels by itself, so that what fails later is known to be of one. Then each test in a process of its own:
# after a fault everything else in its process fails, too.
parity() {
    local tests test kernels
    verified parity-portable portable || parity=wrong
    if grep -q '^backend cuda.*sm_90' "$record/machine.txt"; then
        for kernels in hopper:cluster=off hopper:cluster=on; do
            if verified "parity-${kernels/:cluster=/-cluster-}" $kernels; then
                [ ${#family[@]} -gt 0 ] || continue
                family=(--kernels $kernels)
            elif [ $kernels = hopper:cluster=off ]; then
                parity=wrong family=(--kernels portable)
            elif [ ${#family[@]} -eq 0 ]; then
                parity=wrong family=(--kernels hopper:cluster=off)
            fi
        done
        [ ${#family[@]} -gt 0 ] && echo "what is timed is timed with ${family[*]}"
    fi
    tests=$(timeout 30 ./bin/cuda_device --list --format terse | sed -n 's/: test$//p' | grep -F -- "${PARITY_FILTER:-}")
    [ -n "$tests" ] || { failed+=("parity (no test is named like '${PARITY_FILTER:-}')") && parity=wrong; }
    for test in $tests; do
        step 90 "parity-${test##*::}" ./bin/cuda_device --exact "$test" || parity=wrong
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
    [ ${#family[@]} -gt 0 ] && { echo "skipped compute-sanitizer: a family of kernels fails" | tee "$record/sanitizer.txt"; return; }
    # Ragged and even shapes, one tile and several, every type of element and every filter; then the options of the loss.
    for tool in memcheck racecheck initcheck synccheck; do
        for cases in "N=67 V=1000" "N=64 V=256" "N=300 V=515" softcap smoothing; do
            name=sanitizer-$tool-${cases// /-}
            step 300 "$name" compute-sanitizer --tool "$tool" --error-exitcode 9 ./bin/cce verify --only "$cases" >/dev/null
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

# A run of `cce bench` with its record. Where it does not end by itself (1: something is wrong, the rest is timed), exact gradients may have
# taken the device with them: once more without.
timed() {
    local name=$1 methods=$2
    shift 2
    local command=(./bin/cce bench --backend cuda "${family[@]}")
    # shellcheck disable=SC2086
    step 150 "$name" "${command[@]}" --methods "$methods" "$@" --csv "$record/$name.csv" ${BENCH_ARGS:-}
    [ $? -le 1 ] && return
    if [[ $methods = *,exact ]] && [ ${#late[@]} -eq 0 ]; then
        # shellcheck disable=SC2086
        step 150 "$name-without-exact" "${command[@]}" --methods "${methods%,exact}" "$@" --csv "$record/$name-without-exact.csv" ${BENCH_ARGS:-}
    fi
}

bench() {
    local methods=unbiased,threshold,evaluation,baseline,exact
    if [ $emulated = yes ]; then
        timed bench-emulated $methods --shape gpt2 --tokens 48 --vocab 700 --hidden 40 --dtype f32,bf16,f16 \
            --softcap 0,30 --ignored 0,0.3 --rounds 1 --profile
        return
    fi
    if [ -n "${BENCH_SHAPES:-}" ]; then
        timed bench $methods --shape "$BENCH_SHAPES" --chart "$record/bench.svg"
        return
    fi
    timed bench-gemma2 $methods --shape gemma2_2b --softcap 0,30 --rounds 20 --profile --chart "$record/gemma2.svg"
    timed bench-others $methods --shape llama3_8b,qwen2_5_0_5b,qwen2_5_7b --rounds 20 --profile --chart "$record/others.svg"
    timed bench-tokens $methods --shape llama3_8b --tokens 1024,2048,4096,16384 --rounds 20 --chart "$record/tokens.svg"
    timed bench-ignored $methods --shape llama3_8b --ignored 0.1,0.5 --rounds 10
    timed bench-f16 $methods --shape qwen2_5_0_5b --dtype f16 --rounds 5
    # f32 is portable in any case.
    local of_16_bits=("${family[@]}")
    family=()
    timed bench-f32 $methods --shape qwen2_5_0_5b --dtype f32 --rounds 5
    step 150 bench-gradient-error ./bin/cce bench --backend cuda --methods unbiased,exact --shape gpt2 --tokens 2048 --dtype f32 \
        --rounds 0 --gradient-error --csv "$record/bench.csv" ${BENCH_ARGS:-}
    family=("${of_16_bits[@]}")
}

# What no planner should have to guess: every choice in one process, in turn within a round. The forward alone, and with capture.
tune() {
    local forward=() exact=() sparse=(--kernels auto --kernels auto:tiles=off) kernels shapes name
    if [ ${#family[@]} -gt 0 ]; then
        echo "no tune: there is nothing to choose beside ${family[*]}"
        return
    fi
    for kernels in hopper:cluster=on,lead={0,1,2,3} hopper:cluster=off,lead={0,2} hopper:cluster=on,sweep={20,40} hopper:gather=on; do
        forward+=(--kernels "$kernels")
    done
    for kernels in hopper:lead=2,chunk={16,32,64,128} hopper:lead={0,3},chunk=64 hopper:cluster=off,lead={0,2,3} hopper:gather=on portable; do
        exact+=(--kernels "$kernels")
    done
    if [ $emulated = yes ]; then
        local small=(--shape gpt2 --tokens 300 --vocab 700 --hidden 40 --dtype bf16 --rounds 1)
        timed tune-emulated evaluation,unbiased "${forward[@]}" "${small[@]}"
        timed tune-emulated-exact exact "${exact[@]}" "${small[@]}"
        timed tune-emulated-sparse unbiased "${sparse[@]}" "${small[@]}"
        return
    fi
    for shapes in "gemma2_2b --softcap 0,30" "llama3_8b --tokens 1024,8192" "qwen2_5_0_5b"; do
        name=tune-${shapes%% *}
        # shellcheck disable=SC2086
        timed "$name" evaluation,unbiased "${forward[@]}" --shape $shapes --rounds 20
        # shellcheck disable=SC2086
        timed "$name-sparse" unbiased "${sparse[@]}" --kept 30,200,900 --shape $shapes --rounds 20
        # shellcheck disable=SC2086
        timed "$name-exact" exact "${exact[@]}" --shape $shapes --rounds 10
    done
}

# Clocks all along: a GPU that slows down while it is measured shows here.
watcher=
if [ $emulated = no ] && command -v nvidia-smi >/dev/null && [[ " ${steps[*]} " = *" bench "* || " ${steps[*]} " = *" tune "* ]]; then
    # The newer name; older drivers know the other one.
    reasons=clocks_event_reasons.active
    nvidia-smi -i 0 --format=csv --query-gpu=$reasons >/dev/null 2>&1 || reasons=clocks_throttle_reasons.active
    nvidia-smi -i 0 -l 1 --format=csv --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,$reasons >"$record/clocks.csv" &
    watcher=$!
    trap 'kill $watcher 2>/dev/null' EXIT
fi

for name in "${steps[@]}"; do
    # What is wrong is not timed; `cce bench` leaves out a method that disagrees with f64, whatever the tests said.
    if [[ $name = bench || $name = tune ]] && [ $parity = wrong ] && [ -z "${BENCH_ANYWAY:-}$seconds" ]; then
        echo "no $name after parity failed; BENCH_ANYWAY=1 would do it"
        continue
    fi
    "$name"
done

[ -n "$watcher" ] && { kill "$watcher"; wait "$watcher"; watcher=; } 2>/dev/null

# The figures once more, in short: whoever sees only the end of this output sees them.
printf '\n%s\n' "$([ $emulated = yes ] && echo 'emulated, so that these are no measurements:' || echo 'multiples of T:')"
for file in "$record"/bench-*.csv "$record"/tune-*.csv "$record"/bench.csv; do
    [[ -e $file && $file != *-rounds.csv && $file != *-launches.csv && $file != *-gradient-error.csv ]] || continue
    awk -F, 'NR > 1 && ($7 == "both" || $6 ~ /^evaluation/) { printf "%s N=%s %s cap %s: %s %s T\n", $1, $2, $5, $21, $6, $8 }' "$file"
done | tee "$record/summary.txt"

echo
[ ${#late[@]} -gt 0 ] && printf 'NO TIME for %s\n' "${late[@]}" | tee "$record/LATE"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" | tee "$record/FAILED"
    keep
    exit 1
fi
keep
[ -z "$pack" ] || [ -e "$pack" ] || { echo "cannot write $pack; record in $record" >&2; exit 1; }
[ ${#late[@]} -gt 0 ] && { echo "what ended in time passed; record in $record"; exit 3; }
echo "all passed; record in $record"
