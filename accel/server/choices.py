"""Tokens and their log-probabilities as responses show them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from accel.engine.jobs import TokenLogprobs

# what JSON has instead of minus infinity, as in vLLM
LOWEST = -9999.0


def _byte_of() -> dict[str, int]:
    """The letters that byte-level tokenizers write for bytes (GPT-2's): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): b for place, b in enumerate(others)}


class Vocabulary:
    """Text and bytes of single tokens, and of many."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_bytewise = "ByteLevel" in type(getattr(backend, "decoder", None)).__name__
        self._byte_of = _byte_of()
        # five times as fast as transformers' own, which tidies up around it
        self._raw = backend if backend is not None and not tokenizer.clean_up_tokenization_spaces else None
        self.text = lru_cache(maxsize=65536)(self._text)
        self.bytes = lru_cache(maxsize=65536)(self._bytes)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without special ones."""
        return self._decoded(tokens, True)

    def decode_all(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return self._decoded(tokens, False)

    def _decoded(self, tokens: Sequence[int], skip: bool) -> str:
        if self._raw is not None:
            raw: str = self._raw.decode(list(tokens), skip_special_tokens=skip)
            return raw
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip)
        return text

    def _text(self, token: int) -> str:
        return self.decode_all([token])

    def _bytes(self, token: int) -> list[int]:
        """Bytes of a token, of which a character may need several."""
        if self._is_bytewise:
            letters = self._tokenizer.convert_ids_to_tokens(token) or ""
            if letters and all(letter in self._byte_of for letter in letters):
                return [self._byte_of[letter] for letter in letters]
        return list(self.text(token).encode("utf-8"))


def chat_logprobs(vocabulary: Vocabulary, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """As in chat completions."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": vocabulary.text(token),
            "logprob": max(logprob, LOWEST),
            "bytes": vocabulary.bytes(token),
        }

    content = [
        shown(each.token, each.logprob) | {"top_logprobs": [shown(token, value) for token, value in each.top]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    vocabulary: Vocabulary, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offset: int
) -> dict[str, Any]:
    """As in completions. None for a token that nothing predicts; ``offset``: where in the text the first one stands."""
    names = [vocabulary.text(token) for token in tokens]
    offsets = list(accumulate(map(len, names), initial=offset))[:-1]
    values = [None if each is None else max(each.logprob, LOWEST) for each in logprobs]
    tops = [None if each is None else _top(vocabulary, each) for each in logprobs]
    return {"text_offset": offsets, "token_logprobs": values, "tokens": names, "top_logprobs": tops}


def _top(vocabulary: Vocabulary, each: TokenLogprobs) -> dict[str, float]:
    """The most likely tokens, and the one that was taken: of two with the same text the likelier one."""
    found: dict[str, float] = {}
    for token, value in (*each.top, (each.token, each.logprob)):
        found.setdefault(vocabulary.text(token), max(value, LOWEST))
    return found
