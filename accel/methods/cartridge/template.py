"""Where a document stands in a prompt: what a cartridge replaces, and what is left for the model to read.

Knows tokenizers and chat templates. The two parts, one behind the other, are the prompt with the document in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.errors import OptionError, unknown_name
from accel.methods.cartridge.cartridge import TEMPLATES

Messages = Sequence[Mapping[str, str]]


def document_ids(tokenizer: Any, text: str, template: str, instruction: str = "") -> list[int]:
    """Token ids of a document as a cartridge's part of the prompt: a system message, or the text with its start."""
    content = instruction + text
    if _checked(template) == "text":
        ids: list[int] = tokenizer(content)["input_ids"]
        return ids
    return _ids(tokenizer, _system(tokenizer, content))


def query_ids(tokenizer: Any, messages: Messages, template: str) -> list[int]:
    """Token ids of a conversation behind a cartridge, up to where the answer begins.

    A system message of the caller's own stands behind the cartridge's.
    """
    if _checked(template) == "text":
        return _plain_query(tokenizer, messages)
    head = _system(tokenizer, "")
    whole = _rendered(tokenizer, [{"role": "system", "content": ""}, *messages], add_generation_prompt=True)
    if not whole.startswith(head):
        raise OptionError("the chat template writes a system message differently in front of others: use template text")
    return _ids(tokenizer, whole[len(head) :])


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text behind a cartridge: without the start of a text, which the cartridge has."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _plain_query(tokenizer: Any, messages: Messages) -> list[int]:
    """The conversation by itself, without the start of a text, which the cartridge has."""
    if getattr(tokenizer, "chat_template", None) is None:
        return text_ids(tokenizer, "".join(f"\n\n{each['content']}\n" for each in messages))
    text = _rendered(tokenizer, messages, add_generation_prompt=True)
    if getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token:
        text = text.removeprefix(tokenizer.bos_token)
    return _ids(tokenizer, text)


def _checked(template: str) -> str:
    if template not in TEMPLATES:
        raise OptionError(unknown_name("template", template, TEMPLATES))
    return template


def _system(tokenizer: Any, content: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise OptionError("the tokenizer has no chat template: use template text")
    try:
        return _rendered(tokenizer, [{"role": "system", "content": content}])
    except Exception as error:  # jinja's own, raised by the template
        raise OptionError(f"the chat template takes no system message alone ({error}): use template text") from error


def _rendered(tokenizer: Any, messages: Messages, **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    # a template writes its special tokens itself
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
