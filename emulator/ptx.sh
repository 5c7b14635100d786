#!/bin/sh
# ptx.sh [FOLDER]: compiles every kernel to PTX with nvcc (NVCC, or what toolchain.sh installs) and prints what EMU_PTX takes. A
# kernel that has not changed is not compiled again.
set -e
here=$(cd "$(dirname "$0")" && pwd)
: "${NVCC:=$("$here/toolchain.sh")/bin/nvcc}"
folder=${1:-${CARGO_TARGET_DIR:-$here/../target}/ptx}
mkdir -p "$folder"
list=
for source in "$here"/../kernels/*.cu "$here"/kernels/*.cu; do
    name=$(basename "$source" .cu)
    case $name in
        example_cluster | example_bulk) continue ;;             # instructions that the interpreter does not decode
        *sm90*) arch=90a ;;
        *) arch=80 ;;
    esac
    ptx=$folder/$name.ptx
    # Everything that it could include: kernels are few.
    key=$(cat "$0" "$source" "$here"/../kernels/*.h "$here"/../kernels/*.cuh "$here"/../kernels/prim/* "$here"/kernels/*.cuh | cksum)
    if [ "$(cat "$ptx.key" 2>/dev/null)" != "$key" ]; then
        "$NVCC" -std=c++17 -lineinfo -ptx "-arch=compute_$arch" "-I$here/../kernels" -o "$ptx" "$source" >&2
        printf '%s' "$key" >"$ptx.key"
    fi
    list=$list${list:+:}$ptx
done
printf '%s\n' "$list"
