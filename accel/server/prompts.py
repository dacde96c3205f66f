"""What a request says, as token ids: texts, conversations through the model's template, ids as they are.

Knows the tokenizer, the template and how much fits. Rendering and tokenising take time: both run off the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import accel
from accel.engine.attached import STATE
from accel.errors import AccelError, first_line, unknown_name
from accel.methods.cartridge import template
from accel.server.errors import ApiError, without_paths
from accel.server.protocol import Conversation, Message, Prompt

# arguments of apply_chat_template that are not the template's own
_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
Show = Callable[[list[dict[str, Any]]], tuple[list[dict[str, Any]], dict[str, Any]]]


class Prompts:
    """The prompts of one model. ``max_tokens``: the most that a prompt may have; its context where None."""

    def __init__(self, model: accel.Model, max_tokens: int | None = None) -> None:
        if model.tokenizer is None:
            raise ApiError("the model was loaded without a tokenizer")
        self.tokenizer: Any = model.tokenizer
        self.context_length: int | None = getattr(model.model.config, "max_position_embeddings", None)
        self._max_tokens = max_tokens
        self._vocab_size = model.model.get_input_embeddings().num_embeddings
        # characters of the longest token: what bounds the tokens of a text from below without reading it
        self._longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        self._attached = model.model.__dict__.get(STATE)

    def count(self, prompt: Prompt) -> int:
        """How many prompts ``prompt`` is."""
        return 1 if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else len(prompt)

    def read(
        self, prompt: Prompt, cartridges: Sequence[str] | None, *, special: bool = True, param: str = "prompt"
    ) -> list[list[int]]:
        """Token ids of each prompt."""
        each: Sequence[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not each:
            raise ApiError(f"{param} is an empty list: give at least one", param=param)
        # a cartridge holds the start of the text
        start = special and self.kind(cartridges) is None
        return [self._checked(self._one(one, start, param), param) for one in each]

    def text(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, however many."""
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        return list(ids)

    def conversation(
        self, chat: Conversation, cartridges: Sequence[str] | None, show: Show, *, special: bool = False
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. ``show`` puts tools into its messages."""
        return self._checked(self._rendered(chat, self.kind(cartridges), show, special), "messages")

    def positions(self, cartridges: Sequence[str] | None) -> int:
        """How much of the context the cartridges in front of a prompt take."""
        if self._attached is None:
            return 0
        with self._attached.cartridges.use(None if cartridges is None else list(cartridges), 1) as (seat,):
            return seat.num_positions

    def kind(self, cartridges: Sequence[str] | None) -> str | None:
        """What the cartridges in front of a prompt say about it; None where there are none."""
        if self._attached is None:
            if cartridges:
                raise ApiError(f"cartridges: {', '.join(cartridges)}: this model has none", param="accel.cartridges")
            return None
        held = self._attached.cartridges
        for name in cartridges or ():
            # never a path: the store would go and look
            if name not in held.store:
                raise ApiError(unknown_name("cartridge", name, held.store.names()), param="accel.cartridges")
        found: str | None = held.template(None if cartridges is None else list(cartridges))
        return found

    def check_ids(self, tokens: Sequence[int], param: str) -> None:
        highest = max(tokens, default=0)
        if highest >= self._vocab_size:
            raise ApiError(f"token id {highest} is out of vocabulary: ids are 0 to {self._vocab_size - 1}", param=param)

    def room(self, prompt_tokens: int, asked: int | None, default: int | None, param: str, *, taken: int = 0) -> int:
        """Tokens that may be generated behind a prompt; ``taken``: positions in front of it."""
        if self.context_length is None:
            return asked if asked is not None else default if default is not None else 4096
        left = self.context_length - taken - prompt_tokens
        wanted = asked if asked is not None else min(left, default) if default is not None else left
        if left < 1 or wanted > left:
            front = f", of which cartridges take {taken}" if taken else ""
            raise ApiError(
                f"This model's maximum context length is {self.context_length} tokens{front}. However, you requested "
                f"{prompt_tokens + max(wanted, 1)} tokens ({prompt_tokens} in the {param}, {max(wanted, 1)} in the "
                f"completion). Please reduce the length of the {param} or completion.",
                param=param,
            )
        return wanted

    def _one(self, prompt: str | list[int], special: bool, param: str) -> list[int]:
        if not isinstance(prompt, str):
            self.check_ids(prompt, param)
            return prompt
        self._check_length(prompt, param)
        return self.text(prompt, special=special)

    def _check_length(self, text: str, param: str) -> None:
        """Refuse what cannot fit before time is spent on it."""
        at_least = len(text) // self._longest
        if self._limit is not None and at_least > self._limit:
            self._too_long(f"at least {at_least}", param)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(f"{param}: not a single token; there is nothing to continue", param=param)
        if self._limit is not None and len(ids) > self._limit:
            self._too_long(str(len(ids)), param)
        return ids

    @property
    def _limit(self) -> int | None:
        limits = [each for each in (self.context_length, self._max_tokens) if each is not None]
        return min(limits, default=None)

    def _too_long(self, count: str, param: str) -> None:
        if self._limit == self.context_length:
            what = f"This model's maximum context length is {self._limit} tokens."
        else:
            what = f"This server's maximum prompt length is {self._limit} tokens."
        raise ApiError(f"{what} However, your {param} has {count} tokens. Please reduce its length.", param=param)

    def _rendered(self, chat: Conversation, kind: str | None, show: Show, special: bool) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None and kind is None:
            raise ApiError("this model has no chat template: use /v1/completions", param="messages")
        messages, arguments = show([_plain(message) for message in chat.messages])
        given: Mapping[str, Any] = chat.chat_template_kwargs or {}
        if _RESERVED & set(given):
            names = ", ".join(sorted(_RESERVED & set(given)))
            raise ApiError(f"chat_template_kwargs may not have {names}", param="chat_template_kwargs")
        for message in messages:
            self._check_length(str(message.get("content") or ""), "messages")
        if kind is not None:
            return self._behind_cartridge(chat, messages, kind)
        ends = {"continue_final_message": bool(chat.continue_final_message)}
        ends["add_generation_prompt"] = chat.add_generation_prompt is not False and not chat.continue_final_message
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **dict(given), **arguments, **ends)
        except Exception as error:
            # a template refuses conversations in its own words, and with whatever exception they led to
            said = without_paths(first_line(error))
            raise ApiError(f"the chat template refuses the messages: {said}", param="messages") from error
        return self.text(text, special=special)

    def _behind_cartridge(self, chat: Conversation, messages: list[dict[str, Any]], kind: str) -> list[int]:
        if chat.continue_final_message or chat.add_generation_prompt is False or chat.chat_template_kwargs:
            raise ApiError(
                "behind a cartridge a conversation ends where the answer begins: leave out continue_final_message, "
                "add_generation_prompt and chat_template_kwargs, or give accel.cartridges: []",
                param="accel.cartridges",
            )
        try:
            return template.query_ids(self.tokenizer, messages, kind)
        except AccelError:
            raise
        except Exception as error:
            said = without_paths(first_line(error))
            raise ApiError(f"the chat template refuses the messages: {said}", param="messages") from error


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates know it: content is text."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        plain["content"] = "".join(part.text for part in message.content)
    # templates that do not know of calls write what they find
    plain.setdefault("content", "")
    if message.role == "developer":
        plain["role"] = "system"
    return plain
