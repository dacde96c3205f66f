"""Text that must match a grammar: which tokens may come next, as a logits processor. llguidance does the parsing.

Knows tokens, and nothing of requests. What has once been compiled is kept and copied for each continuation.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from accel.errors import OptionError, first_line
from accel.sampling import RowwiseProcessor

log = logging.getLogger(__name__)

MAX_COMPILED = 64
MAX_CHARACTERS = 65536
MAX_NESTED = 64
# llguidance follows names by recursion and does not guard its stack: room for as many as a text can hold
STACK_BYTES = 2**28
# where JSON may have whitespace: a blank or a line's end with its indentation, as json.dumps writes it. A small model
# would write nothing else if it could.
JSON_STYLE: Any = {"whitespace_pattern": r" |\n[ \t]{0,24}"}


class Grammars:
    """The grammars of one model; ``vocab_size``: of its logits, which may be more than its tokenizer knows."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = stop_tokens
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None
        self._lock = Lock()

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """JSON that a schema describes."""
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"the JSON schema is no JSON: {first_line(error)}") from None
        # a schema may say itself what whitespace there is
        style = None if "x-guidance" in schema else JSON_STYLE
        return self._grammar("JSON schema", text, lambda: LLMatcher.grammar_from_json_schema(schema, style))

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole."""
        return self._grammar("regular expression", pattern, lambda: LLMatcher.grammar_from_regex(pattern))

    def lark(self, text: str) -> Grammar:
        """Text that a context-free grammar in llguidance's variant of Lark derives."""
        return self._grammar("grammar", text, lambda: LLMatcher.grammar_from_lark(text))

    def _grammar(self, kind: str, text: str, read: Callable[[], str]) -> Grammar:
        # one at a time: compiling is heavy, and requests in a row tend to want the same
        with self._lock:
            key = f"{kind}: {text}"
            found = self._compiled.pop(key, None) or _on_deep_stack(lambda: self._compile(kind, text, read))
            self._compiled[key] = found
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return found

    def _compile(self, kind: str, text: str, read: Callable[[], str]) -> Grammar:
        if len(text) > MAX_CHARACTERS:
            raise OptionError(f"the {kind} has {len(text):,} characters: at most {MAX_CHARACTERS:,} are allowed")
        if _depth(text) > MAX_NESTED:
            raise OptionError(f"the {kind} is nested {_depth(text)} deep: at most {MAX_NESTED} levels are allowed")
        try:
            matcher = LLMatcher(self._tokens(), read(), log_level=0)
        except ValueError as error:
            raise OptionError(f"the {kind} cannot be used: {first_line(error)}") from None
        if matcher.is_error():
            raise OptionError(f"the {kind} cannot be used: {first_line(ValueError(matcher.get_error()))}")
        grammar = Grammar(matcher, self._tokens().vocab_size, self._ends())
        # the first mask builds tables that copies share
        grammar.processor(0).allowed([])
        return grammar

    def _tokens(self) -> LLTokenizer:
        """The tokenizer as llguidance wants it, made when first needed: that takes a second or two."""
        if self._vocabulary is None:
            if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                raise OptionError("output in a given format needs a model with a fast tokenizer (tokenizer.json)")
            size = max(self._vocab_size, len(self._tokenizer))
            self._vocabulary = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._ends())
        return self._vocabulary

    def _ends(self) -> list[int]:
        ends = self._stop_tokens or {self._tokenizer.eos_token_id} - {None}
        if not ends:
            raise OptionError("output in a given format needs a token that ends it, and this model has none")
        return sorted(ends)


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._stop_tokens = frozenset(stop_tokens)
        self._lock = Lock()

    def processor(self, prompt_length: int) -> GrammarProcessor:
        """For one continuation of a prompt of so many tokens."""
        with self._lock:
            return GrammarProcessor(self._matcher.deep_copy(), self._vocab_size, self._stop_tokens, prompt_length)


class GrammarProcessor(RowwiseProcessor):
    """Forbids every token that the grammar does not allow behind the ids it is shown.

    A pure function of these ids: the parser it keeps goes back to where they agree with those of the call before and
    reads the rest, so tokens that were only tried are forgotten. One row's ids change little from call to call, hence
    one processor a continuation.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop_tokens: frozenset[int], prompt_length: int) -> None:
        self._matcher = matcher
        self._stop_tokens = stop_tokens
        self._prompt_length = prompt_length
        self._read: list[int] = []
        # one bit a token, as llguidance writes them
        self._words = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._end_ids = sorted(stop_tokens)
        self._ends = np.zeros(32 * len(self._words), dtype=np.bool_)
        self._ends[self._end_ids] = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shown = input_ids[:, self._prompt_length :].tolist()
        return torch.cat([self._masked(tokens, row) for tokens, row in zip(shown, scores.split(1), strict=True)])

    def _masked(self, tokens: list[int], scores: Tensor) -> Tensor:
        allowed = self.allowed(tokens)
        # behind a token that the grammar forbids nothing is kept, whatever its scores
        if allowed is None:
            return scores
        mask = torch.from_numpy(allowed[: scores.shape[-1]]).to(scores.device)
        return torch.where(mask, scores, -torch.inf)

    def allowed(self, tokens: list[int]) -> NDArray[np.bool_] | None:
        """Which tokens may follow ``tokens``; None where these themselves do not match."""
        over = next((place for place, token in enumerate(tokens) if token in self._stop_tokens), len(tokens))
        if not self._go_to(tokens[:over]):
            return None
        if over < len(tokens):
            # an end that did not end the row: nothing but ends can follow it
            return self._ends if self._matcher.is_accepting() else None
        if self._matcher.is_error():
            return self._gives_up(self._matcher.get_error())
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        allowed = np.unpackbits(self._words.view(np.uint8), bitorder="little").view(np.bool_)
        if not self._matcher.is_accepting():
            # a stop token may be text as well, and would end the answer too early
            allowed[self._end_ids] = False
        return allowed if allowed.any() else self._gives_up("the vocabulary has no token that it allows here")

    def _go_to(self, tokens: list[int]) -> bool:
        """Leave the parser behind ``tokens``, or as far as they match; whether they do."""
        if tokens[: len(self._read)] != self._read:
            same = _common(tokens, self._read)
            self._matcher.rollback(len(self._read) - same)
            del self._read[same:]
        rest = tokens[len(self._read) :]
        if rest:
            self._read += rest[: self._matcher.try_consume_tokens(rest)]
        return len(self._read) == len(tokens)

    def _gives_up(self, why: str) -> NDArray[np.bool_]:
        """The answer can only end here."""
        log.warning("a grammar ends an answer before it is complete: %s", first_line(ValueError(why)))
        return self._ends


def _on_deep_stack(work: Callable[[], Grammar]) -> Grammar:
    """What ``work`` returns, called on a thread with a stack of its own size."""
    before = threading.stack_size(STACK_BYTES)
    try:
        pool = ThreadPoolExecutor(1)
        future = pool.submit(work)
    finally:
        threading.stack_size(before)
    with pool:
        return future.result()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _depth(text: str) -> int:
    """How deep brackets are nested at most; those in quotes count too, which errs on the safe side."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest
