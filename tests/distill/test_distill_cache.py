"""The cache: what went in comes out, whole shards or none, bounded, and damage is named."""

from __future__ import annotations

import json

import pytest
import torch

from accel.distill.cache import LessonCache
from accel.distill.lessons import SHARD, fill, is_full, predicted_bytes
from accel.distill.teacher import Lesson
from accel.errors import ArtifactError, OptionError

ABOUT = {"base": {"name": "tiny", "vocab_size": 67}, "k": 4, "stop_tokens": [2]}
PLENTY = 10**7


def lessons(count, *, start=0, k=4):
    generator = torch.Generator().manual_seed(start)
    made = []
    for index in range(start, start + count):
        sizes = torch.randint(1, 9, (2,), generator=generator).tolist()
        prompt, answer = (torch.randint(67, (n,), generator=generator, dtype=torch.int32) for n in sizes)
        ids = torch.randint(67, (len(answer), k), generator=generator, dtype=torch.int32)
        made.append(Lesson(index, prompt, answer, ids, torch.rand(len(answer), k, generator=generator).half()))
    return made


def same(one, other):
    pairs = zip(one, other, strict=True)
    fields = ("prompt", "answer", "ids", "logp")
    return all(a.index == b.index and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields) for a, b in pairs)


@pytest.fixture
def folder(tmp_path):
    cache = LessonCache.open(tmp_path / "cache", ABOUT, PLENTY)
    assert cache.append(lessons(5)) and cache.append(lessons(3, start=5))
    return cache.folder


def test_lessons_come_back_as_they_were(folder):
    cache = LessonCache.open(folder, ABOUT, PLENTY)
    assert same(list(cache), lessons(5) + lessons(3, start=5))
    assert cache.indices() == set(range(8)) and cache.num_lessons == 8
    assert cache.num_tokens == sum(len(each.answer) for each in cache)
    assert cache.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert cache.append(lessons(2, start=8))
    assert LessonCache.open(folder, ABOUT, PLENTY).num_lessons == 10


def test_the_bound_holds(tmp_path):
    cache = LessonCache.open(tmp_path, ABOUT, 3000)
    while cache.append(lessons(4)):
        assert cache.nbytes <= 3000
    assert cache.num_lessons > 0
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 3000
    with pytest.raises(OptionError, match="max_bytes=0"):
        LessonCache.open(tmp_path, ABOUT, 0)


def test_a_shard_that_was_being_written_is_not_there(folder):
    (folder / "lessons-00002.safetensors.new").write_bytes(b"half")
    (folder / "lessons-00002.safetensors").write_bytes(b"written, but not in the index")
    cache = LessonCache.open(folder, ABOUT, PLENTY)
    assert cache.num_lessons == 8
    assert cache.append(lessons(1, start=8)) and same(list(cache)[8:], lessons(1, start=8))


@pytest.mark.parametrize("damage", ["a bit", "the end", "all of it", "another file"])
def test_a_corrupt_shard_is_named_and_refused(folder, damage):
    path = folder / "lessons-00001.safetensors"
    data = path.read_bytes()
    if damage == "a bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "the end":
        path.write_bytes(data[:-7])
    elif damage == "all of it":
        path.unlink()
    else:
        path.write_bytes((folder / "lessons-00000.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"lessons-00001\.safetensors: .*delete the folder"):
        list(LessonCache.open(folder, ABOUT, PLENTY))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "{",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"sha256"', '"sha"'),
        lambda text: text.replace("lessons-00001", "../lessons-00001"),
        lambda text: json.dumps({"format": 1, "shards": []}),
    ],
)
def test_a_corrupt_index_is_named_and_refused(folder, change):
    path = folder / "cache.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ArtifactError, match=r"cache\.json: is no index of lessons"):
        LessonCache.open(folder, ABOUT, PLENTY)


def test_another_description_is_refused(folder):
    with pytest.raises(ArtifactError, match="was made with k=4, this run has 8"):
        LessonCache.open(folder, ABOUT | {"k": 8}, PLENTY)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"holds other files and no cache\.json"):
        LessonCache.open(tmp_path, ABOUT, PLENTY)


def test_filling_writes_whole_shards_and_says_how_far_it_is(tmp_path):
    cache = LessonCache.open(tmp_path, ABOUT, PLENTY)
    said = []
    fill(cache, iter(lessons(SHARD + 6)), SHARD + 6, said.append)
    assert [shard["lessons"] for shard in cache.shards] == [SHARD, 6] and not is_full(cache)
    assert said[-1].startswith(f"{SHARD + 6} of {SHARD + 6} answers")


def test_filling_stops_at_the_bound_and_remembers_it(tmp_path):
    made = lessons(SHARD + 6)
    size = predicted_bytes([8] * SHARD, 8, 4)
    cache = LessonCache.open(tmp_path, ABOUT, size // 3)
    fill(cache, iter(made), len(made))
    assert 0 < cache.num_lessons < len(made) and cache.nbytes <= size // 3
    again = LessonCache.open(tmp_path, ABOUT, size // 3)
    assert is_full(again)
    assert not is_full(LessonCache.open(tmp_path, ABOUT, size))


@pytest.mark.parametrize("count", [1, SHARD, SHARD + 1, 3 * SHARD])
def test_the_prediction_bounds_what_is_written(tmp_path, count):
    made = lessons(count)
    cache = LessonCache.open(tmp_path, ABOUT, PLENTY)
    fill(cache, made, count)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    predicted = predicted_bytes([len(each.prompt) for each in made], 8, 4)
    assert on_disk <= predicted
    assert predicted_bytes([100] * count, 200, 32) < 1.1 * count * (400 + 200 * 196) + 4096
