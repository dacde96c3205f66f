"""Cases of the verify family, beside the same verdict written in plain vectorised PyTorch.

All scores are counted as traffic: a kernel decides the positions of a row at once. Of q, acceptance by token looks at
one number a position and, where a token is refused, at that position's row; acceptance by block looks at all of it,
and so does whoever has the draft's logits alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.bench.kernels import cases as c
from accel.bench.kernels.cases import Case, Check, Goal, Peer, Ready

K = 5
GOALS = (Goal(share=0.8),)
# sums in another order move a drawn token only where a uniform falls between two of them: about one row in a hundred
DRAWS_MAY_DIFFER = 0.05
# rows of the check: enough that one such row stays under DRAWS_MAY_DIFFER
CHECKED_ROWS = 64


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    V = 2_048 if quick else c.LLAMA_3_VOCABULARY
    rows = (1, 4) if quick else (1, 8, 64)
    for R in rows:
        yield _case(device, "token", R, V, rank=0 if rows[-1] == R else 1)
    yield _case(device, "logits", rows[-1], V, rank=0)
    for mode in ("greedy", "certain", "block"):
        yield _case(device, mode, rows[-1], V, rank=1)
    if not quick:
        yield _case(device, "greedy", 1, V, rank=2)
        for R in rows:
            yield _case(device, "token", R, c.MISTRAL_VOCABULARY, rank=2)


WHAT = {
    "token": "p/q by token",
    "logits": "both models' logits by token",
    "greedy": "greedy",
    "certain": "certain guesses by token",
    "block": "p/q by block",
}


def _case(device: torch.device, mode: str, R: int, V: int, rank: int) -> Case:
    dtype = _dtype(device, mode)
    scores = R * (K + 1) * V * dtype.itemsize
    q = {"token": R * V * 4, "block": R * K * V * 4, "logits": R * K * V * dtype.itemsize}.get(mode, 0)
    small = R * (K * 8 + 8 + (K + 1) * 8 + 16)
    return Case(
        "verify",
        f"{WHAT[mode]}, R {R}, K {K}, V {V:,}",
        {"R": R, "K": K, "V": V},
        c.dtype_name(dtype),
        bytes=scores + q + small,
        flops=0,
        prepare=partial(_prepare, device, mode, R, V),
        goals=GOALS,
        rank=rank,
    )


def _dtype(device: torch.device, mode: str) -> torch.dtype:
    """Logits come as the models make them; transformers processes scores in fp32, whatever the model computes in."""
    return c.working_dtype(device) if mode == "logits" else torch.float32


def _inputs(device: torch.device, mode: str, R: int, V: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Scores, tokens and lengths, and the rest by name: drafts close to the target, so that most tokens are kept."""
    dtype = _dtype(device, mode)
    scores = c.normal(device, R, K + 1, V, dtype=dtype, scale=3.0)
    generator = torch.Generator(device).manual_seed(1)
    lengths = torch.full((R,), K, dtype=torch.int64, device=device)
    if mode in ("greedy", "certain"):
        tokens = scores[:, :K].argmax(-1)
        tokens[:, -1] = 0  # a guess that is refused
    else:
        draft_scores = scores[:, :K] + c.normal(device, R, K, V, dtype=dtype, scale=0.3, seed=2)
        q = draft_scores.softmax(-1, dtype=torch.float32)
        tokens = torch.multinomial(q.view(R * K, V), 1, generator=generator).view(R, K)
    if mode == "greedy":
        return (scores, tokens, lengths), {"greedy": True}
    uniforms = torch.rand(R, K + 1, generator=generator, device=device, dtype=torch.float64)
    named: dict[str, Any] = {"uniforms": uniforms}
    if mode == "logits":
        named["draft_scores"] = draft_scores
    elif mode != "certain":
        named["q"] = q
    if mode == "block":
        named["acceptance"] = "block"
    return (scores, tokens, lengths), named


def _prepare(device: torch.device, mode: str, R: int, V: int) -> Ready:
    kernels, reference = c.public("verify"), c.reference("verify")
    given, named = _inputs(device, mode, R, V)

    def check() -> list[Check]:
        wide, their = (given, named) if R >= CHECKED_ROWS else _inputs(device, mode, CHECKED_ROWS, V)
        got = kernels.verify(*wide, **their)
        fp32 = {name: x.float() for name, x in their.items() if name == "draft_scores"}
        expected = reference.verify(wide[0].float(), *wide[1:], **their | fp32)
        return [
            c.equal("n_accepted", got.n_accepted, expected.n_accepted, 0.0 if mode == "greedy" else DRAWS_MAY_DIFFER),
            c.equal("next_token", got.next_token, expected.next_token, 0.0 if mode == "greedy" else DRAWS_MAY_DIFFER),
        ]

    def same_length(result: tuple[Tensor, Tensor]) -> Check:
        ours = kernels.verify(*given, **named).n_accepted
        # one row in a hundred may differ: of one row, none or all
        return c.equal("n_accepted", result[0], ours, max(DRAWS_MAY_DIFFER, 1 / len(ours)))

    peer = Peer(None, "block verification has no plain implementation here")
    if mode != "block":
        peer = Peer(lambda: torch_verify(*given, **named), agrees=same_length)
    return Ready(lambda: kernels.verify(*given, **named), check, {"torch": peer})


def torch_verify(
    scores: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    q: Tensor | None = None,
    draft_scores: Tensor | None = None,
    uniforms: Tensor | None = None,
    greedy: bool = False,
) -> tuple[Tensor, Tensor]:
    """The verdict as tensor operations over all positions at once, without waiting for the device.

    Shapes as in the family's public function; the next token is drawn by torch.multinomial's rule of exponentials.
    """
    R, K = tokens.shape
    drafted = torch.arange(K, device=tokens.device) < lengths[:, None]
    if greedy:
        best = scores.argmax(-1)
        n_accepted = ((tokens == best[:, :K]) & drafted).long().cumprod(-1).sum(-1)
        return n_accepted, best.gather(1, n_accepted[:, None])[:, 0]
    assert uniforms is not None
    if draft_scores is not None:
        q = torch.softmax(draft_scores, -1, dtype=torch.float32)
    p = torch.softmax(scores, -1, dtype=torch.float32)  # [R, K+1, V]
    p_x = p[:, :K].gather(-1, tokens[..., None])[..., 0]  # [R, K]
    q_x = 1.0 if q is None else q.gather(-1, tokens[..., None])[..., 0]
    n_accepted = ((uniforms[:, :K] * q_x < p_x) & drafted).long().cumprod(-1).sum(-1)
    rows = torch.arange(R, device=tokens.device)
    at = n_accepted.clamp(max=K - 1)
    left = p[rows, n_accepted]  # [R, V]
    refused = (n_accepted < lengths)[:, None]
    if q is None:
        left = left.scatter(1, tokens[rows, at][:, None], left.gather(1, tokens[rows, at][:, None]) * ~refused)
    else:
        left = torch.where(refused, (left - q[rows, at]).clamp(min=0), left)
    # the row with the largest weight / Exp(1) is a draw in proportion to the weights, without their sum
    return n_accepted, (left / torch.empty_like(left).exponential_()).argmax(-1)
