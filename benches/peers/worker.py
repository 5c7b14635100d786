"""What runs in a process of its own: a peer, which computes when it is its turn, and the results in f64 that all are checked against.
PyTorch is imported there and not before."""

import json
import sys

from clocks import Gpu, Processor
from peers import PEERS, capped

# Rows of dE and of dC that are compared with f64.
SLICE = 16


def load(path, device):
    from safetensors.torch import load_file

    tensors = load_file(path, device=device)
    if device == "cpu":  # they lie in the file's pages, unaligned
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors["embeddings"], tensors["classifier"], tensors["targets"].long()


def slices(v, y):
    """Tokens and classes that are compared: spread over all that count, and the classes that are targets of these tokens."""
    import torch

    counted = (y >= 0).nonzero()[:, 0]
    rows = counted[torch.linspace(0, len(counted) - 1, min(SLICE, len(counted)), device=y.device).long()]
    classes = torch.linspace(0, v - 1, min(SLICE, v), device=y.device).long()
    return rows.unique(), torch.cat([classes, y[rows]]).unique()


def reference(path, softcap, output, device):
    """Loss and slices of both gradients in f64."""
    import torch

    e, c, y = load(path, device)
    (n, _), v, cd = e.shape, c.shape[0], c.double()
    rows, classes = slices(v, y)
    counts = y >= 0
    lse, target = torch.empty(n, dtype=torch.float64, device=device), torch.empty(n, dtype=torch.float64, device=device)
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


def check_file(path, expected, device):
    """Errors of gradients that `cce run` wrote."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path, device=device)
    d_e, d_c = errors(torch.load(expected, map_location=device), tensors["d_embeddings"], tensors["d_classifier"])
    print(json.dumps({"error_d_e": d_e, "error_d_c": d_c}))


def checked(expected, loss, error_e, error_c, sixteen_bits=False):
    """What is wrong is not timed. Filters and 16 bits are off by percents, a wrong call by more than everything; NaN fails, too. A loss that
    itself has 16 bits, as PyTorch's chunked one, has been summed up in them."""
    off, allowed = abs(loss - expected["loss"]), 5e-2 if sixteen_bits else 1e-2
    if not off <= allowed * max(1.0, abs(expected["loss"])):
        raise ArithmeticError(f"the loss is {loss}, in f64 {expected['loss']}")
    if not (error_e <= 0.5 and error_c <= 0.5):
        raise ArithmeticError(f"relative errors of dE {error_e:.1e} and of dC {error_c:.1e}")
    return off


def work(name, path, softcap, expected, device):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    compute = PEERS[name][0](softcap)  # first: what is not installed, or has no softcap, costs no tensors
    e, c, y = load(path, device)
    e.requires_grad_(), c.requires_grad_()
    # Some form gradients in the forward wherever an input asks for one, also where none is recorded.
    e_alone, c_alone = e.detach(), c.detach()
    clock = Gpu() if device == "cuda" else Processor()
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

    for _ in range(3 if clock.warms_up else 2):  # compiles, tunes
        loss = both().detach()
    exact = torch.load(expected, map_location=device)
    error_e, error_c = errors(exact, e.grad, c.grad)
    off = checked(exact, loss.item(), error_e, error_c, loss.element_size() == 2)
    # Beyond inputs and gradients; a gradient that was not there yet at the peak makes up for some of it.
    e.grad = c.grad = None
    peak = clock.peak(both)
    peak = None if peak is None else max(0, peak - e.grad.nbytes - c.grad.nbytes)
    forward_runs, forward_error = True, ""
    try:
        forward(), forward()
    except Exception as error:  # a peer without evaluation
        forward_runs, forward_error = False, repr(error)
    # The caches of all processes would not fit: each gives back its own before the next starts, and when its turn ends.
    e.grad = c.grad = None
    clock.give_back()
    ready = {
        "error_d_e": error_e, "error_d_c": error_c, "loss": loss.item(), "loss_error": off, "peak_bytes": peak,
        "forward_error": forward_error, "device": clock.name, "threads": torch.get_num_threads(),
    }
    print(json.dumps(ready), flush=True)

    for _ in sys.stdin:
        plane = torch.empty(e.shape[0], c.shape[0], dtype=e.dtype, device=device)
        if clock.warms_up:
            if forward_runs:
                forward()
            both()
        matmul()
        before = clock.timed(matmul)
        step = clock.timed(both)
        middle = clock.timed(matmul)
        alone = clock.timed(forward) if forward_runs else float("nan")
        after = clock.timed(matmul)
        plane = e.grad = c.grad = None
        clock.give_back()
        t = (before + middle) / 2, (middle + after) / 2
        print(json.dumps({"both": step, "forward": alone, "both_t": step / t[0], "forward_t": alone / t[1], "t": middle}), flush=True)
