#!/usr/bin/env python3
"""Times this library's CUDA backend and its peers on one GPU, on the same tensors; see README.md beside this file.

Each method lives in a process of its own, which loads the tensors, checks its gradients against f64 and then waits. The processes take
turns, a round each, so that whatever the GPU does over time it does to all. Times are CUDA events around one step, after a
flush of the L2 cache; every step is a multiple of T, the plain matmul of the logits' size timed right beside it in the same process.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve()

# name, V, D, softcap
SHAPES = [
    ("gemma2_2b", 256_000, 2304, 0.0),
    ("gemma2_2b", 256_000, 2304, 30.0),
    ("llama3_8b", 128_256, 4096, 0.0),
    ("qwen2_5_7b", 151_936, 3584, 0.0),
]
TOKENS = 8192
SWEEP = ("llama3_8b", 128_256, 4096, [1024, 2048, 4096, 16384])
PACKAGES = ["torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "nvidia-cutlass-dsl"]
# Rows of dE and of dC that are compared with f64.
SLICE = 16


# ---- the peers, each with its best settings ------------------------------------------------------------------------------


def capped(logits, softcap):
    return softcap * (logits / softcap).tanh() if softcap else logits


def torch_eager(softcap):
    import torch.nn.functional as F

    return lambda e, c, y: F.cross_entropy(capped((e @ c.T).float(), softcap), y)


def torch_compile(softcap):
    import torch

    return torch.compile(torch_eager(softcap))


def torch_chunked(softcap):
    import torch

    if softcap:
        raise NotImplementedError("linear_cross_entropy has no softcap")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda e, c, y: torch.nn.functional.linear_cross_entropy(e, c, y, ignore_index=-100, options=options)


def liger(softcap):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap or None)
    return lambda e, c, y: loss(c, e, y)


def quack(softcap):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if softcap:
        raise NotImplementedError("chunked_linear_cross_entropy has no softcap")
    return lambda e, c, y: chunked_linear_cross_entropy(e, c, y)


def apple(impl):
    def make(softcap):
        from cut_cross_entropy import linear_cross_entropy

        return lambda e, c, y: linear_cross_entropy(e, c, y, softcap=softcap or None, impl=impl)

    return make


PEERS = {
    "torch eager": torch_eager,
    "torch.compile": torch_compile,
    "torch linear_cross_entropy": torch_chunked,
    "Liger": liger,
    "QuACK": quack,
    "Apple CCE": apple("cce"),
    "Apple CCE exact": apple("cce_exact"),
}


# ---- inside a peer's process ----------------------------------------------------------------------------------------------


def load(path):
    from safetensors.torch import load_file

    tensors = load_file(path, device="cuda")
    e, c, y = tensors["embeddings"], tensors["classifier"], tensors["targets"].long()
    kept = y >= 0
    return (e, c, y) if bool(kept.all()) else (e[kept].contiguous(), c, y[kept].contiguous())


def slices(n, v, y):
    """Tokens and classes that are compared: spread over all, and the classes that are targets of these tokens."""
    import torch

    rows = torch.linspace(0, n - 1, min(SLICE, n), device="cuda").long()
    classes = torch.linspace(0, v - 1, min(SLICE, v), device="cuda").long()
    return rows.unique(), torch.cat([classes, y[rows]]).unique()


def reference(path, softcap, output):
    """Loss and slices of both gradients in f64."""
    import torch

    e, c, y = load(path)
    (n, _), v, cd = e.shape, c.shape[0], c.double()
    rows, classes = slices(n, v, y)
    lse, target = torch.empty(n, dtype=torch.float64, device="cuda"), torch.empty(n, dtype=torch.float64, device="cuda")
    for i in range(0, n, 128):
        z = capped(e[i : i + 128].double() @ cd.T, softcap)
        lse[i : i + 128] = z.logsumexp(1)
        target[i : i + 128] = z.gather(1, y[i : i + 128, None])[:, 0]

    def gradient(z, lse, hit):
        g = ((z - lse).exp() - hit.double()) / n
        return g * (1 - (z / softcap) ** 2) if softcap else g

    z = capped(e[rows].double() @ cd.T, softcap)
    hit = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[rows, None], True)
    d_e = gradient(z, lse[rows, None], hit) @ cd
    z = capped(e.double() @ cd[classes].T, softcap)
    d_c = gradient(z, lse[:, None], y[:, None] == classes[None]).T @ e.double()
    torch.save({"rows": rows, "classes": classes, "d_e": d_e, "d_c": d_c, "loss": (lse - target).mean().item()}, output)


def errors(expected, d_e, d_c):
    def relative(ours, exact):
        return ((ours.double() - exact).norm() / exact.norm()).item()

    return relative(d_e[expected["rows"]], expected["d_e"]), relative(d_c[expected["classes"]], expected["d_c"])


def check_file(path, expected):
    """Errors of gradients that `cce run` wrote."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path, device="cuda")
    d_e, d_c = errors(torch.load(expected, map_location="cuda"), tensors["d_embeddings"], tensors["d_classifier"])
    print(json.dumps({"error_d_e": d_e, "error_d_c": d_c}))


def worker(name, path, softcap, expected):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    e, c, y = load(path)
    e.requires_grad_(), c.requires_grad_()
    compute = PEERS[name](softcap)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    plane = None

    def both():
        e.grad = c.grad = None
        loss = compute(e, c, y)
        loss.backward()
        return loss

    def forward():
        with torch.no_grad():
            return compute(e, c, y)

    def matmul():
        with torch.no_grad():
            torch.mm(e, c.T, out=plane)

    def timed(work):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    for _ in range(3):  # compiles, tunes
        loss = both()
    expected = torch.load(expected, map_location="cuda")
    error_e, error_c = errors(expected, e.grad, c.grad)
    off = abs(loss.item() - expected["loss"])
    # Beyond inputs and gradients.
    e.grad = c.grad = None
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - held - e.grad.nbytes - c.grad.nbytes
    forward_runs, forward_error = True, ""
    try:
        forward(), forward()
    except Exception as error:  # a peer without evaluation
        forward_runs, forward_error = False, repr(error)
    ready = {
        "error_d_e": error_e, "error_d_c": error_c, "loss": loss.item(), "loss_error": off, "peak_bytes": peak,
        "forward_error": forward_error, "gpu": torch.cuda.get_device_name(),
    }
    print(json.dumps(ready), flush=True)

    for _ in sys.stdin:
        # The caches of all processes would not fit: each gives back its own when its turn ends.
        plane = torch.empty(e.shape[0], c.shape[0], dtype=e.dtype, device="cuda")
        both(), matmul()
        before = timed(matmul)
        step = timed(both)
        middle = timed(matmul)
        alone = timed(forward) if forward_runs else float("nan")
        after = timed(matmul)
        plane = e.grad = c.grad = None
        torch.cuda.empty_cache()
        t = (before + middle) / 2, (middle + after) / 2
        print(json.dumps({"both": step, "forward": alone, "both_t": step / t[0], "forward_t": alone / t[1], "t": middle}), flush=True)


# ---- outside ----------------------------------------------------------------------------------------------------------------


class Turn:
    """A process that works when it is its turn."""

    def __init__(self, name, command):
        self.name, self.rounds, self.ready, self.error = name, [], None, ""
        file = pathlib.Path(args.out) / name.replace(" ", "_")
        self.log, self.errors = open(f"{file}.log", "ab"), open(f"{file}.err", "wb")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)

    def lines(self):
        for line in self.process.stdout:
            self.log.write(line.encode())
            yield line.strip()
        self.process.wait()
        if not self.error:
            self.error = f"ended with status {self.process.returncode}: {self.last_words()}"

    def last_words(self):
        text = pathlib.Path(self.errors.name).read_text(errors="replace").strip().splitlines()
        return text[-1][:300] if text else "no output"

    def until_json(self):
        for line in self.lines():
            if line.startswith("{"):
                return json.loads(line)
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
        self.process.stdin.close()
        rest = self.process.stdout.read()
        self.process.wait()
        self.log.write(rest.encode())
        self.log.close(), self.errors.close()


def python(*arguments):
    return [sys.executable, str(HERE), *arguments]


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


def measure(name, path, softcap):
    """Rows of the record for one file of tensors."""
    out = pathlib.Path(args.out)
    expected = out / "expected.pt"
    subprocess.run(python("--reference", path, "--softcap", str(softcap), "--expected", str(expected)), check=True)

    rows, turns = [], []
    for peer in args.peers:
        command = python("--worker", peer, "--file", path, "--softcap", str(softcap), "--expected", str(expected))
        turn = Turn(peer, command)
        turn.ready = turn.until_json()  # one at a time: what loads and compiles does not share the GPU
        turns.append(turn)
        print(f"  {peer}: {turn.ready or turn.error}", flush=True)
    csv_of_ours = out / "cce.csv"
    command = [args.cce, "bench", "--backend", "cuda", "--input", path, "--softcap", str(softcap), "--rounds", str(args.rounds)]
    ours = Turn("cce", command + ["--methods", "unbiased,exact,evaluation", "--paced", "--csv", str(csv_of_ours)])
    ours_ready = ours.until("ready")
    print(f"  cce: {'ready' if ours_ready else ours.error}", flush=True)

    for number in range(args.rounds):
        order = turns[number % max(len(turns), 1) :] + turns[: number % max(len(turns), 1)]
        for turn in order:
            if turn.ready and not turn.error and turn.go():
                done = turn.until_json()
                turn.rounds.extend([done] if done else [])
        if ours_ready and not ours.error and ours.go():
            ours.until("done")
    for turn in [*turns, ours]:
        turn.end()

    for turn in turns:
        row = {"shape": name, "softcap": softcap, "method": turn.name, "error": turn.error}
        if turn.ready and turn.rounds:
            row |= {key: turn.ready[key] for key in ("error_d_e", "error_d_c", "loss", "loss_error", "peak_bytes")}
            row |= {f"{key}_ms": median([r[key] for r in turn.rounds]) for key in ("both", "forward", "t")}
            row |= {key: median([r[key] for r in turn.rounds]) for key in ("both_t", "forward_t")}
        rows.append(row)
    if ours_ready and csv_of_ours.exists():
        by_method = {}
        for record in csv.DictReader(csv_of_ours.open()):
            by_method.setdefault(record["method"], {})[record["phase"]] = record
        csv_of_ours.unlink()
        for method, phases in by_method.items():
            last = phases.get("both", phases["forward"])
            row = {"shape": name, "softcap": softcap, "method": f"ours, {method}", "error": ""}
            row |= {"loss": last["loss"], "peak_bytes": last["peak_bytes"], "kept_per_row": last["kept_per_row"]}
            row |= {"forward_ms": phases["forward"]["median_ms"], "forward_t": phases["forward"]["median_ratio"]}
            row |= {"t_ms": last["matmul_median_ms"]}
            if "both" in phases:
                row |= {"both_ms": last["median_ms"], "both_t": last["median_ratio"]}
                row |= our_errors(method, path, softcap, expected)
            rows.append(row)
    else:
        rows.append({"shape": name, "softcap": softcap, "method": "ours", "error": ours.error or "no record"})
    return rows


def our_errors(method, path, softcap, expected):
    written = pathlib.Path(args.out) / "gradients.safetensors"
    command = [args.cce, "run", "--backend", "cuda", "--input", path, "--output", str(written)]
    command += ["--filter", method.split()[0]] + (["--softcap", str(softcap)] if softcap else [])
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
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


def write(rows):
    out = pathlib.Path(args.out)
    with (out / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({k: v for k, v in row.items() if k in COLUMNS} for row in rows)
    lines = ["| shape | method | forward | forward + both gradients | ms | peak MiB | dE error | dC error |", "|---|---|---|---|---|---|---|---|"]
    chart = {}
    for row in rows:
        title = f"{row['shape']} N={row['tokens']}" + (f" softcap {row['softcap']:g}" if row["softcap"] else "")

        def cell(key, form):
            value = row.get(key, "")
            return form.format(float(value)) if value not in ("", None) else ""

        if row.get("error"):
            lines.append(f"| {title} | {row['method']} | did not run: {row['error']} | | | | | |")
            continue
        peak = f"{float(row['peak_bytes']) / 2**20:.0f}" if row.get("peak_bytes", "") != "" else ""
        lines.append(
            f"| {title} | {row['method']} | {cell('forward_t', '{:.2f} T')} | {cell('both_t', '{:.2f} T')} | {cell('both_ms', '{:.2f}')} "
            f"| {peak} | {cell('error_d_e', '{:.1e}')} | {cell('error_d_c', '{:.1e}')} |"
        )
        if row.get("both_t"):
            chart.setdefault(title, {})[row["method"]] = float(row["both_t"])
    (out / "peers.md").write_text("\n".join(lines) + "\n")
    (out / "chart.json").write_text(json.dumps(chart, indent=1) + "\n")
    print("\n".join(lines))


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
                print(f"  {peer}")
            print(f"  {args.cce} bench --backend cuda --input {path} --methods unbiased,exact,evaluation")
        print(f"\nnothing was run; a run writes peers.csv, peers.md, chart.json, machine.txt and logs to {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    machine = [f"{package} {version}" for package, version in versions().items()]
    for command in (["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK"], [args.cce, "info", "--shape", "gemma2_2b"]):
        try:
            machine.append(subprocess.run(command, capture_output=True, text=True).stdout)
        except OSError as error:
            machine.append(f"{command[0]}: {error}")
    (out / "machine.txt").write_text("\n".join(machine))
    rows = []
    for name, tokens, vocab, hidden, softcap in plan():
        print(f"\n{name}: N={tokens} V={vocab} D={hidden} softcap {softcap:g}", flush=True)
        if not args.input:
            subprocess.run(generate_command(name, tokens, vocab, hidden, softcap, path), check=True)
        sizes = {"tokens": tokens, "vocab": vocab, "hidden": hidden}
        rows += [sizes | row for row in measure(name, path, softcap)]
        write(rows)
    if not args.input:
        os.unlink(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cce", default="target/release/cce", help="our command, built with --features cli,cublas")
    parser.add_argument("--input", help="tensors `embeddings`, `classifier`, `targets` in place of generated ones")
    parser.add_argument("--softcap", dest="softcaps", type=float, action="append", help="for --input")
    parser.add_argument("--shapes", nargs="*", help="only shapes of these names")
    parser.add_argument("--no-sweep", action="store_true", help="8192 tokens only")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="peers-record")
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
