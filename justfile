# The commands of this repository. Everything works without `just`, too.

# the whole suite
test:
    cargo test

# what CI runs
ci:
    bash .ci/run

# plants bugs one at a time and shows which test catches each: in the crate, then in the kernels
mutants: cpu-mutants emulator-mutants

# the crate's
cpu-mutants *words:
    python3 tests/mutants.py {{words}}

# the kernels', under the emulator; with --ptx those of the inline assembly, which needs nvcc
emulator-mutants *arguments:
    python3 emulator/mutants.py {{arguments}}

# what nvcc emits for the kernels, run by the emulator's interpreter of PTX (installs the pinned nvcc)
ptx:
    EMU_PTX=$(sh emulator/ptx.sh) cargo test -p cut-cross-entropy-emulator --test kernels --test checker --test hopper --test layouts
    EMU_PTX=$(sh emulator/ptx.sh) cargo test --test cuda_emulated --test cuda_checked --test cuda_exact_rows --test cuda_hopper --test cuda_raised --test cuda_tiles

# another project's Hopper kernels, known to work, on the emulated GPU (installs the pinned nvcc, fetches from GitHub)
emulator-deepgemm:
    sh emulator/deepgemm.sh

# registers, shared memory and spills of every kernel (needs nvcc, or PyPI for it)
check-kernels *arguments:
    python3 kernels/check.py {{arguments}}

# whether the library and the command compile for other systems (rustup adds their standard libraries)
platforms:
    sh tools/platforms.sh

# times as multiples of one matmul, at the shapes of the README
bench:
    cargo run --release --features cli --bin cce -- bench

# stripped test and command, and a script, for a machine with a GPU and nothing else: target/gpu-bundle.tar
gpu-bundle *args:
    bash tools/gpu-bundle/build.sh {{args}}

# on this machine's GPU: parity, compute-sanitizer, bench; writes target/gpu-bundle/record-<date>
gpu-check: gpu-bundle
    target/gpu-bundle/run.sh
