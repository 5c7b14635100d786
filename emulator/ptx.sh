#!/bin/sh
# ptx.sh [FOLDER]: compiles every kernel to PTX with nvcc (NVCC, or what toolchain.sh installs) and prints what EMU_PTX takes. A
# kernel that has not changed is not compiled again.
set -e
here=$(cd "$(dirname "$0")" && pwd)
: "${NVCC:=$("$here/toolchain.sh")/bin/nvcc}"
folder=${1:-${CARGO_TARGET_DIR:-$here/../target}/ptx}
mkdir -p "$folder"

compile() { # source ptx
    case $1 in
        *sm90* | *example_cluster* | *example_bulk* | *example_layout*) arch=90a ;;
        *) arch=80 ;;
    esac
    # Everything that it could include: kernels are few.
    key=$(cat "$0" "$1" "$here"/../kernels/*.h "$here"/../kernels/*.cuh "$here"/../kernels/prim/* "$here"/kernels/*.cuh | cksum)
    [ "$(cat "$2.key" 2>/dev/null)" != "$key" ] || return 0
    "$NVCC" -std=c++17 -lineinfo -ptx "-arch=compute_$arch" "-I$here/../kernels" -o "$2" "$1" >&2 || return 1
    printf '%s' "$key" >"$2.key"
}
finish() {
    for job in $running; do wait "$job"; done
    running=
}

list=
running=
for source in "$here"/../kernels/*.cu "$here"/kernels/*.cu; do
    ptx=$folder/$(basename "$source" .cu).ptx
    compile "$source" "$ptx" &
    running="$running $!"
    # As many at a time as there are processors.
    # shellcheck disable=SC2086
    [ "$(set -- $running && echo $#)" -lt "$(nproc)" ] || finish
    list=$list${list:+:}$ptx
done
finish
printf '%s\n' "$list"
