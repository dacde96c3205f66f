"""One token a row from its logits: penalties, temperature, top-k, top-p, min-p, a seeded draw, log-probabilities.

Everything random comes in as uniforms, or as seeds and positions that make them: a row's token is a function of the
row alone. Knows nothing of models, histories (counts aside) or stop rules. See README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.common import kind
from accel.kernels.device import runs_triton
from accel.kernels.sampling import reference
from accel.kernels.sampling.reference import Sampled
from accel.kernels.sampling.settings import Settings

__all__ = ["Sampled", "Settings", "count_tokens", "sample", "uniforms"]

# the largest vocabulary and the most top tokens that the kernels' tables hold; beyond, the reference is the path
MAX_V = 2**19
MAX_TOP = 20
# one object, so that its table is made once
PLAIN = Settings()


def sample(
    logits: Tensor,
    settings: Settings | None = None,
    *,
    counts: Tensor | None = None,
    uniforms: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    top_logprobs: int = 0,
    logprobs_of: str = "processed",
) -> Sampled:
    """Choose one token a row: the argmax where the temperature is 0, elsewhere a draw by one uniform.

    logits [R, V], floating point, -inf allowed → token int64 [R], logprob fp32 [R],
    top_tokens int64 [R, n] and top_logprobs fp32 [R, n], n = ``top_logprobs``

    Penalties come first, then temperature, top-k, top-p and min-p, each as in transformers, on what the one before
    left. The draw is the token at which the cumulated weight, in the vocabulary's order, passes u · total; never one
    of weight 0. ``settings``: Settings, one object for all steps of a batch; None draws from the logits as they are.
    ``counts``: int32 [R, V], how often each token occurred; penalties need it. ``uniforms``: float64 [R] in [0, 1); or
    ``seeds`` and ``positions``, int64 [R], from which column 0 of ``uniforms(seeds, positions)`` is taken.
    ``logprobs_of``: "processed" (the distribution drawn from) or "raw" (the model's own, softmax of the logits).

    A row that allows no token (all -inf, NaN or +inf) is a ValueError on the CPU; the GPU, which is not waited for,
    answers token -1 and logprob NaN.
    """
    settings = settings or PLAIN
    if logits.ndim != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(f"logits is {kind(logits)}: it must be floating point [R, V] with V ≥ 1")
    R, V = logits.shape
    if settings.penalises and counts is None:
        raise ValueError("counts=None: penalties need counts int32 [R, V]; make them with count_tokens")
    if counts is not None and (counts.shape != (R, V) or counts.dtype != torch.int32 or counts.device != logits.device):
        raise ValueError(f"counts is {kind(counts)}: it must be int32 [R, V] = [{R}, {V}] on {logits.device}")
    if not 0 <= top_logprobs <= min(MAX_TOP, V):
        raise ValueError(f"top_logprobs={top_logprobs}: must be in 0..{min(MAX_TOP, V)}")
    if logprobs_of not in ("processed", "raw"):
        raise ValueError(f"logprobs_of={logprobs_of!r}: choose 'processed' or 'raw'")
    if settings.greedy:
        uniforms = None
    elif (uniforms is None) == (seeds is None) or (seeds is None) != (positions is None):
        raise ValueError("a draw needs either uniforms, or seeds and positions (or temperature 0 for the argmax)")
    elif seeds is not None and positions is not None:
        uniforms = _uniforms(seeds, positions)[:, 0]
    if uniforms is not None:
        _check_uniforms(uniforms, logits)
    path = reference.sample
    if runs_triton(logits) and V <= MAX_V:
        from accel.kernels.sampling import triton

        path = triton.sample
    return path(logits, settings, counts=counts, uniforms=uniforms, top_logprobs=top_logprobs, logprobs_of=logprobs_of)


def uniforms(seeds: Tensor, positions: Tensor, count: int = 1) -> Tensor:
    """Numbers that belong to a row and a position, whatever else is in the batch: Philox4x32-10, 53 bits each.

    seeds int64 [R], positions int64 [R] (of the token to draw, say) → float64 [R, count] in [0, 1)

    Column j of a row is made from key = seed and counter = (position, j): equal on every device.
    """
    for name, x in (("seeds", seeds), ("positions", positions)):
        if x.shape != seeds.shape or x.ndim != 1 or x.dtype != torch.int64 or x.device != seeds.device:
            raise ValueError(f"{name} is {kind(x)}: seeds and positions must be int64 [R] on one device")
    if count < 1:
        raise ValueError(f"count={count}: must be ≥ 1")
    if runs_triton(seeds):
        from accel.kernels.sampling import triton

        return triton.uniforms(seeds, positions, count)
    return reference.uniforms(seeds, positions, count)


def count_tokens(history: Tensor, lengths: Tensor, V: int) -> Tensor:
    """How often each token occurs among the first lengths[r] of each row's history.

    history int [R, L], lengths [R] → int32 [R, V]

    Ids of V and above are not counted. A step later, add 1 at the new tokens instead of counting again.
    """
    if history.ndim != 2 or lengths.shape != history.shape[:1]:
        raise ValueError(f"history is {kind(history)}, lengths {kind(lengths)}: they must be [R, L] and [R]")
    counted = torch.arange(history.shape[1], device=history.device) < lengths[:, None]
    counted &= (history >= 0) & (history < V)
    counts = torch.zeros(len(history), V, dtype=torch.int32, device=history.device)
    return counts.scatter_add_(1, history.long().where(counted, 0), counted.int())


# ``sample`` has an argument of the same name
_uniforms = uniforms


def _check_uniforms(uniforms: Tensor, logits: Tensor) -> None:
    R = len(logits)
    if uniforms.shape != (R,) or uniforms.dtype != torch.float64 or uniforms.device != logits.device:
        raise ValueError(f"uniforms is {kind(uniforms)}: it must be float64 [R] = [{R}] on {logits.device}")
    if not uniforms.is_cuda and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms holds values outside [0, 1): draw them with torch.rand(..., dtype=float64)")
