"""From a folder to a head that fits its target: safetensors, names of both layouts, and every check between the two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.drafters.eagle3.config import HeadConfig, read_config
from accel.drafters.eagle3.head import Eagle3Head
from accel.errors import ArtifactError, IncompatibleError

EMBEDDING = "embed_tokens.weight"
# in checkpoints for the sake of training; t2d says nothing that d2t does not
_UNUSED = frozenset({"t2d", "verifier_lm_head.weight", "verifier_norm.weight"})


@dataclass(frozen=True)
class LoadedHead:
    """A head ready to run: ``layer_ids`` are settled, ``d2t [draft vocabulary]`` is each draft id's target id."""

    head: Eagle3Head
    layer_ids: tuple[int, ...]
    d2t: Tensor


def load_head(folder: str | Path, model: PreTrainedModel) -> LoadedHead:
    """The EAGLE-3 head in ``folder``, for ``model`` as the target: on its device and in its type."""
    folder = Path(folder)
    config = read_config(folder)
    layer_ids = _check_target(config, model)
    weights = _read_weights(folder)
    d2t = _target_ids(config, weights.pop("d2t", None), model)
    head = Eagle3Head(replace(config, layer_ids=layer_ids), model.device)
    own_embedding = EMBEDDING in weights
    if not own_embedding:
        weights[EMBEDDING] = _target_embedding(config, model)
    _check_weights(config, head, weights)
    placed = {name: tensor.to(model.device, model.dtype) for name, tensor in weights.items()}
    head.load_state_dict(placed, assign=True)
    return LoadedHead(head.requires_grad_(False).eval(), layer_ids, d2t.to(model.device))


def _check_target(config: HeadConfig, model: PreTrainedModel) -> tuple[int, ...]:
    """Hold the config against the target; the layer ids that are meant."""
    target = model.config.get_text_config(decoder=True)
    for what, wanted, found in (
        ("hidden size", config.target_hidden_size, target.hidden_size),
        ("vocabulary", config.layer.vocab_size, target.vocab_size),
    ):
        if wanted != found:
            raise IncompatibleError(
                f"{config.where}: the draft head is for a target with a {what} of {wanted}, this one has {found}: "
                "use a head made for this model"
            )
    n: int = target.num_hidden_layers
    ids = config.layer_ids or (2, n // 2, n - 3)
    if min(ids) < 0 or max(ids) > n or len(set(ids)) != len(ids):
        raise IncompatibleError(
            f"{config.where}: the draft head reads the hidden states {list(ids)}, this target has 0 to {n}: use a head "
            "made for this model"
        )
    return tuple(ids)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, under speculators' names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        if pickled:
            raise ArtifactError(
                f"{folder}: the weights are in {pickled[0]}, which can run code when it is read: convert it to "
                "model.safetensors (safetensors.torch.save_file), or get the head in that format"
            )
        raise ArtifactError(f"{folder}: has no *.safetensors file: a draft head is config.json and its weights")
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            loaded = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}: is not a readable safetensors file: {error}") from error
        weights |= {_plain_name(name): tensor for name, tensor in loaded.items()}
    return {name: tensor for name, tensor in weights.items() if name not in _UNUSED and "rotary_emb" not in name}


def _plain_name(name: str) -> str:
    name = name.removeprefix("model.")
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


def _target_ids(config: HeadConfig, offsets: Tensor | None, model: PreTrainedModel) -> Tensor:
    """The target id of each draft id: the checkpoint's ``d2t`` holds what is to be added to the draft id."""
    own = torch.arange(config.draft_vocab_size)
    vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
    if offsets is None:
        if config.draft_vocab_size != vocab_size:
            raise ArtifactError(
                f"{config.where}: the weights have no d2t, which a draft vocabulary of {config.draft_vocab_size} of "
                f"{vocab_size} needs"
            )
        return own
    if offsets.shape != own.shape or offsets.is_floating_point():
        raise ArtifactError(
            f"{config.where}: d2t is {offsets.dtype} {list(offsets.shape)}: it must be {len(own)} whole numbers"
        )
    ids = own + offsets
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(ids.unique()) != len(ids):
        raise ArtifactError(
            f"{config.where}: d2t does not lead to {len(ids)} different ids of {vocab_size}: it must hold offsets "
            "(target id = draft id + d2t)"
        )
    return ids


def _target_embedding(config: HeadConfig, model: PreTrainedModel) -> Tensor:
    if config.layer.hidden_size != config.target_hidden_size:
        raise ArtifactError(
            f"{config.where}: the weights have no {EMBEDDING}, and the target's has {config.target_hidden_size} "
            f"columns where the head needs {config.layer.hidden_size}"
        )
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight.detach()


def _check_weights(config: HeadConfig, head: Eagle3Head, weights: dict[str, Tensor]) -> None:
    wanted = head.state_dict()
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unknown:
        raise ArtifactError(
            f"{config.where}: the weights do not fit the config: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ArtifactError(
                f"{config.where}: {name} has the shape {list(tensor.shape)}, the config asks for "
                f"{list(wanted[name].shape)}"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ArtifactError(f"{config.where}: {name} is {tensor.dtype}: give an unquantised draft head")
