"""Tokens to text as they come: no half characters, and nothing that may be the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# what a decoder writes where bytes are no character, or not yet
REPLACEMENT = "\ufffd"
# tokens of an unfinished character after which it will not become one; and of a run of bytes that never is text
PATIENCE, GIVE_UP = 8, 64

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of tokens in pieces that together are the text of them all.

    Each piece is decoded behind the one before, because some tokenizers write a word differently at a text's start.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        # the tokens before, which were handed out, and those that were not
        self._window: list[int] = []
        self._num_old = 0
        # what of the window's text was handed out
        self._told = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is now certain."""
        self._window += tokens
        text = self._decode(self._window)
        waiting = len(self._window) - self._num_old
        if text.endswith(REPLACEMENT) and waiting < GIVE_UP:
            if waiting < PATIENCE:
                return ""
            # the last one alone may still become a character
            return self._tell(text[:-1])
        new = self._tell(text)
        self._window = self._window[self._num_old :] if waiting < GIVE_UP else []
        self._num_old = len(self._window)
        self._told = self._decode(self._window)
        return new

    def finish(self) -> str:
        """What was held back, as it is."""
        return self._tell(self._decode(self._window))

    def _tell(self, text: str) -> str:
        new = text[len(self._told) :]
        self._told = text
        return new


class TextStream:
    """Text of one continuation, up to the first stop string.

    ``min_tokens``: stop strings that are complete by then do not count.
    """

    def __init__(
        self, decode: Decode, stops: Sequence[str] = (), *, include: bool = False, min_tokens: int = 0
    ) -> None:
        self.stopped: str | None = None
        self._detokenizer = Detokenizer(decode)
        self._stops = tuple(stops)
        self._include = include
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""

    @property
    def needs_single_tokens(self) -> bool:
        """Tokens behind a stop string must be told from those before it."""
        return bool(self._stops)

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that may be handed out."""
        self._num_tokens += len(tokens)
        new = self._detokenizer.feed(tokens)
        if not self._stops or not new:
            return new
        if self._num_tokens <= self._min_tokens:
            return new
        return self._scan(new, last=False)

    def finish(self) -> str:
        """The rest of it; nothing behind a stop string."""
        if self.stopped is not None:
            return ""
        return self._scan(self._detokenizer.finish(), last=True)

    def _scan(self, new: str, *, last: bool) -> str:
        text = self._held + new
        self._held = ""
        hits = [(place, -len(stop), stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if hits:
            # the first in the text; of two that begin together the longer one
            place, _, self.stopped = min(hits)
            return text[: place + len(self.stopped) if self._include else place]
        if not last:
            certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[:certain], text[certain:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
