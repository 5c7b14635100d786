#!/bin/sh
# Installs the pinned CUDA compiler from PyPI into target/cuda-toolchain, once, and prints the folder with bin/nvcc. NVIDIA's licence
# makes it a tool: nothing of it is copied into this repository. About 350 MB; needs python3 with venv or pip.
set -e
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${CARGO_TARGET_DIR:-$here/target}/cuda-toolchain
# All of one release: nvcc takes whatever nvvm and crt it finds, and newer ones emit PTX that its ptxas does not know.
pins='nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86'
if [ "$(cat "$folder/pins" 2>/dev/null)" != "$pins" ]; then
    rm -rf "$folder"
    # Debian's python3 comes without venv, or without pip, or without both.
    # shellcheck disable=SC2086
    if python3 -m venv "$folder" >&2; then
        "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps $pins >&2
    else
        rm -rf "$folder"
        python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/lib" $pins >&2
    fi
    printf '%s' "$pins" >"$folder/pins"
fi
nvcc=$(find "$folder/lib" -path '*/bin/nvcc' | head -n 1)
[ -n "$nvcc" ] || { echo "toolchain.sh: no nvcc among the packages" >&2; exit 1; }
chmod +x "$(dirname "$nvcc")"/* "$(dirname "$nvcc")"/../nvvm/bin/* 2>/dev/null || true
dirname "$(dirname "$nvcc")"
