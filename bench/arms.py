"""The contestants: each arm is a name, a way to prepare the shared model, and arguments for its generate().

All arms run on one and the same model object, so that no difference in weights, types or layout can pass for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import accel
from accel.artifacts import find_artifact
from accel.engine.attached import STATE, Attached
from accel.engine.drafts import drafter_from
from accel.errors import AccelError, OptionError, unknown_name

# transformers' own default for prompt lookup in its documentation
LOOKUP_TOKENS = 10
REFERENCE = "transformers"
PLAIN = "accel-plain"


def _untouched(model: Any) -> AbstractContextManager[Any]:
    return nullcontext(model)


@dataclass(frozen=True)
class Arm:
    """``prepare(model)`` is entered before a run and left after it; ``kwargs`` go to generate().

    ``stats(model)`` returns the run's ``accel.types.Stats``, or None for an arm that keeps none.
    """

    name: str
    prepare: Callable[[Any], AbstractContextManager[Any]] = _untouched
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    stats: Callable[[Any], Any] = lambda model: None


def attached(name: str, *artifacts: Any, **options: Any) -> Arm:
    """An arm whose runs happen between accel.attach(model, *artifacts, **options) and accel.detach(model).

    What it learns of costs and acceptance stays from run to run, as in a process that attaches once and serves.
    """
    state: Attached | None = None

    @contextmanager
    def prepare(model: Any) -> Iterator[Any]:
        nonlocal state
        try:
            if state is not None and state.model is model:
                state.install()
            else:
                accel.attach(model, *artifacts, **options)
                state = model.__dict__.get(STATE)
            yield model
        finally:
            accel.detach(model)

    return Arm(name, prepare, stats=lambda model: accel.stats(model))


@dataclass(frozen=True)
class Draft:
    """A draft model for the arms that take one: ``artifact`` for accel, ``assistant`` for transformers' generate.

    ``assistant`` is None, and ``reason`` says why, where transformers cannot use the draft.
    """

    artifact: Any
    assistant: Any = None
    reason: str = ""


def find_draft(source: str, target: Any, **load_options: Any) -> Draft:
    """Load ``source`` once, so that both runtimes draft with the same object where both can."""
    if find_artifact(source) is not None:
        return Draft(drafter_from(source, target), reason=f"{source} is an artifact of accel")
    try:
        assistant = accel.load(source, **load_options).model
        state = assistant.__dict__.get(STATE)
        accel.detach(assistant)  # transformers calls the assistant's own generate()
    except (AccelError, OSError, ValueError) as error:
        return Draft(source, reason=f"{source} is not a transformers model ({error})")
    if state is not None and state.facts is not None:
        reason = f"{source} is a masked-diffusion model, which transformers would read from left to right"
        return Draft(assistant, reason=reason)
    theirs, ours = assistant.config.vocab_size, target.config.vocab_size
    if theirs != ours:
        return Draft(source, reason=f"{source} has a vocabulary of {theirs} tokens and the model one of {ours}")
    return Draft(assistant, assistant)


def all_arms(draft: Draft | None = None, **options: Any) -> dict[str, Arm]:
    """Every arm that applies, in the order of the table; ``options`` (a seed, say) go to each attach."""
    assisted: dict[str, Any] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    if draft and draft.assistant is not None:
        assisted = {"assistant_model": draft.assistant}
    drafts = [draft.artifact] if draft else []
    arms = [
        Arm(REFERENCE),
        Arm("transformers-assisted", kwargs=assisted),
        attached(PLAIN, method="plain", **options),
        attached("accel-ngram", method="speculative", drafter="ngram", **options),
        attached("accel-suffix", method="speculative", drafter="suffix", **options),
        *(attached("accel-lm", artifact, method="speculative", drafter="lm", **options) for artifact in drafts),
        attached("accel-auto", *drafts, method="speculative", **options),
    ]
    return {arm.name: arm for arm in arms}


def check(names: str | None, has_draft: bool) -> list[str] | None:
    """The arms named in a comma-separated list, each once; None for all of them."""
    if names is None:
        return None
    known = list(all_arms(Draft(None) if has_draft else None))
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise OptionError(f"--arms {names!r} names no arm: choose from {', '.join(known)}")
    for name in wanted:
        if name == "accel-lm" and not has_draft:
            raise OptionError("arm 'accel-lm' needs a draft model: give one with -a")
        if name not in known:
            raise OptionError(unknown_name("arm", name, known))
    return wanted


def choose(arms: Mapping[str, Arm], names: str | None) -> list[Arm]:
    """The arms named in a comma-separated list, in the order of the table; all where there is no list."""
    wanted = check(names, "accel-lm" in arms)
    return [arm for name, arm in arms.items() if wanted is None or name in wanted]


def reference_of(arms: Sequence[Arm]) -> str:
    """The arm whose output and speed the others are compared with."""
    return next((arm.name for arm in arms if arm.name == REFERENCE), arms[0].name)
