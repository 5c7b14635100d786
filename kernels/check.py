#!/usr/bin/env python3
"""Compiles every kernel and fails where ptxas spills registers, uses local memory or warns.

    python3 kernels/check.py                      sm_80 and sm_120, sm_90a for *_sm90*.cu
    python3 kernels/check.py --all                every architecture that this nvcc knows and the library ships
    python3 kernels/check.py --arch 80,86 exact   some architectures; files whose name contains a word
    python3 kernels/check.py --ptx target/ptx     with the PTX for sm_80 and sm_90a that emulator/ptx.sh has just made there

Prints kernel x architecture: registers, static shared memory, and what is wrong. nvcc: --nvcc, $NVCC, $CUDA_HOME, the PATH, or what
emulator/toolchain.sh installs. Needs nothing but Python.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALL = ["80", "86", "89", "90", "100", "120"]
QUICK = ["80", "120"]          # the least and the most recent; what lies between compiles to nearly the same code
# Function properties that are meant to be so: kernel: reason.
ALLOWED = {}


def find_nvcc(given):
    home = os.environ.get("CUDA_HOME")
    for nvcc in [given, os.environ.get("NVCC"), home and f"{home}/bin/nvcc", shutil.which("nvcc")]:
        if nvcc and Path(nvcc).is_file():
            return nvcc
    folder = subprocess.run(["sh", ROOT / "emulator/toolchain.sh"], check=True, capture_output=True, text=True).stdout.strip()
    return f"{folder}/bin/nvcc"


def compile_one(nvcc, source, arch, folder, ptx):
    """(function: (registers, shared, stack, spills)), the warnings, seconds"""
    out = folder / f"{source.stem}-{arch}.cubin"
    made = Path(ptx) / f"{source.stem}.ptx" if ptx and arch in ("80", "90a") else None
    text = made if made and made.is_file() and f".target sm_{arch}\n" in made.read_text() else source
    began = time.time()
    done = subprocess.run(
        [nvcc, "-std=c++17", "-lineinfo", "-cubin", f"-arch=sm_{arch}", "-I", ROOT / "kernels", "-Xptxas", "-v", "-o", out, text],
        capture_output=True, text=True)
    if done.returncode:
        return {}, [f"{source.name} for sm_{arch} does not compile:\n{done.stderr}"], time.time() - began
    functions, warnings, name = {}, [], None
    for line in done.stderr.splitlines():
        if match := re.search(r"(?:Compiling entry function '|Function properties for )(\w+)", line):
            name = match[1]
            functions.setdefault(name, [0, 0, 0, 0])
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            functions[name][2], functions[name][3] = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            functions[name][0], functions[name][1] = int(match[1]), int(shared[1]) if shared else 0
        elif "warning" in line.lower():
            warnings.append(f"{source.name}, sm_{arch}: {line.strip()}")
    return functions, warnings, time.time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--arch")
    parser.add_argument("--nvcc")
    parser.add_argument("--ptx", metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--times", action="store_true", help="print how long each file took")
    options = parser.parse_args()
    nvcc = find_nvcc(options.nvcc)
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    archs = options.arch.split(",") if options.arch else ALL if options.all else QUICK
    archs = [a for a in archs if f"compute_{a}" in known.split()]
    sources = [s for s in sorted((ROOT / "kernels").glob("*.cu")) if not options.words or any(w in s.name for w in options.words)]
    work = [(s, a) for s in sources for a in (["90a"] if "sm90" in s.stem else [a for a in archs if a != "90a"])]
    work.sort(key=lambda w: -w[0].stat().st_size)                  # long ones first
    began, bad = time.time(), []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda w: compile_one(nvcc, *w, Path(folder), options.ptx), work))
    table, columns = {}, []
    for (source, arch), (functions, warnings, seconds) in zip(work, results):
        bad += warnings
        if options.times:
            print(f"{source.name:24} sm_{arch:4} {seconds:6.1f} s")
        columns += [arch] if arch not in columns else []
        for name, (registers, shared, stack, spills) in functions.items():
            name = demangled(name)
            cell = f"{registers}" if registers else "-"
            cell += f" +{shared} B" if shared else ""
            if (stack or spills) and name not in ALLOWED:
                cell += f" ({spills} B spilled)" if spills else f" ({stack} B stack)"
                bad.append(f"{name}, sm_{arch}: a stack frame of {stack} bytes, {spills} bytes of spills")
            table.setdefault((source.name, name), {})[arch] = cell
    columns.sort(key=lambda a: int(a.rstrip("a")))
    print("registers (- where the caller has them)\n")
    print("| kernel | " + " | ".join(f"sm_{a}" for a in columns) + " |\n|---|" + "---|" * len(columns))
    for (_, name), cells in sorted(table.items()):
        print(f"| `{name}` | " + " | ".join(cells.get(a, "") for a in columns) + " |")
    print(f"\n{len(work)} compilations in {time.time() - began:.0f} s")
    for problem in bad:
        print(f"BAD  {problem}", file=sys.stderr)
    return 1 if bad else 0


def demangled(name):
    if not name.startswith("_Z") or not shutil.which("c++filt"):
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(.*", "", text).removeprefix("void ")


if __name__ == "__main__":
    sys.exit(main())
