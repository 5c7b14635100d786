//! Rules of the repository that a reader relies on, checked by reading its files.

use std::fs;
use std::path::{Path, PathBuf};

/// All `.rs` files under `folder`, with their text.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("UTF-8");
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// Lines with code, comments cut off.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(|line| line.split("//").next().unwrap_or_default())
}

#[test]
fn the_oracle_and_the_backends_share_no_code() {
    for (path, text) in sources("src") {
        let backend =
            ["src/cpu/", "src/cuda/", "src/plan/"].iter().any(|folder| path.to_string_lossy().contains(folder));
        let oracle = path.ends_with("src/reference.rs");
        for line in code(&text) {
            assert!(!(backend && line.contains("reference::")), "{}: {line}", path.display());
            let foreign =
                ["cpu", "filter::", "half::", "gemm", "rayon", "pulp", "cuda"].iter().any(|word| line.contains(word));
            assert!(!(oracle && foreign), "{}: {line}", path.display());
        }
    }
}

/// Where tile products are called, where the driver and NVRTC are, and, in the binary alone, the allocator that counts and
/// the baseline on a GPU.
const UNSAFE: [&str; 11] = [
    "src/cuda/hopper.rs",
    "src/bin/cce/bench/cuda/baseline.rs",
    "src/bin/cce/bench/cuda/blas.rs",
    "src/bin/cce/bench/cuda/mod.rs",
    "src/cpu/bf16/simd.rs",
    "src/cpu/matmul.rs",
    "src/cuda/launch.rs",
    "src/cuda/nvrtc.rs",
    "src/cuda/probe.rs",
    "src/cuda/raw.rs",
    "src/bin/cce/heap.rs",
];

#[test]
fn unsafe_is_only_where_it_must_be() {
    for (path, text) in sources("src") {
        let word = |line: &str| line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
        let mentions = code(&text).any(word);
        let allowed = UNSAFE.iter().any(|file| path.ends_with(file));
        assert!(!mentions || allowed, "{} is unsafe", path.display());
        assert!(!mentions || text.contains("// SAFETY:"), "{} does not say why", path.display());
    }
}

#[test]
fn no_file_is_longer_than_600_lines() {
    for folder in ["src", "tests"] {
        for (path, text) in sources(folder) {
            let lines = text.lines().count();
            assert!(lines <= 600, "{}: {lines} lines", path.display());
        }
    }
}
