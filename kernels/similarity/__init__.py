"""The nearest rows of a store by cosine similarity: normalised inner products and the k largest (README.md).

Knows vectors. Does not know what they stand for, who made them or how several fields of one demonstration combine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.device import runs_triton
from accel.kernels.similarity import reference
from accel.kernels.similarity.reference import Neighbours, inverse_norm

__all__ = ["MAX_K", "Neighbours", "inverse_norm", "top_k"]

# what the kernels keep for one query
MAX_K = 64
# the kernels count rows, and those of a last part that is not full, in 32 bits
MAX_ROWS = 2**30


def top_k(
    queries: Tensor,
    store: Tensor,
    k: int,
    *,
    normalized: bool = False,
    inverse_norms: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Neighbours:
    """The k rows of the store most similar to each query, the most similar first; of equals the lower index first.

    queries [Q, D], store [N, D], one floating point dtype, finite; 1 ≤ k ≤ 64
    → scores fp32 [Q, k], indices int64 [Q, k]

    The score is the cosine q·x / (|q| |x|), and 0 where a vector is zero. ``normalized``: all rows have norm 1
    already, the score is q·x. ``inverse_norms`` fp32 [N]: 1 / |x| of the store as ``inverse_norm`` gives it, for a
    store that is searched often. ``exclude`` bool [N], or [Q, N] by query: rows that must not be returned. Where fewer
    than k rows are left the rest is score −inf, index −1.
    """
    if queries.ndim != 2 or store.ndim != 2 or queries.shape[1] != store.shape[1] or not store.shape[1]:
        raise ValueError(f"queries is {list(queries.shape)}, store {list(store.shape)}: must be [Q, D], [N, D], D ≥ 1")
    if not store.is_floating_point() or queries.dtype != store.dtype or queries.device != store.device:
        raise ValueError(
            f"queries is {queries.dtype} on {queries.device}, store {store.dtype} on {store.device}: must be alike and "
            "floating point; cast the queries to the store's dtype"
        )
    (Q, _), N = queries.shape, len(store)
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k={k}: must be in 1..{MAX_K}")
    if N > MAX_ROWS:
        raise ValueError(f"the store has {N} rows: at most {MAX_ROWS}; search it in parts")
    if inverse_norms is not None:
        if normalized:
            raise ValueError("normalized=True says that the norms are 1: give inverse_norms or normalized, not both")
        if inverse_norms.shape != (N,) or inverse_norms.dtype != torch.float32:
            raise ValueError(
                f"inverse_norms is {inverse_norms.dtype} {list(inverse_norms.shape)}: must be float32 [N] = [{N}]"
            )
    if exclude is not None and (exclude.shape not in ((N,), (Q, N)) or exclude.dtype != torch.bool):
        raise ValueError(
            f"exclude is {exclude.dtype} {list(exclude.shape)}: must be bool [N] = [{N}] or [Q, N] = [{Q}, {N}]"
        )
    if runs_triton(store):
        from accel.kernels.similarity import triton

        return triton.top_k(queries, store, k, normalized=normalized, inverse_norms=inverse_norms, exclude=exclude)
    return reference.top_k(queries, store, k, normalized=normalized, inverse_norms=inverse_norms, exclude=exclude)
