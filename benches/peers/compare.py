#!/usr/bin/env python3
"""Times this library's CUDA backend and its peers on one GPU, on the same tensors; see README.md beside this file.

Each method lives in a process of its own, which loads the tensors, checks its gradients against f64 and then waits. The processes take
turns, a round each, so that whatever the GPU does over time it does to all. Times are CUDA events around one step, after a
flush of the L2 cache; every step is a multiple of T, the plain matmul of the logits' size timed right beside it in the same process.
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
import statistics
import subprocess
import sys
import threading
import time
from xml.sax.saxutils import escape

from peers import PEERS, capped

HERE = pathlib.Path(__file__).resolve()
STARTED = time.monotonic()

# name, V, D, softcap
SHAPES = [
    ("gemma2_2b", 256_000, 2304, 0.0),
    ("gemma2_2b", 256_000, 2304, 30.0),
    ("llama3_8b", 128_256, 4096, 0.0),
    ("qwen2_5_7b", 152_064, 3584, 0.0),
]
TOKENS = 8192
SWEEP = ("llama3_8b", 128_256, 4096, [1024, 2048, 4096, 16384])
PACKAGES = ["torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "nvidia-cutlass-dsl"]
# Rows of dE and of dC that are compared with f64.
SLICE = 16
# How often the flush buffer is written before a step: by estimate 1 ms of work for the device, so that the host, which launches a peer's
# kernels from Python, is ahead of it when the clock starts. `cce bench` gives itself as much.
HEAD_START = 15


# ---- inside a peer's process ----------------------------------------------------------------------------------------------


def load(path):
    from safetensors.torch import load_file

    tensors = load_file(path, device=args.device)
    return tensors["embeddings"], tensors["classifier"], tensors["targets"].long()


def slices(v, y):
    """Tokens and classes that are compared: spread over all that count, and the classes that are targets of these tokens."""
    import torch

    counted = (y >= 0).nonzero()[:, 0]
    rows = counted[torch.linspace(0, len(counted) - 1, min(SLICE, len(counted)), device=args.device).long()]
    classes = torch.linspace(0, v - 1, min(SLICE, v), device=args.device).long()
    return rows.unique(), torch.cat([classes, y[rows]]).unique()


def reference(path, softcap, output):
    """Loss and slices of both gradients in f64."""
    import torch

    e, c, y = load(path)
    (n, _), v, cd = e.shape, c.shape[0], c.double()
    rows, classes = slices(v, y)
    counts = y >= 0
    lse, target = torch.empty(n, dtype=torch.float64, device=args.device), torch.empty(n, dtype=torch.float64, device=args.device)
    for i in range(0, n, 128):
        z = capped(e[i : i + 128].double() @ cd.T, softcap)
        lse[i : i + 128] = z.logsumexp(1)
        target[i : i + 128] = z.gather(1, y[i : i + 128, None].clamp(min=0))[:, 0]

    def gradient(z, lse, hit):
        g = ((z - lse).exp() - hit.double()) / counts.sum()
        return g * (1 - (z / softcap) ** 2) if softcap else g

    z = capped(e[rows].double() @ cd.T, softcap)
    hit = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[rows, None], True)
    d_e = gradient(z, lse[rows, None], hit) @ cd
    z = capped(e.double() @ cd[classes].T, softcap)
    d_c = (gradient(z, lse[:, None], y[:, None] == classes[None]) * counts[:, None]).T @ e.double()
    loss = (lse - target)[counts].mean().item()
    torch.save({"rows": rows, "classes": classes, "d_e": d_e, "d_c": d_c, "loss": loss}, output)


def errors(expected, d_e, d_c):
    def relative(ours, exact):
        return ((ours.double() - exact).norm() / exact.norm()).item()

    return relative(d_e[expected["rows"]], expected["d_e"]), relative(d_c[expected["classes"]], expected["d_c"])


def check_file(path, expected):
    """Errors of gradients that `cce run` wrote."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path, device=args.device)
    d_e, d_c = errors(torch.load(expected, map_location=args.device), tensors["d_embeddings"], tensors["d_classifier"])
    print(json.dumps({"error_d_e": d_e, "error_d_c": d_c}))


class Gpu:
    """The clock and the memory of what is measured."""

    def __init__(self):
        import torch

        self.cuda = torch.cuda
        self.name = torch.cuda.get_device_name()
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def timed(self, work):
        for _ in range(HEAD_START):
            self.flush.zero_()
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, work):
        """Bytes beyond those held before."""
        held = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        work()
        return self.cuda.max_memory_allocated() - held

    def give_back(self):
        self.cuda.empty_cache()


class Rehearsal:
    """The processor in its place: the script runs, and what it says of time and memory means nothing."""

    name = "rehearsal on the processor"

    def timed(self, work):
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def peak(self, work):
        work()
        return 0

    def give_back(self):
        pass


def checked(expected, loss, error_e, error_c):
    """What is wrong is not timed. Filters and 16 bits are off by percents, a wrong call by more than everything; NaN fails, too."""
    off = abs(loss - expected["loss"])
    if not off <= 1e-2 * max(1.0, abs(expected["loss"])):
        raise ArithmeticError(f"the loss is {loss}, in f64 {expected['loss']}")
    if not (error_e <= 0.5 and error_c <= 0.5):
        raise ArithmeticError(f"relative errors of dE {error_e:.1e} and of dC {error_c:.1e}")
    return off


def worker(name, path, softcap, expected):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    e, c, y = load(path)
    e.requires_grad_(), c.requires_grad_()
    # Some form gradients in the forward wherever an input asks for one, also where none is recorded.
    e_alone, c_alone = e.detach(), c.detach()
    compute = PEERS[name][0](softcap)
    device = Gpu() if args.device == "cuda" else Rehearsal()
    plane = None

    def both():
        e.grad = c.grad = None
        loss = compute(e, c, y)
        loss.backward()
        return loss

    def forward():
        with torch.no_grad():
            return compute(e_alone, c_alone, y)

    def matmul():
        with torch.no_grad():
            torch.mm(e, c.T, out=plane)

    for _ in range(3):  # compiles, tunes
        loss = both().item()
    exact = torch.load(expected, map_location=args.device)
    error_e, error_c = errors(exact, e.grad, c.grad)
    off = checked(exact, loss, error_e, error_c)
    # Beyond inputs and gradients.
    e.grad = c.grad = None
    peak = device.peak(both) - e.grad.nbytes - c.grad.nbytes
    forward_runs, forward_error = True, ""
    try:
        forward(), forward()
    except Exception as error:  # a peer without evaluation
        forward_runs, forward_error = False, repr(error)
    # The caches of all processes would not fit: each gives back its own before the next starts, and when its turn ends.
    e.grad = c.grad = None
    device.give_back()
    ready = {
        "error_d_e": error_e, "error_d_c": error_c, "loss": loss, "loss_error": off, "peak_bytes": peak,
        "forward_error": forward_error, "gpu": device.name,
    }
    print(json.dumps(ready), flush=True)

    for _ in sys.stdin:
        plane = torch.empty(e.shape[0], c.shape[0], dtype=e.dtype, device=args.device)
        # What was given back is allocated here and not in what is timed.
        if forward_runs:
            forward()
        both(), matmul()
        before = device.timed(matmul)
        step = device.timed(both)
        middle = device.timed(matmul)
        alone = device.timed(forward) if forward_runs else float("nan")
        after = device.timed(matmul)
        plane = e.grad = c.grad = None
        device.give_back()
        t = (before + middle) / 2, (middle + after) / 2
        print(json.dumps({"both": step, "forward": alone, "both_t": step / t[0], "forward_t": alone / t[1], "t": middle}), flush=True)


# ---- outside ----------------------------------------------------------------------------------------------------------------


class Turn:
    """A process that works when it is its turn."""

    def __init__(self, name, command, environment):
        self.name, self.rounds, self.ready, self.error = name, [], None, ""
        file = pathlib.Path(args.out) / name.replace(" ", "_")
        self.log, self.errors = open(f"{file}.log", "ab"), open(f"{file}.err", "wb")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=os.environ | environment
        )

    def give_up(self):
        self.error = f"no answer in {args.patience} s"
        self.process.kill()

    def lines(self):
        """Of its output, as long as the next one comes in time."""
        while True:
            timer = threading.Timer(args.patience, self.give_up)
            timer.start()
            line = self.process.stdout.readline()
            timer.cancel()
            if not line:
                break
            self.log.write(line.encode())
            yield line.strip()
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
        super().__init__(peer, command, PEERS[peer][1])
        self.ready = self.until_json()

    def round(self):
        done = self.until_json()
        self.rounds.extend([done] if done else [])

    def rows(self, shape):
        row = shape | {"method": self.name, "error": self.error}
        if self.ready and self.rounds:
            row |= {key: self.ready[key] for key in ("error_d_e", "error_d_c", "loss", "loss_error", "peak_bytes")}
            row |= {f"{key}_ms": median([r[key] for r in self.rounds]) for key in ("both", "forward", "t")}
            row |= {key: median([r[key] for r in self.rounds]) for key in ("both_t", "forward_t")}
        return [row]


class OurTurn(Turn):
    def __init__(self, path, softcap, expected):
        self.path, self.softcap, self.expected = path, softcap, expected
        self.csv = pathlib.Path(args.out) / "cce.csv"
        self.csv.unlink(missing_ok=True)  # what an earlier run may have left
        command = [args.cce, "bench", "--backend", "cuda", "--input", path, "--softcap", str(softcap), "--rounds", str(args.rounds)]
        super().__init__("ours", command + ["--methods", "unbiased,exact,evaluation", "--paced", "--csv", str(self.csv)], with_cublas())
        self.ready = self.until("ready")

    def round(self):
        self.until("done")

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
            row |= {"t_ms": last["matmul_median_ms"]}
            if "both" in phases:
                row |= {"both_ms": last["median_ms"], "both_t": last["median_ratio"]}
                row |= our_errors(method, self.path, self.softcap, self.expected)
            rows.append(row)
        return rows


def python(*arguments):
    return [sys.executable, str(HERE), "--device", args.device, *arguments]


def with_cublas():
    """Where our command finds cuBLAS if the loader does not by itself: in the toolkit, or in Python's packages."""
    package = importlib.util.find_spec("nvidia")
    parents = map(pathlib.Path, package.submodule_search_locations or []) if package else []
    folders = [pathlib.Path("/usr/local/cuda/lib64"), *(parent / part / "lib" for parent in parents for part in ("cu13", "cublas"))]
    found = [os.environ.get("LD_LIBRARY_PATH", ""), *(str(folder) for folder in folders if any(folder.glob("libcublas.so*")))]
    return {"LD_LIBRARY_PATH": ":".join(filter(None, found))}


def ours(command, **options):
    return subprocess.run(command, check=True, env=os.environ | with_cublas(), **options)


def late():
    return args.seconds is not None and time.monotonic() - STARTED > args.seconds


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


def measure(name, tokens, path, softcap, write_so_far):
    """Rows of the record for one file of tensors; those of the peers are written after each round, too."""
    out = pathlib.Path(args.out)
    expected = out / "expected.pt"
    subprocess.run(python("--reference", path, "--softcap", str(softcap), "--expected", str(expected)), check=True)

    shape, turns = {"shape": name, "tokens": tokens, "softcap": softcap}, []
    # One at a time: what loads and compiles does not share the GPU.
    for make in [lambda: OurTurn(path, softcap, expected), *(lambda peer=peer: PeerTurn(peer, path, softcap, expected) for peer in args.peers)]:
        if turns and late():
            print(f"  no more peers: the {args.seconds} seconds are over", flush=True)
            break
        turns.append(make())
        print(f"  {turns[-1].name}: {turns[-1].error or turns[-1].ready}", flush=True)
    for number in range(args.rounds):
        if number and late():
            print(f"  {number} of {args.rounds} rounds: the {args.seconds} seconds are over", flush=True)
            break
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            if turn.ready and not turn.error and turn.go():
                turn.round()
        write_so_far([row for turn in turns if isinstance(turn, PeerTurn) for row in turn.rows(shape)])
    for turn in turns:
        turn.end()
    return [row for turn in turns for row in turn.rows(shape)]


def our_errors(method, path, softcap, expected):
    written = pathlib.Path(args.out) / "gradients.safetensors"
    command = [args.cce, "run", "--backend", "cuda", "--input", path, "--output", str(written)]
    command += ["--filter", method.split()[0]] + (["--softcap", str(softcap)] if softcap else [])
    try:
        ours(command, capture_output=True, text=True)
        done = subprocess.run(python("--check", str(written), "--expected", str(expected)), check=True, capture_output=True, text=True)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return {"error": (error.stderr or str(error)).strip().splitlines()[-1][:300]}
    finally:
        written.unlink(missing_ok=True)


COLUMNS = [
    "shape", "tokens", "vocab", "hidden", "softcap", "method", "forward_ms", "forward_t", "both_ms", "both_t", "t_ms", "peak_bytes",
    "error_d_e", "error_d_c", "loss", "loss_error", "kept_per_row", "error",
]


def title_of(row):
    softcap = f" softcap {row['softcap']:g}" if row["softcap"] else ""
    return f"{row['shape']} N={row['tokens']} V={row['vocab']} D={row['hidden']}{softcap}"


def write(rows):
    out = pathlib.Path(args.out)
    with (out / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({k: v for k, v in row.items() if k in COLUMNS} for row in rows)
    lines = ["| shape | method | forward | forward + both gradients | ms | peak MiB | dE error | dC error |", "|---|---|---|---|---|---|---|---|"]
    chart = {}
    for row in rows:

        def cell(key, form):
            value = row.get(key, "")
            return form.format(float(value)) if value not in ("", None) and float(value) == float(value) else ""

        if row.get("error"):
            lines.append(f"| {title_of(row)} | {row['method']} | did not run: {row['error'].replace('|', '/')} | | | | | |")
            continue
        peak = f"{float(row['peak_bytes']) / 2**20:.0f}" if row.get("peak_bytes", "") != "" else ""
        lines.append(
            f"| {title_of(row)} | {row['method']} | {cell('forward_t', '{:.2f} T')} | {cell('both_t', '{:.2f} T')} | {cell('both_ms', '{:.2f}')} "
            f"| {peak} | {cell('error_d_e', '{:.1e}')} | {cell('error_d_c', '{:.1e}')} |"
        )
        if row.get("both_t"):
            chart.setdefault(title_of(row), {})[row["method"]] = float(row["both_t"])
    lines += [""] + [f"{title}: {best_of(methods)}" for title, methods in chart.items()]
    if args.device != "cuda":
        lines.insert(0, "Rehearsed on the processor: no figure here is a measurement.\n")
    (out / "peers.md").write_text("\n".join(lines) + "\n")
    (out / "chart.json").write_text(json.dumps(chart, indent=1) + "\n")
    (out / "peers.svg").write_text(drawn(chart))
    return "\n".join(lines)


def best_of(methods):
    """Ours with the default filter, and exact, next to the fastest peer."""
    peers = {name: t for name, t in methods.items() if not name.startswith("ours")}
    ours = {name: t for name, t in methods.items() if name.startswith("ours")}
    if not peers or not ours:
        return "nothing to compare"
    best = min(peers, key=peers.get)
    return f"best peer {best} {peers[best]:.2f} T; " + ", ".join(f"{name} {t:.2f} T ({peers[best] / t:.2f} times as fast)" for name, t in ours.items())


def drawn(chart):
    """Bars of forward + both gradients, in multiples of T, as SVG."""
    bar, left, width, y, parts = 16, 230, 760, 20, []
    longest = max((t for methods in chart.values() for t in methods.values()), default=1.0)
    for title, methods in chart.items():
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(title)}: forward + both gradients</text>')
        y += 8
        for name, t in sorted(methods.items(), key=lambda pair: pair[1]):
            length, color = (width - left - 60) * t / longest, "#2a7" if name.startswith("ours") else "#99a"
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 3}" fill="{color}"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<text x="{left + length + 4:.1f}" y="{y + 11}">{t:.2f} T</text>')
            y += bar
        y += 28
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{width}" height="{y}" fill="white"/>', *parts, "</svg>"]) + "\n"


def plan():
    """Name, tensors to generate or the file given, softcap."""
    if args.input:
        with open(args.input, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        (n, d), v = header["embeddings"]["shape"], header["classifier"]["shape"][0]
        return [(pathlib.Path(args.input).stem, n, v, d, softcap) for softcap in args.softcaps or [0.0]]
    listed = [(name, TOKENS, v, d, softcap) for name, v, d, softcap in SHAPES]
    if not args.no_sweep:
        name, v, d, tokens = SWEEP
        listed += [(name, n, v, d, 0.0) for n in tokens]
    if args.shapes:
        listed = [entry for entry in listed if entry[0] in args.shapes]
    return listed


def generate_command(name, tokens, vocab, hidden, softcap, path):
    command = [args.cce, "generate", "--backend", "cuda", "--shape", name, "--tokens", str(tokens), "--vocab", str(vocab)]
    return command + ["--hidden", str(hidden), "--dtype", "bf16", "--softcap", str(softcap), "--output", path]


def main():
    print("python", sys.version.split()[0], *[f"{package} {version}" for package, version in versions().items()], sep="\n  ")
    out = pathlib.Path(args.out)
    path = args.input or str(out / "tensors.safetensors")
    if args.dry_run:
        for name, tokens, vocab, hidden, softcap in plan():
            print(f"\n{name}: N={tokens} V={vocab} D={hidden} softcap {softcap:g}, {args.rounds} rounds")
            if not args.input:
                print("  " + " ".join(generate_command(name, tokens, vocab, hidden, softcap, path)))
            for peer in args.peers:
                print(f"  {peer}", *[f"{key}={value}" for key, value in PEERS[peer][1].items()])
            print(f"  {args.cce} bench --backend cuda --input {path} --methods unbiased,exact,evaluation")
        print(f"\nnothing was run; a run writes peers.csv, peers.md, peers.svg, chart.json, machine.txt and logs to {out}")
        return
    if shutil.which(args.cce) is None:
        sys.exit(f"{args.cce} is not there: cargo build --release --features cli,cublas --bin cce")
    out.mkdir(parents=True, exist_ok=True)
    machine = [f"{package} {version}" for package, version in versions().items()]
    for command in (["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK"], [args.cce, "info", "--shape", "gemma2_2b"]):
        try:
            machine.append(subprocess.run(command, capture_output=True, text=True, env=os.environ | with_cublas()).stdout)
        except OSError as error:
            machine.append(f"{command[0]}: {error}")
    (out / "machine.txt").write_text("\n".join(machine))
    rows = []
    for name, tokens, vocab, hidden, softcap in plan():
        print(f"\n{name}: N={tokens} V={vocab} D={hidden} softcap {softcap:g}", flush=True)
        sizes = {"tokens": tokens, "vocab": vocab, "hidden": hidden}
        if late():
            rows.append(sizes | {"shape": name, "softcap": softcap, "method": "all", "error": f"not begun: the {args.seconds} seconds were over"})
            continue
        try:
            if not args.input:
                ours(generate_command(name, tokens, vocab, hidden, softcap, path), stderr=subprocess.PIPE, text=True)
            rows += [sizes | row for row in measure(name, tokens, path, softcap, lambda found: write(rows + [sizes | row for row in found]))]
        except subprocess.CalledProcessError as error:  # the tensors or their reference: the other shapes go on
            said = ((error.stderr or "").strip() or str(error)).splitlines()[-1]
            rows.append(sizes | {"shape": name, "softcap": softcap, "method": "all", "error": said[-300:]})
        write(rows)
    print(write(rows))
    if not args.input:
        pathlib.Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cce", default="target/release/cce", help="our command, built with --features cli,cublas")
    parser.add_argument("--input", help="tensors `embeddings`, `classifier`, `targets` in place of generated ones")
    parser.add_argument("--softcap", dest="softcaps", type=float, action="append", help="for --input")
    parser.add_argument("--shapes", nargs="*", help="only shapes of these names")
    parser.add_argument("--no-sweep", action="store_true", help="8192 tokens only")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--patience", type=int, default=900, help="seconds until a process that says nothing is given up")
    parser.add_argument("--seconds", type=float, help="begin no shape, no peer and no round but a first after so many seconds")
    parser.add_argument("--out", default="peers-record")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal of the script, on tiny tensors of --input")
    parser.add_argument("--dry-run", action="store_true", help="print versions and the plan")
    for hidden_option in ("--worker", "--file", "--expected", "--reference", "--check"):
        parser.add_argument(hidden_option, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cap = (args.softcaps or [0.0])[0]
    if args.reference:
        reference(args.reference, cap, args.expected)
    elif args.check:
        check_file(args.check, args.expected)
    elif args.worker:
        worker(args.worker, args.file, cap, args.expected)
    else:
        main()
