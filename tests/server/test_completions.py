"""/v1/completions: prompts, usage, log-probabilities, several continuations, streams, echo."""

from __future__ import annotations

from typing import Any

import pytest

from accel.engine.jobs import Job

TEXT = "Hello wörld 🎉, and so on."


def test_the_answer_its_usage_and_its_finish(serve: Any) -> None:
    served = serve(TEXT)
    body = served.complete("Say", max_tokens=100).json()
    assert body["object"] == "text_completion" and body["model"] == "tiny" and body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "stop" and choice["index"] == 0
    generated = len(served.ids(TEXT)) + 1
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": generated,
        "total_tokens": 3 + generated,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_sixteen_tokens_where_nothing_is_said(serve: Any) -> None:
    body = serve(TEXT).complete("Say").json()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("stop", [None, "so", ["wör", "🎉"]])
def test_a_stream_is_the_whole(serve: Any, chunk: int, stop: Any) -> None:
    served = serve(TEXT, chunk=chunk)
    fields = {"max_tokens": 100, "stop": stop, "logprobs": 1}
    whole = served.complete(**fields).json()["choices"][0]
    events = served.events(served.complete(stream=True, **fields))
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [whole["finish_reason"]]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [each for choice in choices for each in choice["logprobs"][name]] == whole["logprobs"][name]


def test_prompts_as_ids_and_as_lists(serve: Any) -> None:
    served = serve(lambda job, index: job.prompt)
    ids = served.ids("abc")
    for prompt, texts in [("abc", ["abc"]), (ids, ["abc"]), (["ab", "c"], ["ab", "c"]), ([ids, ids[:1]], ["abc", "a"])]:
        body = served.complete(prompt).json()
        assert [choice["text"] for choice in body["choices"]] == texts
        assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_several_prompts_of_several_continuations_are_in_order(serve: Any) -> None:
    def script(job: Job, index: int) -> list[int]:
        return [*job.prompt, 60 + index]

    served = serve(script, chunk=2)
    body = served.complete(["ab", "cde"], n=2).json()
    expected = [f"{prompt}{served.tokenizer.decode([60 + i])}" for prompt in ("ab", "cde") for i in range(2)]
    assert [choice["text"] for choice in body["choices"]] == expected
    texts = dict.fromkeys(range(4), "")
    finishes: list[int] = []
    for event in served.events(served.complete(["ab", "cde"], n=2, stream=True)):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        finishes += [choice["index"]] * (choice["finish_reason"] is not None)
    assert list(texts.values()) == expected
    assert sorted(finishes) == [0, 1, 2, 3]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_text_usage_and_work(serve: Any, include: bool) -> None:
    served = serve("one two three four", chunk=5, pace=0.01)
    body = served.complete(max_tokens=100, stop=["three"], include_stop_str_in_output=include).json()
    (choice,) = body["choices"]
    assert choice["text"] == ("one two three" if include else "one two ")
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == "three"
    assert body["usage"]["completion_tokens"] == len("one two three")
    assert served.service.wait_idle() and served.service.cancelled == [1]


def test_a_job_goes_on_while_one_continuation_has_not_stopped(serve: Any) -> None:
    lines = ["a!bbbbbb", "aaaaa!bb"]
    served = serve(lambda job, index: [token + 0 for token in served.ids(lines[index])])
    body = served.complete(n=2, max_tokens=50, stop="!").json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "aaaaa"]
    assert body["usage"]["completion_tokens"] == 2 + 6


def test_a_stop_token_is_counted_and_not_shown(serve: Any) -> None:
    served = serve("abcd")
    (c,) = served.ids("c")
    body = served.complete(stop_token_ids=[c]).json()
    (choice,) = body["choices"]
    assert choice["text"] == "ab" and choice["finish_reason"] == "stop" and choice["stop_reason"] == c
    assert body["usage"]["completion_tokens"] == 3
    assert served.complete(stop_token_ids=[c], include_stop_str_in_output=True).json()["choices"][0]["text"] == "abc"


def test_ignore_eos_reads_on(serve: Any) -> None:
    served = serve(lambda job, index: [*served.ids("ab"), 0, *served.ids("cd")])
    assert served.complete().json()["choices"][0]["text"] == "ab"
    choice = served.complete(ignore_eos=True).json()["choices"][0]
    assert choice["text"] == "abcd" and choice["finish_reason"] == "length"
    assert served.complete(ignore_eos=True, skip_special_tokens=False).json()["choices"][0]["text"] == "ab</s>cd"


@pytest.mark.parametrize("count", [0, 5])
def test_logprobs_of_every_token(serve: Any, count: int) -> None:
    found = serve("abcdef").complete(max_tokens=4, logprobs=count).json()["choices"][0]["logprobs"]
    assert found["tokens"] == list("abcd") and found["text_offset"] == [0, 1, 2, 3]
    assert found["token_logprobs"] == [-0.5] * 4
    # the token itself is always among them
    assert [len(top) for top in found["top_logprobs"]] == [max(1, count)] * 4


def test_no_logprobs_where_none_are_asked_for(serve: Any) -> None:
    served = serve("abc")
    assert served.complete().json()["choices"][0]["logprobs"] is None
    assert served.service.jobs[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt_with_its_logprobs(serve: Any, stream: bool) -> None:
    served = serve("xyz")
    response = served.complete("ab", echo=True, logprobs=1, n=2, max_tokens=2, stream=stream)
    events = served.events(response) if stream else [response.json()]
    for index in (0, 1):
        choices = [each for event in events for each in event["choices"] if each["index"] == index]
        assert "".join(choice["text"] for choice in choices) == "abxy"
        found = {name: [e for c in choices for e in c["logprobs"][name]] for name in choices[0]["logprobs"]}
        assert found["tokens"] == list("abxy") and found["text_offset"] == [0, 1, 2, 3]
        assert found["token_logprobs"] == [None, -0.5, -0.5, -0.5] and found["top_logprobs"][0] is None


def test_echo_alone_scores_a_prompt(serve: Any) -> None:
    body = serve("xyz").complete("ab", echo=True, logprobs=0, max_tokens=0).json()
    assert body["choices"][0]["text"] == "ab" and body["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 0


def test_echo_of_ids_is_their_text(serve: Any) -> None:
    served = serve("z")
    body = served.complete([served.ids("ab"), served.ids("c")], echo=True, max_tokens=1).json()
    assert [choice["text"] for choice in body["choices"]] == ["abz", "cz"]


USAGE_CHUNKS = [
    (None, False, False),
    ({"include_usage": False}, False, False),
    ({"include_usage": True}, True, False),
    ({"include_usage": True, "continuous_usage_stats": True}, True, True),
    ({"include_usage": False, "continuous_usage_stats": True}, False, False),
]


@pytest.mark.parametrize(("options", "at_end", "always"), USAGE_CHUNKS)
def test_usage_in_streams(serve: Any, options: Any, at_end: bool, always: bool) -> None:
    served = serve("abc")
    events = served.events(served.complete("Say", stream=True, stream_options=options))
    if not at_end:
        assert not any("usage" in event for event in events) and all(event["choices"] for event in events)
        return
    *chunks, last = events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4 and last["usage"]["prompt_tokens"] == 3
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == ([1, 2, 3, 4] if always else [None] * 4)


def test_fields_reach_the_job(serve: Any) -> None:
    served = serve("abc")
    extension = {
        "method": "speculative",
        "options": {"draft_length": 3},
        "salt": "mine",
        "stats": True,
    }
    response = served.complete(seed=7, n=2, max_tokens=5, temperature=0, timeout=9, accel=extension)
    (job,) = served.service.jobs
    assert (job.seed, job.n, job.max_new_tokens, job.timeout, job.do_sample) == (7, 2, 5, 9, False)
    assert (job.method, dict(job.options), job.salt) == ("speculative", {"draft_length": 3}, "mine")
    assert response.json()["accel"]["drafted_tokens"] == 8
    assert response.headers["x-accel-method"] == "speculative"
    assert response.headers["x-accel-acceptance-rate"] == "0.500" and response.headers["x-accel-tau"] == "1.500"


def test_figures_of_a_stream_come_last(serve: Any) -> None:
    served = serve("abc")
    last = served.events(served.complete(stream=True, accel={"stats": True}))[-1]
    assert last["choices"] == [] and last["accel"]["method"] == "speculative"
    assert "accel" not in served.complete().json()


def test_the_servers_own_deadline_is_the_longest(serve: Any) -> None:
    served = serve("abc", request_timeout=5.0)
    served.complete(timeout=60)
    served.complete(timeout=2)
    served.complete()
    assert [job.timeout for job in served.service.jobs] == [5, 2, 5]
