"""The peers, each by its best settings: a function of the softcap (0: none) makes what computes the loss from embeddings [N, D],
classifier [V, D] and targets [N]. Nothing is imported before it is made. What raises is listed as a peer that does not run."""

import warnings


def capped(logits, softcap):
    return softcap * (logits / softcap).tanh() if softcap else logits


def without_softcap(what, softcap):
    if softcap:
        raise NotImplementedError(f"{what} has no softcap")


def torch_eager(softcap):
    import torch.nn.functional as F

    return lambda e, c, y: F.cross_entropy(capped((e @ c.T).float(), softcap), y)


def torch_compile(softcap):
    import torch

    return torch.compile(torch_eager(softcap))


def torch_chunked(rows):
    def make(softcap):
        import torch

        without_softcap("linear_cross_entropy", softcap)
        # It warns where it would take the materialising path instead.
        warnings.filterwarnings("error", message="linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return lambda e, c, y: torch.nn.functional.linear_cross_entropy(e, c, y, ignore_index=-100, options=options)

    return make


def liger(softcap):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap or None)
    return lambda e, c, y: loss(c, e, y)


def liger_large(softcap):
    """The same with logits of up to 16 times the size of E: 2048 or 4096 rows a chunk at N = 8192, in place of 128 or 256."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    # All arguments between the targets and chunk_mem_const, as the class above passes them; `apply` takes none by name.
    between = [None, None, -100, 0.0, 0.0, "mean", softcap or None, False, None, False, False, False, None, None]
    return lambda e, c, y: Function.apply(e, c, y, *between, 16)[0]


def liger_cute(softcap):
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    without_softcap("liger_fused_linear_cross_entropy_sm90", softcap)
    return lambda e, c, y: liger_fused_linear_cross_entropy_sm90(e, c, y)


def liger_scaled(softcap):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    without_softcap("LigerFusedLinearScaledCrossEntropyFunction", softcap)
    return lambda e, c, y: Function.apply(e, c, y).sum() / (y >= 0).sum()


def quack_rows(n, d):
    """Rows a chunk: its default of 4096 or what is near, as its scaled-exp pipeline refuses a chunk of D rows in release 0.6.5 ("m == n
    makes row/col inference ambiguous"). The last chunk is padded to a multiple of 128."""

    def sizes(rows):
        return {min(rows, n), ((n - 1) % rows // 128 + 1) * 128}

    return next((rows for rows in (4096, 4352, 2048, 1024) if d not in sizes(rows)), 4096)


def quack(use_scaled_exp):
    def make(softcap):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        without_softcap("chunked_linear_cross_entropy", softcap)
        rows = quack_rows if use_scaled_exp is None else lambda n, d: 4096
        return lambda e, c, y: chunked_linear_cross_entropy(e, c, y, chunk_size=rows(*e.shape), use_scaled_exp=use_scaled_exp)

    return make


def apple(impl):
    def make(softcap):
        from cut_cross_entropy import linear_cross_entropy

        return lambda e, c, y: linear_cross_entropy(e, c, y, softcap=softcap or None, impl=impl)

    return make


UNCHECKED = {"LIGER_SCALED_CE_SM90_VALIDATE_TARGETS": "0"}  # no wait for the device to look at the targets
# Tiles by measurement on this GPU. Not its authors' choice: forward and backward then round their logits differently.
TUNED = {"CCE_AUTOTUNE": "1"}
# On a processor large tensors then come in huge pages, where the system leaves that to the program: fewer page faults.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# name: what makes the loss, and the environment of its process
PEERS = {
    "torch eager": (torch_eager, {}),
    "torch.compile": (torch_compile, {}),
    "torch linear_cross_entropy": (torch_chunked(None), {}),
    "torch linear_cross_entropy large": (torch_chunked(2048), {}),
    "Liger": (liger, {}),
    "Liger large": (liger_large, {}),
    "Liger CuTe": (liger_cute, {}),
    "Liger CuTe scaled": (liger_scaled, UNCHECKED),
    "QuACK": (quack(None), {}),
    "QuACK stored logits": (quack(False), {}),
    "Apple CCE": (apple("cce"), {}),
    "Apple CCE tuned": (apple("cce"), TUNED),
    "Apple CCE Kahan full C": (apple("cce_kahan_full_c"), {}),
    "Apple CCE exact": (apple("cce_exact"), {}),
}
# Those that a processor can run.
ON_PROCESSOR = ["torch eager", "torch.compile", "torch linear_cross_entropy", "torch linear_cross_entropy large"]


def environment(name, device):
    return PEERS[name][1] | (HUGE_PAGES if device == "cpu" else {})
