"""One call of transformers' generate(), run by our engine: its arguments become requests, our chunks its return value.

Reached through the ``custom_generate=<callable>`` seam, so that inputs, generation config, logits processors and
stopping criteria have been prepared by transformers itself. Knows no method: it is handed how to decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from accel.axes import Decoder
from accel.engine.cartridges import Seat
from accel.engine.loop import Engine
from accel.engine.stopping import CriteriaStopper, Stopper, TogetherStopper, end_tokens
from accel.errors import OptionError
from accel.models.softmax_target import SoftmaxTarget
from accel.sampling import LogitsPipeline
from accel.types import Chunk, Request, Stats

# what transformers prepares for every decoder-only model; any other model input is beyond the row target
_KNOWN_INPUTS = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})

# (prompt [T] without padding, new tokens up to the row's end), once a finished row
RowFinished = Callable[[Tensor, list[int]], None]


@dataclass(frozen=True)
class Decoding:
    """How the rows of one call are decoded. A call knows no method: it is handed this."""

    # what the decoder reads the model through
    target: Any
    # (target, stats, rows must stay in step) → decoder
    decoder: Callable[[Any, Stats, bool], Decoder]
    # whether the target has the model's own distribution, and not that of something distilled in its place
    exact: bool = True


@dataclass(frozen=True)
class PreparedCall:
    """What transformers hands to a custom decoding method, plus what its seam drops (streamer, seed)."""

    model: PreTrainedModel
    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: GenerationConfig
    inputs: dict[str, Any]
    streamer: BaseStreamer | None
    seed: int | None
    # what stands in front of the prompts: one seat for all, or one a prompt as the caller gave them
    seats: Sequence[Seat] = (Seat(),)

    def obstacle(self, *, causal: bool = True) -> str | None:
        """Why this call cannot be decoded row by row, or None where it can."""
        if self.config.return_dict_in_generate and (self.config.output_attentions or self.config.output_hidden_states):
            return "attentions and hidden states are not recorded"
        unknown = {name for name, value in self.inputs.items() if value is not None} - _KNOWN_INPUTS
        if unknown:
            return f"the model input {sorted(unknown)[0]!r} is not supported"
        if causal and not self.config.use_cache:
            return "use_cache=False"
        mask = self.inputs.get("attention_mask")
        if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
            return "the attention mask has gaps or right padding"
        positions = self.inputs.get("position_ids")
        if positions is not None and not self._are_usual(positions):
            return "custom position_ids"
        return None

    def run(
        self, decoding: Decoding, stats: Stats, row_finished: RowFinished = lambda prompt, new: None
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Decode and return what transformers would."""
        prompts = self._prompts()
        max_new = self._max_new_tokens()
        if isinstance(decoding.target, SoftmaxTarget):
            lengths = [len(p) + self._seat(i).num_positions for i, p in enumerate(prompts)]
            _check_context(decoding.target, lengths, max_new)
        together = self._must_stay_in_step()
        requests = self._requests(prompts, max_new)
        decoder = decoding.decoder(decoding.target, stats, together)
        # a cartridge that is not the document itself only stands in for it
        stats.lossless &= decoding.exact and all(
            each.parameters.exact for seat in self.seats for each in seat.cartridges
        )
        columns = Columns(self, len(prompts), pads_after_end=self._has_eos() or not together)
        pad = columns.pad if self._has_eos() else None
        engine = Engine(decoder, self._stopper(max_new, together), in_step=together, pad=pad)
        # closed at once when a streamer raises: the drafter outlives the call and must not keep its rows
        with torch.no_grad(), closing(engine.answer(requests)) as chunks:
            for chunk in chunks:
                columns.add(chunk)
                if chunk.finished and not chunk.late:
                    prompt = columns.prompts.get(chunk.request_id, prompts[chunk.request_id])
                    row_finished(prompt, columns.tokens(chunk.request_id))
        stats.generated_tokens = columns.num_counted
        return columns.finish(stats)

    def _seat(self, row: int) -> Seat:
        """transformers repeats each prompt num_return_sequences times, next to one another."""
        return self.seats[row * len(self.seats) // len(self.input_ids)]

    def _are_usual(self, positions: Tensor) -> bool:
        fits = positions.ndim == 2 and positions.shape[1] == self.input_ids.shape[1]
        return fits and torch.equal(positions.expand_as(self.input_ids), self._usual_positions())

    def _usual_positions(self) -> Tensor:
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def _prompts(self) -> list[Tensor]:
        """Each row's prompt without its left padding."""
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return list(self.input_ids)
        prompts = [ids[row.bool()] for ids, row in zip(self.input_ids, mask, strict=True)]
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise OptionError(f"row {index} of the batch is all padding: every prompt needs at least one token")
        return prompts

    def _max_new_tokens(self) -> int:
        lengths = [c.max_length for c in self.stopping_criteria if type(c) is MaxLengthCriteria]
        # criteria are asked after each token, so there is always one
        return max(1, min([*lengths, self.config.max_length]) - self.input_ids.shape[1])

    def _has_eos(self) -> bool:
        """Whether rows that have ended are padded, by transformers' own test."""
        return any(hasattr(c, "eos_token_id") for c in self.stopping_criteria)

    def _must_stay_in_step(self) -> bool:
        """Whether somebody looks at the batch as a whole, so that all rows must be at the same length."""
        if len(self.input_ids) == 1:
            return False
        rowwise = LogitsPipeline(self.logits_processor).rowwise and CriteriaStopper.is_rowwise(self.stopping_criteria)
        lengths_only = all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in self.stopping_criteria)
        # without an end-of-sequence token transformers keeps writing rows that other criteria ended
        return not rowwise or not (self._has_eos() or lengths_only)

    def _stopper(self, max_new: int, together: bool) -> Stopper:
        cls = TogetherStopper if together else CriteriaStopper
        return cls(self.stopping_criteria, self.input_ids, max_new)

    def _requests(self, prompts: Sequence[Tensor], max_new: int) -> list[Request]:
        config = self.config
        pipeline = LogitsPipeline(self.logits_processor)
        stop_tokens = end_tokens(self.stopping_criteria)
        # drawn from torch's global generator, so that torch.manual_seed reproduces a call as it does in transformers
        base = int(torch.randint(2**62, ())) if self.seed is None and config.do_sample else self.seed or 0
        return [
            Request(
                id=index,
                prompt=prompt,
                history=self.input_ids[index],
                max_new_tokens=max_new,
                do_sample=bool(config.do_sample),
                seed=row_seed(base, index),
                stop_tokens=stop_tokens,
                pipeline=pipeline,
                keep_logits=bool(config.return_dict_in_generate and config.output_logits),
                keep_scores=bool(config.return_dict_in_generate and config.output_scores),
                segments=self._seat(index).segments,
                draft_segments=self._seat(index).draft_segments,
            )
            for index, prompt in enumerate(prompts)
        ]


def row_seed(base: int, index: int) -> int:
    """A row's own seed: distinct streams for the rows of a call, the same whatever rows stand beside it."""
    return (base + index * 0x9E37_79B9_7F4A_7C15) & 0x7FFF_FFFF_FFFF_FFFF


def _check_context(target: SoftmaxTarget, lengths: Sequence[int], max_new: int) -> None:
    """Refuse prompts that do not fit the model's positions, and lengths that would run off a learned table.

    ``lengths``: positions of each prompt with the cartridges in front of it.
    """
    limit = target.max_positions
    longest = max(lengths)
    name = type(target.model).__name__
    if limit is None:
        return
    if longest > limit:
        raise OptionError(f"the prompt takes {longest} positions, {name} has {limit}: shorten the prompt")
    # the last token is never read, so one more than the positions can be generated
    if longest + max_new > limit + 1 and target.has_position_table:
        raise OptionError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new} exceed the {limit} positions of {name}: "
            f"set max_new_tokens to at most {limit + 1 - longest}"
        )


class Columns:
    """Collects rows that advance at their own pace, and hands out columns ``[B]`` as soon as every row has them."""

    def __init__(self, call: PreparedCall, num_rows: int, *, pads_after_end: bool) -> None:
        self._call = call
        self._tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._logits: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self._scores: list[list[Tensor]] = [[] for _ in range(num_rows)]
        # prompts whose gaps were filled, without padding
        self.prompts: dict[int, Tensor] = {}
        self._finished = [False] * num_rows
        self._pads_after_end = pads_after_end
        self._num_streamed = 0
        self.num_counted = 0
        pad = call.config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)

    def add(self, chunk: Chunk) -> None:
        """Take a chunk of one row; tokens after a row's end become padding where transformers pads."""
        row = chunk.request_id
        if chunk.prompt is not None:
            filled = torch.tensor(chunk.prompt).to(self._call.input_ids)
            # what was written into the prompt was generated too
            self.num_counted += int((filled != self._call.input_ids[row, -len(filled) :]).sum())
            self.prompts[row] = filled
        if not chunk.late:
            self.num_counted += len(chunk.tokens)
            self._finished[row] = chunk.finished
        if chunk.late and self._pads_after_end:
            self._tokens[row] += [self.pad] * len(chunk.tokens)
        else:
            self._tokens[row] += chunk.tokens
        if chunk.logits is not None:
            self._logits[row] += list(chunk.logits)
        if chunk.scores is not None:
            self._scores[row] += list(chunk.scores)
        self._stream()

    def tokens(self, row: int) -> list[int]:
        """What a row has so far: when it ends, its new tokens without padding."""
        return list(self._tokens[row])

    def finish(self, stats: Stats) -> Tensor | GenerateDecoderOnlyOutput:
        """The sequences ``[B, prompt + new]``, or transformers' output object with ``.accel`` on it.

        A prompt that had gaps stands there as it was filled.
        """
        streamer, config = self._call.streamer, self._call.config
        if streamer is not None:
            streamer.end()
        width = max(len(tokens) for tokens in self._tokens)
        new = torch.tensor([tokens + [self.pad] * (width - len(tokens)) for tokens in self._tokens])
        sequences = torch.cat([self._call.input_ids, new.to(self._call.input_ids)], dim=1)
        for row, prompt in self.prompts.items():
            end = self._call.input_ids.shape[1]
            sequences[row, end - len(prompt) : end] = prompt
        if not config.return_dict_in_generate:
            return sequences
        output = GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_steps(self._scores, width) if config.output_scores else None,
            logits=_steps(self._logits, width) if config.output_logits else None,
        )
        output.accel = stats
        return output

    def _stream(self) -> None:
        streamer = self._call.streamer
        if streamer is None:
            return
        # a row that has ended no longer holds the others back
        ready = min((len(t) for t, done in zip(self._tokens, self._finished, strict=True) if not done), default=None)
        if ready is None:
            ready = max(len(t) for t in self._tokens)
        for column in range(self._num_streamed, ready):
            tokens = [t[column] if column < len(t) else self.pad for t in self._tokens]
            streamer.put(torch.tensor(tokens))
        self._num_streamed = max(self._num_streamed, ready)


def _steps(rows: Sequence[Sequence[Tensor]], width: int) -> tuple[Tensor, ...]:
    """Per-row lists of ``[V]`` → one ``[B, V]`` a step; zeros where a row had already ended."""
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[step] if step < len(row) else nothing for row in rows]) for step in range(width))
