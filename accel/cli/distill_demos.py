"""``accel distill demos``: options to a collection of demonstrations, progress, and a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accel.cli.common import Progress, command_line, emit, json_option, use_threads
from accel.cli.recipes import device_options, folder_options, prompts_option
from accel.errors import ArtifactError, OptionError, unknown_name

if TYPE_CHECKING:
    from accel.methods.cascade.tasks import Environment


@click.command("demos")
@click.argument("teacher")
@prompts_option(", and the answer that is right: tasks of one step", required=False)
@click.option(
    "--environment",
    metavar="MODULE",
    help="Tasks of several steps instead: a Python module, which is run, with SYSTEM, tasks(count, seed) and Episode.",
)
@click.option("--count", type=click.IntRange(min=1), help="Tasks to work on. [default: all of --prompts, else 100]")
@click.option("--task-seed", type=int, default=0, show_default=True, help="Of --environment's tasks.")
@click.option("--system", default="", help="What every question of --prompts begins with.")
@click.option(
    "--check",
    default="final",
    show_default=True,
    help="When an answer to --prompts is right: final (behind ####, in \\boxed{}, else the last number), exact, "
    "normalised, json or code.",
)
@folder_options(work="Finished tasks")
@click.option("--tries", type=int, default=1, show_default=True, help="Of a task, until it succeeds.")
@click.option("--keep", default="success", show_default=True, help="success, or all with their outcomes.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="TEACHER's.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Length limit of an answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends an answer. Repeatable.")
@click.option("--marker", default="", metavar="TEXT", help="Stands in front of the action, behind the reasoning.")
@click.option("--history", type=int, default=0, show_default=True, help="Steps before that each question shows again.")
@click.option(
    "--place",
    default="turns",
    show_default=True,
    help="Where a student is shown them: as turns of the conversation, in the system message, or the first user's.",
)
@click.option("--seconds", type=float, default=120.0, show_default=True, help="Time limit of an answer.")
@click.option("--workers", type=int, default=1, show_default=True, help="Tasks at once.")
@click.option("--key-variable", metavar="NAME", help="Environment variable with TEACHER's key.")
@click.option("--prices", type=click.Path(dir_okay=False), metavar="FILE", help="JSON prices by model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of TEACHER's samples.")
@device_options("TEACHER")
@json_option
def demos(
    teacher: str,
    prompt_files: tuple[Path, ...],
    environment: str | None,
    count: int | None,
    task_seed: int,
    system: str,
    check: str,
    output: Path | None,
    work: Path | None,
    max_new_tokens: int,
    place: str,
    key_variable: str | None,
    prices: str | None,
    threads: int | None,
    device: str,
    dtype: str,
    as_json: bool,
    **choices: Any,
) -> None:
    """Let TEACHER work on tasks, and keep its successes as demonstrations for cheaper students.

    TEACHER is a model on this machine, or MODEL@URL of an OpenAI-compatible endpoint. The artifact goes to
    `accel generate --method cascade -a`, or to accel.cascade(). A run that was killed goes on when it is called again.
    """
    if output is None:
        raise OptionError("no --output: name the folder of the artifact")
    if output.exists():
        raise ArtifactError(f"{output} exists already: choose another folder")
    if bool(prompt_files) == (environment is not None):
        raise OptionError("give --prompts or --environment: the tasks are the one's or the other's")
    if environment is not None and (system or check != "final"):
        raise OptionError("--system and --check are for --prompts: an environment has both itself")
    from accel.artifacts import BaseModel, describe_base, json_digest
    from accel.methods.cascade.build import CascadeSetup, answerer
    from accel.methods.cascade.demos import Demos
    from accel.methods.cascade.distill.collect import Recipe, collect, measured
    from accel.methods.cascade.local import LocalAnswerer
    from accel.methods.cascade.prompt import PLAIN, QUESTIONS

    layout = replace(QUESTIONS if environment is None else PLAIN, place=place)
    recipe = Recipe(max_tokens=max_new_tokens, layout=layout, **choices)
    use_threads(threads)
    with Progress() as progress:
        if environment is None:
            world, number = _questions(prompt_files, system, check)
            name = "+".join(file.stem for file in prompt_files)
        else:
            world, number = _imported(environment), 100
            name = f"{environment}/{task_seed}"
        tasks = world.tasks(count or number, task_seed)
        progress("loading the teacher …")
        asked = answerer(teacher, CascadeSetup(key_variable=key_variable, prices=prices), _loader(device, dtype))
        found = collect(
            world, tasks, asked, recipe, work or output.with_name(output.name + ".work"), name=name, progress=progress
        )
    kept = tuple(each.demonstration for each in found if each.demonstration is not None)
    if not kept:
        raise OptionError(f"none of {len(found)} tasks succeeded: there is nothing to keep")
    artifact = Demos(
        kept,
        describe_base(asked.model.config, asked.tokenizer, name=teacher)
        if isinstance(asked, LocalAnswerer)
        else BaseModel(asked.name, None, None, None, 0),
        world.SYSTEM,
        recipe.layout,
        {
            "command": command_line(),
            "seed": recipe.seed,
            "data_digest": json_digest([str(task) for task in tasks]),
            "recipe": recipe.identity(),
        },
        measured(found),
    ).save(output)
    facts = {"artifact": str(artifact.path), "demonstrations": len(kept), "measured": artifact.manifest.measured}
    emit(facts, f"{artifact.path}\n{_report(facts)}", as_json=as_json)


def _report(facts: dict[str, Any]) -> str:
    found = facts["measured"]
    cost = (
        "unknown, no price" if found["cost"] is None else f"${found['cost']:.4f} (${found['cost_a_task']:.5f} a task)"
    )
    return (
        f"{facts['demonstrations']} demonstrations; {found['successes']} of {found['tasks']} tasks succeeded\n"
        f"cost: {cost}; {found['input_tokens']} tokens read, {found['output_tokens']} written, {found['seconds']:.0f} s"
    )


def _loader(device: str, dtype: str) -> Callable[[str], tuple[Any, Any]]:
    def load(name: str) -> tuple[Any, Any]:
        import accel

        loaded = accel.load(name, device=device, dtype=dtype)
        return loaded.model, loaded.tokenizer

    return load


def _questions(files: tuple[Path, ...], system: str, check: str) -> tuple[Environment, int]:
    """The prompts as tasks, and how many they are."""
    from accel.distill import prompts
    from accel.distill.checking import is_right
    from accel.methods.cascade.agreement import COMPARISONS, comparison
    from accel.methods.cascade.tasks import Question, Questions

    if check != "final" and check not in COMPARISONS:
        raise OptionError(unknown_name("check", check, ("final", *COMPARISONS)))
    key = None if check == "final" else comparison(check)

    def right(said: str, known: str) -> bool:
        if key is None:
            return is_right(said, known)
        return key(said) is not None and key(said) == key(known)

    found = []
    for each in prompts.read(files):
        if each.answer is None or each.logged is not None:
            raise OptionError(
                f"{', '.join(map(str, files))}: every line needs an answer that is text, to be checked by"
            )
        found.append(Question(each.text or "\n\n".join(text for _, text in each.messages), each.answer))
    return Questions(found, right, system), len(found)


def _imported(name: str) -> Environment:
    """A module that the user names."""
    try:
        module: Any = import_module(name)
    except ImportError as error:
        raise OptionError(f"--environment {name}: cannot be imported: {error}") from error
    lacking = [each for each in ("SYSTEM", "tasks", "Episode") if not hasattr(module, each)]
    if lacking:
        raise OptionError(f"--environment {name}: the module has no {', '.join(lacking)}")
    environment: Environment = module
    return environment
