#!/usr/bin/env bash
# Packs what a GPU machine needs to prove and time this crate: the test of the CUDA backend, the `cce` command and a run script.
# Neither Rust nor a network is needed there. `--emulated` puts the emulated driver beside them, for trying the script without a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

limit=$((60 << 20))
target=${CARGO_TARGET_DIR:-target}
bundle=$target/gpu-bundle
emulated=no
[ "${1:-}" = --emulated ] && emulated=yes

nvcc=${CCE_NVCC:-$(command -v nvcc || true)}
if [ ! -x "$nvcc" ]; then
    echo "no nvcc: put it on PATH or name it in CCE_NVCC. From PyPI:" >&2
    echo "  python3 -m venv cuda && cuda/bin/pip install -r tools/gpu-bundle/nvcc.txt" >&2
    echo '  export PATH=$PWD/$(echo cuda/lib/python3*/site-packages/nvidia/cu13/bin):$PATH' >&2
    exit 2
fi
"$nvcc" --version | tail -n 2

CCE_REVISION=$(git describe --always --dirty --abbrev=9 2>/dev/null || echo unknown)
export CCE_NVCC=$nvcc CCE_REQUIRE_NVCC=1 CCE_REVISION

# cargo prints where it put each executable.
messages=$(cargo test --release --no-run --features cli,cublas --test cuda_device --message-format=json)
executable() {
    printf '%s\n' "$messages" | grep '"compiler-artifact"' | grep "\"name\":\"$1\"" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}

rm -rf "$bundle" "$bundle.tar"
mkdir -p "$bundle/bin"
for name in cuda_device cce; do
    cp "$(executable "$name")" "$bundle/bin/$name"
    strip "$bundle/bin/$name"
done
cp tools/gpu-bundle/run.sh "$bundle/run.sh"
{
    echo "revision $CCE_REVISION"
    echo "$("$nvcc" --version | sed -n 's/.*release \([^,]*\), \(.*\)/nvcc \1 \2/p')"
    rustc --version
} >"$bundle/MANIFEST"
if [ $emulated = yes ]; then
    libraries=$(cargo run -q --release -p cut-cross-entropy-emulator)
    mkdir "$bundle/emulated"
    cp -P "$libraries"/*.so* "$bundle/emulated/"
fi

tar -C "$target" -cf "$bundle.tar" gpu-bundle
du -b "$bundle"/bin/* "$bundle.tar"
size=$(stat -c %s "$bundle.tar")
if [ $emulated = no ] && [ "$size" -gt $limit ]; then
    echo "the bundle has $size bytes, more than $limit" >&2
    exit 1
fi
