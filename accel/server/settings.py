"""What whoever starts a server decides about it."""

from __future__ import annotations

from dataclasses import dataclass

from accel.errors import OptionError


@dataclass(frozen=True)
class ServerSettings:
    """Limits and names. Every limit is there because a request could otherwise cost what it likes."""

    model_name: str
    # what the model is, for clients that load its tokenizer; the name where None
    model_root: str | None = None
    # none: everybody may ask
    api_keys: frozenset[str] = frozenset()
    max_body_bytes: int = 4 * 2**20
    # continuations of a prompt, and prompts of a request
    max_n: int = 64
    max_prompts: int = 64
    max_logprobs: int = 20
    # the model's context where None
    max_prompt_tokens: int | None = None
    # tokens of an answer whose request does not say; the rest of the context where None
    default_max_tokens: int | None = None
    # seconds that any request may take
    request_timeout: float | None = None
    # none: no browser may ask from another page
    cors_origins: tuple[str, ...] = ()
    log_unknown_fields: bool = True

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_n", "max_prompts"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_logprobs < 0:
            raise OptionError(f"max_logprobs={self.max_logprobs}: must be at least 0")
        if "" in self.api_keys:
            raise OptionError("an API key is empty: give one with characters in it, or none at all")
        if any(not (key.isascii() and key.isprintable()) for key in self.api_keys):
            raise OptionError("an API key has characters that a header cannot carry: use printable ASCII")
