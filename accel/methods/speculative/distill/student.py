"""A draft model before it has learned: of any size in the target's family, or made of the target's own layers.

Knows models. Does not know data or training. A student is in fp32 on the target's device, whatever the target's
precision: it is about to be trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from accel.artifacts import Artifact, check_base
from accel.drafters.small_lm import VocabularyMap
from accel.errors import IncompatibleError, OptionError, unknown_name
from accel.methods.speculative.artifact import load
from accel.models import lagged

STARTS = ("random", "target")
# head sizes that a width is divided into, the first that fits
HEAD_SIZES = (64, 32, 16, 8)
# what a family must call its sizes
_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """The sizes of a student; ``intermediate`` is the width inside its feed-forward blocks."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int

    def __post_init__(self) -> None:
        if min(astuple(self)) < 1:
            raise OptionError(f"shape {self}: every size must be 1 or more")
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise OptionError(f"shape {self}: {self.hidden} does not divide into {self.heads} heads of an even size")
        if self.heads % self.kv_heads:
            raise OptionError(f"shape {self}: {self.heads} heads do not share {self.kv_heads} key-value heads evenly")

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``LAYERSxHIDDEN``, the rest by rule, or all five sizes: ``LAYERSxHIDDENxHEADSxKV_HEADSxINTERMEDIATE``."""
        parts = text.lower().split("x")
        if len(parts) not in (2, 5) or not all(part.isdecimal() for part in parts):
            raise OptionError(
                f"shape {text!r}: give LAYERSxHIDDEN, for example 1x256, or all five sizes: 1x256x4x4x704"
            )
        sizes = [int(part) for part in parts]
        return cls.of(*sizes) if len(sizes) == 2 else cls(*sizes)

    @classmethod
    def of(cls, layers: int, hidden: int) -> Shape:
        """The usual proportions: heads of 64 (or the next size that fits), each with its own keys; 8/3 inside."""
        fitting = [size for size in HEAD_SIZES if hidden >= size and hidden % size == 0]
        if not fitting:
            raise OptionError(f"hidden={hidden}: must be a multiple of {HEAD_SIZES[-1]}")
        heads = hidden // fitting[0]
        return cls(layers, hidden, heads, heads, -(-hidden * 8 // 3 // 32) * 32)

    @classmethod
    def of_layers(cls, target: PreTrainedModel, count: int) -> Shape:
        """What ``count`` of the target's own layers come to."""
        config = _config_of(target)
        heads = config.num_attention_heads
        # families without shared heads may leave that number out
        shared = getattr(config, "num_key_value_heads", None) or heads
        return cls(count, config.hidden_size, heads, shared, config.intermediate_size)

    def __str__(self) -> str:
        return "x".join(str(size) for size in astuple(self))


def num_parameters(shape: Shape, vocab: int, *, tied: bool = True) -> int:
    """Of a llama of that shape; other families add a few biases or norms. ``tied``: one matrix reads and says."""
    attention = 2 * shape.hidden**2 * (1 + shape.kv_heads / shape.heads)
    layer = int(attention) + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return shape.layers * layer + shape.hidden + vocab * shape.hidden * (1 if tied else 2)


def build(
    target: PreTrainedModel,
    shape: Shape,
    vocabulary: VocabularyMap | None,
    *,
    start: str = "target",
    seed: int = 0,
    tied: bool | None = None,
    lags: int = 0,
) -> PreTrainedModel:
    """A model of the target's family and that shape, with embeddings and head from the target (``start="target"``).

    Layers start at random, from ``seed``. ``tied`` is whether one matrix reads and says; as in the target by default.
    ``lags``: how many tokens its embedding looks back (``accel.models.lagged``); that part starts with zeros.
    """
    if start not in STARTS:
        raise OptionError(unknown_name("start", start, STARTS))
    config = _config_of(target)
    if any(getattr(config, name, None) for name in _EXPERTS):
        raise IncompatibleError(
            f"{config.model_type} is a mixture of experts: a student's shape says nothing of those; use truncate"
        )
    # few layers should all see the whole context
    types = getattr(config, "layer_types", None) or []
    whole = [i for i, kind in enumerate(types) if kind == "full_attention"] or range(config.num_hidden_layers)
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
    }
    if tied is not None:
        sizes["tie_word_embeddings"] = tied
    if lags:
        sizes[lagged.CONFIG_KEY] = lags
    student = _blank(target, sizes, [whole[i % len(whole)] for i in range(shape.layers)], vocabulary, seed)
    if start == "target":
        _copy_embeddings(target, student, vocabulary)
    return student


def truncate(
    target: PreTrainedModel, layers: Sequence[int], vocabulary: VocabularyMap | None, *, lags: int = 0
) -> PreTrainedModel:
    """A student made of copies of the target's ``layers``, in that order, its final norm, embeddings and head.

    ``lags`` is that of ``build``.
    """
    config = _config_of(target)
    depth = config.num_hidden_layers
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise OptionError(f"layers={list(layers)}: choose one or more of the target's 0 to {depth - 1}")
    student = _blank(target, {lagged.CONFIG_KEY: lags} if lags else {}, layers, vocabulary, seed=0)
    theirs, ours = target.get_decoder().state_dict(), student.get_decoder()
    copies = {}
    for name in ours.state_dict():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(layers[int(parts[1])])
        if parts[0] != "embed_tokens":
            copies[name] = theirs[".".join(parts)]
    ours.load_state_dict(copies, strict=False)
    _copy_embeddings(target, student, vocabulary)
    return student


def begun(
    artifact: Artifact, target: PreTrainedModel, *, lags: int = 0
) -> tuple[PreTrainedModel, VocabularyMap | None]:
    """A draft that is there already, to be trained on, and its vocabulary; ``lags`` that it lacks start as zeros."""
    check_base(artifact, target.config)
    given, vocabulary = load(artifact, _config_of(target).vocab_size, torch.float32)
    own = getattr(given.config, lagged.CONFIG_KEY, 0)
    if lags < own:
        raise OptionError(f"lags={lags}: {artifact.path.name} looks back {own} tokens already, give {own} or more")
    if lags == own:
        return given.to(target.device), vocabulary
    config = copy.deepcopy(given.config)
    setattr(config, lagged.CONFIG_KEY, lags)
    student = lagged.install(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    tensors = {name: tensor for name, tensor in weights(given).items() if not name.endswith(lagged.LAG_WEIGHT)}
    student.load_state_dict(tensors, strict=False)
    student.tie_weights()
    if own:
        with torch.no_grad():
            student.get_input_embeddings().lag_weight[:own] = given.get_input_embeddings().lag_weight
    return student.to(target.device).eval(), vocabulary


def weights(student: PreTrainedModel) -> dict[str, Tensor]:
    """What a file of the student holds: every tensor once, those that are tied to another left out."""
    tied = set(student._tied_weights_keys or ()) if student.config.tie_word_embeddings else set()
    return {name: tensor.detach().contiguous() for name, tensor in student.state_dict().items() if name not in tied}


def _config_of(target: PreTrainedModel) -> PretrainedConfig:
    """The language model's part of the config, if its family names its sizes as llama does."""
    config = target.config.get_text_config(decoder=True)
    known = type(config)().to_dict()
    missing = [name for name in _NAMES if name not in known]
    if missing:
        raise IncompatibleError(
            f"{config.model_type} has no {missing[0]} in its config: students are made for llama-like families; "
            "give any small causal language model as the draft instead"
        )
    return config


def _blank(
    target: PreTrainedModel,
    sizes: dict[str, Any],
    layers: Sequence[int],
    vocabulary: VocabularyMap | None,
    seed: int,
) -> PreTrainedModel:
    """A random model like the target but for ``sizes``; layer i is of the kind of the target's layer ``layers[i]``."""
    config = _config_of(target)
    if vocabulary is not None and vocabulary.target_vocab_size != config.vocab_size:
        raise IncompatibleError(
            f"the vocabulary was trimmed from {vocabulary.target_vocab_size} tokens, the target has {config.vocab_size}"
        )
    depth, kept = config.num_hidden_layers, None if vocabulary is None else vocabulary.d2t.tolist()
    given = config.to_dict()
    for name, value in given.items():
        if name.endswith("_token_id"):
            given[name] = _draft_id(value, kept)
        elif isinstance(value, list) and len(value) == depth and "layer" in name:
            given[name] = [value[layer] for layer in layers]
    # torch trains no row that stands for padding, and a draft is never padded
    given["pad_token_id"] = None
    given |= {"num_hidden_layers": len(layers), "vocab_size": config.vocab_size if kept is None else len(kept)} | sizes
    if "hidden_size" in sizes:
        head = sizes["hidden_size"] // sizes["num_attention_heads"]
        given |= {name: head for name in ("head_dim", "query_pre_attn_scalar") if name in given}
    for name in ("architectures", "_name_or_path", "dtype"):
        given.pop(name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = lagged.install(AutoModelForCausalLM.from_config(AutoConfig.for_model(**given), dtype=torch.float32))
    return student.to(target.device).eval()


def _draft_id(value: Any, kept: Sequence[int] | None) -> Any:
    """A token id of a config (a number, several, or none) in the draft's vocabulary; None where it has none."""
    if kept is None or value is None:
        return value
    if isinstance(value, list | tuple):
        return [kept.index(token) for token in value if token in kept] or None
    return kept.index(value) if value in kept else None


def _copy_embeddings(target: PreTrainedModel, student: PreTrainedModel, vocabulary: VocabularyMap | None) -> None:
    _copy_rows(target.get_input_embeddings(), student.get_input_embeddings(), vocabulary)
    if not student.config.tie_word_embeddings:
        _copy_rows(target.get_output_embeddings(), student.get_output_embeddings(), vocabulary)


@torch.no_grad()
def _copy_rows(source: Any, to: Any, vocabulary: VocabularyMap | None) -> None:
    """Fill an embedding or head with the source's rows of the kept tokens."""
    kept = slice(None) if vocabulary is None else vocabulary.d2t.to(source.weight.device)
    rows = source.weight[kept].float()
    to.weight.copy_(rows if rows.shape == to.weight.shape else project(rows, to.weight.shape[1]))
    if getattr(source, "bias", None) is not None:
        to.bias.copy_(source.bias[kept])


def project(rows: Tensor, width: int) -> Tensor:
    """Rows [V, d] on their ``width`` top right singular directions, scaled to the rows' RMS: fp32 [V, width].

    Inner products between rows are kept as well as ``width`` numbers a row can, up to one common factor; exactly
    where ``width`` reaches their rank. A width beyond d is filled with zeros.
    """
    gram = (rows.T @ rows).double()
    directions = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :width].float()
    projected = F.pad(rows @ directions, (0, max(0, width - rows.shape[1])))
    scale = rows.square().mean().sqrt() / projected.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return projected * scale
