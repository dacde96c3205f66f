"""Linear layers put into a live transformers model, and taken out again so that nothing of them is left."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.errors import ArtifactError, IncompatibleError
from accel.models.linear.layer import LinearAttention, parameter_shapes
from accel.models.linear.spec import Heads, LinearSpec
from accel.models.linear.transformers_cache import Padding

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to projections: W + (alpha / rank) · B A. ``tensors``: see ``weight_shapes``."""

    rank: int
    alpha: float


def linear_layers(model: PreTrainedModel) -> list[LinearAttention]:
    """The model's linear layers, first to last."""
    return [each.self_attn for each in _decoder_layers(model) if isinstance(each.self_attn, LinearAttention)]


def fresh_layers(model: PreTrainedModel, spec: LinearSpec, generator: torch.Generator) -> list[LinearAttention]:
    """Linear layers at their start values beside the softmax layers of ``model``, which stays as it is."""
    padding = Padding()
    layers = [LinearAttention(_decoder_layers(model)[i].self_attn, spec, i, padding) for i in spec.layers]
    for layer in layers:
        layer.reset(generator)
    return layers


def softmax_attention(model: PreTrainedModel, index: int) -> Any:
    """The attention module of decoder layer ``index``."""
    return _decoder_layers(model)[index].self_attn


def own_parameters(layers: Sequence[LinearAttention]) -> dict[str, nn.Parameter]:
    """What belongs to linear layers and not to the model, under the names of ``weight_shapes``."""
    return {
        f"layers.{layer.layer_idx}.{name}": weight
        for layer in layers
        for name, weight in layer.named_parameters(recurse=False)
    }


def is_linear(model: PreTrainedModel) -> bool:
    """Whether some layer of the model has linear attention."""
    return bool(linear_layers(model))


def weight_shapes(spec: LinearSpec, config: Any, low_rank: LowRank | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor of a conversion, ``layers.N.NAME``, with its shape; LoRA's are ``layers.N.q_proj.lora_A`` etc."""
    heads = Heads.of(config.get_text_config(decoder=True))
    shapes = {}
    for layer in spec.layers:
        for name, shape in parameter_shapes(spec, heads).items():
            shapes[f"layers.{layer}.{name}"] = shape
        for name, (out, into) in _projection_sizes(heads).items() if low_rank else ():
            assert low_rank is not None
            shapes[f"layers.{layer}.{name}.lora_A"] = (low_rank.rank, into)
            shapes[f"layers.{layer}.{name}.lora_B"] = (out, low_rank.rank)
    return shapes


def check_weights(
    tensors: Mapping[str, Tensor], spec: LinearSpec, config: Any, where: str, low_rank: LowRank | None = None
) -> None:
    """Refuse tensors that are not exactly those of the spec, by name and shape. Projections may lack LoRA."""
    wanted = weight_shapes(spec, config, low_rank)
    required = {name for name in wanted if ".lora_" not in name}
    missing, unknown = sorted(required - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unknown:
        raise ArtifactError(f"{where}: tensors missing {missing[:3]}, unknown {unknown[:3]}: they must be the spec's")
    for name, tensor in sorted(tensors.items()):
        if tuple(tensor.shape) != wanted[name]:
            raise ArtifactError(f"{where}: {name} is {list(tensor.shape)}, the spec says {list(wanted[name])}")
        if ".lora_" in name:
            other = name[:-1] + ("B" if name.endswith("A") else "A")
            if other not in tensors:
                raise ArtifactError(f"{where}: {name} without {other}")


class Conversion:
    """Linear attention on one model: ``install`` and ``remove``, any number of times.

    Without LoRA the projections are the model's own modules; with it they are merged copies beside them, so that the
    model's weights are never written to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: LinearSpec,
        tensors: Mapping[str, Tensor],
        low_rank: LowRank | None = None,
        where: str = "linear attention",
    ) -> None:
        spec.check_fits(model.config, where)
        check_weights(tensors, spec, model.config, where, low_rank)
        self.model, self.spec, self.tensors, self.low_rank = model, spec, tensors, low_rank
        self._softmax: dict[int, nn.Module] = {}
        self._linear: dict[int, LinearAttention] = {}
        self._padding = Padding()
        self._hook: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether no layer stays softmax."""
        return len(self.spec.layers) == len(_decoder_layers(self.model))

    @torch.no_grad()
    def install(self) -> None:
        """Replace the spec's layers; refused where one is linear already."""
        if is_linear(self.model):
            raise IncompatibleError(
                f"{type(self.model).__name__} has linear attention already: detach it before another is attached"
            )
        self._padding = Padding()
        for index in self.spec.layers:
            softmax = _decoder_layers(self.model)[index].self_attn
            own = f"layers.{index}."
            layer = LinearAttention(softmax, self.spec, index, self._padding)
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.copy_(self.tensors[own + name])
            for name in PROJECTIONS:
                if f"{own}{name}.lora_A" in self.tensors:
                    setattr(layer, name, self._merged(getattr(softmax, name), own + name))
            self._softmax[index], self._linear[index] = softmax, layer
        self.use(linear=True)

    def use(self, *, linear: bool) -> None:
        """While installed: whether the linear layers run, or the softmax ones for a while; the others are kept."""
        for index, softmax in self._softmax.items():
            layer: Any = softmax
            if linear:
                # what does not stand in the model is neither moved nor set to training with it
                layer = self._linear[index].train(softmax.training).to(next(softmax.parameters()).device)
            _decoder_layers(self.model)[index].self_attn = layer
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if linear:
            before = self._padding.before
            self._hook = self.model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)

    def remove(self) -> None:
        """Put the softmax layers back."""
        self.use(linear=False)
        self._softmax, self._linear = {}, {}

    def _merged(self, linear: nn.Linear, name: str) -> nn.Linear:
        """A copy with W + (alpha / rank) · B A, made in fp32."""
        assert self.low_rank is not None
        a, b = (self.tensors[f"{name}.lora_{half}"].to(linear.weight.device).float() for half in "AB")
        weight = linear.weight.float() + (self.low_rank.alpha / self.low_rank.rank) * (b @ a)
        merged = copy.copy(linear)
        merged._parameters = dict(linear._parameters)
        merged.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        return merged


def converted_copy(
    model: PreTrainedModel, spec: LinearSpec, tensors: Mapping[str, Tensor], low_rank: LowRank | None = None
) -> PreTrainedModel:
    """Another model with linear attention that shares every weight of ``model``, which stays as it is."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    hidden = {name: model.__dict__.pop(name) for name in list(model.__dict__) if name.startswith("_accel")}
    replaced = model.__dict__.pop("generate", None)
    try:
        student: PreTrainedModel = copy.deepcopy(model, shared)
    finally:
        model.__dict__.update(hidden)
        if replaced is not None:
            model.__dict__["generate"] = replaced
    Conversion(student, spec, tensors, low_rank).install()
    return student


def _projection_sizes(heads: Heads) -> dict[str, tuple[int, int]]:
    queries, keys = heads.queries * heads.width, heads.keys * heads.width
    return {
        "q_proj": (queries, heads.hidden),
        "k_proj": (keys, heads.hidden),
        "v_proj": (keys, heads.hidden),
        "o_proj": (heads.hidden, queries),
    }


def _decoder_layers(model: PreTrainedModel) -> Any:
    """The decoder's layers that have a ``self_attn``; none for families without."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    return layers if all(hasattr(each, "self_attn") for each in layers) else ()
