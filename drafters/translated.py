"""A small causal language model with another tokenizer as the drafter: it reads and guesses text, not token ids.

Each round the row's new final tokens become text, the draft model reads that text in its own tokens and continues it
greedily, and the continuation is cut into the target's tokens. Only short windows are converted, whatever the length
of the text. A guess is a point mass (``probs`` is None), which is lossless at any temperature.

What is proposed: the drafted text is tokenised together with the row's last few tokens. These must come back as they
are; where they do not (the text would have been cut differently), nothing is proposed. The next drafted letter may
change how the last word is cut, so the tokens of the last word (with the space in front of it) are kept back, one at
least and eight at most, unless the draft has ended its text. A character is proposed whole or not at all.

Confidence: each draft token counts for the target token in which its text begins; a target token's confidence is the
product of the probabilities of the draft tokens that count for it, 1 where there are none. So the product over a
proposal is the draft model's own probability of it.

Special tokens (a chat template's, say) mean nothing to another tokenizer: they are left out of the text.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accel.drafters.base import Ask, Draft
from accel.drafters.rows import Rows
from accel.errors import IncompatibleError
from accel.models.lean import draft_reader

# what decoders write for bytes that make no character (yet)
BROKEN = "\ufffd"
# a character has at most four bytes, so at most three tokens can wait for the rest of theirs
MAX_BROKEN_TOKENS = 3
# target tokens that are tokenised again in front of drafted text
WINDOW = 8
# a word that the next letter may still change, as most tokenizers cut words: letters and digits, or marks, or space;
# in scripts that put no spaces between words (Thai, Lao, kana, Han) a single letter
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
LAST_WORD = re.compile(rf"\s*(?:[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]+)?$")
# more tokens than these are not kept back: a word may be an endless number
MAX_LOOSE_TOKENS = 8
# characters of known text that are tokenised again in front of new text; the whole text where these do not do
LOOKBACKS = (64, 512)
# draft tokens at the end of the text that stay uncommitted, because new text may change how it is cut
NUM_HELD = 4
# draft tokens per target token at most: a draft model that reads letters still gets through a word
MAX_TOKENS_PER_TOKEN = 8


class _Codec:
    """One tokenizer: ids to text and back, with nothing added, tidied or cut off."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, owner: str) -> None:
        if tokenizer is None:
            raise IncompatibleError(
                f"no tokenizer for the {owner}: drafting through text needs both models' tokenizers"
            )
        if len(tokenizer) > vocab_size:
            raise IncompatibleError(
                f"the {owner}'s tokenizer has {len(tokenizer)} tokens and the {owner} only {vocab_size}: pass its own"
            )
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def encode(self, text: str) -> list[int]:
        # verbose: the warning about a long text is for models that would read it in one piece
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, truncation=False, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # "tidying" would take the space out of " ." and the text would no longer be the tokens' own
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def text_behind(self, lead: Sequence[int], ids: Sequence[int]) -> str:
        """What ``ids`` add to the text of ``lead``: decoders treat the start of a text specially."""
        before, both = self.decode(lead), self.decode([*lead, *ids])
        return both[len(before) :] if both.startswith(before) else self.decode(ids)

    def start(self) -> list[int]:
        """The token that the tokenizer puts in front of every text, if it is one that does."""
        first: list[int] = self._tokenizer.encode("", add_special_tokens=True)[:1]
        return first if first and first[0] == self._tokenizer.bos_token_id else []


@dataclass
class _Row:
    name: int
    # the row's final target tokens; the text is that of the first num_told, the rest wait for more bytes
    tokens: list[int]
    num_told: int = 0
    text: str = ""
    # the text in draft tokens: the first num_committed are committed, `tentative` was read behind these
    ids: list[int] = field(default_factory=list)
    num_committed: int = 0
    tentative: list[int] = field(default_factory=list)

    @property
    def unread(self) -> list[int]:
        return self.ids[self.num_committed :]


class TranslatedDrafter:
    """Drafts with a causal language model whose tokenizer is not the target's."""

    name = "translated-lm"
    free = False

    def __init__(
        self,
        model: PreTrainedModel,
        draft_tokenizer: PreTrainedTokenizerBase | None,
        target_tokenizer: PreTrainedTokenizerBase | None,
        target_vocab_size: int,
    ) -> None:
        self.reader = draft_reader(model)
        self.model = model
        self._draft = _Codec(draft_tokenizer, self.reader.vocab_size, "draft model")
        self._final = _Codec(target_tokenizer, target_vocab_size, "target")
        self._start = self._draft.start()
        self._ends = self._draft.special | _end_ids(model)
        self._rows: Rows[_Row] = Rows(self.name)

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        """Remember the prompt; it is read when the first draft is asked for. ``seed`` is not used: nothing is drawn."""
        name = self.reader.open()
        try:
            self._rows.open(row, _Row(name, list(prompt), ids=list(self._start)))
        except Exception:
            self.reader.close([name])
            raise

    def close(self, row: int) -> None:
        name = self._rows[row].name
        self._rows.close(row)
        self.reader.close([name])

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        self._rows[row].tokens += tokens

    def state_bytes(self) -> int:
        return self.reader.state_bytes()

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """One draft per ask, in order; nothing where the context is full or the row's last tokens cannot be respelt."""
        drafts = [self._begin(ask) for ask in asks]
        active = [draft for draft in drafts if draft.limit > 0]
        logits = self._read([draft.row for draft in active])
        while active:
            best = logits.float().softmax(-1).max(-1)
            for draft, token, probability in zip(active, best.indices.tolist(), best.values.tolist(), strict=True):
                self._extend(draft, token, probability)
            active = [draft for draft in active if draft.wants_more()]
            if active:
                last = torch.tensor([[draft.drafted[-1]] for draft in active], device=self.reader.device)
                logits = self.reader.forward(last, [draft.row.name for draft in active])[:, 0]
                for draft in active:
                    draft.row.tentative.append(draft.drafted[-1])
        return [Draft(draft.tokens, None, draft.confidence, self.name) for draft in drafts]

    # what the draft model reads

    def _begin(self, ask: Ask) -> _Growing:
        row = self._rows[ask.row]
        self._tell(row)
        kept = min(_common(row.tentative, row.unread), len(row.unread) - NUM_HELD)
        if row.tentative:
            self.reader.commit([max(0, kept)], [row.name])
            row.num_committed += max(0, kept)
            row.tentative = []
        anchor = self._anchor(row)
        limit = MAX_TOKENS_PER_TOKEN * ask.max_tokens
        if self.reader.max_positions is not None:
            limit = min(limit, self.reader.max_positions - len(row.ids))
        return _Growing(ask, row, anchor or [], limit if anchor is not None and row.ids else 0)

    def _tell(self, row: _Row) -> None:
        """Turn the final tokens that are not text yet into text, all but an unfinished character."""
        waiting = row.tokens[row.num_told :]
        lead = row.tokens[max(0, row.num_told - WINDOW) : row.num_told]
        for count in range(len(waiting), max(-1, len(waiting) - MAX_BROKEN_TOKENS - 1), -1):
            new = self._final.text_behind(lead, waiting[:count])
            if not new.endswith(BROKEN):
                break
        else:
            # no character is that long: these bytes will never make one
            count, new = len(waiting), self._final.text_behind(lead, waiting)
        row.num_told += count
        if new:
            self._append(row, new)

    def _append(self, row: _Row, new: str) -> None:
        """Add text to the row's draft tokens, cutting the end of the known text anew together with it."""
        first, tail = self._recut(row, new)
        unchanged = first + _common(row.ids[first:], tail)
        row.ids[first:] = tail
        row.text += new
        if unchanged < row.num_committed:
            # committed tokens cannot be taken back: read the text again from its start
            self.reader.close([row.name])
            row.name, row.num_committed, row.tentative = self.reader.open(), 0, []

    def _recut(self, row: _Row, new: str) -> tuple[int, list[int]]:
        """(index of the first draft token to replace, the draft tokens from there on) after ``new`` is appended.

        A piece of text that starts anywhere may begin with other tokens than the row has. What it ends with is the
        same from the first place where both are cut, and only from there on is it believed.
        """
        for reach in LOOKBACKS:
            if reach >= len(row.text):
                break
            lead = row.text[-reach:]
            before, after = self._draft.encode(lead), self._draft.encode(lead + new)
            same = _common(before[::-1], row.ids[: -len(before) - 1 : -1])
            foreign = len(before) - same
            if same >= NUM_HELD and after[:foreign] == before[:foreign]:
                return len(row.ids) - same, after[foreign:]
        return 0, [*self._start, *self._draft.encode(row.text + new)]

    def _read(self, rows: Sequence[_Row]) -> Tensor:
        """Let the draft model read what the rows have unread; logits after the last token of each, ``[R, V]``.

        The last n unread tokens of every row stay tentative, because new text may yet change them. Where some rows
        have more than others, the surplus is read and committed first: padding behind tentative tokens is no context.
        """
        if not rows:
            return torch.empty(0)
        n = min(len(row.unread) for row in rows)
        ahead = [row for row in rows if len(row.unread) > n]
        if ahead:
            surplus = [row.unread[:-n] for row in ahead]
            padded = torch.zeros(len(ahead), max(map(len, surplus)), dtype=torch.long)
            for index, ids in enumerate(surplus):
                padded[index, : len(ids)] = torch.tensor(ids)
            names = [row.name for row in ahead]
            self.reader.forward(padded.to(self.reader.device), names, keep=[0])
            self.reader.commit([len(ids) for ids in surplus], names)
            for row, ids in zip(ahead, surplus, strict=True):
                row.num_committed += len(ids)
        for row in rows:
            row.tentative = row.unread
        tokens = torch.tensor([row.tentative for row in rows], device=self.reader.device)
        return self.reader.forward(tokens, [row.name for row in rows], keep=[n - 1])[:, 0]

    # what is proposed

    def _anchor(self, row: _Row) -> list[int] | None:
        """The row's last tokens, as many of up to ``WINDOW`` as come back unchanged from text; None without any.

        No tokens at all are enough where text starts afresh: at the start of the row and behind a special token.
        """
        told = row.tokens[: row.num_told][-WINDOW:]
        for first in range(len(told)):
            if self._final.encode(self._final.decode(told[first:])) == told[first:]:
                return told[first:]
        return [] if not told or told[-1] in self._final.special else None

    def _extend(self, draft: _Growing, token: int, probability: float) -> None:
        """Add one draft token to a draft and see what it makes of the proposal."""
        if token in self._ends:
            draft.ended = True
        else:
            draft.starts.append(len(draft.text))
            draft.drafted.append(token)
            draft.beliefs.append(probability)
            text = self._draft.text_behind(draft.row.ids[-WINDOW:], draft.drafted)
            draft.text, broken, rest = text.partition(BROKEN)
            draft.broken = bool(broken)
            # bytes that no later byte will make a character of
            draft.ended |= bool(rest.strip(BROKEN))
        before = len(draft.tokens)
        draft.tokens = self._proposal(draft)
        draft.grew = len(draft.tokens) > before
        draft.confidence = self._confidence(draft)

    def _proposal(self, draft: _Growing) -> list[int]:
        """The drafted text in target tokens, by the rule in the module's docstring."""
        window = [*draft.anchor, *draft.row.tokens[draft.row.num_told :]]
        known = self._final.decode(draft.anchor)
        pieces = self._final.encode(known + draft.text)
        word = LAST_WORD.search(known + draft.text)
        sure = word.start() if word is not None else 0
        if pieces[: len(window)] != window:
            # only while the word at the boundary still grows can that be undone
            draft.ended |= sure > len(known)
            return []
        tokens = pieces[len(window) :]
        if draft.broken or not draft.ended:
            tokens = self._certain(window, tokens, sure)
        tokens = tokens[: draft.ask.max_tokens]
        while tokens and self._final.decode([*window, *tokens]).endswith(BROKEN):
            tokens.pop()
        return tokens

    def _certain(self, window: list[int], tokens: list[int], sure: int) -> list[int]:
        """``tokens``, which stand behind ``window``, without those that end behind ``sure`` characters."""
        kept = tokens[:-1]
        while len(tokens) - len(kept) < MAX_LOOSE_TOKENS and kept and self._length([*window, *kept]) > sure:
            kept = kept[:-1]
        return kept

    def _length(self, tokens: list[int]) -> int:
        """Whole characters that target tokens spell."""
        return len(self._final.decode(tokens).rstrip(BROKEN))

    def _confidence(self, draft: _Growing) -> list[float]:
        if not draft.tokens:
            return []
        window = [*draft.anchor, *draft.row.tokens[draft.row.num_told :]]
        lengths = [self._length([*window, *draft.tokens[:i]]) for i in range(len(draft.tokens) + 1)]
        # some decoders take back whole characters while the bytes behind them are not complete
        *starts, end = accumulate((length - lengths[0] for length in lengths), max)
        confidence = [1.0] * len(starts)
        for start, belief in zip(draft.starts, draft.beliefs, strict=True):
            if start < end:
                # of the tokens that spell the bytes of one character, the first
                confidence[bisect_left(starts, starts[bisect_right(starts, start) - 1])] *= belief
        return confidence


@dataclass
class _Growing:
    """A row's draft while it grows."""

    ask: Ask
    row: _Row
    # the row's last told tokens, which are tokenised again in front of the drafted text
    anchor: list[int]
    # draft tokens at most
    limit: int
    drafted: list[int] = field(default_factory=list)
    # the draft model's probability of each drafted token, and where in the drafted text it begins
    beliefs: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    text: str = ""
    # the drafted tokens end inside a character
    broken: bool = False
    ended: bool = False
    # the proposal so far
    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    grew: bool = False

    def wants_more(self) -> bool:
        if self.ended or len(self.tokens) >= self.ask.max_tokens or len(self.drafted) >= self.limit:
            return False
        return not self.grew or self.ask.keep_going is None or self.ask.keep_going(self.confidence)


def _end_ids(model: PreTrainedModel) -> set[int]:
    """What ends a text by the draft model's own configuration."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
