"""One timed call of generate(): its batch, the clock, the streamer that stamps chunks, and the record that is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from accel.bench.arms import Arm

Item = TypeVar("Item")


class StampStreamer(BaseStreamer):
    """Notes when each chunk of new tokens arrives; the first put() of a generate() call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._seen_prompt = False

    def put(self, value: Any) -> None:
        if self._seen_prompt:
            self.times.append(time.perf_counter())
        self._seen_prompt = True

    def end(self) -> None: ...


@dataclass
class Record:
    """One run of one arm on one prompt; times in seconds, memory in bytes.

    ``times`` are the moments, from the call's start, at which a chunk of tokens was handed out. ``verdict`` is the
    gate's word on the output (see accel.bench.gate), ``margin`` how far the logits were apart where it had to ask.
    """

    prompt: str
    category: str
    group: str
    arm: str
    turn: int = 0
    repetition: int = 0
    # what the tokens were drawn at; 0 is greedy
    temperature: float = 0.0
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    stats: dict[str, Any] | None = None
    peak_bytes: int = 0
    verdict: str = ""
    margin: float | None = None
    reason: str = ""
    error: str = ""

    @property
    def output_tokens(self) -> int:
        return len(self.tokens)

    @property
    def ttft(self) -> float:
        return self.times[0] if self.times else self.seconds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock reads finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(arm: Arm, model: Any, input_ids: Tensor, kwargs: Mapping[str, Any], record: Record) -> Record:
    """Time ``arm`` on ``input_ids`` [1, T], with a model already prepared for it; fills and returns ``record``."""
    device = input_ids.device
    streamer = StampStreamer()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    output, start, record.seconds = clocked(model, **inputs, streamer=streamer, **{**kwargs, **arm.kwargs})
    record.times = [stamp - start for stamp in streamer.times]
    record.peak_bytes = peak_bytes(device)
    sequences = getattr(output, "sequences", output)
    record.prompt_tokens = input_ids.shape[1]
    record.tokens = sequences[0, input_ids.shape[1] :].tolist()
    stats = arm.stats(model)
    record.stats = None if stats is None else stats.as_dict()
    return record


def clocked(model: Any, **kwargs: Any) -> tuple[Any, float, float]:
    """What ``model.generate(**kwargs)`` returns, the moment it was called, and the seconds until it was done."""
    synchronize(model.device)
    start = time.perf_counter()
    output = model.generate(**kwargs)
    synchronize(model.device)
    return output, start, time.perf_counter() - start


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Prompts of token ids as the batch that generate() wants: ``input_ids`` and ``attention_mask`` [R, T]."""
    longest = max(len(each) for each in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, each in enumerate(rows):
        ids[place, longest - len(each) :] = torch.tensor(list(each))
        mask[place, longest - len(each) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """The same, another one first: who comes first in a turn must not be the same every time."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def peak_bytes(device: torch.device) -> int:
    """The device's peak since the last reset; on a CPU the process's resident memory now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def generate_kwargs(tokenizer: Any, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """What every arm's generate() is given; greedy at temperature 0."""
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        kwargs["temperature"] = temperature
    # without a pad token transformers warns on every call
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return kwargs if pad is None else {**kwargs, "pad_token_id": pad}
