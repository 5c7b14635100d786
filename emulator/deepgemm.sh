#!/bin/sh
# deepgemm.sh: runs kernels that are known to work on an H100 on the emulated one, as a test of the emulator by another's hand. They are
# DeepGEMM's for bf16, compiled to PTX by the pinned nvcc (toolchain.sh), under five schedules and the checker. Needs git and a network, or
# DEEPGEMM and CUTLASS: where these repositories are.
set -e
here=$(cd "$(dirname "$0")" && pwd)
folder=${CARGO_TARGET_DIR:-$here/../target}/deepgemm
mkdir -p "$folder"

checkout() { # repository commit folder
    [ "$(git -C "$3" rev-parse HEAD 2>/dev/null)" != "$2" ] || return 0
    rm -rf "$3"
    git init --quiet "$3"
    git -C "$3" fetch --quiet --depth 1 "https://github.com/$1" "$2" && git -C "$3" checkout --quiet FETCH_HEAD
}
if [ -z "${DEEPGEMM:-}" ]; then
    DEEPGEMM=$folder/DeepGEMM
    checkout deepseek-ai/DeepGEMM 54e22612409371d6364144b69086735beb54e98b "$DEEPGEMM"
fi
if [ -z "${CUTLASS:-}" ]; then
    CUTLASS=$folder/cutlass
    checkout NVIDIA/cutlass 7107b05535f8977f5ecb9d01ee203205b1fd9bc4 "$CUTLASS"
fi
: "${CUDA_HOME:=$(sh "$here/toolchain.sh")}"
if [ ! -d "$CUDA_HOME/include/cccl" ]; then
    "$(echo "$CUDA_HOME"/../../../../../bin/pip)" install --quiet --disable-pip-version-check --no-deps nvidia-cuda-cccl==13.0.85 >&2
fi

"$CUDA_HOME/bin/nvcc" -std=c++20 -ptx -lineinfo -arch=compute_90a --expt-relaxed-constexpr --disable-warnings -I"$DEEPGEMM/deep_gemm/include" \
    -I"$CUTLASS/include" -I"$CUDA_HOME/include/cccl" -o "$folder/kernels.ptx" "$here/deepgemm/kernels.cu"
# They leave while the copy engine may still read their last tile, which the checker takes for a bug.
sed 's/^\tret;/\tcp.async.bulk.wait_group.read 0;\n\tret;/' "$folder/kernels.ptx" >"$folder/waiting.ptx"
library=$(cd "$here" && cargo run --quiet)
"${CXX:-g++}" -std=c++17 -O2 -Wall -Wextra "-I$CUDA_HOME/include" -o "$folder/main" "$here/deepgemm/main.cpp" -L"$library" -l:libcuda.so.1

export LD_LIBRARY_PATH="$library" EMU_DEVICE=h200
for schedule in forward,lazy,1 reverse,eager,2 random,random,3 random,lazy,4 random,random,5; do
    IFS=, read -r EMU_ORDER EMU_ASYNC EMU_SEED <<END
$schedule
END
    export EMU_ORDER EMU_ASYNC EMU_SEED
    echo "order $EMU_ORDER, copies $EMU_ASYNC, seed $EMU_SEED"
    "$folder/main" "$folder/waiting.ptx"
done
