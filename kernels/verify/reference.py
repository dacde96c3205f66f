"""Which of the target's drafted tokens to keep, and the token after them: the plain PyTorch statement.

Knows scores, draft tokens, the drafts' distributions and uniforms. Does not know where the uniforms come from, what
drafted the tokens or how the scores were processed. The derivations are in README.md beside this file.

A row is decided by its own numbers alone and one position is looked at a time, so that a row that stopped early
costs nothing more and what stands after a row's length is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from accel.kernels.common import first_argmax

# rule and ε of DistillSpec's lossy acceptance (Zhou et al. 2024, arXiv 2310.08461)
Lenience = tuple[str, float]


class Verdict(NamedTuple):
    """``n_accepted`` int64 [R]: drafted tokens kept; ``next_token`` int64 [R]: the token that follows them."""

    n_accepted: Tensor
    next_token: Tensor


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
    """``accel.kernels.verify.verify`` without its checks of the arguments.

    scores [R, K+1, V], tokens [R, K], lengths [R], q or draft_scores [R, K, V], temperature [R] or a number,
    uniforms [R, K+1] → n_accepted [R], next_token [R]
    """
    if greedy:
        return _verify_greedy(scores, tokens, lengths, temperature, lenience)
    assert uniforms is not None
    scores = _cool(scores, temperature)
    if draft_scores is not None:
        q = _softmax(_cool(draft_scores, temperature))
    if acceptance == "block":
        n_accepted, weights = _verify_block(scores, tokens, lengths, q, uniforms)
    else:
        n_accepted, weights = _verify_token(scores, tokens, lengths, q, uniforms, lenience)
    return Verdict(n_accepted, _draw(weights, uniforms[:, -1]))


def longest_prefix(scores: Tensor, tokens: Sequence[int]) -> tuple[int, int]:
    """``verify`` of one greedy row, for who has the draft's tokens on the host: (tokens kept, the token after them).

    scores ``[n, V]`` with n > len(tokens). A small model's step on a CPU is short enough to feel what ``verify`` calls.
    """
    best: list[int] = first_argmax(scores[: len(tokens) + 1]).tolist()
    kept = next((i for i, token in enumerate(tokens) if token != best[i]), len(tokens))
    if not float(scores[kept, best[kept]]) > -torch.inf:
        raise ValueError(NOTHING_TO_CHOOSE)
    return kept, best[kept]


def longest_path(scores: Tensor, tokens: Sequence[int], beside: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """``longest_prefix`` with other tokens beside the draft's: (places in ``scores`` that are kept, the token after).

    scores ``[1 + len(tokens) + len(beside), V]``: before the draft, behind each of its tokens, and behind each of
    ``beside``: (depth, token), what might stand in the place of the draft's token ``depth``. The first place is always
    kept; a token beside the draft has nothing behind it.
    """
    path = [0]
    while True:
        depth, place = len(path) - 1, path[-1]
        token = int(first_argmax(scores[place : place + 1]))
        if place == depth and depth < len(tokens) and tokens[depth] == token:
            path.append(depth + 1)
        elif place == depth and (depth, token) in beside:
            path.append(1 + len(tokens) + beside.index((depth, token)))
        else:
            break
    if not float(scores[path[-1], token]) > -torch.inf:
        raise ValueError(NOTHING_TO_CHOOSE)
    return path, token


def f(p: Tensor, lenience: Lenience | None) -> Tensor:
    """The target's probabilities as lenient acceptance sees them: p/ε (lin), p/ε² (sq) or p^ε (exp); any shape."""
    if lenience is None:
        return p
    rule, eps = lenience
    if rule not in ("lin", "sq", "exp") or not 0 < eps <= 1:
        raise ValueError(f"lenience={lenience!r}: give (rule, eps) with rule 'lin', 'sq' or 'exp' and 0 < eps <= 1")
    if rule == "exp":
        # fp64: vector lanes and the scalar tail of pow differ in the last bit, which would tie a row to its place
        return p if eps == 1 else p.double() ** eps
    return p / (eps if rule == "lin" else eps**2)


def accept(p: Tensor, q: Tensor | None, token: int, u: float, lenience: Lenience | None = None) -> bool:
    """Whether one drafted token is kept: with probability min(1, f(p(x)) / q(x)); p [V], q [V] or None (one-hot)."""
    at = torch.tensor([token], device=p.device)
    return bool(_accepts(p[at], None if q is None else q[at], u, lenience))


def residual(p: Tensor, q: Tensor | None, token: int, lenience: Lenience | None = None) -> Tensor:
    """Weights of the token that replaces a refused one: max(f(p) − q, 0), not normalised; p [V], q [V] → [V]."""
    at = torch.tensor([token], device=p.device)
    return _residual(p[None], None if q is None else q[None], at, lenience)[0]


def draw(weights: Tensor, u: float) -> int:
    """The token at which the cumulated weights [V] pass u · total; never one of weight 0. 0 ≤ u < 1."""
    return int(_draw(weights[None], torch.tensor([u], dtype=torch.float64)))


def _verify_greedy(
    scores: Tensor, tokens: Tensor, lengths: Tensor, temperature: float | Tensor, lenience: Lenience | None
) -> Verdict:
    best = first_argmax(scores)  # [R, K+1]
    K = tokens.shape[1]
    drafted = torch.arange(K, device=scores.device) < lengths[:, None]
    kept = tokens == best[:, :K]
    if lenience is not None and lenience[1] < 1 and K:
        # p(x) and max p are all the rule asks for; tokens beyond a row's length may be no tokens at all
        at = tokens.where(drafted, 0)[..., None]
        cooled = _cool(scores[:, :K], temperature).float()
        log_total = cooled.logsumexp(-1, keepdim=True)
        p_token = (cooled.gather(-1, at) - log_total).exp()
        p_best = (cooled.gather(-1, best[:, :K, None]) - log_total).exp()
        kept |= (f(p_token, lenience) >= p_best)[..., 0]
    n_accepted = (kept & drafted).long().cumprod(-1).sum(-1)
    next_token = best.gather(1, n_accepted[:, None])  # [R, 1]
    rows = torch.arange(len(scores), device=scores.device)
    if not bool((scores[rows, n_accepted, next_token[:, 0]] > -torch.inf).all()):
        raise ValueError(NOTHING_TO_CHOOSE)
    return Verdict(n_accepted, next_token[:, 0])


def _verify_token(
    scores: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    q: Tensor | None,
    uniforms: Tensor,
    lenience: Lenience | None,
) -> tuple[Tensor, Tensor]:
    """Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1 → n_accepted [R], weights of the next token [R, V]."""
    R, K = tokens.shape
    n_accepted = torch.zeros_like(lengths)
    weights = scores.new_empty(R, scores.shape[-1], dtype=torch.float64)
    rows = torch.arange(R, device=scores.device)  # the rows that have kept every token so far
    for i in range(K):
        rows = rows[lengths[rows] > i]
        if not len(rows):
            break
        p, x = _softmax(_at(scores, i, rows)), tokens[rows, i]  # [r, V], [r]
        p_x = p.gather(1, x[:, None])[:, 0]
        q_x = None if q is None else q[rows, i, x]
        kept = _accepts(p_x, q_x, uniforms[rows, i], lenience)
        n_accepted[rows[kept]] += 1
        refused = rows[~kept]
        if len(refused):
            q_refused = None if q is None else _at(q, i, refused)
            weights[refused] = _residual(p[~kept], q_refused, x[~kept], lenience).double()
        rows = rows[kept]
    whole = (n_accepted == lengths).nonzero()[:, 0]
    weights[whole] = _softmax(scores[whole, lengths[whole]]).double()
    return n_accepted, weights


def _verify_block(
    scores: Tensor, tokens: Tensor, lengths: Tensor, q: Tensor | None, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Block verification (Sun et al. 2024, arXiv 2403.10444) → n_accepted [R], weights of the next token [R, V].

    ``weight`` is P_i, the probability with which at least the first i drafted tokens are kept, and ``left`` is S_i,
    the mass that P_i · p leaves uncovered by q at the next position; README.md derives both.
    """
    R, K = tokens.shape
    n_accepted = torch.zeros_like(lengths)
    weight = scores.new_ones(R, dtype=torch.float64)
    weight_kept = weight.clone()  # P at n_accepted
    rows = torch.arange(R, device=scores.device)
    for i in range(K):
        # once P is 0 it stays 0 and no longer prefix can be kept
        rows = rows[(lengths[rows] > i) & (weight[rows] > 0)]
        if not len(rows):
            break
        p, x, P = _softmax(_at(scores, i, rows)), tokens[rows, i], weight[rows]
        p_x = p.gather(1, x[:, None])[:, 0].double()
        if q is None:
            q_x, left = torch.ones_like(p_x), P * (1 - p_x)
        else:
            q_i = _at(q, i, rows)
            q_x = q_i.gather(1, x[:, None])[:, 0].double()
            left = (P[:, None].float() * p - q_i).clamp(min=0).sum(-1, dtype=torch.float64)
        if i:
            # 0/0 is a prefix that fits (P = 1) before a position where p = q: nothing is lost by keeping it
            h = (left / (left + 1 - P)).nan_to_num(nan=1.0)
            kept = uniforms[rows, i - 1] < h
            n_accepted[rows[kept]], weight_kept[rows[kept]] = i, P[kept]
        # q(x) = 0 cannot be drawn from q; it is kept wherever the target allows the token
        weight[rows] = (P * p_x / q_x).nan_to_num(nan=0.0).clamp(max=1.0)
    rows = (lengths > 0).nonzero()[:, 0]
    rows = rows[uniforms[rows, lengths[rows] - 1] < weight[rows]]
    # a row whose P fell to 0 early left the loop with weight 0 and is not among these
    n_accepted[rows] = lengths[rows]
    stopped = (n_accepted < lengths).nonzero()[:, 0]
    at = n_accepted[stopped]
    weights = _softmax(scores[torch.arange(R, device=scores.device), n_accepted])
    if len(stopped):
        scaled = weights[stopped] * weight_kept[stopped, None].float()
        q_stopped = None if q is None else q[stopped, at]
        weights[stopped] = _residual(scaled, q_stopped, tokens[stopped, at], None)
    return n_accepted, weights


def _accepts(p_x: Tensor, q_x: Tensor | None, u: Tensor | float, lenience: Lenience | None) -> Tensor:
    """u · q(x) < f(p(x)), in fp64: the division-free form of u < f(p(x)) / q(x); all [r]."""
    return u * (1.0 if q_x is None else q_x.double()) < f(p_x.double(), lenience)


def _residual(p: Tensor, q: Tensor | None, x: Tensor, lenience: Lenience | None) -> Tensor:
    """p [r, V], q [r, V] or None, x [r] → weights [r, V]. A one-hot q leaves p with x removed."""
    wanted = f(p.float(), lenience)
    weights = wanted.scatter(1, x[:, None], 0.0) if q is None else (wanted - q.float()).clamp(min=0)
    # p and q that differ by rounding alone can refuse a token and leave nothing: p itself is then the answer
    return torch.where(weights.amax(-1, keepdim=True) == 0, p.to(weights.dtype), weights)


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """weights [R, V], u fp64 [R] → int64 [R], the first token whose cumulated weight exceeds u · total.

    In fp64 u · total < total for every u < 1, and the sum steps only at positive weights, so neither end can yield a
    token of weight 0. That needs a sequential sum: a GPU's parallel one may step anywhere, hence the host.
    """
    cumulated = weights.double().cpu().cumsum(-1)
    total = cumulated[:, -1:]
    if not bool(((total > 0) & (total < torch.inf)).all()):
        raise ValueError(NOTHING_TO_CHOOSE)
    return torch.searchsorted(cumulated, u.cpu()[:, None] * total, right=True)[:, 0].to(weights.device)


NOTHING_TO_CHOOSE = (
    "no token can follow: the scores of a position are all -inf or hold NaN or +inf (or the weights are all 0); "
    "allow at least one token at every position up to the row's length"
)


def _cool(scores: Tensor, temperature: float | Tensor) -> Tensor:
    """scores [R, n, V] divided by the temperature, a number or [R]; at 1 they stay what they are."""
    if isinstance(temperature, Tensor):
        return scores.float() / temperature.float()[:, None, None]
    return scores if temperature == 1 else scores.float() / temperature


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, dtype=torch.float32)


def _at(x: Tensor, i: int, rows: Tensor) -> Tensor:
    """Position i of the given rows, [R, n, V] → [r, V]; a copy costs as much as a softmax, so none for all rows."""
    return x[:, i] if len(rows) == len(x) else x[rows, i]
