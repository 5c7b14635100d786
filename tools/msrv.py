#!/usr/bin/env python3
"""What can be said of `rust-version` with a newer toolchain alone, beside clippy's `incompatible_msrv` (standard library).

Fails where a dependency asks for a newer Rust than Cargo.toml does, or where a source uses what the language got later.
"""

import json
import pathlib
import re
import subprocess
import sys

# Of the release notes of 1.90 to 1.95 ("Language"), what this code could use by accident.
NEWER = {
    "`if let` guard (1.95)": re.compile(r"^[^/\n]*\bif let\b[^{};]*=>", re.M),
    "`cfg_select!` (1.95)": re.compile(r"^[^/\n]*\bcfg_select!", re.M),
}


def version(text):
    return tuple(int(part) for part in (text + ".0.0").split(".")[:3])


root = pathlib.Path(__file__).parent.parent
command = "cargo metadata --locked --offline --format-version 1 --filter-platform x86_64-unknown-linux-gnu"
command += " --features candle,cli,cublas,cuda"
metadata = json.loads(subprocess.run(command.split(), cwd=root, check=True, stdout=subprocess.PIPE).stdout)
resolved = {node["id"] for node in metadata["resolve"]["nodes"]}
packages = [p for p in metadata["packages"] if p["id"] in resolved]
ours = next(p["rust_version"] for p in packages if p["name"] == "cut-cross-entropy")
silent = [p for p in packages if not p["rust_version"]]
wrong = [
    f"{p['name']} {p['version']} needs Rust {p['rust_version']}"
    for p in packages
    if p["rust_version"] and version(p["rust_version"]) > version(ours)
]
sources = [path for folder in ("src", "tests", "benches", "examples", "emulator") for path in (root / folder).rglob("*.rs")]
for path in [root / "build.rs", *sources]:
    text = path.read_text()
    for name, pattern in NEWER.items():
        wrong += [f"{path.relative_to(root)}:{text.count(chr(10), 0, m.start()) + 1}: {name}" for m in pattern.finditer(text)]
print(f"rust-version {ours}: {len(packages)} packages, {len(silent)} of which declare none; {1 + len(sources)} sources")
sys.exit("\n".join(wrong) if wrong else 0)
