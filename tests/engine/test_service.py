"""Continuous batching: many callers' jobs against the same requests decoded alone, and what becomes of the unlucky."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper

import accel
from accel.engine.attached import STATE
from accel.engine.jobs import ClosedError, Done, Failed, Job, Piece, QueueFullError
from accel.engine.loop import Engine
from accel.engine.service import Service, serve
from accel.engine.stopping import RequestStopper
from accel.errors import AccelError, OptionError
from accel.methods.plain.decoder import PlainDecoder, PlainOptions
from accel.sampling import LogitsPipeline
from accel.types import Request, Stats

EOS = 2
PROMPTS = [[5, 9, 11, 23], [7, 7, 30, 31, 32, 33, 34, 35, 36, 37, 38], list(range(3, 60)), [44], [12, 13] * 20]
METHODS = {
    "plain": {"method": "plain"},
    "speculative": {"method": "speculative", "drafter": "suffix", "draft_length": 3},
}


class Listener:
    """Collects a job's events, from the engine's thread to this one."""

    def __init__(self) -> None:
        self.events: queue.Queue = queue.Queue()

    def __call__(self, event) -> None:
        self.events.put(event)

    def all(self, timeout=60):
        events = []
        while not events or not isinstance(events[-1], Done | Failed):
            events.append(self.events.get(timeout=timeout))
        return events

    def answers(self, n=1):
        """Tokens of each continuation, and why each ended."""
        events = self.all()
        assert isinstance(events[-1], Done), events[-1]
        tokens, finishes = [[] for _ in range(n)], [[] for _ in range(n)]
        for piece in events[:-1]:
            assert not finishes[piece.index], "nothing comes behind a continuation's end"
            tokens[piece.index] += piece.tokens
            finishes[piece.index] += [piece.finish] if piece.finish else []
        assert all(len(each) == 1 for each in finishes)
        return tokens, [each[0] for each in finishes]


def tokens_of(events):
    return [token for event in events if isinstance(event, Piece) for token in event.tokens]


@contextmanager
def serving(model, how="plain", **limits):
    accel.attach(model, **METHODS[how])
    service = serve(model, **limits)
    try:
        yield service
    finally:
        service.close()
        assert not service._thread.is_alive()
        accel.detach(model)


def ask(service, prompt, new=12, **job):
    listener = Listener()
    job.setdefault("stop_tokens", frozenset({EOS}))
    listener.number = service.submit(Job(prompt, new, **job), listener)
    return listener


def alone(model, prompt, new=12):
    ids = type(model).generate(model, torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=EOS)
    return ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.build("llama")


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("limits", [{}, {"max_rows": 2, "piece": 3}, {"piece": 1, "prefix_bytes": 0}])
def test_every_job_is_answered_as_if_it_were_alone(model, how, limits):
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with serving(model, how, **limits) as service:
        # the second round finds what the first left behind
        for _ in range(2):
            listeners = [ask(service, prompt) for prompt in PROMPTS]
            assert [listener.answers()[0][0] for listener in listeners] == expected


def test_jobs_that_come_while_others_are_under_way(model):
    expected = [alone(model, prompt, 40) for prompt in PROMPTS]
    with serving(model) as service:
        listeners = []
        for prompt in PROMPTS:
            listeners.append(ask(service, prompt, 40))
            time.sleep(0.02)
        assert [listener.answers()[0][0] for listener in listeners] == expected


def test_a_prompt_that_begins_like_an_earlier_conversation_is_not_read_again(model):
    first = list(range(3, 43))
    with serving(model) as service:
        answer = ask(service, first).answers()[0][0]
        turn = [*first, *answer, 9, 8, 7]
        *_, done = ask(service, turn).all()
        # all but the answer's last token, which nobody has read
        assert done.cached_tokens == len(first) + len(answer) - 1
        assert ask(service, turn).answers()[0][0] == alone(model, turn)
        *_, done = ask(service, turn, salt="another").all()
        assert done.cached_tokens == 0


def test_samples_of_one_prompt_are_repeatable_and_differ(model):
    warm = LogitsPipeline([TemperatureLogitsWarper(2.0)])
    with serving(model) as service:
        job = {"n": 4, "do_sample": True, "seed": 5, "pipeline": lambda: warm, "stop_tokens": frozenset()}
        tokens, _ = ask(service, PROMPTS[0], **job).answers(4)
        again, _ = ask(service, PROMPTS[0], **job).answers(4)
        assert tokens == again
        assert len({tuple(each) for each in tokens}) == 4
    # one at a time is the same four
    with serving(model, max_rows=1) as service:
        assert ask(service, PROMPTS[0], **job).answers(4)[0] == tokens


def test_why_a_continuation_ended(model):
    greedy = alone(model, PROMPTS[0])
    with serving(model) as service:
        assert ask(service, PROMPTS[0], new=3).answers() == ([greedy[:3]], ["length"])
        stop = ask(service, PROMPTS[0], stop_tokens=frozenset({greedy[2]})).all()
        assert next(piece for piece in stop[:-1] if piece.finish).stop_token == greedy[2]
        assert tokens_of(stop) == greedy[: greedy.index(greedy[2]) + 1]


@pytest.mark.parametrize("how", METHODS)
def test_log_probabilities_are_the_models_own(model, how):
    prompt = PROMPTS[1]
    with serving(model, how, piece=4) as service:
        events = ask(service, prompt, logprobs=3, prompt_logprobs=2).all()
    pieces = events[:-1]
    tokens = tokens_of(events)
    found = [each for piece in pieces for each in piece.logprobs]
    reference = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    at = reference[len(prompt) - 1 : -1]
    assert [each.token for each in found] == tokens
    torch.testing.assert_close(torch.tensor([e.logprob for e in found]), at[range(len(tokens)), tokens])
    assert all(each.rank == 1 and len(each.top) == 3 and each.top[0][0] == each.token for each in found)
    told = next(piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs)
    assert told[0] is None and len(told) == len(prompt)
    chosen = reference[range(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(torch.tensor([each.logprob for each in told[1:]]), chosen)


def test_a_cancelled_job_ends_at_once_and_leaves_nothing(model):
    with serving(model, max_rows=2, max_queue=8) as service:
        listeners = [ask(service, [5, 6], 200, n=1, stop_tokens=frozenset()) for _ in range(5)]
        listeners[0].events.get(timeout=30)
        for listener in listeners:
            service.cancel(listener.number)
        for listener in listeners:
            events = listener.all(timeout=5)
            assert [piece.finish for piece in events if isinstance(piece, Piece)][-1] == "abort"
        assert service.gauges().running == service.gauges().waiting == 0
        assert not service._batcher.target.cache.rows
        service.cancel(listeners[0].number)
        assert ask(service, PROMPTS[0]).answers()[0][0] == alone(model, PROMPTS[0])


def test_a_deadline_aborts(model):
    with serving(model) as service:
        _, finishes = ask(service, [5, 6], 240, stop_tokens=frozenset(), timeout=0.05).answers()
        assert finishes == ["abort"]


def test_a_full_queue_says_when_to_come_again(model):
    with serving(model, max_rows=1, max_queue=2) as service:
        tickets = [service.reserve() for _ in range(3)]
        with pytest.raises(QueueFullError) as caught:
            service.reserve()
        assert caught.value.retry_after >= 1
        tickets[0].release()
        tickets[0].release()
        with pytest.raises(QueueFullError):
            service.reserve(2)
        service.reserve().release()
        with pytest.raises(OptionError, match="room for 3"):
            service.reserve(4)
        for ticket in tickets[1:]:
            ticket.release()
        assert service.gauges().waiting == 0


@pytest.mark.parametrize(
    ("prompt", "job", "words"),
    [
        ([], {}, "empty"),
        ([1, 67], {}, "token id 67 is out of vocabulary"),
        ([-1], {}, "token id -1"),
        ([3] * 250, {"new": 100}, "maximum context length is 256"),
        ([3], {"method": "beam"}, "beam"),
        ([3], {"options": {"colour": 1}}, "colour"),
        ([3], {"cartridges": ("atlas",)}, "no cartridge 'atlas'"),
        ([3], {"n": 0}, "n=0"),
    ],
)
def test_what_cannot_be_done_is_said_at_once_and_gives_its_room_back(model, prompt, job, words):
    with serving(model, max_queue=0, max_rows=1) as service:
        with pytest.raises(AccelError, match=words):
            ask(service, prompt, **job)
        assert ask(service, PROMPTS[0]).answers()[0][0] == alone(model, PROMPTS[0])


class Broken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("no such luck")


def test_a_job_that_breaks_a_step_takes_itself_down_and_not_the_service(model):
    with serving(model) as service:
        events = ask(service, PROMPTS[0], pipeline=lambda: LogitsPipeline([Broken()])).all()
        assert isinstance(events[-1], Failed) and "no such luck" in str(events[-1].error)
        assert ask(service, PROMPTS[0]).answers()[0][0] == alone(model, PROMPTS[0])
        assert service.failure is None


def test_a_broken_model_is_known_as_such(model):
    with serving(model) as service:
        for _ in range(3):
            events = ask(service, PROMPTS[0], pipeline=lambda: LogitsPipeline([Broken()])).all()
            assert isinstance(events[-1], Failed)
        service._thread.join(timeout=5)
        assert service.failure is not None
        with pytest.raises(ClosedError, match="failed"):
            service.reserve()


def test_closing_drains_or_aborts(model):
    with serving(model) as service:
        patient = ask(service, PROMPTS[0])
        service.close(drain=30)
        assert patient.answers()[0][0] == alone(model, PROMPTS[0])
        with pytest.raises(ClosedError, match="shutting down"):
            service.reserve()
    with serving(model) as service:
        hasty = ask(service, [5, 6], 240, stop_tokens=frozenset())
        hasty.events.get(timeout=30)
        closer = threading.Thread(target=service.close)
        closer.start()
        assert hasty.all()[-2].finish == "abort"
        closer.join(5)
        assert not closer.is_alive()


def test_a_served_model_is_nobody_elses(model):
    with serving(model):
        with pytest.raises(AccelError, match="busy"):
            model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    accel.attach(model)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    accel.detach(model)
    with pytest.raises(AccelError, match="attach"):
        serve(model)


def test_methods_side_by_side(model):
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with serving(model, "speculative") as service:
        asked = [
            {"method": "plain"},
            {},
            {"options": {"draft_length": 1}},
            {"method": "plain"},
            {"options": {"draft_length": 5}},
        ]
        listeners = [ask(service, prompt, **how) for prompt, how in zip(PROMPTS, asked, strict=True)]
        events = [listener.all() for listener in listeners]
        assert [tokens_of(each) for each in events] == expected
        assert [each[-1].stats.method for each in events] == ["plain", *["speculative"] * 2, "plain", "speculative"]
        gauges = service.gauges()
        assert gauges.generated_tokens == sum(map(len, expected))
        assert gauges.drafted_tokens >= gauges.accepted_tokens


def test_no_count_is_lost_with_a_decoder_that_is_given_up(model):
    with serving(model, "speculative") as service:
        last = 0
        for length in range(1, 12):
            ask(service, [12, 13] * 20, options={"draft_length": length}).all()
            now = service.gauges().drafted_tokens
            assert now >= last
            last = now
        assert len(service._batcher.lanes) == 8
        assert last > 0


def test_embeddings_are_last_hidden_states(model):
    with serving(model) as service:
        found = queue.Queue()
        service.embed([PROMPTS[0], PROMPTS[1]], found.put)
        vectors = found.get(timeout=30)
    for prompt, vector in zip(PROMPTS, vectors, strict=False):
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.tensor(vector), hidden / hidden.norm())


def test_rows_wait_for_room_in_memory(model):
    accel.attach(model, method="plain")
    # two layers, two key heads of 8 in fp32: 256 bytes a token; room for two rows of 64
    service = Service(model.__dict__[STATE], context_bytes=2 * 64 * 256)
    try:
        listeners = [ask(service, [5, 6, 7], 50, stop_tokens=frozenset()) for _ in range(4)]
        assert [len(listener.answers()[0][0]) for listener in listeners] == [50] * 4
        with pytest.raises(OptionError, match="ask for fewer"):
            ask(service, [5, 6, 7], 200)
    finally:
        service.close()
        accel.detach(model)


@pytest.mark.parametrize("gone", [{0}, {1, 2}, {0, 1, 2}], ids=str)
@pytest.mark.parametrize("pieces_read", [0, 1, 3])
def test_continuations_may_go_at_any_piece_of_their_prompt(model, gone, pieces_read):
    prompt = torch.tensor(list(range(3, 20)))
    with serving(model) as service:
        target = service._batcher.target
        stopper = RequestStopper()
        engine = Engine(PlainDecoder(target, PlainOptions(), Stats()), stopper, max_rows=4, piece=4)
        requests = [Request(id=i, prompt=prompt, max_new_tokens=6, history=prompt) for i in range(3)]
        stopper.add(requests)
        engine.submit(requests)
        for _ in range(pieces_read):
            assert not list(engine.step())
        engine.cancel(gone)
        found = {i: [] for i in range(3)}
        while engine.is_busy:
            for chunk in engine.step():
                found[chunk.request_id] += chunk.tokens
        assert all(found[i] == ([] if i in gone else alone(model, prompt.tolist(), 6)) for i in range(3))
        assert not target.cache.rows
