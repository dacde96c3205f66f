"""From a model and documents to cartridges: every choice in one place, and the steps in order.

Each step resumes: conversations go on behind the last shard, training behind the last checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from accel.artifacts import Artifact, BaseModel, config_digest, json_digest
from accel.distill.batches import Lessons
from accel.distill.begin import begin_run
from accel.distill.checkpoint import FRAME, thinned, training_bytes
from accel.distill.files import read_document
from accel.distill.forward import Scorer
from accel.distill.losses import Teacher, forward_kl, pair
from accel.distill.teacher import Lesson, stop_tokens
from accel.errors import OptionError, unknown_name
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import DTYPES, FILE, TEMPLATES, Cartridge, Document, Geometry
from accel.methods.cartridge.distill.compact import compact
from accel.methods.cartridge.distill.self_study import Corpus, Study, cut, study
from accel.methods.cartridge.distill.slots import STARTS, Slots, begin, inputs
from accel.methods.cartridge.distill.train import Training, train
from accel.methods.cartridge.template import document_ids, query_ids
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget

Progress = Callable[[str], None]

METHODS = ("self-study", "compact", "whole")
# one conversation in so many is held out, so many at most
_HELD_OUT, _MOST_HELD_OUT = 16, 64
# what the quick fit is asked about: stretches of the document, so many tokens each, so many of them
_STRETCH, _STRETCHES = 24, 48


@dataclass(frozen=True)
class Recipe:
    """Every choice that makes a cartridge; the same recipe, model and documents make the same one."""

    # slots of a layer, or how many tokens of the document stand for one slot; one of the two
    tokens: int | None = None
    compression: float | None = None
    method: str = "self-study"
    # how the document stands in prompts, and what is said before it
    template: str = "system"
    instruction: str = ""
    start: str = "chunks"
    sink_tokens: int = 1
    # about the longest document, and about others in proportion; or, given as many, about each; see Study
    conversations: int | tuple[int, ...] = 1024
    shortest_chunk: int = 256
    longest_chunk: int = 1024
    per_chunk: int = 16
    question_tokens: int = 48
    answer_tokens: int = 96
    k: int = 32
    rows: int = 32
    # see Training
    steps: int = 400
    batch_tokens: int = 2048
    learning_rate: float = 0.02
    together: float = 0.5
    checkpoint_every: int = 50
    seed: int = 0
    # of the file
    dtype: str = "bfloat16"
    # everything below the work folder and the artifacts
    max_bytes: int = 2_000_000_000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(unknown_name("method", self.method, METHODS))
        if self.method == "whole":
            if self.tokens is not None or self.compression is not None:
                raise OptionError("method='whole' keeps every token: leave tokens and compression out")
        elif (self.tokens is None) == (self.compression is None):
            raise OptionError(f"tokens={self.tokens} and compression={self.compression}: give one of the two")
        if self.tokens is not None and self.tokens < 1:
            raise OptionError(f"tokens={self.tokens}: must be 1 or more")
        if self.compression is not None and not 1 <= self.compression < float("inf"):
            raise OptionError(f"compression={self.compression}: must be 1 or more, as in 16 for a sixteenth")
        for name, allowed in (("template", TEMPLATES), ("start", STARTS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                raise OptionError(unknown_name(name, getattr(self, name), allowed))
        if self.sink_tokens < 0 or self.max_bytes < 1:
            raise OptionError(f"sink_tokens={self.sink_tokens}, max_bytes={self.max_bytes}: ≥ 0 and ≥ 1")
        # these check the rest
        for count in self.conversations if isinstance(self.conversations, tuple) else (self.conversations,):
            assert self.study(count).seed == self.training.seed

    def study(self, conversations: int) -> Study:
        """How so many conversations are held about one document."""
        named = {each.name: getattr(self, each.name) for each in fields(Study) if hasattr(self, each.name)}
        return Study(**named | {"conversations": conversations})

    def conversations_about(self, lengths: Sequence[int]) -> list[int]:
        """Of each document, by their tokens: a shorter one has less to ask about, unless each is given its own."""
        if not isinstance(self.conversations, tuple):
            return [max(round(self.conversations * each / max(lengths)), 1) for each in lengths]
        if len(self.conversations) != len(lengths):
            raise OptionError(
                f"conversations={self.conversations} for {len(lengths)} documents: give one number for the longest, "
                "or one for each"
            )
        return list(self.conversations)

    @property
    def training(self) -> Training:
        return Training(
            **{each.name: getattr(self, each.name) for each in fields(Training) if hasattr(self, each.name)}
        )

    def slots_for(self, document_tokens: int) -> int:
        """p for a document of so many tokens, with its template."""
        if self.method == "whole":
            return document_tokens
        if self.tokens is not None:
            return self.tokens
        assert self.compression is not None
        return max(int(document_tokens / self.compression), 1)


@dataclass(frozen=True)
class Prepared:
    """Documents as token ids, their slots, and what will be on disk, at most."""

    corpora: list[Corpus]
    ids: list[list[int]]
    slots: list[int]
    studies: list[Study]
    lessons_bytes: int
    checkpoint_bytes: int
    artifact_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.lessons_bytes + self.checkpoint_bytes + self.artifact_bytes

    def as_dict(self) -> dict[str, Any]:
        documents = [
            {"name": corpus.name, "tokens": len(ids), "slots": slots, "compression": round(len(ids) / slots, 2)}
            for corpus, ids, slots in zip(self.corpora, self.ids, self.slots, strict=True)
        ]
        for each, asked in zip(documents, self.studies, strict=False):  # none where nothing is trained
            each["conversations"] = asked.conversations
        disk = {"lessons": self.lessons_bytes, "checkpoints": self.checkpoint_bytes, "artifacts": self.artifact_bytes}
        return {"documents": documents, "disk": disk | {"total": self.total_bytes}}


def read_corpora(files: Sequence[Path], recipe: Recipe) -> list[Corpus]:
    """Documents of text files (UTF-8), named by their files."""
    texts = [read_document(path, "the document") for path in files]
    corpora = [
        Corpus(path.stem, text, recipe.template, recipe.instruction) for path, text in zip(files, texts, strict=True)
    ]
    names = [each.name for each in corpora]
    if len(set(names)) < len(names):
        raise OptionError(f"documents named {', '.join(names)}: each needs a file name of its own")
    if len({each.digest for each in corpora}) < len(corpora):
        raise OptionError("the same document is given twice: give each once")
    return corpora


def prepare(model: PreTrainedModel, tokenizer: Any, corpora: Sequence[Corpus], recipe: Recipe) -> Prepared:
    """Count tokens, slots and bytes; generates and writes nothing."""
    ids = [document_ids(tokenizer, each.text, each.template, each.instruction) for each in corpora]
    slots = [recipe.slots_for(len(each)) for each in ids]
    for corpus, each, count in zip(corpora, ids, slots, strict=True):
        if count > len(each):
            raise OptionError(f"tokens={count}: {corpus.name} has only {len(each)} with its template; ask for fewer")
        if recipe.method != "whole" and count <= recipe.sink_tokens:
            raise OptionError(f"{corpus.name}: {count} slots and sink_tokens={recipe.sink_tokens} leave none to fit")
    learns = recipe.method == "self-study"
    limit = SoftmaxTarget(model).max_positions
    # the piece and what stands around it, the question, the answer
    longest = recipe.longest_chunk + 5 * recipe.question_tokens + recipe.answer_tokens
    if learns and limit is not None and longest > limit:
        raise OptionError(
            f"longest_chunk={recipe.longest_chunk}: with question and answer up to {longest} positions, the model has "
            f"{limit}; take shorter pieces"
        )
    geometry = Geometry.of(model.config)
    numbers = sum(2 * geometry.layers * geometry.kv_heads * geometry.head_dim * each for each in slots)
    asked = recipe.conversations_about([len(each) for each in ids])
    studies = [recipe.study(count) for count in asked] if learns else []
    lessons = sum(each.predicted_bytes() for each in studies)
    checkpoints = training_bytes(numbers, recipe.steps) if learns else 0
    prepared = Prepared(
        list(corpora),
        ids,
        slots,
        studies,
        lessons,
        checkpoints,
        numbers * DTYPES[recipe.dtype].itemsize + FRAME * len(corpora),
    )
    if prepared.total_bytes > recipe.max_bytes:
        raise OptionError(
            f"max_bytes={recipe.max_bytes}: conversations take up to {lessons}, checkpoints {checkpoints} and "
            f"artifacts {prepared.artifact_bytes} bytes; allow more disk, fewer conversations or fewer slots"
        )
    return prepared


def distill_cartridges(
    model: PreTrainedModel,
    tokenizer: Any,
    corpora: Sequence[Corpus],
    recipe: Recipe,
    work: Path,
    outputs: Sequence[Path],
    progress: Progress = lambda message: None,
    *,
    name: str | None = None,
    command: str | None = None,
    prepared: Prepared | None = None,
    begun: Sequence[Artifact] = (),
) -> list[Artifact]:
    """Make a cartridge of each document; those of one call learn to stand together.

    ``begun``: cartridges of any of these documents whose training goes on, instead of beginning at ``recipe.start``.

    ``work`` keeps conversations and checkpoints, so that a run that was killed goes on, and another recipe with the
    same conversations finds them; it may be deleted afterwards.
    ``name``: what the manifest calls the model; ``command``: how this was called.
    """
    prepared, base = begin_run(
        outputs, model, tokenizer, name, lambda: prepared or prepare(model, tokenizer, corpora, recipe), progress
    )
    trained_before = _begun(begun, model, tokenizer, prepared, recipe)
    made: dict[str, Any] = {"command": command, "seed": recipe.seed, "recipe": asdict(recipe)}
    if begun:
        made["begun"] = [{"sha256": each.manifest.files[FILE].sha256} for each in begun]
    measured: list[dict[str, Any]] = [{} for _ in corpora]
    if recipe.method == "self-study":
        segments, losses, measured = _trained(model, tokenizer, prepared, recipe, work, progress, base, trained_before)
        made["losses"] = thinned(losses)
    elif recipe.method == "compact":
        queries = [_probes(tokenizer, each) for each in prepared.corpora]
        triples = zip(prepared.ids, queries, prepared.slots, strict=True)
        segments = [compact(model, ids, asked, count, recipe.sink_tokens) for ids, asked, count in triples]
    else:
        segments = [document.read(model, ids) for ids in prepared.ids]
    artifacts = []
    digests = [each.digest for each in corpora]
    joint = recipe.method == "self-study" and recipe.together > 0
    for place, (corpus, segment, output) in enumerate(zip(corpora, segments, outputs, strict=True)):
        cartridge = Cartridge.of(
            output.name,
            segment,
            model,
            tokenizer,
            method=recipe.method,
            template=recipe.template,
            instruction=recipe.instruction,
            sink_tokens=0 if recipe.method == "whole" else recipe.sink_tokens,
            documents=(Document(corpus.digest, len(prepared.ids[place])),),
            trained_with=tuple(each for each in digests if each != corpus.digest) if joint else (),
            exact=recipe.method == "whole",
        )
        cartridge = dataclasses.replace(cartridge, base=base)
        artifacts.append(
            cartridge.save(
                output,
                dtype=recipe.dtype,
                made=made | {"data_digest": corpus.digest},
                measured=measured[place],
            )
        )
    return artifacts


def _begun(
    given: Sequence[Artifact], model: PreTrainedModel, tokenizer: Any, prepared: Prepared, recipe: Recipe
) -> dict[str, tuple[Segment, str]]:
    """By document: the slots to go on with, and the digest of their file. What does not fit is refused."""
    if given and recipe.method != "self-study":
        raise OptionError(f"method={recipe.method!r} trains nothing that could go on from {given[0].path}")
    counts = {each.digest: count for each, count in zip(prepared.corpora, prepared.slots, strict=True)}
    found: dict[str, tuple[Segment, str]] = {}
    for artifact in given:
        cartridge = Cartridge.load(artifact, model, tokenizer)
        about = cartridge.parameters
        documents = [each.sha256 for each in about.documents]
        if len(documents) != 1 or documents[0] not in counts:
            raise OptionError(f"{artifact.path}: was made of none of these documents: give its own with --corpus")
        if documents[0] in found:
            raise OptionError(f"{artifact.path}: a second cartridge of the same document to go on from: give one")
        if about.has_bias:
            raise OptionError(f"{artifact.path}: was fitted with a bias of its slots, which training does not have")
        has = (about.tokens, about.positions, about.sink_tokens, about.template, about.instruction)
        wants = (counts[documents[0]],) * 2 + (recipe.sink_tokens, recipe.template, recipe.instruction)
        if has != wants:
            raise OptionError(
                f"{artifact.path}: (slots, positions, sink tokens, template, instruction) are {has}, asked for are "
                f"{wants}: ask for the same to go on"
            )
        found[documents[0]] = cartridge.segment, artifact.manifest.files[FILE].sha256
    return found


def _trained(
    model: PreTrainedModel,
    tokenizer: Any,
    prepared: Prepared,
    recipe: Recipe,
    work: Path,
    progress: Progress,
    base: BaseModel,
    begun: Mapping[str, tuple[Segment, str]],
) -> tuple[list[Segment], list[float], list[dict[str, Any]]]:
    stop = stop_tokens(model, tokenizer)
    learned, unseen = [], []
    for corpus, asked in zip(prepared.corpora, prepared.studies, strict=True):
        lessons = study(
            model,
            tokenizer,
            corpus,
            asked,
            work / corpus.name,
            asdict(base),
            stop,
            lambda message, of=corpus.name: progress(f"{of}: {message}"),  # type: ignore[misc]
            recipe.max_bytes,
        )
        lessons = cut(lessons, recipe.batch_tokens)
        held = [each for each in lessons if each.index % _HELD_OUT == _HELD_OUT - 1][:_MOST_HELD_OUT]
        chosen = {each.index for each in held}
        learned.append([each for each in lessons if each.index not in chosen])
        unseen.append(held)
    slots = []
    for corpus, ids, count in zip(prepared.corpora, prepared.ids, prepared.slots, strict=True):
        if corpus.digest in begun:
            segment = begun[corpus.digest][0]
        else:
            segment = begin(model, ids, count, recipe.start, recipe.sink_tokens, recipe.seed)
        slots.append(Slots(segment, recipe.sink_tokens))
    before = [_divergence(model, one, held, recipe) for one, held in zip(slots, unseen, strict=True)]
    free = ("max_bytes", "dtype", "rows", "checkpoint_every")
    made_from = {key: value for key, value in asdict(recipe).items() if key not in free}
    made_from |= {"config": config_digest(model.config), "documents": [each.digest for each in prepared.corpora]}
    if begun:
        made_from["begun"] = sorted(digest for _, digest in begun.values())
    rows = train(
        model,
        slots,
        learned,
        recipe.training,
        # others of the same conversations, in another size or at another rate, stand beside it
        work / f"training-{json_digest(made_from)[:12]}",
        made_from=made_from,
        progress=lambda row: progress(
            f"training: step {row['step'] + 1} of {recipe.steps} · loss {row['loss']:.3f} · about "
            f"{(recipe.steps - row['step'] - 1) * row['seconds']:.0f} s left"
        ),
    )
    progress("measuring …")
    measured = [
        {
            "conversations": len(lessons),
            "held_out": len(held),
            "divergence_before": start,
            "divergence": _divergence(model, one, held, recipe),
        }
        for one, lessons, held, start in zip(slots, learned, unseen, before, strict=True)
    ]
    return [each.segment(model.dtype) for each in slots], [row["loss"] for row in rows], measured


@torch.no_grad()
def _divergence(model: PreTrainedModel, slots: Slots, lessons: Sequence[Lesson], recipe: Recipe) -> float | None:
    """Mean KL(teacher ‖ cartridge) over the answer tokens of conversations that were held out; None without any."""
    if not lessons:
        return None
    scorer = Scorer(model)
    total, count = 0.0, 0
    for whole in Lessons(lessons, recipe.batch_tokens, seed=0).epoch():
        batch = whole.to(model.device)
        logits = scorer(batch.tokens, batch.at, **inputs([slots], batch.tokens, model.dtype))
        total += float(forward_kl(pair(logits, Teacher(batch.ids, batch.logp))).sum())
        count += len(batch.at)
    return round(total / count, 5)


def _probes(tokenizer: Any, corpus: Corpus) -> list[list[int]]:
    """What the quick fit is asked: to say again what stands at evenly spread places of the document."""
    ids: list[int] = tokenizer(corpus.text, add_special_tokens=False)["input_ids"]
    count = min(_STRETCHES, -(-len(ids) // _STRETCH))
    probes = []
    for place in range(count):
        start = round(place * max(len(ids) - _STRETCH, 0) / max(count - 1, 1))
        passage = tokenizer.decode(ids[start : start + _STRETCH], skip_special_tokens=True).strip()
        asked = [{"role": "user", "content": f"What does the text say about this? {passage}"}]
        probes.append([*query_ids(tokenizer, asked, corpus.template), *ids[start : start + _STRETCH]])
    return probes


def summary(artifacts: Sequence[Artifact], prepared: Prepared) -> list[Mapping[str, Any]]:
    """What a report says of each artifact."""
    return [
        {"path": str(artifact.path), **facts, **artifact.manifest.measured}
        for artifact, facts in zip(artifacts, prepared.as_dict()["documents"], strict=True)
    ]
