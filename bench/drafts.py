"""The suite `drafts`: several draft models on one target, greedy and at temperature 1, beside what theory promises.

Every draft drafts the same number of tokens a round, so that drafts are compared and not draft lengths. The sampled
arms accept token by token: block-wise acceptance keeps more than 1 − TVD says. Measures only; drafts_report shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel.bench import summary
from accel.bench.arms import PLAIN, Arm, attached
from accel.bench.candidates import Candidate, baseline_of, load, names_of
from accel.bench.measure import Record
from accel.bench.runner import Runner
from accel.bench.session import Ground, Plan, Progress, conduct
from accel.bench.theory import Along, Prediction, along, predict, read
from accel.bench.workloads import encode
from accel.distill.forward import Scorer
from accel.errors import OptionError
from accel.methods.speculative.distill.data import Translation
from accel.methods.speculative.options import SpeculativeOptions

DECODINGS = {0.0: "greedy", 1.0: "temperature 1"}
# what is drawn from must be the model's own distribution, whatever its generation config says
OWN_DISTRIBUTION: dict[float, dict[str, Any]] = {
    0.0: {"repetition_penalty": 1.0},
    1.0: {"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0},
}
# arm → the draft and its γ
Entries = Mapping[str, tuple[Candidate, int]]
# (arm, temperature) → prediction
Predictions = Mapping[tuple[str, float], Prediction | None]


@dataclass(frozen=True)
class DraftsPlan(Plan):
    """``draft_lengths``: γ, one or several."""

    draft_lengths: tuple[int, ...] = (3,)

    def check(self) -> None:
        if not self.artifacts:
            raise OptionError("suite 'drafts' compares draft models: give one or more with -a")
        for gamma in self.draft_lengths:
            SpeculativeOptions(draft_length=gamma)
        if len(set(self.draft_lengths)) < len(self.draft_lengths):
            raise OptionError(f"draft lengths {list(self.draft_lengths)}: give each once")
        names_of(self.artifacts)


def carry_out(plan: DraftsPlan, progress: Progress = lambda done, total, prompt, arm: None) -> dict[str, Any]:
    """Measure as ``plan`` says; returns the finished document, and keeps ``plan.output`` up to date meanwhile."""
    ground = Ground.prepare(plan)
    names = names_of(plan.artifacts)
    candidates = [load(source, name, ground.model) for source, name in zip(plan.artifacts, names, strict=True)]
    several = len(plan.draft_lengths) > 1
    entries = {
        f"{candidate.name} γ={gamma}" if several else candidate.name: (candidate, gamma)
        for candidate in candidates
        for gamma in plan.draft_lengths
    }
    contests = [
        Runner(
            ground.model, ground.tokenizer, _arms(entries, temperature), replace(plan.settings, temperature=temperature)
        )
        for temperature in DECODINGS
    ]
    settings = ground.settings(
        [PLAIN, *entries],
        temperature=list(DECODINGS),
        draft_lengths=list(plan.draft_lengths),
        weights=[candidate.facts["sha256"] for candidate in candidates],
    )

    def summarise(records: Sequence[Record], complete: bool) -> dict[str, Any]:
        predictions = _predictions(ground, entries, records, progress) if complete else {}
        frame = ground.frame(settings, contests, complete)
        return document(records, entries, predictions, frame, keep_records=plan.save_detailed)

    return conduct(ground, contests, settings, summarise, progress)


def document(
    records: Sequence[Record],
    entries: Entries,
    predictions: Predictions,
    frame: Mapping[str, Any],
    keep_records: bool = False,
) -> dict[str, Any]:
    """``drafts``: what each is. ``rows``: one a draft and decoding. ``arms``: the figures of all arms by decoding."""
    arms, rows = {}, []
    for temperature, decoding in DECODINGS.items():
        drawn = [record for record in records if record.temperature == temperature]
        by_arm = summary.split(drawn, [PLAIN, *entries])
        arms[decoding] = summary.figures(by_arm, PLAIN)
        for name, (candidate, gamma) in entries.items():
            row = {"arm": name, "draft": candidate.name, "decoding": decoding, "draft_length": gamma}
            row |= _measured(arms[decoding][name]) | _first(by_arm[name])
            row |= _over_baseline(name, entries, by_arm)
            found = predictions.get((name, temperature))
            rows.append(row | {"theory": found.as_dict() if found else None})
    result = summary.frame(**frame) | {
        "reference": PLAIN,
        "prompts": len({record.prompt for record in records}),
        "drafts": {candidate.name: candidate.facts for candidate, _ in entries.values()},
        "rows": rows,
        "arms": arms,
    }
    return result | summary.kept(records, keep_records or not frame["complete"])


def _arms(entries: Entries, temperature: float) -> list[Arm]:
    """No seed is given to attach: each run follows the runner's, the same for all arms of a prompt."""
    acceptance = {"acceptance": "token"} if temperature > 0 else {}
    arms = [attached(PLAIN, method="plain")]
    for name, (candidate, gamma) in entries.items():
        options = {"method": "speculative", "drafter": "lm", "draft_length": gamma, **acceptance}
        arms.append(attached(name, candidate.drafter, **options))
    return [replace(arm, kwargs=OWN_DISTRIBUTION[temperature]) for arm in arms]


def _measured(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What the row takes from the arm's own figures; predicted = τ / (c γ + 1) (Leviathan et al. 2023, theorem 3.8)."""
    spread = ("speedup", "speedup_p20", "speedup_p80", "speedup_ci_low", "speedup_ci_high")
    counts = ("gate", "completed", "mean_accepted_length", "acceptance_rate", "mean_draft_length", "cost_ratio")
    predicted = figures["predicted_speedup_vs_plain"]
    both = predicted is not None and figures["speedup"] is not None
    return {key: figures[key] for key in (*counts, *spread)} | {
        "predicted_speedup": predicted,
        "measured_over_predicted": figures["speedup"] / predicted if both else None,
        "failures": figures["failures"],
    }


def _first(runs: Sequence[Record]) -> dict[str, Any]:
    """Acceptance at position 1 of a round: the one place where every drafted token had its chance."""
    counts = [run.stats for run in runs if run.stats and run.stats["drafted_by_position"]]
    drafted = sum(stats["drafted_by_position"][0] for stats in counts)
    accepted = sum(sum(stats["accepted_by_position"][:1]) for stats in counts)
    return {"first_drafted": drafted, "first_acceptance": accepted / drafted if drafted else None}


def _over_baseline(name: str, entries: Entries, by_arm: Mapping[str, list[Record]]) -> dict[str, Any]:
    """Tokens/s over those of the undistilled draft of the same shape and γ, paired by prompt."""
    candidate, gamma = entries[name]
    baseline = baseline_of(candidate, [other for other, _ in entries.values()])
    theirs = next((arm for arm, (other, length) in entries.items() if other is baseline and length == gamma), None)
    sound = theirs is not None and not {PLAIN, theirs, name} & summary.failures(by_arm)
    pairs = summary.ratios(by_arm[theirs], by_arm[name]) if theirs is not None and sound else []
    return {"baseline": baseline.name if baseline else None, **summary.speedup("speedup_vs_baseline", pairs)}


@torch.no_grad()
def _predictions(
    ground: Ground, entries: Entries, records: Sequence[Record], progress: Progress
) -> dict[tuple[str, float], Prediction | None]:
    """What theory says along the plain arm's own texts."""
    target = Scorer(ground.model)
    readers = {
        candidate.name: (Scorer(candidate.drafter.model), Translation(candidate.drafter.vocabulary))
        for candidate, _ in entries.values()
    }
    prompts = {prompt.id: prompt for prompt in ground.prompts}
    texts: dict[tuple[str, float], list[Along]] = {}
    plain = [record for record in records if record.arm == PLAIN]
    for done, record in enumerate(plain):
        prompt = prompts[record.prompt]
        progress(done, len(plain), prompt, "theory")
        asked = encode(ground.tokenizer, prompt.turns[:1])[0].tolist()
        text = read(target, asked, record.tokens, ground.plan.settings.max_new_tokens)
        for name, (scorer, translation) in readers.items():
            if text is not None:
                found = along(scorer, translation, text, sampled=record.temperature > 0)
                texts.setdefault((name, record.temperature), []).append(found)
    return {
        (arm, temperature): predict(texts.get((candidate.name, temperature), []), gamma)
        for arm, (candidate, gamma) in entries.items()
        for temperature in DECODINGS
    }
