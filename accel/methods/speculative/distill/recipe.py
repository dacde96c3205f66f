"""From a target and prompts to a draft artifact: every choice in one place, and the steps in order.

Each step resumes: lessons go on behind the last shard, training behind the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from accel.artifacts import Artifact, Manifest, save
from accel.distill.batches import Batch, Lessons
from accel.distill.begin import begin_run
from accel.distill.checkpoint import thinned
from accel.distill.forward import Scorer
from accel.distill.lessons import Library
from accel.distill.prompts import Prompt
from accel.distill.teacher import Generation, Lesson
from accel.distill.weights import DTYPES
from accel.drafters.small_lm import VocabularyMap
from accel.errors import OptionError, unknown_name
from accel.methods.speculative.artifact import KIND, MODEL, VOCABULARY
from accel.methods.speculative.distill.copying import Copies, begin_to_copy
from accel.methods.speculative.distill.data import Mix, Mixture, OnPolicy, Source, Translation, writer
from accel.methods.speculative.distill.measure import measure
from accel.methods.speculative.distill.plan import HELD_OUT, Prepared, prepare
from accel.methods.speculative.distill.student import STARTS, Shape, build, truncate, weights
from accel.methods.speculative.distill.student import begun as student_begun
from accel.methods.speculative.distill.train import Training, train
from accel.methods.speculative.distill.vocabulary import count, coverage, trim
from accel.models.lagged import check_lags

Progress = Callable[[str], None]

DEFAULT_SHAPE = "1x576"


@dataclass(frozen=True)
class Recipe:
    """Every choice that makes a draft; the same recipe, target and prompts make the same draft."""

    # LAYERSxHIDDEN, or some of the target's own layers; one of the two
    shape: str | None = None
    layers: tuple[int, ...] = ()
    # "target": embeddings and head begin as the target's; "random"
    start: str = "target"
    # tokens that its embedding looks back (``accel.models.lagged``)
    lags: int = 0
    # tokens that the draft can say, the most frequent ones
    vocabulary: int = 8192
    data: str = "target"
    # how answers are written, by the target and by the student, where the source names no temperature of its own
    temperature: float = 1.0
    max_new_tokens: int = 256
    longest_prompt: int = 512
    # tokens of the target's distribution that are kept at each position
    k: int = 32
    # prompts that decode together
    rows: int = 32
    loss: str = "lk"
    beta: float = 0.5
    # what learning to copy counts beside the loss; 0 is not to learn it
    copying: float = 0.0
    baseline: bool = False
    keep: float = 1.0
    steps: int = 1000
    batch_tokens: int = 4096
    learning_rate: float = 1e-3
    checkpoint_every: int = 100
    seed: int = 0
    # share of the prompts that nothing is learned from, and how many that are at most
    held_out: float = 0.02
    most_held_out: int = 128
    # everything below the work folder and the artifact
    max_bytes: int = 2_000_000_000
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.shape is not None and self.layers:
            raise OptionError(f"shape={self.shape!r} and layers={list(self.layers)}: give one of the two")
        if self.shape is not None:
            Shape.parse(self.shape)
        for name in ("vocabulary", "longest_prompt", "batch_tokens", "most_held_out", "max_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 < self.held_out <= 0.5:
            raise OptionError(f"held_out={self.held_out}: must be above 0 and at most 0.5")
        if self.dtype not in DTYPES:
            raise OptionError(unknown_name("dtype", self.dtype, DTYPES))
        if self.start not in STARTS:
            raise OptionError(unknown_name("start", self.start, STARTS))
        if self.batch_tokens < self.longest_prompt + self.max_new_tokens:
            raise OptionError(
                f"batch_tokens={self.batch_tokens}: must hold one lesson, longest_prompt + max_new_tokens = "
                f"{self.longest_prompt + self.max_new_tokens}"
            )
        check_lags(self.lags)
        if self.copying > 0 and self.lags == 0:
            raise OptionError(
                f"copying={self.copying} with lags=0: a draft copies by what stands before, give lags=1 or more"
            )
        # these check the rest
        Mix.parse(self.data)
        self.generation(self.temperature)
        assert self.training.steps == self.steps

    def check_begun(self) -> None:
        """Refuse choices that a draft to begin with has made already."""
        usual = Recipe()
        for name in ("shape", "layers", "start", "vocabulary"):
            if getattr(self, name) != getattr(usual, name):
                raise OptionError(f"{name}={getattr(self, name)!r}: the draft to begin with has its own; leave it out")

    @property
    def mix(self) -> Mix:
        return Mix.parse(self.data)

    @property
    def training(self) -> Training:
        names = ("steps", "loss", "beta", "copying", "baseline", "keep", "learning_rate", "checkpoint_every", "seed")
        return Training(**{name: getattr(self, name) for name in names})

    def generation(self, temperature: float, stop_tokens: Sequence[int] = ()) -> Generation:
        return Generation(self.max_new_tokens, temperature, self.seed, stop_tokens, self.k, self.rows)

    def temperature_of(self, source: str) -> float:
        """At which temperature a source of the mix writes: its own, or the recipe's."""
        own = writer(source)[1]
        return self.temperature if own is None else own

    @property
    def weight_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def student_shape(self) -> Shape | None:
        """None where the student is made of the target's layers."""
        return None if self.layers else Shape.parse(self.shape or DEFAULT_SHAPE)


def distill_draft(
    target: PreTrainedModel,
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
    begun: Artifact | None = None,
) -> Artifact:
    """Make a draft for ``target``: lessons, vocabulary, student, training, measures, artifact.

    ``work`` keeps lessons and checkpoints, so that a run that was killed goes on; it may be deleted afterwards.
    ``name``: what the manifest calls the target; ``command``: how this was called;
    ``prepared``: what ``prepare`` said of the same arguments, to save doing it again.
    ``begun``: a draft artifact to train on, in place of a student of the recipe's shape, start and vocabulary.
    """
    prepared, base = begin_run(
        [output],
        target,
        tokenizer,
        name,
        lambda: prepared or prepare(target, tokenizer, prompts, recipe, begun),
        progress,
    )
    lessons = _lessons(target, recipe, prepared, work, asdict(base), progress)
    if begun is None:
        vocabulary = _vocabulary(target, recipe, prepared, lessons)
    else:
        _, vocabulary = student_begun(begun, target, lags=recipe.lags)
    run = _Run(target, recipe, prepared, lessons, vocabulary, work, progress, begun)
    reference = None
    if recipe.keep < 1:
        # AdaSPEC: a draft distilled on all tokens tells which of them can be learned
        reference, _ = run.learn("reference", replace(recipe.training, keep=1.0), None)
    student, rows = run.learn("training", recipe.training, reference)
    progress("measuring …")
    losses = [row["loss"] for row in rows]
    manifest = Manifest(
        kind=KIND,
        base=base,
        parameters={"config": student.config.to_diff_dict()}
        | ({} if vocabulary is None else {"unknown": vocabulary.unknown}),
        made={
            "command": command,
            "seed": recipe.seed,
            "data_digest": prepared.digest,
            "losses": thinned(losses),
            "recipe": asdict(recipe),
            "lessons": {folder: len(each) for folder, each in lessons.items()},
        }
        | run.begun_with(),
        measured=run.measured(student) | {"parameters": prepared.parameters},
    )
    tensors = {MODEL: {key: each.to(recipe.weight_dtype) for key, each in weights(student).items()}}
    if vocabulary is not None:
        tensors[VOCABULARY] = {"d2t": vocabulary.d2t}
    return save(output, manifest, tensors)


def _lessons(
    target: PreTrainedModel,
    recipe: Recipe,
    prepared: Prepared,
    work: Path,
    base: Mapping[str, Any],
    progress: Progress,
) -> dict[str, list[Lesson]]:
    """The lessons of every folder, made where they are not there yet."""
    library = Library(target, work, prepared.disk.shares(), base, progress)
    lessons = {}
    for folder, asked in prepared.folders.items():
        temperature = HELD_OUT[folder] if folder in HELD_OUT else recipe.temperature_of(folder)
        how = replace(recipe.generation(temperature, prepared.stop_tokens), k=prepared.ks[folder])
        make = library.judged if folder == "fixed" else library.written
        lessons[folder] = make(folder, asked, how)
    return lessons


def _vocabulary(
    target: PreTrainedModel, recipe: Recipe, prepared: Prepared, lessons: Mapping[str, Sequence[Lesson]]
) -> VocabularyMap | None:
    """The most frequent tokens of the answers; of the prompts where the student alone writes answers."""
    size = target.config.get_text_config(decoder=True).vocab_size
    if recipe.vocabulary >= size:
        return None
    said = [lesson.answer for folder, each in lessons.items() if folder not in HELD_OUT for lesson in each]
    return trim(count(said or prepared.kept.prompts, size), recipe.vocabulary, prepared.stop_tokens)


@dataclass(frozen=True)
class _Run:
    """What all trainings of one call share."""

    target: PreTrainedModel
    recipe: Recipe
    prepared: Prepared
    lessons: Mapping[str, Sequence[Lesson]]
    vocabulary: VocabularyMap | None
    work: Path
    progress: Progress
    begun: Artifact | None = None

    def learn(
        self, folder: str, how: Training, reference: PreTrainedModel | None
    ) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """A student, trained, and its log."""
        recipe, translation = self.recipe, Translation(self.vocabulary)
        shape = recipe.student_shape
        if self.begun is not None:
            student, _ = student_begun(self.begun, self.target, lags=recipe.lags)
        elif shape is None:
            student = truncate(self.target, recipe.layers, self.vocabulary, lags=recipe.lags)
        else:
            student = build(self.target, shape, self.vocabulary, start=recipe.start, seed=recipe.seed, lags=recipe.lags)
        if recipe.copying > 0 and not (self.begun and self.begun.manifest.made.get("recipe", {}).get("copying")):
            begin_to_copy(student, recipe.seed)
        sources: dict[str, Source] = {
            folder: Lessons(each, recipe.batch_tokens, recipe.seed, by_target=folder != "fixed")
            for folder, each in self.lessons.items()
            if folder not in HELD_OUT
        }
        for source in recipe.mix.sources:
            if writer(source)[0] == "draft":
                how_written = recipe.generation(recipe.temperature_of(source), self.prepared.stop_tokens)
                asked = self.prepared.kept.prompts
                sources[source] = OnPolicy(
                    Scorer(self.target), student, translation, asked, how_written, recipe.batch_tokens
                )
        mixture = Mixture(sources, recipe.mix, recipe.steps, recipe.seed)
        rows = train(
            student,
            lambda step: translation(mixture.batch(step)),
            how,
            self.work / folder,
            made_from=self._made_from(),
            reference=reference,
            copies=self._copies(translation) if recipe.copying > 0 else None,
            progress=_told(self.progress, folder, recipe.steps),
        )
        return student, rows

    def _copies(self, translation: Translation) -> Callable[[int], Batch]:
        """What is said twice: pieces of the lessons that are learned from, or of prompts where there are none."""
        lessons = [lesson for folder, each in self.lessons.items() if folder not in HELD_OUT for lesson in each]
        texts = [torch.cat([each.prompt, each.answer]).long() for each in lessons]
        texts = texts or [torch.tensor(prompt) for prompt in self.prepared.kept.prompts if len(prompt) > 1]
        size = self.target.config.get_text_config(decoder=True).vocab_size
        can_say = torch.arange(size) if self.vocabulary is None else self.vocabulary.d2t
        copies = Copies(texts, can_say, self.recipe.seed)
        return lambda step: translation(copies.batch(step))

    def measured(self, student: PreTrainedModel) -> dict[str, Any]:
        """Agreement on the held-out answers, greedy and sampled, and how much of them the draft could say at all."""
        found: dict[str, Any] = {}
        translation = Translation(self.vocabulary)
        for folder in HELD_OUT:
            lessons = Lessons(self.lessons[folder], self.recipe.batch_tokens, seed=0)
            sampled = HELD_OUT[folder] > 0
            batches = (translation(batch) for batch in lessons.epoch())
            found[folder.removeprefix("held-out-")] = measure(student, batches, sampled=sampled).as_dict()
        answers = [lesson.answer for folder in HELD_OUT for lesson in self.lessons[folder]]
        size = self.target.config.get_text_config(decoder=True).vocab_size
        covered = 1.0 if self.vocabulary is None else coverage(count(answers, size), self.vocabulary)
        return found | {"coverage": covered, "held_out_prompts": len(self.prepared.held_out.prompts)}

    def _made_from(self) -> dict[str, Any]:
        """What a training that goes on must have in common with the one that was killed."""
        free = ("max_bytes", "dtype", "rows", "checkpoint_every")
        choices = {key: value for key, value in asdict(self.recipe).items() if key not in free}
        return (
            choices
            | {
                "data_digest": self.prepared.digest,
                "lessons": {folder: len(each) for folder, each in self.lessons.items()},
            }
            | self.begun_with()
        )

    def begun_with(self) -> dict[str, Any]:
        """The weights that the training began with, where they were a draft's."""
        return {} if self.begun is None else {"begun": {"sha256": self.begun.manifest.files[MODEL].sha256}}


def _told(progress: Progress, folder: str, steps: int) -> Callable[[Mapping[str, Any]], None]:
    def told(row: Mapping[str, Any]) -> None:
        left = (steps - row["step"] - 1) * row["seconds"]
        progress(
            f"{folder}: step {row['step'] + 1} of {steps} · loss {row['loss']:.3f} · α {row['acceptance']:.3f} · "
            f"about {left:.0f} s left"
        )

    return told
