"""Bytes of a stream → events → an outcome: pieces of any size, every chunk counted once, broken streams refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.bench.serving import stream
from accel.bench.serving.stream import BrokenStreamError, Events, Outcome, Reading

STREAM = b": ping\n\ndata: one\n\nevent: x\r\ndata:two\r\n\r\ndata: 3a\ndata: 3b\n\n\n\ndata: last"
DATA = [b"one", b"two", b"3a\n3b", b"last"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts):
    bounds = [0, *sorted(cuts), len(STREAM)]
    events = Events()
    found = [data for a, b in pairwise(bounds) for data in events.feed(STREAM[a:b])]
    assert found == DATA[:3]
    assert events.close() == DATA[3:]


def test_an_event_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(stream, "MAX_EVENT_BYTES", 100)
    events = Events()
    events.feed(b"x" * 100)
    with pytest.raises(BrokenStreamError, match="an event of more than"):
        events.feed(b"x")


def chunk(**choice):
    return json.dumps({"choices": [{"index": 0, **choice}]}).encode()


def read(*events):
    """The outcome of (seconds, data) pairs for a request that was sent at second 10."""
    outcome = Outcome(started=10.0)
    reading = Reading(outcome)
    for at, data in events:
        reading.take(data, 10.0 + at)
    reading.end()
    return outcome


def test_every_chunk_with_choices_counts_and_no_other():
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}).encode()
    found = read(
        (1.0, chunk(delta={"role": "assistant"})),
        (3.0, chunk(delta={"content": "a"})),
        (3.5, chunk(delta={"content": "bc"})),
        (3.75, chunk(delta={}, finish_reason="stop")),
        (9.0, usage),
        (9.5, b"[DONE]"),
    )
    assert (found.ttft, found.ttft_text, found.latency, found.gaps) == (1.0, 3.0, 3.75, [2.0, 0.5, 0.25])
    assert (found.prompt_tokens, found.output_tokens, found.counted) == (5, 9, False)
    assert (found.text, found.finish_reason) == ("abc", "stop")


def test_without_usage_chunks_with_text_are_counted():
    found = read((1, chunk(text="a")), (2, chunk(text="")), (3, chunk(text="b", finish_reason="length")))
    assert (found.output_tokens, found.counted, found.text) == (2, True, "ab")


def test_usage_in_the_last_chunk_with_choices_is_taken():
    last = json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}})
    assert read((1, chunk(delta={"content": "a"})), (2, last.encode())).output_tokens == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error": {"message": "out of\\nblocks", "code": 500}}', "the server reported: out of blocks"),
        (b'{"error": "gone"}', "the server reported: gone"),
        (b'{"object": "error", "message": "old shape"}', "the server reported: old shape"),
        (b"[1]", "the server reported"),
        (b"<html>", "no JSON: <html>"),
    ],
)
def test_what_is_no_chunk_is_refused(data, message):
    with pytest.raises(BrokenStreamError, match=message):
        read((1, data))


def test_an_answer_without_end_is_refused():
    with pytest.raises(BrokenStreamError, match="after 2 chunks, with neither"):
        read((1, chunk(text="a")), (2, chunk(text="b")))
    with pytest.raises(BrokenStreamError, match="without a chunk"):
        read((1, b"[DONE]"))
    # either end will do
    assert read((1, chunk(text="a")), (2, b"[DONE]")).text == "a"


def test_what_a_server_says_is_one_short_line():
    assert stream.said({"detail": [{"msg": "no"}]}) == '[{"msg": "no"}]'
    assert len(stream.said("x\n" * 1000)) == stream.MAX_MESSAGE
