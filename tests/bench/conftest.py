"""A model small enough to generate in milliseconds, a byte tokenizer, and stand-ins for accel's public names."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import accel
from accel.types import Stats


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return byte_llama(max_position_embeddings=2048)


@pytest.fixture
def fake_accel(monkeypatch: pytest.MonkeyPatch, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list:
    """accel.load gives the tiny model; attach and detach only note that they were called. Yields the calls."""
    calls: list = []

    def attach(target: LlamaForCausalLM, *artifacts: object, **options: object) -> LlamaForCausalLM:
        calls.append(("attach", artifacts, options))
        return target

    def stats(target: LlamaForCausalLM) -> Stats:
        return Stats(row_calls=4, drafted_tokens=8, accepted_tokens=4, cost_ratio=0.05)

    loaded = SimpleNamespace(model=model, tokenizer=tokenizer)
    monkeypatch.setattr(accel, "load", lambda name, **options: loaded, raising=False)
    monkeypatch.setattr(accel, "attach", attach, raising=False)
    monkeypatch.setattr(accel, "detach", lambda target: calls.append(("detach",)), raising=False)
    monkeypatch.setattr(accel, "stats", stats, raising=False)
    return calls


@pytest.fixture
def changed_generate(model: LlamaForCausalLM):
    """A context manager: within it the model's generate() passes its result through ``change`` first."""

    @contextlib.contextmanager
    def changed(change):
        original = model.generate
        model.generate = lambda **kwargs: change(original(**kwargs), kwargs)
        try:
            yield model
        finally:
            del model.generate

    return changed
