"""A transformers model on this machine as a student or teacher, attached to accel or not.

With accel attached the samples of a question share one reading of its prompt, and its draft and cartridges are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accel.errors import OptionError, first_line
from accel.methods.cascade import background
from accel.methods.cascade.answerer import Messages, Reply, Sample, Sampling, Unanswered, check_question
from accel.methods.cascade.prices import Price, Usage

Encode = Callable[[Messages], Sequence[int]]


class LocalAnswerer:
    """An ``Answerer`` over ``model.generate()``. One question at a time: others wait, within their own limits, also
    those of other answerers over the same model.

    ``encode``: messages → the prompt's tokens; the tokenizer's chat template where there is none. ``settings`` are
    further arguments of every ``generate()`` (``cartridges=[…]``).
    """

    shares_prompt = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        price: Price | None = None,
        encode: Encode | None = None,
        **settings: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or model.config._name_or_path or "local"
        self.price = price
        self._encode = encode or self._templated
        self._settings = settings

    def sample(self, messages: Messages, n: int, settings: Sampling, *, seconds: float) -> Reply:
        """n samples of one batch; what is not finished when the time is over is no answer."""
        check_question(messages, n, seconds)
        if n > 1 and settings.temperature == 0:
            raise OptionError(f"temperature=0 with n={n}: a local model would say the same {n} times; ask once")
        began = time.monotonic()
        lock = background.lock_of(self.model)
        if not lock.acquire(timeout=seconds):
            raise Unanswered(f"{self.name}: busy for {seconds:g} s", seconds=seconds, usage=Usage())
        try:
            left = seconds - (time.monotonic() - began)
            prompt = [int(token) for token in self._encode(messages)]
            samples, written = self._samples(self._generate(prompt, n, settings, left), settings)
        except Exception as error:  # too long a prompt, memory that ran out, a template that knows no system message
            raise Unanswered(f"{self.name}: {first_line(error)}", seconds=time.monotonic() - began) from error
        finally:
            lock.release()
        spent = time.monotonic() - began
        usage = Usage(len(prompt), 0, written)
        if spent > seconds:
            raise Unanswered(f"{self.name}: no answer within {seconds:g} s", seconds=spent, usage=usage)
        return Reply(tuple(samples), usage, spent, self.name)

    def _generate(self, prompt: list[int], n: int, settings: Sampling, seconds: float) -> list[list[int]]:
        """The new tokens of each row, padding included."""
        ids = torch.tensor([prompt], device=self.model.device)
        choices: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            # a checkpoint's own top-k or top-p would change what is asked for here
            choices = {
                "do_sample": True,
                "temperature": float(settings.temperature),
                "top_k": 0,
                "top_p": settings.top_p or 1.0,
            }
        if settings.stop:
            choices |= {"stop_strings": list(settings.stop), "tokenizer": self.tokenizer}
        with torch.random.fork_rng(enabled=settings.seed is not None):
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_return_sequences=n,
                max_new_tokens=settings.max_tokens,
                max_time=max(seconds, 1e-3),
                **choices | self._settings,
            )
        rows: list[list[int]] = out[:, len(prompt) :].tolist()
        return rows

    def _samples(self, rows: list[list[int]], settings: Sampling) -> tuple[list[Sample], int]:
        """Texts, and how many tokens were written for them."""
        samples, written = [], 0
        for row in rows:
            tokens, ended = self._until_end(row)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            stops = [at for stop in settings.stop if (at := text.find(stop)) >= 0]
            # a stop text ends a row: an end behind it is padding, which often is the same token
            written += len(tokens) - (1 if stops and ended else 0)
            cut = len(tokens) >= settings.max_tokens and not ended and not stops
            samples.append(Sample(text[: min(stops)] if stops else text, "length" if cut else "stop"))
        return samples, written

    def _until_end(self, row: list[int]) -> tuple[list[int], bool]:
        """A row's own tokens with the one that ends it, and whether there is one; padding follows it or a stop text."""
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        for index, token in enumerate(row):
            if token in ends:
                return row[: index + 1], True
        length = len(row)
        while length and row[length - 1] == config.pad_token_id:
            length -= 1
        return row[:length], False

    def _templated(self, messages: Messages) -> Sequence[int]:
        """The chat template's prompt; the text alone for a model without one."""
        if getattr(self.tokenizer, "chat_template", None) is not None:
            encoded = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        else:
            encoded = self.tokenizer("\n\n".join(message["content"] for message in messages))
        ids: Sequence[int] = encoded["input_ids"]
        return ids
