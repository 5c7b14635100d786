#!/usr/bin/env python3
"""Seeds one bug at a time into a copy of the kernels, rebuilds what it touches, and runs the cheapest test that must notice.

    python3 emulator/mutants.py              all
    python3 emulator/mutants.py fence filter those whose name or file contains a word
    python3 emulator/mutants.py --ptx        those in kernels/prim, which only nvcc's output shows (needs nvcc: see toolchain.sh)
    python3 emulator/mutants.py --table      prints the results as a Markdown table
    python3 emulator/mutants.py --check      runs nothing: does every text still occur, of all, --ptx or not?

Nothing of the repository changes. A mutant is one or more replacements; a text that does not occur is an error. Exit status 0: every
bug was caught, no legal change raised an alarm, and every test passes without a mutant.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutant_list import MUTANTS, PTX_MUTANTS

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "emulator"
# A schedule that hides nothing; the checker needs no luck, so one is enough.
LIMIT = 120


def run(command, **options):
    return subprocess.run([str(c) for c in command], cwd=ROOT, text=True, capture_output=True, **options)


def cargo():
    """The library's folder, the objects' folder, and the test executables by name."""
    library = run(["cargo", "run", "-q", "-p", "cut-cross-entropy-emulator"])
    if library.returncode:
        sys.exit(library.stderr)
    executables = {}
    for what in (["--features", "cuda", "--test", "cuda_checked", "--test", "cuda_exact_rows", "--test", "cuda_hopper", "--test", "cuda_raised", "--test", "cuda_tiles", "--test", "cuda_traffic"], ["-p", "cut-cross-entropy-emulator", "--test", "kernels", "--test", "checker", "--test", "hopper"]):
        built = run(["cargo", "test", "-q", "--no-run", "--message-format=json", *what])
        if built.returncode:
            sys.exit(built.stderr)
        for line in built.stdout.splitlines():
            message = json.loads(line)
            if message.get("executable") and "test" in message["target"]["kind"]:
                executables[message["target"]["name"]] = message["executable"]
    folder = Path(library.stdout.strip())
    return folder, folder.parent, executables


class Workshop:
    """A copy of the kernels, the objects that differ, and a driver made of them."""

    def __init__(self, folder, driver, objects):
        self.folder, self.driver, self.objects = folder, driver, objects
        shutil.copytree(ROOT / "kernels", folder / "kernels")
        shutil.copytree(HERE / "kernels", folder / "emulator/kernels")

    def change(self, file, edits):
        for old, new, *other in edits:
            path = self.folder / (other[0] if other else file)
            text = path.read_text()
            if old not in text:
                raise LookupError(f"{path.name}: no {old!r}")
            path.write_text(text.replace(old, new))

    def build(self, units):
        changed = {}
        for unit in units:
            tag = "example" if unit.startswith("example_") else "kernel"
            object_ = next(o for o in self.objects.glob(f"{tag}*-{unit}.o"))
            arguments = object_.with_suffix(".arguments").read_text().split("\n")
            wrapper = Path(arguments[-3])
            own = self.folder / wrapper.name
            moved = lambda text: text.replace(f"{ROOT}/kernels", f"{self.folder}/kernels").replace(
                f"{HERE}/kernels", f"{self.folder}/emulator/kernels")
            own.write_text(moved(re.sub(r"/emulator/\.\./kernels", "/kernels", wrapper.read_text())))
            arguments = [moved(re.sub(r"/emulator/\.\./kernels", "/kernels", a)) for a in arguments]
            arguments[-3], arguments[-1] = str(own), str(self.folder / object_.name)
            done = run([os.environ.get("CXX", "c++"), *arguments])
            if done.returncode:
                return done.stderr
            changed[object_.name] = arguments[-1]
        library = self.folder / "lib"
        library.mkdir()
        for file in self.driver.iterdir():
            if file.name != "libcuda.so.1":
                shutil.copy(file, library)
        objects = [changed.get(o.name, o) for o in self.objects.glob("*.o") if o.name != "driver-nvrtc.o"]
        done = run([os.environ.get("CXX", "c++"), "-shared", "-Wl,-Bsymbolic", "-Wl,-soname,libcuda.so.1", "-o",
                    library / "libcuda.so.1", *objects, "-ldl", "-lpthread"])
        return done.stderr if done.returncode else None

    def test(self, executables, test, **variables):
        return run_test(executables, test, EMU_LIBRARY_DIR=str(self.folder / "lib"), **variables)


def check():
    """1 if a mutant's text does not occur: the code has moved on without it."""
    stale = [f"{path}: no {old!r}, of: {name}" for name, file, edits, *_ in MUTANTS + PTX_MUTANTS for old, _, *other in edits
             if old not in (ROOT / (path := other[0] if other else file)).read_text()]
    print("\n".join(stale) or f"{len(MUTANTS + PTX_MUTANTS)} mutants, every text occurs")
    return bool(stale)


def run_test(executables, test, **variables):
    """What caught it: the kind of the first report, what else failed, or "" where the test passed. And all it said."""
    name, _, argument = test.partition(" ")
    if name in ("cuda_exact_rows", "cuda_hopper", "cuda_tiles"):     # name of a test, and its cases
        of_test, _, cases = argument.partition("/")
        command, extra = [executables[name], of_test], {"CCE_CASES": cases} if cases else {}
    elif name in executables:
        command, extra = [executables[name], argument], {}
    else:                                            # case/filter
        case, _, number = test.partition("/")
        command, extra = [executables["cuda_checked"]], {"CCE_CASES": case, "CCE_FILTERS": number or "0,1,2,3"}
    environment = {**os.environ, "RUST_BACKTRACE": "0", "EMU_SPIN_SECONDS": "2", **extra, **variables}
    try:
        done = run(command, env=environment, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "hangs", ""
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return ("", said) if re.search(r"test result: ok\. [1-9]", said) else ("no such test", said)
    if found := re.search(r"^\s*\[([a-z][^\]\n]*)\] (?:block|the)", said, re.M):
        return found[1], said
    return ("crash" if done.returncode < 0 else "wrong result"), said


def one(mutant, library, objects, executables, log):
    name, file, edits, units, test = mutant[:5]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder), library, objects)
        try:
            shop.change(file, edits)
        except LookupError as error:
            return name, f"ERROR: {error}", 0
        failed = shop.build(units)
        if failed:
            return name, "ERROR: does not compile: " + failed[:300], 0
        built = time.time()
        kind, said = shop.test(executables, test)
        if log:
            (Path(log) / (re.sub(r"\W+", "-", name) + ".log")).write_text(said)
    return name, kind, (built - began, time.time() - built)


def one_ptx(mutant, nvcc, executables, log):
    """ptxas accepts it? And what the interpreter's run says."""
    name, file, edits, units, test, arch = mutant
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder), Path(folder), Path(folder))
        try:
            shop.change(file, edits)
        except LookupError as error:
            return name, f"ERROR: {error}", 0
        paths = []
        began = time.time()
        for unit in units:
            source = next(p for p in [shop.folder / f"kernels/{unit}.cu", shop.folder / f"emulator/kernels/{unit}.cu"] if p.exists())
            out = shop.folder / f"{unit}.ptx"
            done = run([nvcc, "-std=c++17", "-lineinfo", "-ptx", f"-arch=compute_{arch}", f"-I{shop.folder}/kernels", "-o", out, source])
            if done.returncode:
                return name, "ERROR: does not compile: " + done.stderr[:300], 0
            assembled = run([nvcc, "-cubin", f"-arch=sm_{arch}", "-o", shop.folder / "x.cubin", out])
            if assembled.returncode:
                return name, "ptxas refuses it", 0
            paths.append(str(out))
        built = time.time()
        kind, said = run_test(executables, test, EMU_PTX=":".join(paths))
        if "ptx: " in said and "cannot run" in said:
            kind = "the interpreter refuses it"
        if log:
            (Path(log) / (re.sub(r"\W+", "-", name) + ".log")).write_text(said)
    return name, kind, (built - began, time.time() - built)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--ptx", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--log", help="a folder for what each test said")
    options = parser.parse_args()
    if options.check:
        return check()
    if options.log:
        Path(options.log).mkdir(parents=True, exist_ok=True)
    library, objects, executables = cargo()
    mutants = [m for m in (PTX_MUTANTS if options.ptx else MUTANTS) if not options.words or any(w in m[0] or w in m[1] for w in options.words)]
    if options.ptx:
        sys.path.insert(0, str(ROOT / "kernels"))
        from check import find_nvcc
        nvcc = find_nvcc(None)
    else:
        for test in sorted({m[4] for m in mutants}):
            kind, said = run_test(executables, test)
            if kind:
                sys.exit(f"{test} fails without any mutant: {kind}\n{said[-3000:]}")
    bad = caught = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        work = (lambda m: one_ptx(m, nvcc, executables, options.log)) if options.ptx else (lambda m: one(m, library, objects, executables, options.log))
        for mutant, (name, kind, seconds) in zip(mutants, pool.map(work, mutants)):
            legal = "(legal)" in name or "(no change)" in name
            right = not kind.startswith("ERROR") and kind != "no such test" and bool(kind) != legal
            bad += not right
            caught += right and not legal
            spent = f"{seconds[0]:.0f} + {seconds[1]:.0f} s" if seconds else ""
            if options.table:
                print(f"| {Path(mutant[1]).name} | {name} | {kind or '-'} |", flush=True)
            else:
                print(f"{'   ' if right else 'BAD'} {Path(mutant[1]).name:22} {name:58} {kind or '-':34} {mutant[4]:22} {spent}", flush=True)
    total = sum("(legal)" not in m[0] and "(no change)" not in m[0] for m in mutants)
    print(f"{caught} of {total} bugs caught, {bad} wrong", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
