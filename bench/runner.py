"""The paired experiment: every arm on every prompt, close together in time, with the order rotating.

Machines drift (heat, neighbours, clocks). Running the arms of one prompt back to back, starting with another arm on
each prompt, makes drift hit all arms alike, and ratios are only ever taken within a prompt and a repetition.
Knows how to measure, not what the measurements mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.bench import gate
from accel.bench.arms import Arm, reference_of
from accel.bench.measure import Record, generate_kwargs, rotated, run
from accel.bench.workloads import Prompt, encode
from accel.errors import OptionError

# what every arm generates after it is prepared and before the clock starts; never a measured prompt, because a
# drafter that remembers earlier outputs would then know the answer
WARMUP_PROMPT = "Name three colours."
WARMUP_TOKENS = 4
# between the seeds of two prompts: more than anybody's repetitions
_SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class Settings:
    """How to measure; ``turns`` is how many of a prompt's turns are asked (the first only, unless told)."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    repeat: int = 1
    turns: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "repeat", "turns"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")


class Runner:
    """Measures ``arms`` on one shared ``model``; ``progress(prompt, arm)`` is called before each run."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        arms: Sequence[Arm],
        settings: Settings,
        progress: Callable[[Prompt, str], None] = lambda prompt, arm: None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.arms = list(arms)
        self.settings = settings
        self.progress = progress
        self.reference = reference_of(self.arms)
        self.notes: list[str] = []
        # arms that raised: name -> what; they are not run again
        self.broken: dict[str, str] = {}
        self._kwargs = generate_kwargs(tokenizer, settings.max_new_tokens, settings.temperature)
        self._warmup_ids = self._to_model(encode(tokenizer, [WARMUP_PROMPT]))

    def measure(self, prompts: Sequence[Prompt], skip: Collection[str] = ()) -> Iterator[list[Record]]:
        """Yield each prompt's records once all arms have run on it; prompts whose id is in ``skip`` are left out.

        The rotation counts skipped prompts too, so that a resumed run measures as one that never stopped.
        """
        self._first_warmup()
        for index, prompt in enumerate(prompts):
            if prompt.id not in skip:
                yield self._measure_prompt(index, prompt)

    def _first_warmup(self) -> None:
        """The process's first forwards allocate, compile and page in; nobody should pay for that on the clock."""
        for _ in range(2):
            self._generate_warmup(Arm(self.reference))

    def _measure_prompt(self, index: int, prompt: Prompt) -> list[Record]:
        records: list[Record] = []
        replies: list[str] = []
        for turn in range(min(self.settings.turns, len(prompt.turns))):
            input_ids = self._to_model(encode(self.tokenizer, prompt.turns[: turn + 1], replies))
            if not self._fits(prompt, input_ids):
                break
            of_turn = []
            for repetition in range(self.settings.repeat):
                for arm in rotated(self.arms, index + repetition):
                    if arm.name not in self.broken:
                        record = Record(prompt.id, prompt.category, prompt.group, arm.name, turn, repetition)
                        record.temperature = self.settings.temperature
                        # arms share a seed; prompts do not, or one lucky draw would be every prompt's
                        seed = self.settings.seed + repetition + _SEEDS_APART * index
                        of_turn.append(self._measure_arm(arm, input_ids, record, prompt, seed))
            reference = next(record.tokens for record in of_turn if record.arm == self.reference)
            self._judge(input_ids, reference, of_turn)
            # every arm is asked the next turn after the same reply
            replies.append(self.tokenizer.decode(reference, skip_special_tokens=True))
            records += of_turn
        return records

    def _measure_arm(self, arm: Arm, input_ids: Tensor, record: Record, prompt: Prompt, seed: int) -> Record:
        self.progress(prompt, arm.name)
        try:
            with arm.prepare(self.model):
                self._generate_warmup(arm)
                torch.manual_seed(seed)
                return run(arm, self.model, input_ids, self._kwargs, record)
        except Exception as error:  # a broken arm must not cost the others their measurements
            if arm.name == self.reference:
                raise
            record.error = f"{type(error).__name__}: {error}"
            self.broken[arm.name] = record.error
            return record

    def _generate_warmup(self, arm: Arm) -> None:
        kwargs = {**self._kwargs, **arm.kwargs, "max_new_tokens": WARMUP_TOKENS}
        mask = torch.ones_like(self._warmup_ids)
        self.model.generate(input_ids=self._warmup_ids, attention_mask=mask, **kwargs)

    def _judge(self, input_ids: Tensor, reference: Sequence[int], records: Sequence[Record]) -> None:
        for record in records:
            if record.error:
                record.verdict, record.reason = gate.FAILED, record.error
            elif self.settings.temperature > 0:
                record.verdict = gate.SAMPLED
            elif record.stats is not None and not record.stats["lossless"]:
                record.verdict = gate.IDENTICAL if list(reference) == record.tokens else gate.LOSSY
            else:
                verdict = gate.compare(self.model, input_ids, reference, record.tokens)
                record.verdict, record.margin, record.reason = verdict.name, verdict.margin, verdict.reason

    def _fits(self, prompt: Prompt, input_ids: Tensor) -> bool:
        context = getattr(self.model.config, "max_position_embeddings", None)
        needed = input_ids.shape[1] + self.settings.max_new_tokens
        if context is None or needed <= context:
            return True
        self.notes.append(f"prompt {prompt.id} left out: it needs {needed} positions and the model has {context}")
        return False

    def _to_model(self, input_ids: Tensor) -> Tensor:
        return input_ids.to(self.model.device)
