"""From a softmax model and texts to a LAWCAT conversion: every choice in one place, and the steps in order.

Each step resumes: both stages go on behind their last checkpoint, and what was measured between them is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.artifacts import Artifact, json_digest
from accel.distill.begin import begin_run
from accel.distill.checkpoint import FRAME, thinned, training_bytes
from accel.distill.weights import DTYPES, describe_teacher
from accel.errors import ArtifactError, IncompatibleError, OptionError, unknown_name
from accel.methods.lawcat.artifact import Lawcat
from accel.methods.lawcat.distill import transfer, tune
from accel.methods.lawcat.distill.sensitivity import only, rises
from accel.methods.lawcat.distill.stage import Stage
from accel.methods.lawcat.distill.texts import Documents, Rows, rows
from accel.models.linear import Heads, LinearSpec, LowRank, fresh_layers, is_linear, own_parameters, weight_shapes
from accel.models.linear.layer import LinearAttention
from accel.models.softmax_target import SoftmaxTarget

Progress = Callable[[str], None]

# nothing that is learned depends on these
_FREE = ("max_bytes", "dtype", "checkpoint_every")
# of the recipe, what the first stage does not depend on
_LATER = ("keep_softmax", "tune_steps", "tune_rate", "lora_rank", "lora_alpha", "tune_own", "next_token", "kl")
_FORM = (
    "conv_width share_conv tie_maps activation gate_rank gate_normalizer min_log_decay normalised window affine".split()
)


@dataclass(frozen=True)
class Recipe:
    """Every choice that makes a conversion; the same recipe, model and texts make the same one."""

    # which are converted; None: all
    layers: tuple[int, ...] | None = None
    # of these, how many stay softmax: those that cost most when each is converted alone
    keep_softmax: int = 0
    # see LinearSpec
    conv_width: int = 4
    share_conv: bool = False
    tie_maps: bool = False
    activation: str | None = None
    gate_rank: int | None = 16
    gate_normalizer: float = 16.0
    min_log_decay: float | None = None
    normalised: bool = True
    window: int = 0
    affine: bool = False
    # tokens of a row
    length: int = 1024
    batch_tokens: int = 8192
    # stage 1: attention transfer
    transfer_steps: int = 1000
    transfer_rate: float = 1e-2
    # stage 2: 0 steps leave it out; rank 0 has no additions, tune_own trains the spec's own parameters too
    tune_steps: int = 1000
    tune_rate: float = 1e-4
    lora_rank: int = 8
    lora_alpha: float = 16.0
    tune_own: bool = False
    # weights of its two losses
    next_token: float = 1.0
    kl: float = 1.0
    checkpoint_every: int = 50
    seed: int = 0
    # share of the documents that nothing is learned from, and how many that are at most
    held_out: float = 0.02
    most_held_out: int = 64
    # of the artifact's tensors
    dtype: str = "bfloat16"
    # everything below the work folder and the artifact
    max_bytes: int = 2_000_000_000

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(unknown_name("dtype", self.dtype, DTYPES))
        for name in ("transfer_steps", "max_bytes", "most_held_out"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("keep_softmax", "tune_steps", "lora_rank"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.length < 2 or self.length > self.batch_tokens:
            raise OptionError(
                f"length={self.length}, batch_tokens={self.batch_tokens}: a row has 2 tokens or more, a batch one row"
            )
        if not 0 < self.held_out <= 0.5:
            raise OptionError(f"held_out={self.held_out}: must be above 0 and at most 0.5")
        for name in ("next_token", "kl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 < self.lora_alpha < math.inf:
            raise OptionError(f"lora_alpha={self.lora_alpha}: must be a positive number")
        if self.tune_steps and not (self.lora_rank or self.tune_own):
            raise OptionError("lora_rank=0 without tune_own: stage 2 has nothing to train; set one, or tune_steps to 0")
        if self.tune_steps and not (self.next_token or self.kl):
            raise OptionError("next_token=0 and kl=0: stage 2 has no loss; set one, or tune_steps to 0")
        # these check the rest
        assert self.transfer.seed == self.tuning.seed - 1

    @property
    def transfer(self) -> Stage:
        return self._stage(self.transfer_steps, self.transfer_rate, self.seed)

    @property
    def tuning(self) -> Stage:
        # other rows side by side than in stage 1
        return self._stage(self.tune_steps, self.tune_rate, self.seed + 1)

    def _stage(self, steps: int, rate: float, seed: int) -> Stage:
        return Stage(steps, rate, batch_tokens=self.batch_tokens, checkpoint_every=self.checkpoint_every, seed=seed)

    @property
    def low_rank(self) -> LowRank | None:
        """None where no additions are made."""
        return LowRank(self.lora_rank, self.lora_alpha) if self.tune_steps and self.lora_rank else None

    def spec(self, model: PreTrainedModel) -> LinearSpec:
        """The linear layers of ``model`` before any of them is given back; refused where it has another form."""
        config = model.config.get_text_config(decoder=True)
        layers = tuple(range(config.num_hidden_layers)) if self.layers is None else self.layers
        form = {name: getattr(self, name) for name in _FORM}
        heads = Heads.of(config)
        try:
            spec = LinearSpec(layers=layers, feature_size=heads.width // 2, **form)
        except ArtifactError as error:
            raise OptionError(str(error)) from None
        spec.check_fits(model.config, "this recipe")
        return spec

    def made_from(self, *, later: bool) -> dict[str, Any]:
        """What may not change while a run is resumed; of both stages or of the first."""
        left_out = _FREE if later else (*_FREE, *_LATER)
        return {key: value for key, value in asdict(self).items() if key not in left_out}


@dataclass(frozen=True, eq=False)
class Prepared:
    """Texts as rows, the form of the layers, and what will be on disk, at most, in bytes."""

    rows: Rows
    documents: int
    spec: LinearSpec
    own: int
    additions: int
    disk: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.disk.values())

    def as_dict(self) -> dict[str, Any]:
        learned, held = self.rows.learned, self.rows.held_out
        return {
            "documents": self.documents,
            "rows": len(learned),
            "tokens": learned.numel(),
            "held_out_tokens": sum(map(len, held)),
            "spec": self.spec.as_dict(),
            "own_parameters": self.own,
            "lora_parameters": self.additions,
            "disk": self.disk | {"total": self.total_bytes},
        }


def prepare(model: PreTrainedModel, documents: Documents, recipe: Recipe) -> Prepared:
    """Pack rows and count bytes; writes nothing, and leaves the model as it is."""
    if is_linear(model):
        raise IncompatibleError(
            f"{type(model).__name__} has linear attention attached: detach it, the teacher is the softmax model"
        )
    spec = recipe.spec(model)
    if recipe.keep_softmax >= len(spec.layers):
        raise OptionError(
            f"keep_softmax={recipe.keep_softmax} of {len(spec.layers)} layers leaves none to convert: keep fewer"
        )
    if model.dtype == torch.float16:
        raise OptionError("dtype=float16: small gradients become nothing in it; use bfloat16 or float32")
    limit = SoftmaxTarget(model).max_positions
    if limit is not None and recipe.length > limit:
        raise OptionError(f"length={recipe.length}: the model has {limit} positions; train on shorter rows")
    packed = rows(documents, recipe.length, recipe.held_out, recipe.most_held_out, recipe.seed)
    if not packed.held_out:
        raise OptionError("the held-out documents have no 2 tokens: give longer ones, or a larger held_out")
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(spec, model.config, recipe.low_rank).items()}
    additions = sum(size for name, size in sizes.items() if ".lora_" in name)
    own = sum(sizes.values()) - additions
    tuned = additions + (own if recipe.tune_own else 0)
    disk = {
        "transfer": training_bytes(own, recipe.transfer_steps),
        "tuning": training_bytes(tuned, recipe.tune_steps) if recipe.tune_steps else 0,
        "artifact": (own + additions) * DTYPES[recipe.dtype].itemsize + FRAME,
    }
    if (total := sum(disk.values())) > recipe.max_bytes:
        raise OptionError(
            f"max_bytes={recipe.max_bytes}: checkpoints take up to {disk['transfer'] + disk['tuning']} and the "
            f"artifact {disk['artifact']} bytes; allow {total}, or convert fewer layers"
        )
    return Prepared(packed, len(documents.ids), spec, own, additions, disk)


def distill(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Documents,
    recipe: Recipe,
    work: Path,
    output: Path,
    progress: Progress = lambda message: None,
    *,
    name: str | None = None,
    command: str | None = None,
    prepared: Prepared | None = None,
) -> Artifact:
    """Make the artifact: both stages, measures, files. ``model`` stays as it is.

    ``work`` keeps checkpoints, so that a run that was killed goes on; it may be deleted afterwards.
    ``name``: what the manifest calls the model; ``command``: how this was called.
    """
    prepared, base = begin_run(
        [output], model, tokenizer, name, lambda: prepared or prepare(model, documents, recipe), progress
    )
    teacher = describe_teacher(base, model)
    run = _Run(model, recipe, prepared, work, progress, {"weights": teacher["weights_digest"]})
    spec, tensors = run.transferred()
    tensors = run.tuned(spec, tensors)
    tensors = {key: tensor.to(DTYPES[recipe.dtype]) for key, tensor in tensors.items()}
    lawcat = Lawcat.of(output.name, spec, tensors, model, tokenizer, recipe.low_rank)
    progress("measuring …")
    # the tensors as they are saved, not as they were trained
    run.say("student", lawcat.student(model))
    made: dict[str, Any] = {
        "command": command,
        "seed": recipe.seed,
        "data_digest": prepared.rows.digest,
        "losses": thinned(run.losses[-1]),
        "transfer_losses": thinned(run.losses[0]),
        "recipe": asdict(recipe),
        "teacher": teacher,
    }
    return dataclasses.replace(lawcat, base=base).save(output, made=made, measured=run.measured)


class _Run:
    """One call of ``distill``: ``measured`` and the ``losses`` of its stages fill as it goes."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        prepared: Prepared,
        work: Path,
        progress: Progress,
        teacher: Mapping[str, Any],
    ) -> None:
        self.model, self.recipe, self.prepared, self.progress = model, recipe, prepared, progress
        self.work = work
        self.teacher = teacher
        self.losses: list[list[float]] = []
        self.measured: dict[str, Any] = {
            "training_length": recipe.length,
            "trained_tokens": (recipe.transfer_steps + recipe.tune_steps)
            * (recipe.batch_tokens // recipe.length * recipe.length),
            "held_out_tokens": sum(map(len, prepared.rows.held_out)),
        }

    def say(self, who: str, model: PreTrainedModel) -> float:
        """Measure ``model`` on the held-out rows and note it under ``who``."""
        loss = tune.measure(model, self.prepared.rows.held_out)
        self.measured[who] = {"cross_entropy": round(loss, 5), "perplexity": round(math.exp(min(loss, 80)), 4)}
        return loss

    def transferred(self) -> tuple[LinearSpec, dict[str, Tensor]]:
        """Stage 1: the layers that are converted and their own parameters."""
        recipe, prepared, spec = self.recipe, self.prepared, self.prepared.spec
        self.progress("measuring the teacher …")
        loss = self.say("teacher", self.model)
        layers = self._fresh()
        before = transfer.errors(self.model, layers, prepared.rows.held_out)
        made_from = self._made_from(later=False)
        done = transfer.train(
            self.model,
            layers,
            prepared.rows,
            recipe.transfer,
            self.work / "transfer",
            made_from=made_from,
            progress=self._shown("attention transfer", recipe.transfer_steps),
        )
        self.losses.append([row["loss"] for row in done])
        after = transfer.errors(self.model, layers, prepared.rows.held_out)
        self.measured["transfer"] = {
            str(layer): {"before": was, "after": now}
            for layer, was, now in zip(spec.layers, before, after, strict=True)
        }
        tensors = {key: weight.detach() for key, weight in own_parameters(layers).items()}
        if recipe.keep_softmax:
            spec, tensors = self._kept(tensors, loss, json_digest(made_from))
        return spec, tensors

    def tuned(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stage 2, where there is one."""
        recipe = self.recipe
        if not recipe.tune_steps:
            return dict(tensors)
        learner = tune.Tuned(self.model, spec, tensors, recipe.low_rank, recipe.tune_own, recipe.seed)
        self.say("transferred", learner.student)
        done = tune.train(
            learner,
            self.prepared.rows,
            recipe.tuning,
            self.work / "tuning",
            next_token=recipe.next_token,
            kl=recipe.kl,
            made_from=self._made_from(later=True) | {"converted": list(spec.layers)},
            progress=self._shown("tuning", recipe.tune_steps),
        )
        self.losses.append([row["loss"] for row in done])
        return learner.tensors()

    def _fresh(self) -> list[LinearAttention]:
        return fresh_layers(self.model, self.prepared.spec, torch.Generator().manual_seed(self.recipe.seed))

    def _kept(self, tensors: Mapping[str, Tensor], loss: float, run: str) -> tuple[LinearSpec, dict[str, Tensor]]:
        """Without the layers that cost most; measured once, so that a run that goes on finds the same."""
        spec, held = self.prepared.spec, self.prepared.rows.held_out
        found = rises(self.model, spec, tensors, held, loss, self.work / "sensitivity.json", run, self.progress)
        worst = sorted(spec.layers, key=lambda layer: -found[layer])[: self.recipe.keep_softmax]
        self.measured["sensitivity"] = {str(layer): found[layer] for layer in spec.layers}
        self.measured["kept_softmax"] = sorted(worst)
        left = tuple(layer for layer in spec.layers if layer not in worst)
        return dataclasses.replace(spec, layers=left), only(tensors, left)

    def _made_from(self, *, later: bool) -> dict[str, Any]:
        rows = {"data": self.prepared.rows.digest}
        return self.recipe.made_from(later=later) | dict(self.teacher) | rows

    def _shown(self, what: str, steps: int) -> Callable[[Mapping[str, Any]], None]:
        return lambda row: self.progress(
            f"{what}: step {row['step'] + 1} of {steps} · loss {row['loss']:.4f} · "
            f"about {(steps - row['step'] - 1) * row['seconds']:.0f} s left"
        )
