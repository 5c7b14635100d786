"""What compare.py leaves: a table, a CSV, a chart, and the best peer next to ours.

On a GPU methods are compared by multiples of T, as T is one library's in all processes. On a processor each process has its own library's
matmul, so milliseconds are compared there.
"""

import csv
import json
from xml.sax.saxutils import escape

COLUMNS = [
    "shape", "tokens", "vocab", "hidden", "softcap", "dtype", "method", "forward_ms", "forward_t", "both_ms", "both_t", "t_ms", "threads",
    "peak_bytes", "error_d_e", "error_d_c", "loss", "loss_error", "kept_per_row", "error",
]
HEADS = {
    "cuda": ["shape", "method", "forward", "forward + both gradients", "ms", "peak MiB", "dE error", "dC error"],
    "cpu": ["shape", "method", "forward", "forward + both gradients", "its T, ms", "peak MiB", "dE error", "dC error"],
}
# The column of the record in each of them, how it is written, and its unit.
CELLS = {
    "cuda": [("forward_t", "{:.2f} T", 1), ("both_t", "{:.2f} T", 1), ("both_ms", "{:.2f}", 1)],
    "cpu": [("forward_ms", "{:.2f} ms", 1), ("both_ms", "{:.2f} ms", 1), ("t_ms", "{:.2f}", 1)],
}
LAST_CELLS = [("peak_bytes", "{:.0f}", 2**20), ("error_d_e", "{:.1e}", 1), ("error_d_c", "{:.1e}", 1)]
UNITS = {"cuda": "T", "cpu": "ms"}


def title_of(row):
    softcap = f" softcap {row['softcap']:g}" if row["softcap"] else ""
    return f"{row['shape']} N={row['tokens']} V={row['vocab']} D={row['hidden']}{softcap} {row['dtype']}"


def cell(row, key, form, unit):
    """Empty where there is no figure: rows of `cce bench` are text, those of the peers numbers or NaN."""
    value = row.get(key)
    return form.format(float(value) / unit) if value not in ("", None) and float(value) == float(value) else ""


def line_of(row, device):
    cells = [cell(row, *how) for how in CELLS[device] + LAST_CELLS]
    method, error = row["method"], row.get("error", "").replace("|", "/")
    if not any(cells):
        cells = [f"did not run: {error or 'nothing was measured'}"] + [""] * (len(cells) - 1)
    elif error:  # what it took until then counts
        method += f" ({error})"
    return "| " + " | ".join([title_of(row), method, *cells]) + " |"


def preface(rows, device):
    """What a reader of the table must know of a processor's figures."""
    if device == "cuda":
        return []
    threads = sorted({str(row["threads"]) for row in rows if row.get("threads")})
    return [
        f"On the processor; threads of each method: {' and '.join(threads) or 'unknown'}.",
        "Milliseconds are compared: T is each library's own matmul, and differs. Peaks are ours by the allocator, the peers' by resident pages.",
        "",
    ]


def figures(rows, device):
    """title: {method: forward and both gradients}"""
    chart, key = {}, "both_t" if device == "cuda" else "both_ms"
    for row in rows:
        if cell(row, key, "{}", 1):
            chart.setdefault(title_of(row), {})[row["method"]] = float(row[key])
    return chart


def write(rows, out, device):
    """Writes all files, and returns the table."""
    with (out / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({k: v for k, v in row.items() if k in COLUMNS} for row in rows)
    chart, unit = figures(rows, device), UNITS[device]
    lines = preface(rows, device)
    lines += ["| " + " | ".join(HEADS[device]) + " |", "|" + "---|" * len(HEADS[device])]
    lines += [line_of(row, device) for row in rows]
    lines += [""] + [f"{title}: {best_of(methods, unit)}" for title, methods in chart.items()]
    (out / "peers.md").write_text("\n".join(lines) + "\n")
    (out / "chart.json").write_text(json.dumps(chart, indent=1) + "\n")
    (out / "peers.svg").write_text(drawn(chart, unit))
    return "\n".join(lines)


def best_of(methods, unit):
    """Ours with the default filter, and exact, next to the fastest peer."""
    peers = {name: figure for name, figure in methods.items() if not name.startswith("ours")}
    ours = {name: figure for name, figure in methods.items() if name.startswith("ours")}
    if not peers or not ours:
        return "nothing to compare"
    best = min(peers, key=peers.get)
    beside = [f"{name} {figure:.2f} {unit} ({peers[best] / figure:.2f} times as fast)" for name, figure in ours.items()]
    return f"best peer {best} {peers[best]:.2f} {unit}; " + ", ".join(beside)


def drawn(chart, unit):
    """Bars of forward + both gradients as SVG."""
    bar, left, width, y, parts = 16, 230, 760, 20, []
    longest = max((figure for methods in chart.values() for figure in methods.values()), default=1.0)
    for title, methods in chart.items():
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(title)}: forward + both gradients</text>')
        y += 8
        for name, figure in sorted(methods.items(), key=lambda pair: pair[1]):
            length, color = (width - left - 90) * figure / longest, "#2a7" if name.startswith("ours") else "#99a"
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 3}" fill="{color}"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<text x="{left + length + 4:.1f}" y="{y + 11}">{figure:.2f} {unit}</text>')
            y += bar
        y += 28
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{width}" height="{y}" fill="white"/>', *parts, "</svg>"]) + "\n"
