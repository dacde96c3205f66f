"""How a draft of one layer learns to copy: a head that begins as one that does, and texts that are said twice.

An embedding that looks back (``accel.models.lagged``) lets a key know what stands before it, so that one head can find
where the last token was said before and say what came next (an induction head, Olsson et al. 2022, arXiv 2209.11895).
Training alone does not find it in any time that a small draft is given: until the lag, the keys, the queries and the
values fit each other, a change of one of them gains nothing. So one head is built to do it, roughly, and trained on.

Knows weights of llama-like students, token ids and batches. Does not know losses or optimisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from accel.distill.batches import Batch
from accel.errors import IncompatibleError
from accel.models.lagged import lagged_embedding

CLASSES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
# a pair of a head's numbers is used where a rotation over so many tokens stays below so many radians: what is sought
# may be far away
FAR, MOST_TURNED = 800, 0.6
# inputs that the layer's norm scales by less cannot be read
LEAST_NORM = 0.012
# of the code of the token before, in units of the code itself
CODE_SCALE = 2.0
# the score of a match, in nats; what the head adds, in units of the embedding's norm
MATCH, ADDED = 25.0, 11.0
# pieces that are said twice, and what may stand between
SHORTEST, LONGEST = 16, 120
BETWEEN = (0, 4, 16, 64, 200)
# share of the pieces that are random tokens: nothing but copying foretells those
RANDOM = 0.4
ROWS = 6


@torch.no_grad()
def begin_to_copy(student: PreTrainedModel, seed: int = 0) -> None:
    """Turn the first query head of the last key head of the first layer into one that copies.

    With a code A x of each token's embedding x: the lag writes the code of the token before along directions U in which
    embeddings vary least, keys read U, queries read A, values the directions V in which embeddings vary most, and the
    output adds V Σ⁻¹ Vᵀ x of the token that was found. The group's other query heads begin with nothing to add.
    """
    embedding = lagged_embedding(student)
    if type(student) not in CLASSES or embedding is None or embedding.lags < 1:
        raise IncompatibleError(
            f"a {type(student).__name__} cannot begin to copy: that takes a llama-like draft whose embedding looks back"
        )
    layer: Any = student.get_decoder().layers[0]
    attention, scale = layer.self_attn, layer.input_layernorm.weight
    size: int = attention.head_dim
    group = attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0]
    head = attention.k_proj.weight.shape[0] // size - 1
    slow = (student.get_decoder().rotary_emb.inv_freq * FAR < MOST_TURNED).nonzero()[:, 0]
    places = torch.cat([slow, slow + size // 2])

    weight = embedding.weight.float()
    width, readable = weight.shape[1], (scale.abs() > LEAST_NORM).float()
    read = torch.where(readable > 0, 1 / scale, torch.zeros_like(scale))
    mean = weight.mean(0)
    centred = (weight - mean) * readable
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    num_readable = int(readable.sum())
    if num_readable < size + len(places) + 1 or not len(places):
        raise IncompatibleError(
            f"hidden={width}: too narrow for a head of {size} that copies, or its rotations too fast"
        )
    directions, variances = directions[:, width - num_readable :], variances[width - num_readable :]
    least, most = directions[:, : len(places)], directions[:, -size:]
    taken = torch.linalg.qr(torch.cat([least, (mean * readable)[:, None]], 1)).Q
    code = torch.randn(width, len(places), generator=torch.Generator().manual_seed(seed)) * readable[:, None]
    code = torch.linalg.qr(code - taken @ (taken.T @ code)).Q
    values = most / variances[-size:].clamp(min=torch.finfo(torch.float32).tiny)

    rms = weight.square().mean(-1).sqrt().mean()
    length = (weight @ code).norm(dim=-1).mean() / rms
    gain = (MATCH * size**0.5 / (CODE_SCALE * length * length)).sqrt()
    spoken = (centred @ most @ values.T).norm(dim=-1).mean() / rms
    keys, first = slice(head * size, (head + 1) * size), head * group * size
    embedding.lag_weight[0] = CODE_SCALE * least @ code.T
    attention.k_proj.weight[keys] = 0
    attention.k_proj.weight[places + head * size] = gain * least.T * read
    attention.v_proj.weight[keys] = most.T * read
    attention.q_proj.weight[first : first + size] = 0
    attention.q_proj.weight[places + first] = gain * code.T * read
    attention.o_proj.weight[:, first : first + group * size] = 0
    attention.o_proj.weight[:, first : first + size] = values * (ADDED * weight.norm(dim=-1).mean() / spoken)


class Copies:
    """Batches of pieces of texts, and of random tokens, that are said twice: what is foretold is the second time.

    Every batch is a function of the seed and of its number. In the target's ids; nobody's view of them is needed.
    """

    def __init__(self, texts: Sequence[Tensor], can_say: Tensor, seed: int) -> None:
        """texts int64 ``[T]`` each, T ≥ 2; ``can_say``: the ids that random pieces are made of."""
        self._texts = texts
        self._can_say = can_say
        self._seed = seed

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) * 2 + 1)

        def below(count: int) -> int:
            return int(torch.randint(count, (1,), generator=generator))

        rows, places, answers = [], [], []
        for _ in range(ROWS):
            text = self._texts[below(len(self._texts))]
            count = SHORTEST + below(LONGEST - SHORTEST)
            start = below(max(1, len(text) - count))
            piece = text[start : start + count]
            if float(torch.rand(1, generator=generator)) < RANDOM:
                piece = self._can_say[torch.randint(len(self._can_say), (count,), generator=generator)]
            between = self._texts[below(len(self._texts))][: BETWEEN[below(len(BETWEEN))]]
            rows.append(torch.cat([piece, between, piece]))
            # the first token of the second time is nobody's to know
            places.append((len(piece) + len(between), len(rows[-1]) - 1))
            answers.append(piece[1:])
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        at = torch.cat([index * width + torch.arange(*span) for index, span in enumerate(places)])
        answer = torch.cat(answers)
        nobody = answer.new_zeros(len(answer), 0)
        return Batch(tokens, at, answer, nobody, nobody.float(), tuple(map(len, answers)))
