# The commands of this repository. Everything works without `just`, too.

# the whole suite
test:
    cargo test

# what CI runs
ci:
    bash .ci/run

# plants bugs one at a time and shows which test catches each
mutants:
    python3 tests/mutants.py

# times as multiples of one matmul, at the shapes of the README
bench:
    cargo run --release --features cli --bin cce -- bench

# stripped test and command, and a script, for a machine with a GPU and nothing else: target/gpu-bundle.tar
gpu-bundle *args:
    bash tools/gpu-bundle/build.sh {{args}}

# on this machine's GPU: parity, compute-sanitizer, bench; writes target/gpu-bundle/record-<date>
gpu-check: gpu-bundle
    target/gpu-bundle/run.sh
