"""A training run on disk: weights and moments as safetensors, the step as JSON, and one line a step in a log.

Knows how to write them so that they are whole or absent, and how to refuse broken ones. Does not know what is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from accel.artifacts import file_digest
from accel.errors import ArtifactError

# the last one may be bad (a full disk): the one before it is kept
KEPT = 2
LOG = "log.jsonl"
# bytes, at most: what a checkpoint or an artifact has beside its numbers (headers, small files), and a line of the log
FRAME = 2**20
_LINE = 512
# points of the loss curve that an artifact keeps
_CURVE = 100
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Checkpoints:
    """The checkpoints of one run in one folder; ``schedule`` is what the run was asked to do."""

    folder: Path
    schedule: Mapping[str, Any]

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state behind ``step`` steps and drop the checkpoints before the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, weight in model.named_parameters():
            tensors[f"weight.{name}"] = weight.detach().cpu().contiguous()
            for moment in _MOMENTS:
                if weight in optimizer.state:
                    tensors[f"{moment}.{name}"] = optimizer.state[weight][moment].cpu().contiguous()
        path = self._path(step, "safetensors")
        _replace(path, lambda new: safetensors.torch.save_file(tensors, new))
        # the JSON file comes last: a checkpoint without one was never finished
        document = {"step": step, "sha256": file_digest(path), "schedule": dict(self.schedule)}
        _replace(self._path(step, "json"), lambda new: new.write_text(json.dumps(document, indent=1) + "\n"))
        for old in self.steps()[:-KEPT]:
            self._path(old, "json").unlink()
            self._path(old, "safetensors").unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.json"))

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the newest checkpoint into both and return its step; 0, and nothing done, where there is none."""
        if not self.steps():
            return 0
        path = self._path(self.steps()[-1], "json")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            step, digest, schedule = int(document["step"]), document["sha256"], dict(document["schedule"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}: is no checkpoint ({error}); delete it to go on from the one before"
            ) from error
        wanted = json.loads(json.dumps(dict(self.schedule)))
        for key in sorted({*schedule, *wanted}):
            if schedule.get(key) != wanted.get(key):
                raise ArtifactError(
                    f"{path}: was made with {key}={schedule.get(key)!r}, this run has {wanted.get(key)!r}: delete "
                    f"{self.folder} or choose another work folder"
                )
        weights = path.with_suffix(".safetensors")
        if not weights.is_file() or file_digest(weights) != digest:
            raise ArtifactError(
                f"{weights}: is missing or its sha256 is not the one in {path.name}; delete {path.name} to go on from "
                "the checkpoint before"
            )
        _restore(safetensors.torch.load_file(weights), step, model, optimizer)
        return step

    def _path(self, step: int, suffix: str) -> Path:
        return self.folder / f"step-{step:08d}.{suffix}"


def training_bytes(numbers: int, steps: int) -> int:
    """The most that training so many numbers takes on disk: the checkpoints kept, one being written, and the log."""
    # weights and two moments in fp32
    return (KEPT + 1) * (12 * numbers + FRAME) + steps * _LINE


class Log:
    """One JSON object a line and a step; lines of steps that a resumed run takes again are dropped."""

    def __init__(self, folder: Path, done: int) -> None:
        self._path = folder / LOG
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in _rows(self._path) if row["step"] < done]
        if [row["step"] for row in self.rows] != list(range(done)):
            raise ArtifactError(f"{self._path}: does not hold steps 0 to {done - 1}; delete {folder} to begin again")
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        _replace(self._path, lambda new: new.write_text(text, encoding="utf-8"))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def thinned(losses: Sequence[float]) -> list[float]:
    """Means over at most ``_CURVE`` equal stretches."""
    size = -(-len(losses) // _CURVE)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [round(sum(part) / len(part), 5) for part in parts]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The log's lines up to the first that was not written to its end."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append(row)
    return rows


def _restore(tensors: Mapping[str, Tensor], step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"weight.{name}"])
            moments = {moment: tensors.get(f"{moment}.{name}") for moment in _MOMENTS}
            if all(each is not None for each in moments.values()):
                held = {moment: each.to(weight.device) for moment, each in moments.items() if each is not None}
                # as AdamW itself keeps it: a float on the CPU
                optimizer.state[weight] = {"step": torch.tensor(float(step)), **held}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    new = path.with_name(f"{path.name}.new")
    write(new)
    os.replace(new, path)
