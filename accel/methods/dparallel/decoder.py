"""Decoding of masked-diffusion models: blocks of masks, filled wherever the model is certain enough (README.md).

Knows rows, masks and rules. What the logits are made of is the denoiser's business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accel.errors import IncompatibleError, OptionError
from accel.kernels.sampling import sample
from accel.kernels.sampling.reference import NOTHING_TO_CHOOSE
from accel.kernels.unmask import Certainty, certainty, commit
from accel.methods.dparallel.options import DParallelOptions, Plan
from accel.models.diffusion import BlockCache, Denoiser
from accel.sampling import IGNORE_IDS, LogitsPipeline, RowSampler
from accel.types import Emission, Request, Stats

_APPROXIMATE = {
    "prefix": "approximate: what stands before a block is read once, with the block still masked (cache='prefix')",
    "dual": "approximate: what stands around a block is read once, with the block still masked (cache='dual')",
}


@dataclass
class _Row:
    """A request being decoded: prompt and canvas, and the masks that are left in them."""

    request: Request
    sampler: RowSampler
    # int64 [prompt + canvas], the same on the device and on the host
    ids: Tensor
    tokens: list[int]
    # masked positions in the order in which they are filled: stages[0] is the block being filled
    stages: deque[list[int]]
    # how many masks each coming forward of this block fills, for the rules that count
    counts: deque[int] = field(default_factory=deque)
    # fp64 [prompt + canvas], a draw for every position; None where nothing is drawn
    uniforms: Tensor | None = None
    has_gaps: bool = False
    num_emitted: int = 0

    @property
    def gaps(self) -> list[int]:
        return self.stages[0]

    @property
    def pipeline(self) -> LogitsPipeline:
        return self.sampler.pipeline


class DParallelDecoder:
    """One forward a step over all live rows, each at its own block (``accel.axes.Decoder``).

    With a cache a step has up to two: the rows that enter a block are read whole, the others in their blocks alone.
    """

    def __init__(self, target: Denoiser, options: DParallelOptions, stats: Stats) -> None:
        self.target = target
        self.options = options
        self.stats = stats
        self.mask_token = target.facts.mask_token
        self.plan: Plan = options.plan(target.facts)
        self.live: dict[int, _Row] = {}
        # the rows inside a block, and what was kept when each of them entered it
        self._inside: list[_Row] = []
        self._cache: BlockCache | None = None
        if options.cache != "none" and not target.supports_cache:
            raise IncompatibleError(
                f"cache={options.cache!r}: this model has no keys and values that could be kept; use cache='none'"
            )
        stats.method, stats.lossless = "dparallel", False
        if options.cache in _APPROXIMATE:
            stats.notes.append(_APPROXIMATE[options.cache])

    def admit(self, requests: Sequence[Request]) -> None:
        """Lay out a canvas of masks behind each prompt; nothing is read before the first step."""
        rows = [self._row(request) for request in requests]
        self.live.update({row.request.id: row for row in rows})
        self.stats.prompt_tokens += sum(len(request.prompt) for request in requests)

    def step(self) -> list[Emission]:
        """Fill what one forward is certain of, and hand out the tokens that have no mask before them any more."""
        start = time.perf_counter()
        rows = [row for row in self.live.values() if row.stages]
        if not rows:
            return []
        at = [torch.tensor(row.gaps, device=self.target.device) for row in rows]
        found = self._certainty(rows, at, self._logits(rows, at))
        self._fill(rows, at, found)
        emissions = [emission for row in rows if (emission := self._emission(row)) is not None]
        self.stats.add_seconds("decode", time.perf_counter() - start)
        return emissions

    def evict(self, request_ids: Sequence[int]) -> None:
        """Drop rows, finished or not; ids that were never admitted are fine."""
        self._leave([self.live.pop(id) for id in request_ids if id in self.live])

    def _row(self, request: Request) -> _Row:
        self.check(request)
        length, mask = self.plan.block_length, self.mask_token
        canvas = -(-request.max_new_tokens // length) * length
        prompt = request.prompt.tolist()
        tokens = [*prompt, *[mask] * canvas]
        # a prompt's own gaps come first, as many at a time as a block has
        gaps = [position for position, token in enumerate(prompt) if token == mask]
        parts = [gaps, list(range(len(prompt), len(tokens)))]
        stages = deque(part[i : i + length] for part in parts for i in range(0, len(part), length))
        ids = torch.cat([request.prompt, request.prompt.new_full((canvas,), mask)])
        row = _Row(request, RowSampler(request), ids, tokens, stages, has_gaps=bool(gaps))
        if request.do_sample:
            row.uniforms = row.sampler.uniforms(len(tokens)).to(ids.device)
        self._enter(row)
        return row

    def _enter(self, row: _Row) -> None:
        """Called when a row comes to a new block."""
        if self.plan.threshold is None and row.stages:
            row.counts = deque(self.plan.counts(len(row.gaps)))

    def _logits(self, rows: Sequence[_Row], at: Sequence[Tensor]) -> list[Tensor]:
        """Logits [L, V] of each row's masks."""
        if self.options.cache == "none":
            self._count(len(rows))
            return self.target.logits([row.ids for row in rows], at)
        logits: dict[int, Tensor] = {}
        inside = [row.request.id for row in self._inside]
        asked = {row.request.id: positions for row, positions in zip(rows, at, strict=True)}
        if self._cache is not None:
            self._count(len(inside))
            ids = [row.ids for row in self._inside]
            said = self.target.logits_cached(self._cache, ids, [asked[id] for id in inside])
            logits = dict(zip(inside, said, strict=True))
        fresh = [row for row in rows if row.request.id not in logits]
        if fresh:
            self._count(len(fresh))
            starts, stops = [row.gaps[0] for row in fresh], [row.gaps[-1] + 1 for row in fresh]
            dual = self.options.cache == "dual"
            cache, blocks = self.target.open([row.ids for row in fresh], starts, stops, dual=dual)
            for row, start, block in zip(fresh, starts, blocks, strict=True):
                # the gaps of a prompt need not be neighbours
                logits[row.request.id] = block[asked[row.request.id] - start]
            self._inside += fresh
            self._cache = cache if self._cache is None else cache.join([self._cache, cache])
            self.stats.state_bytes = max(self.stats.state_bytes, self._cache.nbytes())
        return [logits[row.request.id] for row in rows]

    def _certainty(self, rows: Sequence[_Row], at: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Certainty]:
        """What would be filled in at each row's masks, and how certain that is: of each row, [L]."""
        kinds: dict[tuple[int, bool], list[int]] = {}
        for place, row in enumerate(rows):
            kinds.setdefault((id(row.pipeline), row.request.do_sample), []).append(place)
        found: dict[int, Certainty] = {}
        for members in kinds.values():
            joined = torch.cat([logits[i] for i in members]) if len(members) > 1 else logits[members[0]]
            first = rows[members[0]]
            if not first.pipeline and not first.request.do_sample:
                together = certainty(joined, forbidden=self.mask_token)
            else:
                draws = [u[at[i]] for i in members if (u := rows[i].uniforms) is not None]
                together = self._processed(first.pipeline, joined, torch.cat(draws) if draws else None)
            lengths = [len(at[i]) for i in members]
            parts = zip(*(part.split(lengths) for part in together), strict=True)
            found.update(zip(members, (Certainty(*part) for part in parts), strict=True))
        return [found[place] for place in range(len(rows))]

    def _processed(self, pipeline: LogitsPipeline, logits: Tensor, uniforms: Tensor | None) -> Certainty:
        """logits [N, V], uniforms fp64 [N] → [N], judged on the distribution that the processors leave."""
        # before any truncation: the mask must not take the place of a token that could be chosen
        logits = logits.index_fill(-1, torch.tensor([self.mask_token], device=logits.device), -torch.inf)
        scores = pipeline.warp(logits) if pipeline else logits.float()
        found = certainty(scores, forbidden=self.mask_token)
        if uniforms is None:
            return found
        drawn = sample(scores, uniforms=uniforms)
        # a drawn token is as certain as it is probable, which the most likely one's probability says nothing of
        return Certainty(drawn.token, drawn.logprob.exp(), found.entropy)

    def _fill(self, rows: Sequence[_Row], at: Sequence[Tensor], found: Sequence[Certainty]) -> None:
        """Decide for all rows at once which masks are filled, and fill them: the step's one wait for the device."""
        device = self.target.device
        lengths = torch.tensor([len(row.gaps) for row in rows], device=device)
        token, probability, entropy = (pad_sequence(list(part), batch_first=True) for part in zip(*found, strict=True))
        masked = torch.arange(token.shape[1], device=device) < lengths[:, None]  # [R, L]
        counts = None
        if self.plan.threshold is None:
            counts = torch.tensor([row.counts.popleft() for row in rows], device=device)
        chosen = commit(
            Certainty(token, probability, entropy),
            masked,
            rule=self.plan.rule,
            threshold=self.plan.threshold,
            count=counts,
            strict=self.plan.strict,
        )
        for i, (row, places) in enumerate(zip(rows, at, strict=True)):
            row.ids[places] = torch.where(chosen[i, : len(places)], token[i, : len(places)], self.mask_token)
        chosen_here, token_here = torch.stack([chosen.long(), token]).tolist()
        done = []
        for row, taken, tokens in zip(rows, chosen_here, token_here, strict=True):
            filled = {p: t for p, t, yes in zip(row.gaps, tokens, taken, strict=False) if yes}
            for position, value in filled.items():
                if value < 0:  # a GPU's answer where every token is forbidden
                    raise ValueError(NOTHING_TO_CHOOSE)
                row.tokens[position] = value
            row.stages[0] = [position for position in row.gaps if position not in filled]
            if not row.gaps:
                row.stages.popleft()
                self._enter(row)
                done.append(row)
        self._leave(done)

    def _emission(self, row: _Row) -> Emission | None:
        """The row's tokens that are new and have no mask before them; without early stopping all of them at once."""
        if row.stages and not self.options.early_stop:
            return None
        begin = len(row.request.prompt)
        settled = (row.gaps[0] if row.stages else len(row.tokens)) - begin
        # the canvas is whole blocks: what is too much is not shown
        settled = min(settled, row.request.max_new_tokens)
        if settled <= row.num_emitted:
            return None
        tokens = row.tokens[begin + row.num_emitted : begin + settled]
        prompt = row.tokens[:begin] if row.has_gaps and not row.num_emitted else None
        row.num_emitted = settled
        return Emission(row.request.id, tokens, prompt=prompt)

    def _leave(self, rows: Iterable[_Row]) -> None:
        """These rows are done with their block: nothing is kept for them any more."""
        gone = {row.request.id for row in rows}
        keep = [index for index, row in enumerate(self._inside) if row.request.id not in gone]
        if len(keep) == len(self._inside):
            return
        self._inside = [self._inside[index] for index in keep]
        self._cache = self._cache.select(keep) if keep and self._cache is not None else None

    def _count(self, num_rows: int) -> None:
        self.stats.target_calls += 1
        self.stats.row_calls += num_rows

    def check(self, request: Request) -> None:
        self.options.check_length(request.max_new_tokens)
        if request.segments:
            raise IncompatibleError(
                "a cartridge in front of a masked-diffusion model: its keys and values were made by reading from left "
                "to right; leave it out"
            )
        if request.keep_logits or request.keep_scores:
            what = "output_logits" if request.keep_logits else "output_scores"
            raise IncompatibleError(
                f"{what} with method 'dparallel': a token has logits in every forward until it is settled; leave it out"
            )
        for processor in RowSampler(request).pipeline.processors:
            if type(processor) not in IGNORE_IDS:
                raise IncompatibleError(
                    f"{type(processor).__name__} reads the text from left to right, and method 'dparallel' fills it in "
                    "any order: leave out the setting that adds it; temperature, top_k, top_p and min_p work"
                )

        self._check_room(request)

    def _check_room(self, request: Request) -> None:
        limit, length = self.target.max_positions, self.plan.block_length
        canvas = -(-request.max_new_tokens // length) * length
        if limit is None or len(request.prompt) + canvas <= limit:
            return
        most = (limit - len(request.prompt)) // length * length
        advice = f"set max_new_tokens to at most {most}" if most > 0 else "shorten the prompt"
        raise OptionError(
            f"a prompt of {len(request.prompt)} tokens and {canvas} masks for max_new_tokens={request.max_new_tokens} "
            f"exceed the model's {limit} positions: {advice}"
        )
