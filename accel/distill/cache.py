"""Lessons on disk: shards of safetensors beside one JSON file that names them with their digests.

Knows how to append, to bound and to verify. Does not know where lessons come from or what is learned from them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from accel.artifacts import file_digest
from accel.distill.teacher import Lesson
from accel.errors import ArtifactError, OptionError

FORMAT = 1
INDEX = "cache.json"


def bytes_per_token(k: int) -> int:
    """What one answer token takes on disk: itself, k ids and k log-probabilities."""
    return 4 + k * (4 + 2)


@dataclass
class LessonCache:
    """A folder of lessons made under one ``description`` (base model, k, prompts, how answers were written).

    Shards appear whole or not at all, so that a run that was killed goes on behind the last one.
    """

    folder: Path
    description: Mapping[str, Any]
    max_bytes: int
    shards: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, description: Mapping[str, Any], max_bytes: int) -> LessonCache:
        """The cache at ``folder``: a new one, or the one that was begun there under the same description."""
        if max_bytes < 1:
            raise OptionError(f"max_bytes={max_bytes}: must be 1 or more")
        path = folder / INDEX
        if not path.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ArtifactError(f"{folder}: holds other files and no {INDEX}: choose an empty folder")
            folder.mkdir(parents=True, exist_ok=True)
            cache = cls(folder, description, max_bytes)
            cache._write_index()
            return cache
        index = _read_index(path)
        for key in sorted({*description, *index["description"]}):
            found, wanted = index["description"].get(key), description.get(key)
            if found != wanted:
                raise ArtifactError(
                    f"{folder}: was made with {key}={found!r}, this run has {wanted!r}: delete it or choose another"
                )
        return cls(folder, description, max_bytes, index["shards"])

    @property
    def num_lessons(self) -> int:
        return sum(shard["lessons"] for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Answer tokens in all shards."""
        return sum(shard["tokens"] for shard in self.shards)

    @property
    def nbytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    def append(self, lessons: Sequence[Lesson]) -> bool:
        """Add one shard; False, and nothing written, where it would pass ``max_bytes``."""
        data = safetensors.torch.save(_pack(lessons))
        if self.nbytes + len(data) > self.max_bytes:
            return False
        name = f"lessons-{len(self.shards):05d}.safetensors"
        path, new = self.folder / name, self.folder / f"{name}.new"
        new.write_bytes(data)
        os.replace(new, path)
        tokens = sum(len(lesson.answer) for lesson in lessons)
        facts = {"bytes": len(data), "lessons": len(lessons), "tokens": tokens}
        entry = {"name": name, "sha256": file_digest(path), **facts}
        self.shards.append(entry)
        self._write_index()
        return True

    def indices(self) -> set[int]:
        """The prompts that have been answered."""
        return {lesson.index for lesson in self}

    def __iter__(self) -> Iterator[Lesson]:
        for shard in self.shards:
            yield from self.read(shard)

    def read(self, shard: Mapping[str, Any]) -> list[Lesson]:
        """The lessons of one shard, after its digest was checked."""
        path = self.folder / shard["name"]
        if not path.is_file():
            raise ArtifactError(f"{path}: is missing; delete the folder to make the cache again")
        if file_digest(path) != shard["sha256"]:
            raise ArtifactError(f"{path}: its sha256 is not the one in {INDEX}; delete the folder to make it again")
        try:
            return _unpack(safetensors.torch.load_file(path))
        except (SafetensorError, KeyError) as error:
            raise ArtifactError(f"{path}: is no shard of lessons: {error}") from error

    def _write_index(self) -> None:
        document = {"format": FORMAT, "description": dict(self.description), "shards": self.shards}
        new = self.folder / f"{INDEX}.new"
        new.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(new, self.folder / INDEX)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = index["format"]
        shards = index["shards"]
        complete = all({"name", "sha256", "bytes", "lessons", "tokens"} <= set(shard) for shard in shards)
        plain = all(Path(shard["name"]).name == shard["name"] for shard in shards)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is no index of lessons ({error}); delete the folder to make it again") from error
    if found != FORMAT or not complete or not plain or not isinstance(index.get("description"), dict):
        raise ArtifactError(f"{path}: is no index of lessons of format {FORMAT}; delete the folder to make it again")
    return index


def _pack(lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
    return {
        "indices": torch.tensor([each.index for each in lessons]),
        "prompt_lengths": torch.tensor([len(each.prompt) for each in lessons]),
        "answer_lengths": torch.tensor([len(each.answer) for each in lessons]),
        "prompts": torch.cat([each.prompt for each in lessons]),
        "answers": torch.cat([each.answer for each in lessons]),
        "ids": torch.cat([each.ids for each in lessons]),
        "logp": torch.cat([each.logp for each in lessons]),
    }


def _unpack(tensors: Mapping[str, torch.Tensor]) -> list[Lesson]:
    before, after = tensors["prompt_lengths"].tolist(), tensors["answer_lengths"].tolist()
    prompts = tensors["prompts"].split(before)
    parts = (tensors[name].split(after) for name in ("answers", "ids", "logp"))
    return [Lesson(*each) for each in zip(tensors["indices"].tolist(), prompts, *parts, strict=True)]
