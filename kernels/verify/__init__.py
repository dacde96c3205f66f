"""Deciding a round of drafted tokens: how many the target keeps and which token follows. See README.md.

Everything random comes in as uniforms, so a verdict is a function of its inputs and a row never depends on its
neighbours. Knows nothing of models, drafters or generators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accel.kernels.common import kind
from accel.kernels.device import runs_triton
from accel.kernels.verify import reference
from accel.kernels.verify.reference import Lenience, Verdict, accept, draw, f, longest_path, longest_prefix, residual

__all__ = ["Lenience", "Verdict", "accept", "draw", "f", "longest_path", "longest_prefix", "residual", "verify"]


def verify(
    scores: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    q: Tensor | None = None,
    draft_scores: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    greedy: bool = False,
    uniforms: Tensor | None = None,
    acceptance: str = "token",
    lenience: Lenience | None = None,
) -> Verdict:
    """Keep a prefix of each row's draft so that what is emitted follows the target.

    scores [R, K+1, V], tokens [R, K], lengths [R] → n_accepted [R], next_token [R] (int64)

    ``scores``: floating point, the target's processed logits (-inf allowed) at the K drafted positions and one more.
    ``tokens``, ``lengths``: int64; only the first lengths[r] ≤ K tokens of row r count, and what scores, tokens, q
    and uniforms hold for the others is never looked at (lengths[r] is where the bonus token's scores stand).
    ``q``: floating point [R, K, V], the distributions the tokens were sampled from, or None for certain guesses.
    ``draft_scores``: floating point [R, K, V], instead of q: q = softmax(draft_scores / temperature).
    ``temperature``: > 0, a number or floating point [R]; divides scores and draft_scores. An argmax does not feel it.
    ``greedy``: keep the longest prefix of argmaxes; the first index wins ties. q and uniforms are then not used.
    ``uniforms``: float64 [R, K+1] in [0, 1): column i < K tests drafted token i, column K draws the next token.
    ``acceptance``: "token" (Leviathan et al. 2023) or "block" (Sun et al. 2024: never shorter in expectation).
    ``lenience``: None (lossless) or (rule, ε), rule one of "lin", "sq", "exp": DistillSpec's lossy acceptance.

    On a GPU no value is looked at by the host: shapes and types are checked there and nothing else. README.md says
    what comes out where the values are wrong (next_token is -1 where no token can follow; on a CPU that is an error).
    """
    _check_shapes(scores, tokens, lengths, q, None if greedy else uniforms)
    _check_draft(scores, q, draft_scores, temperature)
    _check_rules(greedy, uniforms, acceptance, lenience)
    tokens, lengths = tokens.to(scores.device), lengths.to(scores.device)
    uniforms = None if uniforms is None or greedy else uniforms.to(scores.device)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scores.device)
    if runs_triton(scores):
        from accel.kernels.verify import triton

        decide = triton.verify
    else:
        _check_values(scores, tokens, lengths, temperature, uniforms)
        decide = reference.verify
    return decide(
        scores,
        tokens,
        lengths,
        q=q,
        draft_scores=draft_scores,
        temperature=temperature,
        greedy=greedy,
        uniforms=uniforms,
        acceptance=acceptance,
        lenience=lenience,
    )


def _check_shapes(scores: Tensor, tokens: Tensor, lengths: Tensor, q: Tensor | None, uniforms: Tensor | None) -> None:
    if scores.ndim != 3 or scores.shape[1] < 1 or scores.shape[2] < 1 or not scores.is_floating_point():
        raise ValueError(f"scores is {kind(scores)}: it must be floating point [R, K+1, V] with K ≥ 0 and V ≥ 1")
    R, K, V = scores.shape[0], scores.shape[1] - 1, scores.shape[2]
    given = f"for scores [{R}, {K + 1}, {V}] it must be"
    if tokens.shape != (R, K) or tokens.dtype != torch.int64:
        raise ValueError(f"tokens is {kind(tokens)}: {given} int64 [R, K] = [{R}, {K}]")
    if lengths.shape != (R,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths is {kind(lengths)}: {given} int64 [R] = [{R}]")
    if q is not None and (q.shape != (R, K, V) or not q.is_floating_point() or q.device != scores.device):
        raise ValueError(f"q is {kind(q)}: {given} floating point [R, K, V] = [{R}, {K}, {V}] on {scores.device}")
    if uniforms is not None and (uniforms.shape != (R, K + 1) or uniforms.dtype != torch.float64):
        raise ValueError(f"uniforms is {kind(uniforms)}: {given} float64 [R, K+1] = [{R}, {K + 1}]")


def _check_draft(scores: Tensor, q: Tensor | None, draft_scores: Tensor | None, temperature: float | Tensor) -> None:
    R, K, V = scores.shape[0], scores.shape[1] - 1, scores.shape[2]
    x = draft_scores
    if x is not None and q is not None:
        raise ValueError("q and draft_scores are both given: pass the one the draft was sampled by")
    if x is not None and (x.shape != (R, K, V) or not x.is_floating_point() or x.device != scores.device):
        wanted = f"floating point [R, K, V] = [{R}, {K}, {V}] on {scores.device}"
        raise ValueError(f"draft_scores is {kind(x)}: for scores [{R}, {K + 1}, {V}] it must be {wanted}")
    if isinstance(temperature, Tensor):
        if temperature.shape != (R,) or not temperature.is_floating_point():
            raise ValueError(f"temperature is {kind(temperature)}: give a number or floating point [R] = [{R}]")
    elif not 0 < temperature < torch.inf:
        raise ValueError(f"temperature={temperature}: must be above 0 and finite; use greedy=True for the argmax")


def _check_rules(greedy: bool, uniforms: Tensor | None, acceptance: str, lenience: Lenience | None) -> None:
    if acceptance not in ("token", "block"):
        raise ValueError(f"acceptance={acceptance!r}: choose 'token' or 'block'")
    if lenience is not None:
        f(torch.ones(()), lenience)  # refuses unknown rules and ε
        if acceptance == "block":
            raise ValueError("lenience with acceptance='block': lenience is allowed only with acceptance='token'")
    if uniforms is None and not greedy:
        raise ValueError("uniforms=None: sampling needs uniforms [R, K+1]; pass them, or greedy=True for the argmax")


def _check_values(
    scores: Tensor, tokens: Tensor, lengths: Tensor, temperature: float | Tensor, uniforms: Tensor | None
) -> None:
    K, V = tokens.shape[1], scores.shape[2]
    if bool(((lengths < 0) | (lengths > K)).any()):
        raise ValueError(f"lengths={lengths.tolist()}: each must lie in 0..K, K={K} being the width of tokens")
    drafted = torch.arange(K, device=tokens.device) < lengths[:, None]
    if bool((((tokens < 0) | (tokens >= V)) & drafted).any()):
        raise ValueError(f"tokens holds ids outside 0..{V - 1}: draft in the vocabulary of scores (V={V})")
    if isinstance(temperature, Tensor) and not bool(((temperature > 0) & (temperature < torch.inf)).all()):
        raise ValueError(f"temperature={temperature.tolist()}: each must be above 0 and finite")
    if uniforms is not None:
        # the last column always counts, the others where there is a token to test
        used = torch.cat([drafted, drafted.new_ones(len(drafted), 1)], 1)
        if not bool((((uniforms >= 0) & (uniforms < 1)) | ~used).all()):
            raise ValueError("uniforms holds values outside [0, 1): draw them with torch.rand(..., dtype=float64)")
