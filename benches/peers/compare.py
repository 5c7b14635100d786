#!/usr/bin/env python3
"""Times this library and its peers on one GPU, or on the processor, on the same tensors; see README.md beside this file.

Each method lives in a process of its own, which loads the tensors, checks its gradients against f64 and then waits. The processes take
turns, a round each, so that whatever the machine does over time it does to all. On a GPU times are CUDA events around one step, after a
flush of the L2 cache; every step is a multiple of T, the plain matmul of the logits' size timed right beside it in the same process.
On the processor (--device cpu) the clock is the wall's, all have the same number of threads, and milliseconds are compared.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

import report
import worker
from peers import ON_PROCESSOR, PEERS, environment

HERE = pathlib.Path(__file__).resolve()
STARTED = time.monotonic()
# Signals that came, and what ends the process that is waited for now.
STOPPED, WAITED_FOR = [], []

# name, V, D, softcap
SHAPES = [
    ("gemma2_2b", 256_000, 2304, 0.0),
    ("gemma2_2b", 256_000, 2304, 30.0),
    ("llama3_8b", 128_256, 4096, 0.0),
    ("qwen2_5_7b", 152_064, 3584, 0.0),
]
TOKENS = 8192
SWEEP = ("llama3_8b", 128_256, 4096, [1024, 2048, 4096, 16384])
# name, N, V, D: those of the figures in README.md at the top
PROCESSOR_SHAPES = [("figure_64k", 2048, 65_536, 1024), ("figure_qwen", 1024, 151_936, 896)]
PACKAGES = ["torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "nvidia-cutlass-dsl"]


def launched(command, more, **options):
    """In a group of its own, with what it starts: that would hold its output open, and a terminal's interrupt is ours alone."""
    return subprocess.Popen(command, env=os.environ | more, text=True, process_group=0, stdout=subprocess.PIPE, **options)


def kill(process):
    """It, and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def call(command, more={}):
    """What it prints. Fails where it does, after --patience seconds, and at a signal."""
    process = launched(command, more, stderr=subprocess.PIPE)
    WAITED_FOR[:] = [lambda: kill(process)]
    try:
        said, errors = process.communicate(timeout=args.patience)
    finally:
        kill(process)
        process.wait()
        process.stdout.close(), process.stderr.close()
        WAITED_FOR.clear()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, said, errors)
    return said


def last_line(error):
    """Of what a command that failed has said."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{pathlib.Path(error.cmd[0]).name} {error.cmd[1]}: no answer in {error.timeout} s"
    said = (getattr(error, "stderr", None) or "").strip() or str(error)
    return said.splitlines()[-1].strip()[-300:]


class Turn:
    """A process that works when it is its turn."""

    def __init__(self, name, command, more):
        self.name, self.rounds, self.ready, self.error = name, [], None, ""
        file = pathlib.Path(args.out) / name.replace(" ", "_")
        self.log, self.errors = open(f"{file}.log", "ab", buffering=0), open(f"{file}.err", "wb")
        self.process = launched(command, more, stdin=subprocess.PIPE, stderr=self.errors)

    def give_up(self, why):
        self.error = self.error or why
        kill(self.process)

    def interrupt(self):
        """At a signal: the round that it is in is lost."""
        self.give_up("stopped")

    def lines(self):
        """Of its output, as long as the next one comes in time."""
        WAITED_FOR[:] = [self.interrupt]
        while True:
            timer = threading.Timer(args.patience, self.give_up, [f"no answer in {args.patience} s"])
            timer.start()
            line = self.process.stdout.readline()
            timer.cancel()
            if not line:
                break
            self.log.write(line.encode())
            yield line.strip()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # it has closed its output and lives on
            self.give_up("ended its output and did not exit")
            self.process.wait()
        self.error = self.error or f"ended with status {self.process.returncode}: {self.last_words()}"

    def last_words(self):
        """The last line that names an exception, as some are followed by advice; else the last line."""
        text = pathlib.Path(self.errors.name).read_text(errors="replace").strip().splitlines()
        named = [line for line in text if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return (named or text or ["no output"])[-1][:300]

    def until_json(self):
        for line in self.lines():
            if line.startswith("{"):
                try:
                    return json.loads(line)
                except ValueError:  # what some package prints
                    pass
        return None

    def until(self, word):
        return any(line == word for line in self.lines())

    def go(self):
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            return True
        except OSError:
            self.error = self.error or f"ended: {self.last_words()}"
            return False

    def end(self):
        """Says that no more rounds come, and waits for what it does then."""
        had_failed = self.error
        try:
            self.process.stdin.close()
        except OSError:
            pass
        for _ in self.lines():
            pass
        self.error = had_failed or (self.error if self.process.returncode else "")
        self.log.close(), self.errors.close(), self.process.stdout.close()


class PeerTurn(Turn):
    def __init__(self, peer, path, softcap, expected):
        command = python("--worker", peer, "--file", path, "--softcap", str(softcap), "--expected", str(expected))
        super().__init__(peer, command, environment(peer, args.device))

    def prepare(self):
        self.ready = self.until_json()

    def round(self):
        done = self.until_json()
        self.rounds.extend([done] if done else [])

    def end(self):
        """What it would do at its exit, a crash or nothing for long, says nothing of its rounds."""
        kill(self.process)
        self.process.wait()
        self.log.close(), self.errors.close(), self.process.stdout.close()

    def rows(self, shape):
        row = shape | {"method": self.name, "error": self.error}
        if self.ready and self.rounds:
            row |= {key: self.ready[key] for key in ("error_d_e", "error_d_c", "loss", "loss_error", "peak_bytes")}
            row |= {"threads": self.ready["threads"]} if args.device == "cpu" else {}
            row |= {f"{key}_ms": median([r[key] for r in self.rounds]) for key in ("both", "forward", "t")}
            row |= {key: median([r[key] for r in self.rounds]) for key in ("both_t", "forward_t")}
            row["error"] = f"after {len(self.rounds)} rounds: {self.error}" if self.error else ""
        return [row]


class OurTurn(Turn):
    def __init__(self, path, softcap):
        self.csv = pathlib.Path(args.out) / "cce.csv"
        self.csv.unlink(missing_ok=True)  # what an earlier run may have left
        super().__init__("ours", bench_command(path, softcap) + ["--csv", str(self.csv)], with_cublas())

    def prepare(self):
        self.ready = self.until("ready")

    def round(self):
        self.until("done")

    def interrupt(self):
        """It writes at its end what its rounds took."""
        if not self.ready:
            super().interrupt()

    def rows(self, shape):
        # A method of ours that was wrong is an error of the process, which has timed the others.
        rows = [shape | {"method": self.name, "error": self.error or "no record"}] if self.error or not self.csv.exists() else []
        by_method = {}
        for record in csv.DictReader(self.csv.read_text().splitlines()) if self.csv.exists() else []:
            by_method.setdefault(record["method"], {})[record["phase"]] = record
        self.csv.unlink(missing_ok=True)
        if (rounds := self.csv.with_name("cce-rounds.csv")).exists():  # that of the next shape has the same name
            rounds.rename(rounds.with_name("-".join(["cce-rounds", *map(str, shape.values())]) + ".csv"))
        for method, phases in by_method.items():
            last = phases.get("both", phases["forward"])
            row = shape | {"method": f"ours, {method}", "error": ""}
            row |= {"loss": last["loss"], "peak_bytes": last["peak_bytes"], "kept_per_row": last["kept_per_row"]}
            row |= {"forward_ms": phases["forward"]["median_ms"], "forward_t": phases["forward"]["median_ratio"]}
            row |= {"t_ms": last["matmul_median_ms"]} | ({"threads": last["threads"]} if args.device == "cpu" else {})
            if "both" in phases:
                row |= {"both_ms": last["median_ms"], "both_t": last["median_ratio"]}
            rows.append(row)
        return rows


def python(*arguments):
    return [sys.executable, str(HERE), "--device", args.device, *arguments]


def with_cublas():
    """Where our command finds cuBLAS: first in Python's packages, so that T is by the library that PyTorch has, then where the loader looks
    by itself, then in the toolkit."""
    package = importlib.util.find_spec("nvidia") if args.device == "cuda" else None
    parents = map(pathlib.Path, package.submodule_search_locations or []) if package else []
    folders = [parent / part / "lib" for parent in parents for part in ("cu13", "cublas")]
    found = [str(folder) for folder in folders if any(folder.glob("libcublas.so*"))]
    found += [os.environ.get("LD_LIBRARY_PATH", ""), "/usr/local/cuda/lib64" if args.device == "cuda" else ""]
    return {"LD_LIBRARY_PATH": ":".join(filter(None, found))} if any(found) else {}


def late(share=1.0):
    """Whether nothing more is begun: a signal came, or this share of --seconds is over."""
    return bool(STOPPED) or args.seconds is not None and time.monotonic() - STARTED > share * args.seconds


def why_late():
    return "stopped" if STOPPED else f"of {args.seconds:g} seconds {time.monotonic() - STARTED:.0f} are over"


def stop(number, _):
    """The first signal: nothing more is begun, and what was measured is written. The second ends the script."""
    STOPPED.append(number)
    signal.signal(number, signal.SIG_DFL)
    for interrupt in WAITED_FOR:
        interrupt()


def versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def median(values):
    return statistics.median(values) if values else float("nan")


def measure(shape, path, write_so_far):
    """Rows of the record for one file of tensors; those of the peers are written after each round, too."""
    softcap, expected = shape["softcap"], pathlib.Path(args.out) / "expected.pt"
    call(python("--reference", path, "--softcap", str(softcap), "--expected", str(expected)))
    turns = []
    try:
        for make in [lambda: OurTurn(path, softcap), *(lambda peer=peer: PeerTurn(peer, path, softcap, expected) for peer in args.peers)]:
            # The rest is for the rounds: each method that is ready has at least one.
            if STOPPED or turns and late(0.7):
                print(f"  no more peers: {why_late()}", flush=True)
                break
            turns.append(make())
            if not args.together:  # what loads, compiles and tunes does not share the machine
                prepare(turns[-1])
        for turn in turns if args.together else []:
            prepare(turn)
        all_rounds(turns, lambda: write_so_far([row for turn in turns if isinstance(turn, PeerTurn) for row in turn.rows(shape)]))
        for turn in turns:
            turn.end()
        rows = [row for turn in turns for row in turn.rows(shape)]
        write_so_far(rows)
        add_our_errors(rows, path, expected)
        return rows
    finally:
        for turn in turns:
            kill(turn.process)


def prepare(turn):
    if STOPPED:
        turn.interrupt()
    turn.prepare()
    print(f"  {time.monotonic() - STARTED:.0f} s, {turn.name}: {turn.error or turn.ready}", flush=True)


def all_rounds(turns, write_so_far):
    for number in range(args.rounds):
        if STOPPED or number and late():
            print(f"  {number} of {args.rounds} rounds: {why_late()}", flush=True)
            break
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            if turn.ready and not turn.error and not STOPPED and turn.go():
                turn.round()
        write_so_far()


def add_our_errors(rows, path, expected):
    """`cce bench` has checked its gradients. Their errors are information, by a run of their own: what cannot be had is left out."""
    for row in rows:
        if row["method"].startswith("ours, ") and "both_ms" in row and not late(1.1):
            try:
                row |= our_errors(row["method"].removeprefix("ours, ").split()[0], path, row["softcap"], expected)
            except (subprocess.SubprocessError, ValueError, IndexError) as error:
                print(f"  {row['method']}: errors of gradients not known: {last_line(error)}", flush=True)


def our_errors(method, path, softcap, expected):
    written = pathlib.Path(args.out) / "gradients.safetensors"
    command = [args.cce, "run", "--backend", args.device, "--input", path, "--output", str(written)]
    command += ["--filter", method] + (["--softcap", str(softcap)] if softcap else [])
    try:
        call(command, with_cublas())
        return json.loads(call(python("--check", str(written), "--expected", str(expected))).strip().splitlines()[-1])
    finally:
        written.unlink(missing_ok=True)


def sized(name, tokens, vocab, hidden, softcap, dtype):
    return {"shape": name, "tokens": tokens, "vocab": vocab, "hidden": hidden, "softcap": softcap, "dtype": dtype}


def described(shape):
    return f"{report.title_of(shape)}, {args.rounds} rounds" + (f", {args.threads} threads" if args.device == "cpu" else "")


def plan():
    """The shapes of what is generated, or of the file given."""
    if args.input:
        with open(args.input, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        (n, d), v, dtype = header["embeddings"]["shape"], header["classifier"]["shape"][0], header["embeddings"]["dtype"].lower()
        return [sized(pathlib.Path(args.input).stem, n, v, d, softcap, dtype) for softcap in args.softcaps or [0.0]]
    if args.device == "cpu":
        listed = [(*entry, 0.0) for entry in PROCESSOR_SHAPES]
    else:
        listed = [(name, TOKENS, v, d, softcap) for name, v, d, softcap in SHAPES]
    if args.device == "cuda" and not args.no_sweep and not args.tokens:
        name, v, d, tokens = SWEEP
        listed += [(name, n, v, d, 0.0) for n in tokens]
    listed = [entry for entry in listed if not args.shapes or entry[0] in args.shapes]
    return [sized(name, args.tokens or n, v, d, softcap, dtype) for name, n, v, d, softcap in listed for dtype in args.dtypes]


def generate_command(shape, path):
    command = [args.cce, "generate", "--backend", args.device, "--shape", shape["shape"], "--tokens", str(shape["tokens"])]
    command += ["--vocab", str(shape["vocab"]), "--hidden", str(shape["hidden"]), "--dtype", shape["dtype"]]
    return command + ["--softcap", str(shape["softcap"]), "--output", path]


def bench_command(path, softcap):
    command = [args.cce, "bench", "--backend", args.device, "--input", path, "--softcap", str(softcap), "--rounds", str(args.rounds)]
    return command + ["--methods", "unbiased,exact,evaluation", "--paced"]


def dry_run(path):
    for shape in plan():
        print(f"\n{described(shape)}")
        if not args.input:
            print("  " + " ".join(generate_command(shape, path)))
        for peer in args.peers:
            print(f"  {peer}", *[f"{key}={value}" for key, value in environment(peer, args.device).items()])
        print("  " + " ".join(bench_command(path, shape["softcap"])))
    print(f"\nnothing was run; a run writes peers.csv, peers.md, peers.svg, chart.json, machine.txt and logs to {args.out}")


def machine():
    """What is found in it, for the record."""
    found = [f"{package} {version}" for package, version in versions().items()] + [f"load average {os.getloadavg()}"]
    tools = [["lscpu"]] if args.device == "cpu" else [["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK"]]
    for command in [*tools, [args.cce, "--version"], [args.cce, "info", "--shape", "gemma2_2b"]]:
        try:
            found.append(call(command, with_cublas()))
        except (OSError, subprocess.SubprocessError) as error:
            found.append(f"{command[0]}: {last_line(error)}")
    return "\n".join(found)


def main():
    print("python", sys.version.split()[0], *[f"{package} {version}" for package, version in versions().items()], sep="\n  ")
    out = pathlib.Path(args.out)
    path = args.input or str(out / "tensors.safetensors")
    if not plan():
        sys.exit(f"none of these shapes is for --device {args.device}")
    if args.dry_run:
        return dry_run(path)
    if shutil.which(args.cce) is None:
        sys.exit(f"{args.cce} is not there: cargo build --release --features cli{',cublas' if args.device == 'cuda' else ''} --bin cce")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
    if args.device == "cpu":  # of ours and of PyTorch
        os.environ.update({name: str(args.threads) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    (out / "machine.txt").write_text(machine())
    rows = []
    for shape in plan():
        print(f"\n{described(shape)}", flush=True)
        if late():
            rows.append(shape | {"method": "all", "error": f"not begun: {why_late()}"})
            continue
        try:
            if not args.input:
                call(generate_command(shape, path), with_cublas())
            rows += measure(shape, path, lambda found: report.write(rows + found, out, args.device))
        except subprocess.SubprocessError as error:  # the tensors or their reference: the other shapes go on
            rows.append(shape | {"method": "all", "error": "stopped" if STOPPED else last_line(error)})
        report.write(rows, out, args.device)
    print(report.write(rows, out, args.device))
    if not args.input:
        pathlib.Path(path).unlink(missing_ok=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cce", default="target/release/cce", help="our command, built with --features cli,cublas; for the processor cli")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="what computes")
    parser.add_argument("--input", help="tensors `embeddings`, `classifier`, `targets` in place of generated ones")
    parser.add_argument("--softcap", dest="softcaps", type=float, action="append", help="for --input")
    names = dict.fromkeys(entry[0] for entry in SHAPES + PROCESSOR_SHAPES)
    parser.add_argument("--shapes", nargs="*", choices=list(names), help="only shapes of these names")
    parser.add_argument("--tokens", type=int, help="N of all shapes, in place of their own")
    parser.add_argument("--dtype", dest="dtypes", nargs="*", choices=["bf16", "f32"], help="of what is generated: bf16, on the processor both")
    parser.add_argument("--threads", type=int, help="on the processor, of each method: by default as many as it may use")
    parser.add_argument("--no-sweep", action="store_true", help="8192 tokens only")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="by default all, on the processor those that it can run")
    parser.add_argument("--rounds", type=int, help="10, on the processor 5")
    parser.add_argument("--patience", type=int, default=900, help="seconds until a process that says nothing is given up")
    parser.add_argument("--seconds", type=float, help="begin no shape and no round but a first after so many seconds, no peer after 70 %% of them")
    parser.add_argument("--together", action="store_true", help="all load and compile at once: quicker, but not for what tunes itself by time")
    parser.add_argument("--out", default="peers-record")
    parser.add_argument("--dry-run", action="store_true", help="print versions and the plan")
    for hidden_option in ("--worker", "--file", "--expected", "--reference", "--check"):
        parser.add_argument(hidden_option, help=argparse.SUPPRESS)
    given = parser.parse_args()
    on_processor = given.device == "cpu"
    given.dtypes = given.dtypes or (["bf16", "f32"] if on_processor else ["bf16"])
    given.peers = (ON_PROCESSOR if on_processor else list(PEERS)) if given.peers is None else given.peers
    given.rounds = (5 if on_processor else 10) if given.rounds is None else given.rounds
    given.threads = given.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return given


if __name__ == "__main__":
    args = arguments()
    cap = (args.softcaps or [0.0])[0]
    if args.reference:
        worker.reference(args.reference, cap, args.expected, args.device)
    elif args.check:
        worker.check_file(args.check, args.expected, args.device)
    elif args.worker:
        worker.work(args.worker, args.file, cap, args.expected, args.device)
    else:
        main()
