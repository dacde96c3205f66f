"""Before anything is generated: prompts on their two sides, and what all of it will take on disk.

Knows prompts and sizes. Does not know training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from accel.artifacts import Artifact, describe_base
from accel.distill.checkpoint import FRAME, training_bytes
from accel.distill.lessons import predicted_bytes
from accel.distill.prompts import ANSWERS, Encoded, Prompt, encode, split
from accel.distill.teacher import stop_tokens
from accel.drafters.small_lm import VocabularyMap
from accel.errors import OptionError
from accel.methods.speculative.distill.data import writer
from accel.methods.speculative.distill.student import Shape, build, truncate
from accel.methods.speculative.distill.student import begun as student_begun
from accel.models.softmax_target import SoftmaxTarget
from accel.request_log import check_tokens

if TYPE_CHECKING:
    from accel.methods.speculative.distill.recipe import Recipe

# held-out answers are written both ways, because a draft is used both ways: folder → temperature
HELD_OUT = {"held-out-greedy": 0.0, "held-out-sampled": 1.0}
# tokens of the target's distribution kept at their positions, at least: α of a shorter list looks too large, because
# all tokens outside it count as one
HELD_OUT_K = 512


def num_student_parameters(
    target: PreTrainedModel,
    shape: Shape | None,
    layers: Sequence[int],
    vocabulary: int,
    lags: int = 0,
    begun: Artifact | None = None,
) -> int:
    """Of the student that would be built; asked of one with random weights, because families differ."""
    if begun is not None:
        return sum(weight.numel() for weight in student_begun(begun, target, lags=lags)[0].parameters())
    size = target.config.get_text_config(decoder=True).vocab_size
    kept = None if vocabulary >= size else VocabularyMap(torch.arange(vocabulary), 0, size)
    if shape is None:
        student = truncate(target, layers, kept, lags=lags)
    else:
        student = build(target, shape, kept, start="random", lags=lags)
    return sum(weight.numel() for weight in student.parameters())


@dataclass(frozen=True)
class Disk:
    """Bytes, at most: ``lessons`` by folder, ``checkpoints`` (those kept, and one being written), ``artifact``."""

    lessons: Mapping[str, int]
    checkpoints: int
    artifact: int
    max_bytes: int

    @classmethod
    def predict(
        cls,
        folders: Mapping[str, Encoded],
        *,
        answer_tokens: int,
        ks: Mapping[str, int],
        parameters: int,
        runs: int,
        steps: int,
        bytes_per_weight: int,
        max_bytes: int,
    ) -> Disk:
        """``folders``: the prompts answered into each, with ``ks`` tokens kept a position. ``runs``: trainings, each
        with checkpoints of its own.
        """
        sizes = {
            name: predicted_bytes([len(prompt) for prompt in asked.prompts], answer_tokens, ks[name])
            for name, asked in folders.items()
        }
        checkpoints = runs * training_bytes(parameters, steps)
        return cls(sizes, checkpoints, parameters * bytes_per_weight + FRAME, max_bytes)

    @property
    def total(self) -> int:
        """The most that is ever used: lessons stop where ``max_bytes`` would be passed."""
        return min(self.wanted, self.max_bytes)

    @property
    def wanted(self) -> int:
        """What all answers would take if each were as long as allowed."""
        return sum(self.lessons.values()) + self.checkpoints + self.artifact

    def shares(self) -> dict[str, int]:
        """Bytes for each folder of lessons: held-out ones what they want, the others their part of what is left."""
        reserved = {name: size for name, size in self.lessons.items() if name in HELD_OUT}
        others = {name: size for name, size in self.lessons.items() if name not in HELD_OUT}
        left = self.max_bytes - self.checkpoints - self.artifact - sum(reserved.values())
        if left <= 0:
            raise OptionError(
                f"max_bytes={self.max_bytes}: checkpoints take {self.checkpoints}, the artifact {self.artifact} and "
                f"held-out lessons {sum(reserved.values())}, which leaves nothing to learn from: allow more disk or "
                "take a smaller student"
            )
        wanted = sum(others.values())
        return reserved | {name: min(size, left * size // wanted) for name, size in others.items()}

    def as_dict(self) -> dict[str, Any]:
        parts = {"lessons": dict(self.lessons), "checkpoints": self.checkpoints, "artifact": self.artifact}
        return parts | {"wanted": self.wanted, "max_bytes": self.max_bytes, "total": self.total}


@dataclass(frozen=True)
class Prepared:
    """Prompts on their two sides, and what will be on disk."""

    kept: Encoded
    held_out: Encoded
    # folder of lessons → the prompts that are answered into it
    folders: Mapping[str, Encoded]
    # tokens of the target's distribution kept at each position of a folder
    ks: Mapping[str, int]
    stop_tokens: list[int]
    num_too_long: int
    digest: str
    parameters: int
    disk: Disk

    @property
    def total_bytes(self) -> int:
        return self.disk.total

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": len(self.kept.prompts),
            "held_out": len(self.held_out.prompts),
            "too_long": self.num_too_long,
            "parameters": self.parameters,
            "disk": self.disk.as_dict(),
        }


def prepare(
    target: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], recipe: Recipe, begun: Artifact | None = None
) -> Prepared:
    """Encode and split the prompts and predict the disk; generates and writes nothing."""
    if begun is not None:
        recipe.check_begun()
    limit = SoftmaxTarget(target).max_positions
    if limit is not None and limit < recipe.longest_prompt + recipe.max_new_tokens:
        raise OptionError(
            f"longest_prompt={recipe.longest_prompt} and max_new_tokens={recipe.max_new_tokens}: the model has "
            f"{limit} positions for both"
        )
    logged = [prompt.logged for prompt in prompts if prompt.logged is not None]
    if logged:
        check_tokens(logged, describe_base(target.config, tokenizer, name=target.config._name_or_path or "the model"))
    stop = stop_tokens(target, tokenizer)
    encoded = encode(prompts, tokenizer, longest=recipe.longest_prompt, end=stop[0] if stop else None)
    kept, held = split(encoded.digests, recipe.held_out, recipe.most_held_out)
    learned, unseen = encoded.take(kept), encoded.take(held)
    folders = dict.fromkeys(HELD_OUT, unseen)
    folders |= {source: learned for source in recipe.mix.sources if writer(source)[0] == "target"}
    if "fixed" in recipe.mix.sources:
        having = [place for place, answer in enumerate(learned.answers) if answer]
        if not having:
            raise OptionError(
                f"data={recipe.data!r}: none of the {len(kept)} prompts has an answer; write one beside it, as "
                f"{', '.join(ANSWERS)} or an assistant's message"
            )
        folders["fixed"] = learned.take(having)
    parameters = num_student_parameters(
        target, recipe.student_shape, recipe.layers, recipe.vocabulary, recipe.lags, begun
    )
    size = target.config.get_text_config(decoder=True).vocab_size
    ks = {name: min(max(recipe.k, HELD_OUT_K) if name in HELD_OUT else recipe.k, size) for name in folders}
    disk = Disk.predict(
        folders,
        answer_tokens=recipe.max_new_tokens,
        ks=ks,
        parameters=parameters,
        runs=2 if recipe.keep < 1 else 1,
        steps=recipe.steps,
        bytes_per_weight=recipe.weight_dtype.itemsize,
        max_bytes=recipe.max_bytes,
    )
    disk.shares()
    return Prepared(learned, unseen, folders, ks, stop, encoded.num_too_long, encoded.digest(), parameters, disk)
