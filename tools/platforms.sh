#!/bin/sh
# Whether the library and the command compile for systems on which CI does not run. What they depend on has no C; what tests
# depend on has, and needs a compiler for each system (CONTRIBUTING.md, "Other platforms").
set -eu
cd "$(dirname "$0")/.."

for target in aarch64-apple-darwin aarch64-unknown-linux-gnu x86_64-pc-windows-msvc; do
    if ! rustup target add "$target"; then
        printf '== SKIPPED, no standard library of %s could be installed (above)\n' "$target"
        continue
    fi
    cargo clippy -p cut-cross-entropy --lib --bins --features cli,cublas --target "$target" -- -D warnings
done
