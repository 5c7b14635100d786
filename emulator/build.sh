#!/bin/sh
# build.sh TEST.cpp KERNEL.cu... : an executable of a C++ test, kernels and the emulator, without cargo. Objects of the
# runtime are kept in $OBJ and made again when a source is newer. Prints the executable's path.
set -e
here=$(cd "$(dirname "$0")" && pwd)
: "${CXX:=g++}" "${OBJ:=${TMPDIR:-/tmp}/emulator-objects}" "${KFLAGS:=-O1 -g1 -fsanitize=thread,undefined -fno-sanitize=pointer-overflow,object-size}"
mkdir -p "$OBJ"
test=$1; shift
make_object() { # source object flags...
    from=$1; to=$2; shift 2
    if [ ! -e "$to" ] || [ -n "$(find "$from" "$here/include" "$here/runtime" -newer "$to" -name '*.[chS]*' \( -path "$from" -o -name '*.hpp' \))" ]; then
        $CXX "$@" -c "$from" -o "$to"
    fi
}
objects=
for s in "$here"/runtime/*.cpp "$here"/ptx/*.cpp "$here"/runtime/switch.S; do
    o=$OBJ/$(basename "$s").o
    case $s in *.S) make_object "$s" "$o" ;; *) make_object "$s" "$o" -std=c++17 -O2 -g1 -fvisibility=hidden -fPIC ;; esac
    objects="$objects $o"
done
out=$OBJ/$(basename "$test" .cpp)
for k in "$@"; do
    o=$out-$(basename "$k").o
    { echo "#include \"$(cd "$(dirname "$k")" && pwd)/$(basename "$k")\""; echo '#include "export.hpp"'
      tr '\n' ' ' <"$k" | sed 's/extern "C"/\n&/g' | sed -n 's/^extern "C" *__global__ *void *\(__cluster_dims__ *(\([^)]*\))\)\? *\(__launch_bounds__ *(\([^)]*\))\)\? *\([A-Za-z_0-9]*\) *(.*/EMU_EXPORT(\5, \4); EMU_CLUSTER(\5, \2);/p' | sed 's/ EMU_CLUSTER([a-z_0-9]*, );//'; } >"$o.cpp"
    # -fsanitize=thread would pull in libtsan at link time, so only the compile sees it
    $CXX -std=c++20 -x c++ -I"$here/include" -I"$here/../kernels" -I"$here/../kernels/prim" -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -Wno-tsan -ffp-contract=off $KFLAGS -c "$o.cpp" -o "$o"
    objects="$objects $o"
done
$CXX -std=c++20 -O2 -g1 -Wall -Wextra -I"$here/include" -I"$here/../kernels" -I"$here/../kernels/prim" "$test" $objects -o "$out" -ldl -lpthread
echo "$out"
