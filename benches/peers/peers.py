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


def torch_chunked(softcap):
    import torch

    without_softcap("linear_cross_entropy", softcap)
    # It warns where it would take the materialising path instead.
    warnings.filterwarnings("error", message="linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda e, c, y: torch.nn.functional.linear_cross_entropy(e, c, y, ignore_index=-100, options=options)


def liger(softcap):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap or None)
    return lambda e, c, y: loss(c, e, y)


def liger_cute(softcap):
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    without_softcap("liger_fused_linear_cross_entropy_sm90", softcap)
    return lambda e, c, y: liger_fused_linear_cross_entropy_sm90(e, c, y)


def liger_scaled(softcap):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    without_softcap("LigerFusedLinearScaledCrossEntropyFunction", softcap)
    return lambda e, c, y: Function.apply(e, c, y).mean()


def quack(softcap):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    without_softcap("chunked_linear_cross_entropy", softcap)
    return lambda e, c, y: chunked_linear_cross_entropy(e, c, y)


def apple(impl):
    def make(softcap):
        from cut_cross_entropy import linear_cross_entropy

        return lambda e, c, y: linear_cross_entropy(e, c, y, softcap=softcap or None, impl=impl)

    return make


TUNED = {"CCE_AUTOTUNE": "1"}               # Apple's kernels choose their tiles on this GPU, not by a table
# name: what makes the loss, and the environment of its process
PEERS = {
    "torch eager": (torch_eager, {}),
    "torch.compile": (torch_compile, {}),
    "torch linear_cross_entropy": (torch_chunked, {}),
    "Liger": (liger, {}),
    "Liger CuTe": (liger_cute, {}),
    "Liger CuTe scaled": (liger_scaled, {}),
    "QuACK": (quack, {}),
    "Apple CCE": (apple("cce"), TUNED),
    "Apple CCE Kahan full C": (apple("cce_kahan_full_c"), TUNED),
    "Apple CCE exact": (apple("cce_exact"), TUNED),
}
