"""Every kind of model behind a service: its answers are those of generate(), whoever else is under way."""

from __future__ import annotations

import queue
from contextlib import contextmanager

import pytest
import torch
from linear_models import random_tensors

import accel
from accel.engine.jobs import Done, Failed, Job, Piece
from accel.engine.service import serve
from accel.errors import AccelError, IncompatibleError
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.lawcat.artifact import Lawcat
from accel.models.diffusion import DiffusionFacts, set_facts
from accel.models.linear import LinearSpec

NEW, EOS = 16, 2
PROMPTS = [[5, 9, 11, 23], [7, 7, 30, 31, 32, 33, 34, 35, 36, 37, 38], list(range(3, 60)), [44], [12, 13] * 20]


@contextmanager
def serving(model, **limits):
    service = serve(model, **limits)
    try:
        yield service
    finally:
        service.close()


def ask(service, prompts, **job):
    """Each prompt's answer, all asked at once: tokens, and what came last."""
    heard = [queue.Queue() for _ in prompts]
    for prompt, events in zip(prompts, heard, strict=True):
        service.submit(Job(prompt, NEW, stop_tokens=frozenset({EOS}), **job), events.put)
    answers = []
    for events in heard:
        tokens: list[int] = []
        while isinstance(event := events.get(timeout=60), Piece):
            tokens += event.tokens
        assert isinstance(event, Done), event
        answers.append((tokens, event))
    return answers


def alone(model, prompt, **kwargs):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=EOS, **kwargs)
    return out[0, len(prompt) :].tolist()


def conversion(model, **spec):
    size = model.config.hidden_size // model.config.num_attention_heads
    layers = tuple(range(model.config.num_hidden_layers))
    chosen = LinearSpec(**{"layers": layers, "feature_size": size // 2, "gate_rank": 3} | spec)
    return Lawcat.of("a-lawcat", chosen, random_tensors(model.config, chosen, None), model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "falcon"])
@pytest.mark.parametrize("piece", [5, 256])
def test_a_draft_model(tiny, family, piece):
    model, draft = tiny.pair(family)
    accel.attach(model, draft, draft_length=3)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with serving(model, piece=piece) as service:
        for _ in range(2):
            assert [tokens for tokens, _ in ask(service, PROMPTS)] == expected
        assert service.gauges().drafted_tokens > 0
    accel.detach(model)


@pytest.mark.parametrize("kind", [{}, {"layers": (1,)}, {"window": 4}])
@pytest.mark.parametrize("how", [{"method": "plain"}, {"drafter": "ngram", "draft_length": 4}])
@pytest.mark.parametrize("piece", [3, 256])
def test_linear_layers(tiny, kind, how, piece):
    model = tiny.build("llama")
    accel.attach(model, conversion(model, **kind), **how)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with serving(model, piece=piece, max_rows=3) as service:
        for _ in range(2):
            assert [tokens for tokens, _ in ask(service, PROMPTS)] == expected
        with pytest.raises(IncompatibleError, match="dparallel"):
            ask(service, PROMPTS, method="dparallel")


def test_layers_that_change_from_call_to_call_cannot_be_shared(tiny):
    model = tiny.build("llama")
    accel.attach(model, conversion(model), lawcat="auto")
    with pytest.raises(IncompatibleError, match="lawcat='draft'"):
        serve(model)


def test_a_masked_diffusion_model(tiny):
    model = tiny.build("llama", peak=1.3).double()
    set_facts(model, DiffusionFacts(mask_token=66, block_length=4, threshold=0.8, pad_token=0))
    accel.attach(model)
    prompts = PROMPTS[:3]
    expected = [alone(model, prompt) for prompt in prompts]
    with serving(model) as service:
        answers = ask(service, prompts)
        assert [tokens for tokens, _ in answers] == expected
        assert {done.stats.method for _, done in answers} == {"dparallel"}
        with pytest.raises(IncompatibleError, match="logprobs"):
            ask(service, prompts, logprobs=1)
        # no room for a canvas of masks: this job's fault alone
        refused: queue.Queue = queue.Queue()
        service.submit(Job([5] * 241, NEW, stop_tokens=frozenset({EOS})), refused.put)
        assert isinstance(refused.get(timeout=30), Failed)
        assert service.failure is None


def test_cartridges_of_each_job(tiny):
    model = tiny.build("llama")
    texts = {"a": list(range(20, 50)), "b": list(range(50, 66))}
    accel.attach(model, drafter="suffix", draft_length=3)
    store = accel.cartridges(model)
    for name, ids in texts.items():
        given = {"method": "whole", "exact": True, "documents": (document.describe(name, len(ids)),)}
        store.add(Cartridge.of(name, document.read(model, ids), model, **given))
    wanted = [(), ("a",), ("b",), ("a", "b"), ("a",)]
    expected = [alone(model, p, cartridges=list(names)) for p, names in zip(PROMPTS, wanted, strict=True)]
    with serving(model, piece=7) as service:
        for _ in range(2):
            heard = [queue.Queue() for _ in PROMPTS]
            for prompt, names, events in zip(PROMPTS, wanted, heard, strict=True):
                service.submit(Job(prompt, NEW, stop_tokens=frozenset({EOS}), cartridges=names), events.put)
            got = []
            for events in heard:
                tokens: list[int] = []
                while isinstance(event := events.get(timeout=60), Piece):
                    tokens += event.tokens
                got.append(tokens)
            assert got == expected
        assert {each["users"] for each in store.report()} == {0}
        store.remove("a")
        with pytest.raises(AccelError, match="no cartridge 'a' here; there are: b"):
            service.submit(Job([5], 2, cartridges=("a",)), lambda event: None)
