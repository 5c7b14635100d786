#!/bin/sh
# candle.sh: builds candle with CUDA and runs tests/candle_cuda.rs on the emulated GPU. Needs the pinned nvcc (toolchain.sh, or
# CUDA_HOME) and CCCL, which candle's kernels include. What the test never calls is left out: candle's kernels for quantised
# products, which take ten minutes, cuBLAS, cuRAND and the CUDA runtime are functions that do nothing.
#
# candle.sh check: only clippy, on this crate's part of it. Needs no nvcc, since none of candle's kernels is compiled.
set -e
cd "$(dirname "$0")/.."

if [ "${1:-}" = check ]; then
    mkdir -p "${CARGO_TARGET_DIR:-target}/no-cuda/bin"
    folder=$(cd "${CARGO_TARGET_DIR:-target}/no-cuda" && pwd)
    cat >"$folder/bin/nvcc" <<'END'
#!/bin/sh
# Empty files in place of what it is asked for.
output= folder=. source=
while [ $# -gt 0 ]; do
    case $1 in
    -o) output=$2 && shift ;;
    --output-directory) folder=$2 && shift ;;
    *.cu) source=$1 ;;
    esac
    shift
done
[ -z "$output$source" ] || : >"${output:-$folder/$(basename "$source" .cu).ptx}"
END
    chmod +x "$folder/bin/nvcc"
    export NVCC="$folder/bin/nvcc" CUDA_HOME="$folder" CUDA_COMPUTE_CAP=80 CCE_NVCC=0
    exec cargo clippy --features candle-cuda --lib --test candle_cuda -- -D warnings
fi
: "${CARGO_TARGET_DIR:=$PWD/target/candle-cuda}"                # another cudarc than everybody else's: built apart
export CARGO_TARGET_DIR
folder=$CARGO_TARGET_DIR/stubs
mkdir -p "$folder"

: "${CUDA_HOME:=$(CARGO_TARGET_DIR=$PWD/target sh emulator/toolchain.sh)}"
if [ ! -d "$CUDA_HOME/include/cccl" ]; then
    "$(echo "$CUDA_HOME"/../../../../../bin/pip)" install --quiet --disable-pip-version-check --no-deps nvidia-cuda-cccl==13.0.85 >&2
fi
cat >"$folder/nvcc" <<END
#!/bin/sh
# Objects are empty; everything else is nvcc's.
case " \$* " in
*' -c '*) while [ "\$1" != -o ]; do shift; done; exec g++ -x c++ -c /dev/null -o "\$2" ;;
*) exec "$CUDA_HOME/bin/nvcc" "\$@" ;;
esac
END
chmod +x "$folder/nvcc"
# CCE_NVCC=0: this crate's kernels are the emulator's.
export CUDA_HOME NVCC="$folder/nvcc" CUDA_COMPUTE_CAP=80 CCE_NVCC=0 PATH="$CUDA_HOME/bin:$PATH"

# Every function that candle's or cudarc's bindings name, in one library of many names. Making a handle is all that happens.
cargo fetch --quiet
sources=$(cargo metadata --format-version 1 --features candle-cuda | python3 -c '
import json, os, sys
packages = {p["name"]: os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"]}
for part in ("src/cublas/sys", "src/cublaslt/sys", "src/curand/sys"): print(packages["cudarc"] + "/" + part)
print(packages["candle-kernels"] + "/src/ffi.rs")')
# shellcheck disable=SC2086
grep -rhoE '\bfn [a-zA-Z0-9_]+' $sources | sed 's/fn //' | grep -E '^(cu(blas|rand)|moe_|launch_|mmq|candle_)' | sort -u >"$folder/names"
sed 's/.*/int &(void) { return 0; }/' "$folder/names" >"$folder/stubs.c"
for name in cublas cublasLt curand cudart; do
    gcc -w -fno-builtin -shared -Wl,-soname,lib$name.so -o "$folder/lib$name.so" "$folder/stubs.c"
done

libraries=$(cargo run --quiet -p cut-cross-entropy-emulator)
# Linkers want the symbols in the library that they are named, not in one that it needs.
ln -sf "$libraries/libcuda.so.1" "$folder/libcuda.so"
ln -sf "$libraries/libnvrtc.so.13" "$folder/libnvrtc.so"
export LIBRARY_PATH="$folder" LD_LIBRARY_PATH="$libraries:$folder"
exec cargo test --features candle-cuda --test candle_cuda "$@"
