"""The request log: exact rows, a bound that holds, writers that share a file, damage that is named, calls unharmed."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers.generation import StoppingCriteria

import accel
from accel.artifacts import BaseModel
from accel.errors import AccelError, OptionError
from accel.request_log import LEAST_MAX_BYTES, RequestLog, check_tokens, is_log, older, read

BASE = BaseModel("toy", None, "a" * 64, None, 1000)
NEW = 16
WAYS = {
    "plain": {"method": "plain"},
    "lm": {"drafter": "lm", "draft_length": 3},
    "suffix": {"drafter": "suffix", "draft_length": 3},
}


def rows(path):
    return [(list(row.prompt), list(row.new)) for row in read(path)]


def all_rows(path):
    return (rows(older(path)) if older(path).exists() else []) + rows(path)


def size(path):
    return sum(each.stat().st_size for each in (path, older(path)) if each.exists())


@pytest.fixture
def file(tmp_path):
    return tmp_path / "log.jsonl"


# -- what generate() logs --


def decode(tiny, way, **kwargs):
    model, draft = tiny.pair("llama")
    return accel.generate(model, artifacts=[draft] if way == "lm" else [], **WAYS[way], **kwargs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "seed": 5, "num_return_sequences": 2}, {"return_dict_in_generate": True}],
    ids=str,
)
def test_the_rows_are_what_was_asked_and_said(tiny, file, way, settings):
    """A batch with left padding, whose rows end at different lengths."""
    batch = tiny.prompts(4)
    greedy = decode(tiny, "plain", **batch, max_new_tokens=NEW)
    settings = settings | {"max_new_tokens": NEW, "eos_token_id": int(greedy[1, 12])}
    plain = decode(tiny, way, **batch, **settings)
    assert not file.exists(), "nothing asked for a log"
    out = decode(tiny, way, **batch, **settings, log=file)
    plain, out = (each if isinstance(each, torch.Tensor) else each.sequences for each in (plain, out))
    assert torch.equal(out, plain), "the log changed what was said"
    several = settings.get("num_return_sequences", 1)
    expected = []
    for index, sequence in enumerate(out.tolist()):
        new, end = sequence[9:], settings["eos_token_id"]
        expected.append((sequence[3 * (index // several % 3) : 9], new[: new.index(end) + 1] if end in new else new))
    assert sorted(rows(file)) == sorted(expected)
    assert len({len(new) for _, new in expected}) > 1, "all rows ended together: nothing was cut"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not accel.stats(tiny.pair("llama")[0]).notes


class LongerThan(StoppingCriteria):
    """Looks at the batch as a whole, so that rows stay in step: ends row i after i + 2 tokens."""

    def __call__(self, ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= 9 + i + 2 for i in range(len(ids))])


def test_rows_in_step_are_logged_up_to_their_own_end(tiny, file):
    for eos in (2, None):
        model = accel.attach(tiny.build("llama", eos_token_id=eos), method="plain", log=file)
        model.generate(**tiny.prompts(3), max_new_tokens=8, stopping_criteria=[LongerThan()], eos_token_id=eos)
        assert [len(new) for _, new in sorted(rows(file), key=lambda row: len(row[1]))] == [2, 3, 4]
        file.unlink()


def test_an_attached_model_logs_until_it_is_detached(tiny, file):
    model = accel.attach(tiny.build("llama"), log=file, log_max_bytes=10**6)
    prompt = tiny.prompts(1)
    model.generate(**prompt, max_new_tokens=4)
    accel.attach(model, log=file)
    model.generate(**prompt, max_new_tokens=4)
    assert len(rows(file)) == 2
    accel.detach(model).generate(**prompt, max_new_tokens=4)
    accel.attach(model).generate(**prompt, max_new_tokens=4)
    assert len(rows(file)) == 2 and list(file.parent.iterdir()) == [file]


def test_what_transformers_decodes_is_said_not_to_be_logged(tiny, file):
    model, _ = tiny.pair("llama")
    for kwargs in ({"num_beams": 2}, {"use_cache": False}):
        accel.generate(model, **tiny.prompts(2), max_new_tokens=4, log=file, **kwargs)
        assert "not logged: only rows that accel decodes are" in accel.stats(model).notes
        accel.generate(model, **tiny.prompts(2), max_new_tokens=4, **kwargs)
        assert not any("not logged" in note for note in accel.stats(model).notes)
    assert rows(file) == []


def test_a_write_that_fails_is_a_note_and_the_call_goes_on(tiny, file, caplog):
    model = accel.attach(tiny.build("llama"))
    batch = tiny.prompts(4) | {"max_new_tokens": NEW}
    expected = model.generate(**batch)
    accel.attach(model, log=file)
    file.unlink()
    file.mkdir()
    with caplog.at_level(logging.WARNING, "accel"):
        for _ in range(2):
            assert torch.equal(model.generate(**batch), expected)
            assert accel.stats(model).notes == [f"not logged: {file}: Is a directory"]
    assert [record.getMessage() for record in caplog.records] == accel.stats(model).notes
    file.rmdir()
    model.generate(**batch)
    assert len(rows(file)) == 4 and not accel.stats(model).notes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"log": "{tmp}"}, "Is a directory"),
        ({"log": "{tmp}/no/where.jsonl"}, "No such file or directory: name a file that can be written"),
        ({"log": os.devnull}, "is not a regular file"),
        ({"log": ""}, "give the path of a file"),
        ({"log": True}, "log=True: give the path of a file"),
        ({"log": "{tmp}/notes.txt"}, "is no request log of accel"),
        ({"log": "{tmp}/log.jsonl", "log_max_bytes": 10}, "≥ 65536"),
        ({"log": "{tmp}/log.jsonl", "log_max_bytes": 1e6}, "whole number"),
        ({"log_max_bytes": 10**6}, "log_max_bytes=1000000 without log"),
        ({"log": "{tmp}/other.jsonl"}, "vocabulary size is 1000, this model's is 67"),
        ({"log": "{tmp}/x.jsonl"}, "x.1.jsonl is no request log"),
    ],
)
def test_a_log_that_cannot_be_is_refused_in_one_line(tiny, tmp_path, options, says):
    (tmp_path / "notes.txt").write_text("do not lose this")
    (tmp_path / "x.1.jsonl").write_text("nor this\n")
    RequestLog(tmp_path / "other.jsonl", BASE)
    options = {
        key: each.replace("{tmp}", str(tmp_path)) if isinstance(each, str) else each for key, each in options.items()
    }
    model = tiny.build("llama")
    with pytest.raises(AccelError) as caught:
        accel.attach(model, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert "generate" not in vars(model)
    assert (tmp_path / "notes.txt").read_text() == "do not lose this"


# -- the file --


def test_the_bound_holds_and_the_most_recent_rows_stay(file):
    log = RequestLog(file, BASE, LEAST_MAX_BYTES)
    for number in range(5000):
        assert log.append([number % 1000] * (1 + number % 40), [number // 1000] * (1 + number % 7)) is None
        assert size(file) <= LEAST_MAX_BYTES
    assert sorted(file.parent.iterdir()) == sorted([file, older(file)])
    assert is_log(file) and is_log(older(file))
    assert stat.S_IMODE(older(file).stat().st_mode) == 0o600
    kept = [1000 * new[0] + prompt[0] for prompt, new in all_rows(file)]
    assert kept == list(range(5000 - len(kept), 5000)), "rows were lost between the oldest kept and the newest"
    assert size(file) > LEAST_MAX_BYTES // 2


def test_a_row_beyond_half_of_the_bound_is_left_out_and_said(file):
    log = RequestLog(file, BASE, LEAST_MAX_BYTES)
    assert log.append([1], [2]) is None
    before = file.read_bytes()
    assert log.append([1] * 20_000, [2]) == "not logged: a row takes more than half of log_max_bytes=65536"
    assert file.read_bytes() == before and not older(file).exists()


def test_a_smaller_bound_than_what_is_there_is_refused(file):
    log = RequestLog(file, BASE)
    log.append([1] * 20_000, [2])
    with pytest.raises(OptionError, match="more than half of log_max_bytes=65536"):
        RequestLog(file, BASE, LEAST_MAX_BYTES)
    os.replace(file, older(file))
    with pytest.raises(OptionError, match=r"log\.1\.jsonl has 4"):
        RequestLog(file, BASE, LEAST_MAX_BYTES)


def append_many(file, who, count, bound):
    log = RequestLog(file, BASE, bound)
    for number in range(count):
        assert log.append([who, number % 1000, number // 1000], [7] * (1 + number % 50)) is None


@pytest.mark.parametrize("bound", [10**8, LEAST_MAX_BYTES], ids=["one file", "rotated"])
def test_processes_and_threads_share_a_file(file, bound):
    count, fork = 1500, multiprocessing.get_context("fork")
    processes = [fork.Process(target=append_many, args=(file, who, count, bound)) for who in range(2)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(append_many, file, who, count, bound) for who in (2, 3)]:
            done.result()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert size(file) <= bound
    found = [(prompt[0], 1000 * prompt[2] + prompt[1]) for prompt, _ in all_rows(file)]
    for who in range(4):
        mine = [number for each, number in found if each == who]
        # in order and without a gap; after a rotation the most recent ones
        assert mine == list(range(count - len(mine), count))
    assert len(found) == 4 * count or bound == LEAST_MAX_BYTES


def test_a_write_that_stops_in_the_middle_leaves_nothing(file):
    log = RequestLog(file, BASE)
    log.append([1], [2])
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        said = log.append([1] * 100, [2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said is not None and said.startswith(f"not logged: {file}: ")
    assert file.read_bytes() == before
    assert log.append([3], [4]) is None and rows(file) == [([1], [2]), ([3], [4])]


def test_a_torn_last_line_is_left_out_and_said(file, caplog):
    log = RequestLog(file, BASE)
    for number in range(3):
        log.append([number], [2])
    whole = file.read_bytes()
    header = whole.index(b"\n") + 1
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last + 1, len(whole) - 1):
        file.write_bytes(whole[:end])
        caplog.clear()
        assert rows(file) == [([0], [2]), ([1], [2])]
        (said,) = caplog.records
        assert said.getMessage().startswith(f"{file}:4: left out")
    caplog.clear()
    # the next writer cuts the fragment off, so that its own line is not lost with it
    assert log.append([9], [2]) is None
    assert "cut off its last line" in caplog.text
    assert rows(file) == [([0], [2]), ([1], [2]), ([9], [2])]
    # all but the line's end is a whole row
    file.write_bytes(whole[:-1])
    caplog.clear()
    assert len(rows(file)) == 3 and not caplog.records
    for end in (1, header - 1):
        file.write_bytes(whole[:end])
        assert log.append([9], [2]) is None and rows(file) == [([9], [2])]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt_tokens":[1', "not JSON"),
        ('{"prompt_tokens":[1],"new_tokens":[]}', "new_tokens must be a list of token ids below 1000"),
        ('{"prompt_tokens":[1000],"new_tokens":[1]}', "prompt_tokens must be"),
        ('{"prompt_tokens":[true],"new_tokens":[1]}', "prompt_tokens must be"),
        ("[1]", "prompt_tokens must be"),
        ('{"prompt": "text"}', "prompt_tokens must be"),
        ('{"accel_request_log":2}', "of format 2, this accel reads 1"),
        ('{"accel_request_log":1,"base":{}}', "does not say which model's tokens follow"),
    ],
)
def test_a_damaged_line_is_named(file, line, says):
    log = RequestLog(file, BASE)
    log.append([1], [2])
    with open(file, "a") as damaged:
        damaged.write(line + "\n")
    log.append([3], [4])
    with pytest.raises(OptionError) as caught:
        rows(file)
    assert str(caught.value).startswith(f"{file}:3: ") and says in str(caught.value)


def test_files_may_be_joined_but_not_begin_without_a_header(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for number, path in enumerate((one, two)):
        RequestLog(path, dataclasses.replace(BASE, vocab_size=10 + number)).append([9 + number], [2])
    joined = tmp_path / "joined"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    assert [(row.prompt, row.base.vocab_size) for row in read(joined)] == [((9,), 10), ((10,), 11)]
    joined.write_bytes(one.read_bytes().partition(b"\n")[2])
    assert not is_log(joined)
    with pytest.raises(OptionError, match="joined:1: no header"):
        list(read(joined))


def test_a_file_of_another_model_that_appears_later_stays_as_it_is(file):
    log = RequestLog(file, BASE)
    file.unlink()
    RequestLog(file, dataclasses.replace(BASE, name="other", config_digest="b" * 64)).append([1], [2])
    said = log.append([3], [4])
    assert said is not None and "was written with other, whose config digest is bbb" in said
    assert rows(file) == [([1], [2])]


def test_the_file_is_where_it_was_when_attached(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.jsonl"
    link.symlink_to(Path("real/log.jsonl"))
    monkeypatch.chdir(tmp_path)
    log = RequestLog("link.jsonl", BASE, LEAST_MAX_BYTES)
    monkeypatch.chdir("/")
    for _ in range(900):
        assert log.append([1] * 20, [2]) is None
    assert link.is_symlink() and sorted(each.name for each in (tmp_path / "real").iterdir()) == [
        "log.1.jsonl",
        "log.jsonl",
    ]


@pytest.mark.parametrize(
    ("written", "model", "says"),
    [
        ({}, {}, None),
        ({}, {"config_digest": "b" * 64}, "config digest is aaa"),
        ({"tokenizer_digest": "c" * 64}, {"config_digest": "b" * 64}, "config digest"),
        # the same tokenizer is enough: the prompts may have been another model's
        ({"tokenizer_digest": "c" * 64}, {"tokenizer_digest": "c" * 64, "config_digest": "b" * 64}, None),
        ({"tokenizer_digest": "c" * 64}, {"tokenizer_digest": "d" * 64}, "tokenizer digest is ccc"),
        ({"vocab_size": 77}, {}, "vocabulary size is 77, mine has 1000"),
    ],
)
def test_token_ids_of_another_vocabulary_are_refused_with_both_values(file, written, model, says):
    RequestLog(file, dataclasses.replace(BASE, **written)).append([1], [2])
    mine = dataclasses.replace(BASE, name="mine", **model)
    if says is None:
        check_tokens(read(file), mine)
        return
    with pytest.raises(OptionError) as caught:
        check_tokens(read(file), mine)
    message = str(caught.value)
    assert says in message and str(file) in message and "toy" in message
    assert all(value[:9] in message for value in model.values())


def test_the_header_names_the_tokenizer_where_it_is_known(tiny, file):
    class Letters:
        def get_vocab(self):
            return {chr(i): i for i in range(67)}

    def header():
        base = json.loads(file.read_text().splitlines()[0])["base"]
        file.unlink()
        return base

    model = accel.attach(tiny.build("llama"), log=file)
    assert header()["tokenizer_digest"] is None
    accel.attach(model, log=file, tokenizer=Letters())
    assert len((attached := header())["tokenizer_digest"]) == 64
    accel.generate(model, **tiny.prompts(1), max_new_tokens=2, log=file, tokenizer=Letters())
    assert header() == attached and attached["vocab_size"] == 67
