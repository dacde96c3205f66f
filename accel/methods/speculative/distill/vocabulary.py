"""Which of the target's tokens a draft learns to say: the ones that are used.

Knows token ids and how often they occur. Does not know texts, tokenizers or models. A smaller vocabulary makes the
draft's head, most of a small model, cheaper; every token left out is one the draft can never get right
(VocabTrim, arXiv 2506.22694; FR-Spec, arXiv 2502.14856).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from accel.drafters.small_lm import VocabularyMap
from accel.errors import OptionError


def count(tokens: Iterable[Tensor | Sequence[int]], vocab_size: int) -> Tensor:
    """How often each token occurs in all sequences: int64 [V]."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for each in tokens:
        ids = torch.as_tensor(each, dtype=torch.long).flatten().cpu()
        if len(ids):
            _check_ids(int(ids.min()), int(ids.max()), vocab_size)
            counts += ids.bincount(minlength=vocab_size)
    return counts


def trim(counts: Tensor, size: int, always: Collection[int] = ()) -> VocabularyMap:
    """The ids of ``always`` (what ends a text, byte fallbacks, …) and then the most frequent: ``size`` ids, ascending.

    Of equally frequent ids the lower one is kept. What the draft reads as "a token I have no id for" is the kept id
    that occurs least: its row is free to learn that, where a frequent token's row has a meaning of its own.
    """
    vocab_size = len(counts)
    first = sorted(set(always))
    if first:
        _check_ids(first[0], first[-1], vocab_size)
    if not 1 <= size <= vocab_size:
        raise OptionError(f"draft vocabulary of {size}: the target has {vocab_size} tokens, keep 1 to {vocab_size}")
    if size < len(first):
        raise OptionError(f"draft vocabulary of {size}: {len(first)} tokens must always be kept, keep as many or more")
    ranked = counts.clone()
    ranked[first] = int(counts.max()) + 1
    d2t = ranked.argsort(descending=True, stable=True)[:size].sort().values
    kept = counts[d2t]
    unknown = int((kept == kept.min()).nonzero()[0])
    return VocabularyMap(d2t, unknown, vocab_size)


def coverage(counts: Tensor, vocabulary: VocabularyMap) -> float:
    """The share of the counted tokens that the draft can say; the others always end a round."""
    total = int(counts.sum())
    if total == 0:
        raise OptionError("coverage of no tokens: count some first")
    return int(counts[vocabulary.d2t].sum()) / total


def _check_ids(least: int, most: int, vocab_size: int) -> None:
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise OptionError(f"token {wrong}: the target's vocabulary has ids 0 to {vocab_size - 1}")
