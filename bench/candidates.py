"""A draft model that is to be compared: loaded once, with what its manifest says of how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.artifacts import Artifact, Manifest
from accel.bench.arms import PLAIN
from accel.drafters.small_lm import SmallLMDrafter
from accel.engine.drafts import drafter_from
from accel.engine.given import opened
from accel.errors import OptionError

NEXT_TOKEN = "next token"
# of a config: what must be the same in drafts of one shape
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


@dataclass(frozen=True)
class Candidate:
    """``facts`` are plain JSON and stand in the document."""

    name: str
    drafter: SmallLMDrafter
    facts: dict[str, Any]

    @property
    def form(self) -> tuple[str, int]:
        """What a draft costs is decided by its sizes alone."""
        return self.facts["shape"], self.facts["vocabulary"]


def names_of(sources: Sequence[str]) -> list[str]:
    """A short name for each artifact: its folder's, or all of what was given where two folders are called the same."""
    if len(set(sources)) < len(sources):
        raise OptionError("an artifact is given twice: give each once")
    short = [Path(source).name or source for source in sources]
    return [
        source if short.count(name) > 1 or name == PLAIN else name for name, source in zip(short, sources, strict=True)
    ]


def load(source: str, name: str, model: Any) -> Candidate:
    """A draft artifact, or a folder with a small transformers model, for ``model``."""
    given = opened(source)
    drafter = drafter_from(given, model)
    if not isinstance(drafter, SmallLMDrafter):
        raise OptionError(f"{source} is no draft model: this suite compares language models that draft")
    made = _made(given.manifest) if isinstance(given, Artifact) else {}
    config = drafter.model.config
    shape = "x".join(str(getattr(config, name, "?")) for name in _SIZES)
    facts = {
        "loss": None,
        "baseline": False,
        "data": None,
        "held_out": {},
        "sha256": None,
        "shape": shape,
        "vocabulary": config.vocab_size,
        "parameters": drafter.model.num_parameters(),
    }
    return Candidate(name, drafter, facts | made)


def baseline_of(candidate: Candidate, all_of_them: Sequence[Candidate]) -> Candidate | None:
    """The undistilled draft of the same shape, where there is one; a baseline itself has none."""
    if candidate.facts["baseline"]:
        return None
    return next((each for each in all_of_them if each.facts["baseline"] and each.form == candidate.form), None)


def _made(manifest: Manifest) -> dict[str, Any]:
    made = manifest.made.get("recipe")
    recipe: Mapping[str, Any] = made if isinstance(made, dict) else {}
    baseline = bool(recipe.get("baseline", False))
    held_out = {key: each for key, each in manifest.measured.items() if isinstance(each, dict)}
    weights = manifest.files.get("model.safetensors")
    return {
        "loss": NEXT_TOKEN if baseline else _loss(recipe),
        "baseline": baseline,
        "data": recipe.get("data"),
        "held_out": held_out,
        "sha256": weights.sha256 if weights else None,
    }


def _loss(recipe: Mapping[str, Any]) -> str | None:
    """``jsd 0.5``, ``tvd, keep 0.4``."""
    loss = recipe.get("loss")
    if loss is None:
        return None
    name = f"{loss} {recipe.get('beta'):g}" if loss == "jsd" and recipe.get("beta") is not None else str(loss)
    keep = recipe.get("keep", 1.0)
    return name if keep == 1.0 else f"{name}, keep {keep:g}"
