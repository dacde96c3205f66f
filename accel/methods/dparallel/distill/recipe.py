"""From a model and prompts to a masked-diffusion artifact: every choice in one place, and the steps in order.

Two recipes share them. ``DParallel`` makes a masked-diffusion model certain in few steps; ``Conversion`` makes one of a
causal model. Each step resumes: answers go on behind the last shard, training behind the last checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from accel.artifacts import Artifact
from accel.distill.begin import begin_run
from accel.distill.checkpoint import FRAME, thinned, training_bytes
from accel.distill.lessons import Library, predicted_bytes
from accel.distill.lora import ALL, Lora, layers
from accel.distill.prompts import Encoded, Prompt, encode, split
from accel.distill.teacher import Generation, stop_tokens
from accel.distill.weights import DTYPES, describe_teacher
from accel.errors import ModelError, OptionError, unknown_name
from accel.methods.dparallel import artifact as artifacts
from accel.methods.dparallel.distill import begin
from accel.methods.dparallel.distill.calibrate import (
    check_length,
    evaluate,
    known_answers,
    one_token,
    require_answers,
)
from accel.methods.dparallel.distill.opened import masked_facts
from accel.methods.dparallel.distill.train import Training, filler, measure, train
from accel.methods.dparallel.distill.trajectories import Kept, from_file, keep, self_written
from accel.methods.dparallel.options import DParallelOptions
from accel.models.diffusion import Denoiser, DiffusionFacts, facts_of

Progress = Callable[[str], None]

# who writes the answers
DATA = ("self", "file")
# answers are kept where their final answer is the file's, or all of them
CHECKS = ("final", "none")
# nothing that is made depends on these
_FREE = ("max_bytes", "dtype", "rows", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both recipes choose; the same recipe, model and prompts make the same model."""

    name: ClassVar[str]
    # who writes the answers that are learned
    data: str
    check: str
    noise: str
    canvas: str
    beta: float
    learning_rate: float
    # 0: all weights are trained
    lora_rank: int
    # None: as the rank
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = (ALL,)
    # of the facts; None leaves the model's own
    rule: str | None = None
    threshold: float | None = None
    block_length: int | None = None
    longest_prompt: int = 256
    max_new_tokens: int = 256
    entropy_temperature: float = 0.5
    steps: int = 1000
    batch_tokens: int = 4096
    warmup: float = 0.05
    floor: float = 0.1
    checkpoint_every: int = 100
    # prompts that decode together
    rows: int = 16
    seed: int = 0
    # share of the prompts that nothing is learned from, and how many that are at most
    held_out: float = 0.02
    most_held_out: int = 64
    # everything below the work folder and the artifact
    max_bytes: int = 2_000_000_000
    # of the artifact's weights
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, allowed in (("data", DATA), ("check", CHECKS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                raise OptionError(unknown_name(name, getattr(self, name), allowed))
        for name in ("longest_prompt", "rows", "most_held_out", "max_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 < self.held_out <= 0.5:
            raise OptionError(f"held_out={self.held_out}: must be above 0 and at most 0.5")
        if self.lora_rank < 0:
            raise OptionError(f"lora_rank={self.lora_rank}: must be 1 or more, or 0 to train all weights")
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets != (ALL,)):
            raise OptionError("lora_rank=0 trains all weights: leave lora_alpha and lora_targets out, or give a rank")
        # these check the rest
        DiffusionFacts(mask_token=0, **self.chosen_facts)
        assert self.training.seed == self.seed

    @property
    def training(self) -> Training:
        return Training(
            **{each.name: getattr(self, each.name) for each in fields(Training) if hasattr(self, each.name)}
        )

    @property
    def chosen_facts(self) -> dict[str, Any]:
        """The facts that this recipe replaces."""
        named = {name: getattr(self, name) for name in ("rule", "threshold", "block_length")}
        return {name: value for name, value in named.items() if value is not None}

    def made_from(self) -> dict[str, Any]:
        """What may not change while a run is resumed."""
        return {key: value for key, value in asdict(self).items() if key not in _FREE}


@dataclass(frozen=True, kw_only=True)
class DParallel(Recipe):
    """Certainty-forcing distillation of a masked-diffusion model from its own right answers (arXiv 2509.26488)."""

    name: ClassVar[str] = "dparallel"
    data: str = "self"
    check: str = "final"
    noise: str = "blocks"
    canvas: str = "whole"
    beta: float = 2.0
    learning_rate: float = 2e-5
    lora_rank: int = 32


@dataclass(frozen=True, kw_only=True)
class Conversion(Recipe):
    """A causal language model to a masked-diffusion model (MDLM, arXiv 2406.07524, from the causal weights)."""

    name: ClassVar[str] = "a2d"
    data: str = "file"
    check: str = "none"
    noise: str = "diffusion"
    canvas: str = "random"
    beta: float = 0.0
    learning_rate: float = 1e-4
    lora_rank: int = 0
    # the tokenizer's own, or a new token of this text
    mask_token: str | None = None
    # position i goes on predicting token i + 1, as the causal model did
    shift: bool = False


@dataclass(frozen=True)
class Prepared:
    """Prompts as token ids, those held out, and what will be on disk, at most, in bytes."""

    kept: Encoded
    held_out: Encoded
    # the file's answers to both, as texts; None where nothing is compared
    known: list[str] | None
    known_held_out: list[str] | None
    num_too_long: int
    facts: DiffusionFacts
    parameters: int
    trained: int
    disk: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.disk.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": len(self.kept.prompts),
            "held_out": len(self.held_out.prompts),
            "too_long": self.num_too_long,
            "parameters": self.parameters,
            "trained": self.trained,
            "facts": self.facts.as_dict(),
            "disk": self.disk | {"total": self.total_bytes},
        }


def prepare(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], recipe: Recipe) -> Prepared:
    """Read the prompts and count bytes; generates and writes nothing, and leaves the model as it is."""
    facts = _facts(model, tokenizer, recipe)
    # tried here: it refuses what reads in one direction alone. A mask token that is not there yet is any other
    trial = facts if facts_of(model) else DiffusionFacts(mask_token=facts.stop_tokens[0])
    limit = Denoiser(model, trial).max_positions
    whole = encode(prompts, tokenizer, longest=recipe.longest_prompt, end=filler(facts))
    places, held = split(whole.digests, recipe.held_out, recipe.most_held_out)
    kept, held_out = whole.take(places), whole.take(held)
    known = known_held_out = None
    if recipe.check == "final":
        if recipe.data == "self":
            known = require_answers(known_answers(prompts, kept), ", or keep all (check='none')")
        texts = known_answers(prompts, held_out)
        known_held_out = [each for each in texts if each is not None] if None not in texts else None
    if recipe.data == "file":
        from_file(kept), from_file(held_out)
    longest = max(map(len, whole.prompts))
    check_length(limit, facts.block_length, longest, recipe.max_new_tokens)
    canvas = recipe.training.positions(facts.block_length)
    if (wide := recipe.training.views * (longest + canvas)) > recipe.batch_tokens:
        raise OptionError(
            f"batch_tokens={recipe.batch_tokens}: a prompt of {longest} tokens, {canvas} positions of its answer and "
            f"{recipe.training.views} views of both take {wide}; allow as many"
        )
    numbers = sum(each.numel() for each in model.parameters())
    trained = numbers
    if recipe.lora_rank:
        modules = dict(model.named_modules())
        sizes = [modules[name].weight.shape for name in layers(model, recipe.lora_targets)]
        trained = recipe.lora_rank * sum(sum(size) for size in sizes)
    disk = {
        "answers": 0,
        "checkpoints": training_bytes(trained, recipe.steps),
        # and the copy that transformers saves first
        "artifact": 2 * (numbers * DTYPES[recipe.dtype].itemsize + _tokenizer_bytes(tokenizer) + FRAME),
    }
    if recipe.data == "self":
        disk["answers"] = sum(predicted_bytes([len(p) for p in e.prompts], canvas, 1) for e in (kept, held_out))
    if (total := sum(disk.values())) > recipe.max_bytes:
        raise OptionError(
            f"max_bytes={recipe.max_bytes}: answers take up to {disk['answers']}, checkpoints {disk['checkpoints']} "
            f"and the artifact {disk['artifact']} bytes; allow {total} or train fewer weights (lora_rank)"
        )
    return Prepared(kept, held_out, known, known_held_out, whole.num_too_long, facts, numbers, trained, disk)


def distill(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    work: Path,
    output: Path,
    progress: Progress = lambda message: None,
    *,
    name: str | None = None,
    command: str | None = None,
    prepared: Prepared | None = None,
) -> Artifact:
    """Make the artifact: answers, training, measures, files. ``model`` is changed in place.

    ``work`` keeps answers and checkpoints, so that a run that was killed goes on; it may be deleted afterwards.
    ``name``: what the manifest calls the model; ``command``: how this was called.
    """
    prepared, base = begin_run(
        [output], model, tokenizer, name, lambda: prepared or prepare(model, tokenizer, prompts, recipe), progress
    )
    teacher = describe_teacher(base, model)
    run = _Run(model, tokenizer, recipe, prepared, work, progress, teacher)
    measured, losses = run.learn()
    made: dict[str, Any] = {
        "command": command,
        "seed": recipe.seed,
        "data_digest": prepared.kept.digest(),
        "losses": thinned(losses),
        "recipe": {"name": recipe.name, **asdict(recipe)},
        "teacher": teacher,
    }
    parameters = {"max_new_tokens": recipe.training.positions(prepared.facts.block_length)}
    return artifacts.write(
        output,
        model,
        tokenizer,
        prepared.facts,
        work=work,
        base=base,
        dtype=recipe.dtype,
        parameters=parameters,
        made=made,
        measured=measured,
    )


@dataclass
class _Run:
    """One call of ``distill``."""

    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe
    prepared: Prepared
    work: Path
    progress: Progress
    teacher: Mapping[str, Any]

    def learn(self) -> tuple[dict[str, Any], list[float]]:
        """Train the model in place; what was measured on held-out prompts, and the losses."""
        recipe, facts = self.recipe, self.prepared.facts
        how = recipe.training
        found: dict[str, Any] = {"held_out_prompts": len(self.prepared.held_out.prompts)}
        if isinstance(recipe, Conversion):
            kept, unseen = (self._causal_answers(folder) for folder in ("answers", "held-out"))
            text = begin.mask_text(self.tokenizer, recipe.mask_token)
            begin.add_mask_token(self.model, self.tokenizer, facts.mask_token, text)
            denoiser = Denoiser(self.model, facts)
        else:
            denoiser = Denoiser(self.model, facts)
            kept, unseen = (self._own_answers(denoiser, folder) for folder in ("answers", "held-out"))
        if not kept.lessons:
            raise OptionError(
                f"none of {kept.written} answers is worth learning ({kept.cut} without an end, {kept.wrong} wrong): "
                "raise max_new_tokens, or give prompts that the model can answer"
            )
        found["answers"] = kept.as_dict()
        if not isinstance(recipe, Conversion):
            self.progress("measuring the teacher …")
            found["teacher"] = self._decoded(denoiser)
        found["hidden_tokens"] = {"before": measure(denoiser, unseen.lessons, how)}
        learner: nn.Module = self.model.float() if not recipe.lora_rank else self._additions()
        rows = train(
            denoiser,
            learner,
            kept.lessons,
            how,
            self.work / "training",
            made_from=recipe.made_from()
            | {"teacher": dict(self.teacher), "facts": facts.as_dict()}
            | {"answers": [each.index for each in sorted(kept.lessons, key=lambda each: each.index)]},
            progress=lambda row: self.progress(
                f"training: step {row['step'] + 1} of {how.steps} · loss {row['loss']:.3f} · "
                f"{row['correct']:.0%} right · about {(how.steps - row['step'] - 1) * row['seconds']:.0f} s left"
            ),
        )
        if isinstance(learner, Lora):
            learner.merge()
        self._round()
        self.progress("measuring …")
        found["hidden_tokens"]["after"] = measure(denoiser, unseen.lessons, how)
        found["student"] = self._decoded(denoiser)
        return found, [row["loss"] for row in rows]

    def _additions(self) -> Lora:
        recipe = self.recipe
        alpha = float(recipe.lora_rank) if recipe.lora_alpha is None else recipe.lora_alpha
        return Lora(self.model, rank=recipe.lora_rank, alpha=alpha, targets=recipe.lora_targets, seed=recipe.seed)

    @torch.no_grad()
    def _round(self) -> None:
        """To what the artifact will hold, so that what is measured is what is saved."""
        for weight in self.model.parameters():
            weight.copy_(weight.to(DTYPES[self.recipe.dtype]))

    def _asked(self, folder: str) -> tuple[Encoded, list[str] | None, int]:
        """Prompts, their known answers, and the bytes that their answers may take."""
        prepared, learns = self.prepared, folder == "answers"
        asked = prepared.kept if learns else prepared.held_out
        known = prepared.known if learns or prepared.known is None else prepared.known_held_out
        return asked, known, max(self.prepared.disk["answers"], 1)

    def _own_answers(self, denoiser: Denoiser, folder: str) -> Kept:
        asked, known, room = self._asked(folder)
        facts, recipe = denoiser.facts, self.recipe
        length = recipe.training.positions(facts.block_length)
        if recipe.data == "file":
            return keep(from_file(asked), facts.stop_tokens, self.tokenizer, None)
        lessons = self_written(
            denoiser,
            asked,
            DParallelOptions(),
            length,
            recipe.rows,
            self.work / folder,
            self.teacher,
            room,
            lambda message: self.progress(f"{folder}: {message}"),
        )
        return keep(lessons, facts.stop_tokens, self.tokenizer, known)

    def _causal_answers(self, folder: str) -> Kept:
        """The file's, or what the causal model says."""
        asked, known, room = self._asked(folder)
        facts, recipe = self.prepared.facts, self.recipe
        if recipe.data == "file":
            return keep(from_file(asked), facts.stop_tokens, self.tokenizer, None)
        length = recipe.training.positions(facts.block_length)
        how = Generation(length, 0.0, recipe.seed, facts.stop_tokens, k=1, rows=recipe.rows)
        library = Library(self.model, self.work, {folder: room}, dict(self.teacher), self.progress)
        return keep(library.written(folder, asked, how), facts.stop_tokens, self.tokenizer, known)

    def _decoded(self, denoiser: Denoiser) -> dict[str, Any]:
        """Held-out prompts at the model's threshold and at one token a forward."""
        prepared, recipe = self.prepared, self.recipe
        length = recipe.training.positions(denoiser.facts.block_length)
        found = {}
        for label, options in (("threshold", DParallelOptions()), ("one_token", one_token(denoiser))):
            point = evaluate(
                denoiser,
                self.tokenizer,
                prepared.held_out.prompts,
                prepared.known_held_out,
                options,
                length,
                recipe.rows,
            )
            found[label] = asdict(point)
        return found


def _facts(model: PreTrainedModel, tokenizer: Any, recipe: Recipe) -> DiffusionFacts:
    """What the artifact will say of itself."""
    if isinstance(recipe, Conversion):
        if facts_of(model) is not None:
            raise ModelError(
                "the model is a masked-diffusion model already: make it faster with `accel distill dparallel`"
            )
        end = stop_tokens(model, tokenizer)
        if not end:
            raise ModelError("the tokenizer and the generation config name no end token, and an answer needs an end")
        mask = begin.mask_id(tokenizer, begin.mask_text(tokenizer, recipe.mask_token))
        pad = tokenizer.pad_token_id
        return DiffusionFacts(
            mask_token=mask,
            shift=recipe.shift,
            stop_tokens=tuple(end),
            pad_token=None if pad == mask else pad,
            **recipe.chosen_facts,
        )
    return dataclasses.replace(masked_facts(model, "the model"), **recipe.chosen_facts)


def _tokenizer_bytes(tokenizer: Any) -> int:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # indented, in two files at most
    return 64 * len(tokenizer) if backend is None else 4 * len(backend.to_str())
