"""What the commands that make artifacts share: where it goes, on which model, within what, and how it is told.

Knows click and names of models. What a recipe does is its own business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from accel.cli.common import Command, Progress, command_line, emit, json_option, parse_bytes, use_threads
from accel.errors import ArtifactError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accel.artifacts import Artifact


def prompts_option(text: str, *, required: bool = True) -> Callable[[Command], Command]:
    """``--prompts FILE``, repeatable → ``prompt_files: tuple[Path, ...]``; ``text`` goes on behind the shapes."""
    return click.option(
        "--prompts",
        "prompt_files",
        multiple=True,
        required=required,
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help=f"JSON lines with prompt, question, instruction (and input), turns, messages or text{text}. Repeatable.",
    )


def folder_options(*, work: str, output: str = "The artifact to write.") -> Callable[[Command], Command]:
    """``--output`` and ``--work``; ``work``: what is kept there."""
    return all_of(
        click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help=output),
        click.option(
            "--work",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="FOLDER",
            help=f"{work}; a run that was killed goes on there. [default: OUTPUT.work]",
        ),
    )


def device_options(of: str) -> Callable[[Command], Command]:
    """``--threads``, ``--device`` and ``--dtype``; ``of``: whose precision that is."""
    return all_of(
        click.option("--threads", type=int, help="CPU threads of torch."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …"),
        click.option(
            "--dtype", default="auto", show_default=True, help=f"Of {of}: auto, float32, bfloat16 or float16."
        ),
    )


def run_options(*, bounds: str, plan: str) -> Callable[[Command], Command]:
    """What every recipe's command ends with: disk, precision and device of a run, its plan, ``--json``.

    ``bounds``: what is on disk; ``plan``: what ``--plan`` shows.
    """
    return all_of(
        click.option("--max-disk", default="2GB", show_default=True, help=f"Bound on {bounds}."),
        click.option(
            "--weights", default="bfloat16", show_default=True, help="Precision to save: bfloat16 or float32."
        ),
        device_options("MODEL"),
        click.option("--plan", "only_plan", is_flag=True, help=f"Show {plan}, and stop."),
        json_option,
    )


def all_of(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help page."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Prepared(Protocol):
    """A recipe's plan."""

    def as_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Run:
    """One call of a recipe's command: what ``folder_options`` and ``run_options`` gave it, and MODEL."""

    model: str
    output: Path | None
    work: Path | None
    max_disk: str
    weights: str
    threads: int | None
    device: str
    dtype: str
    only_plan: bool
    as_json: bool

    @classmethod
    def of(cls, given: Mapping[str, Any], *, several: bool = False) -> tuple[Run, dict[str, Any]]:
        """The run, and what else was ``given``: the recipe's own choices. ``several``: they go below the output."""
        names = {each.name for each in fields(cls)}
        run = cls(**{name: value for name, value in given.items() if name in names})
        if run.output is None and not run.only_plan:
            raise OptionError("no --output: name the folder of the artifact, or ask for --plan")
        if run.output is not None and run.output.exists() and not run.only_plan and not several:
            raise ArtifactError(f"{run.output} exists already: choose another folder")
        return run, {name: value for name, value in given.items() if name not in names}

    @property
    def limits(self) -> dict[str, Any]:
        """For the recipe: bytes on disk, and the precision that is saved."""
        return {"max_bytes": parse_bytes(self.max_disk), "dtype": self.weights}

    @property
    def target(self) -> Path:
        assert self.output is not None, "a run without an output ends with its plan"
        return self.output

    @property
    def work_folder(self) -> Path:
        return self.work or self.target.with_name(self.target.name + ".work")

    @property
    def signature(self) -> dict[str, str]:
        """For the manifest: what the model is called, and how this was called."""
        return {"name": self.model, "command": command_line()}

    @contextmanager
    def loaded(self, what: str) -> Iterator[tuple[Progress, PreTrainedModel, Any]]:
        """Progress, the model and its tokenizer, without which ``what`` cannot be read."""
        # torch takes seconds to import: not for --help
        from accel.models.loading import load_model

        use_threads(self.threads)
        with Progress() as progress:
            progress("loading the model …")
            model, tokenizer = load_model(self.model, device=self.device, dtype=self.dtype)
            if tokenizer is None:
                raise OptionError(f"{self.model} brings no tokenizer: {what} cannot be read without one")
            yield progress, model, tokenizer

    def tell(self, document: dict[str, Any], text: str) -> None:
        """Print the ``document`` or the ``text``, whichever was asked for."""
        emit(document, text, as_json=self.as_json)

    def report(self, artifact: Artifact, prepared: Prepared, text: str) -> None:
        """The end of a run that made one artifact."""
        manifest = artifact.manifest
        facts = {"artifact": str(artifact.path), **prepared.as_dict()}
        self.tell(facts | {"measured": manifest.measured, "made": manifest.made}, text)
