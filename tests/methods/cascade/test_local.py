"""A local model as an answerer: one reading of the prompt, honest counts, stop texts, seeds and limits."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from refusals import refusal

import accel
from accel.methods.cascade import background
from accel.methods.cascade.answerer import Sampling, Unanswered
from accel.methods.cascade.embedding import HiddenStateEmbedder
from accel.methods.cascade.local import LocalAnswerer
from accel.methods.cascade.prices import HourPrice, Usage

ASKED = [{"role": "user", "content": "what is behind the door?"}]
HOT = Sampling(temperature=1.0, max_tokens=12, seed=1)


@pytest.fixture
def model():
    return byte_llama(max_position_embeddings=512)


@pytest.fixture
def made(model):
    accel.attach(model)
    return LocalAnswerer(model, byte_tokenizer(), name="tiny", price=HourPrice(3.6))


class ReadPositions:
    """Counts the positions that a model reads."""

    def __init__(self, model):
        self.count = 0
        model.model.layers[0].register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, _module, args, kwargs, _output):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.count += hidden.shape[0] * hidden.shape[1]


def test_samples_share_one_reading_of_the_prompt(model, made):
    tokens = len(byte_tokenizer()(ASKED[0]["content"])["input_ids"])
    read = ReadPositions(model)
    reply = made.sample(ASKED, 5, HOT, seconds=60.0)
    assert len(reply.samples) == 5 and reply.usage.input_tokens == tokens
    # the prompt once, and what five rows wrote: read twice, the prompt alone would take more
    assert tokens <= read.count <= tokens + 5 * 2 * HOT.max_tokens
    assert made.shares_prompt and reply.model == "tiny"


def test_samples_are_those_of_generate(model, made):
    ids = byte_tokenizer()(ASKED[0]["content"], return_tensors="pt")["input_ids"]
    torch.manual_seed(1)
    rows = model.generate(ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=12)
    rows = rows[:, ids.shape[1] :]
    reply = made.sample(ASKED, 1, HOT, seconds=60.0)
    assert reply.samples[0].text == byte_tokenizer().decode(rows[0], skip_special_tokens=True)


def test_a_seed_repeats_samples_and_leaves_the_global_generator_alone(made):
    before = torch.random.get_rng_state()
    one, other = (made.sample(ASKED, 3, HOT, seconds=60.0) for _ in range(2))
    assert one.samples == other.samples and len({each.text for each in one.samples}) > 1
    assert torch.equal(before, torch.random.get_rng_state())
    different = made.sample(ASKED, 3, Sampling(temperature=1.0, max_tokens=12, seed=2), seconds=60.0)
    assert different.samples != one.samples


def test_counts_end_with_the_end_of_a_sample(model, made, monkeypatch):
    rows = [[65, 66, 0, 7, 7], [67, 68, 69, 70, 71], [72, 73, 7, 7, 7]]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 7
    monkeypatch.setattr(made, "_generate", lambda *_: rows)
    reply = made.sample(ASKED, 3, Sampling(max_tokens=5), seconds=60.0)
    assert reply.usage.output_tokens == 3 + 5 + 2
    assert [each.finish for each in reply.samples] == ["stop", "length", "stop"]
    decode = byte_tokenizer().decode
    assert [each.text for each in reply.samples] == [decode([65, 66]), decode([67, 68, 69, 70, 71]), decode([72, 73])]


def test_an_end_behind_a_stop_text_is_padding(model, made, monkeypatch):
    # as most models are set up: padding is the end's own token
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    monkeypatch.setattr(made, "_generate", lambda *_: [[65, 66, 0, 0, 0], [67, 68, 69, 0, 0]])
    reply = made.sample(ASKED, 2, Sampling(max_tokens=5, temperature=1.0, stop=("b",)), seconds=60.0)
    assert [each.text for each in reply.samples] == ["a", "cde"]
    # a and b; c, d, e and the end
    assert reply.usage.output_tokens == 2 + 4


def test_a_stop_text_is_no_part_of_the_sample(made):
    whole = made.sample(ASKED, 1, Sampling(temperature=0, max_tokens=12), seconds=60.0).samples[0].text
    # bytes that are no text have no stop text either
    stop = next(pair for at in range(1, 10) if (pair := whole[at : at + 2]).isascii())
    reply = made.sample(ASKED, 1, Sampling(temperature=0, max_tokens=12, stop=(stop,)), seconds=60.0)
    assert reply.samples[0].text == whole[: whole.index(stop)] and reply.samples[0].finish == "stop"
    assert reply.usage.output_tokens < 12


def test_a_template_is_used_where_there_is_one(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
    made = LocalAnswerer(accel.attach(model), tokenizer)
    reply = made.sample(ASKED, 1, HOT, seconds=60.0)
    assert reply.usage.input_tokens == len("<user>" + ASKED[0]["content"] + ">")
    own = LocalAnswerer(model, tokenizer, encode=lambda messages: [5, 6, 7])
    assert own.sample(ASKED, 1, HOT, seconds=60.0).usage.input_tokens == 3


def test_without_accel_attached_too(model):
    made = LocalAnswerer(model, byte_tokenizer(), name="plain")
    reply = made.sample(ASKED, 2, Sampling(temperature=0.7, max_tokens=4, top_p=0.9), seconds=60.0)
    assert len(reply.samples) == 2 and reply.usage.output_tokens <= 8


def test_a_slow_model_is_stopped(model, made):
    def slow(*_args, **_kwargs):
        time.sleep(0.05)

    model.model.layers[0].register_forward_hook(slow)
    began = time.monotonic()
    with pytest.raises(Unanswered, match=r"tiny: no answer within 0\.3 s") as caught:
        made.sample(ASKED, 1, Sampling(temperature=0, max_tokens=400), seconds=0.3)
    assert time.monotonic() - began < 5 and 0 < caught.value.usage.output_tokens < 100


def test_who_waits_too_long_for_a_busy_model_is_told(model, made):
    lock = background.lock_of(model)
    lock.acquire()
    threading.Timer(0.6, lock.release).start()
    with pytest.raises(Unanswered, match="busy for"):
        made.sample(ASKED, 1, HOT, seconds=0.2)
    # and who has the time gets an answer
    assert made.sample(ASKED, 1, HOT, seconds=60.0).samples


def test_what_goes_wrong_inside_is_one_line(model, made):
    def breaks(*_args, **_kwargs):
        raise RuntimeError("out of\nmemory")

    hook = model.model.layers[0].register_forward_hook(breaks)
    with pytest.raises(Unanswered, match=r"^tiny: out of$") as caught:
        made.sample(ASKED, 1, HOT, seconds=60.0)
    assert caught.value.usage is None
    hook.remove()
    with pytest.raises(Unanswered, match="shorten the prompt"):
        made.sample([{"role": "user", "content": "x" * 600}], 1, HOT, seconds=60.0)
    assert made.sample(ASKED, 1, HOT, seconds=60.0).usage != Usage()
    made.tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(Unanswered, match=r"^tiny: no system here$"):
        made.sample(ASKED, 1, HOT, seconds=60.0)
    made.tokenizer.chat_template = None
    assert "temperature=0 with n=2" in refusal(lambda: made.sample(ASKED, 2, Sampling(temperature=0), seconds=1.0))


def test_nobody_is_in_a_model_together(model, made):
    embedder = HiddenStateEmbedder(model, byte_tokenizer())
    other = LocalAnswerer(model, byte_tokenizer(), name="other")
    inside, together = threading.Lock(), []

    def enter(*_args):
        together.append(not inside.acquire(blocking=False))
        time.sleep(0.002)

    # the second of two threads in one model finds the lock taken
    model.model.register_forward_pre_hook(enter)
    model.model.register_forward_hook(lambda *_: inside.release() if inside.locked() else None)
    greedy = Sampling(temperature=0, max_tokens=20)
    threads = [
        threading.Thread(target=lambda: [embedder.embed([f"text {n}"]) for n in range(20)]),
        threading.Thread(target=lambda: other.sample(ASKED, 1, greedy, seconds=60.0)),
    ]
    for thread in threads:
        thread.start()
    assert made.sample(ASKED, 1, greedy, seconds=60.0).samples
    for thread in threads:
        thread.join()
    assert len(together) > 40 and not any(together)
