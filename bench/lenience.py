"""The suite `lenience`: what a draft gains when verification is lossy, and what the output loses.

DistillSpec (arXiv 2310.08461, section 5.3) accepts with chance min(1, f(p, ε)/q), f one of p/ε (lin), p/ε² (sq) and
p^ε (exp); ε = 1 is lossless. Quality is told twice: the share of right answers, where the prompts have reference
answers in GSM8K's form, and (1/n) Σ ln p(y_i), the mean log-probability that the plain target at temperature 1 gives
the output's own n tokens, which says something of models too small for the task. Measures only; lenience_report shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from statistics import stdev
from typing import Any

import torch

from accel.bench import summary
from accel.bench.arms import PLAIN, Arm, attached
from accel.bench.candidates import Candidate, load, names_of
from accel.bench.measure import Record
from accel.bench.metrics import wilson
from accel.bench.runner import Runner
from accel.bench.session import Ground, Plan, Progress, conduct
from accel.bench.workloads import GSM8K_MARK, Prompt, encode
from accel.distill.forward import Scorer
from accel.errors import OptionError
from accel.methods.speculative.options import SpeculativeOptions

RULES = ("lin", "sq", "exp")
EPSILONS = (0.5, 0.2, 0.05)
LOSSLESS = "lossless"
# drawn from the model's own distribution, whatever its generation config says
OWN_DISTRIBUTION = {"repetition_penalty": 1.0}
OWN_SAMPLED = {**OWN_DISTRIBUTION, "top_k": 0, "top_p": 1.0}
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
# (prompt, arm, repetition) → mean log-probability of the output's tokens, and how many there are
Likelihoods = Mapping[tuple[str, str, int], tuple[float, int]]


@dataclass(frozen=True)
class LeniencePlan(Plan):
    """``epsilons``: how lenient each rule is tried."""

    draft_length: int = 3
    epsilons: tuple[float, ...] = EPSILONS

    def check(self) -> None:
        if len(self.artifacts) != 1:
            raise OptionError(f"{len(self.artifacts)} artifacts given: suite 'lenience' takes one draft model, with -a")
        for lenience in self.choices.values():
            SpeculativeOptions(draft_length=self.draft_length, lenience=lenience)
        if not self.epsilons or len(set(self.epsilons)) < len(self.epsilons):
            raise OptionError(f"epsilons {list(self.epsilons)}: give one or more, each once")

    @property
    def choices(self) -> dict[str, tuple[str, float] | None]:
        """The speculative arms: name → the lenience option."""
        lossy = {f"{rule} {epsilon:g}": (rule, epsilon) for rule in RULES for epsilon in self.epsilons}
        return {LOSSLESS: None, **lossy}


def carry_out(plan: LeniencePlan, progress: Progress = lambda done, total, prompt, arm: None) -> dict[str, Any]:
    """Measure as ``plan`` says; returns the finished document, and keeps ``plan.output`` up to date meanwhile."""
    ground = Ground.prepare(plan)
    candidate = load(plan.artifacts[0], names_of(plan.artifacts)[0], ground.model)
    contest = Runner(ground.model, ground.tokenizer, _arms(plan, candidate), plan.settings)
    settings = ground.settings(
        [PLAIN, *plan.choices], draft_length=plan.draft_length, weights=[candidate.facts["sha256"]]
    )

    def summarise(records: Sequence[Record], complete: bool) -> dict[str, Any]:
        likelihoods = _likelihoods(ground, records, progress) if complete else {}
        marks = {} if not complete else _marks(ground, records)
        return document(
            records,
            plan.choices,
            {candidate.name: candidate.facts},
            likelihoods,
            marks,
            ground.frame(settings, [contest], complete),
            keep_records=plan.save_detailed,
        )

    return conduct(ground, [contest], settings, summarise, progress)


def document(
    records: Sequence[Record],
    choices: Mapping[str, tuple[str, float] | None],
    drafts: Mapping[str, Any],
    likelihoods: Likelihoods,
    marks: Mapping[tuple[str, str, int], bool],
    frame: Mapping[str, Any],
    keep_records: bool = False,
) -> dict[str, Any]:
    """``arms``: each arm's figures, with accuracy and mean log-probability among them."""
    by_arm = summary.split(records, [PLAIN, *choices])
    arms = summary.figures(by_arm, PLAIN)
    for name, figures in arms.items():
        rule, epsilon = choices.get(name) or (None, None)
        figures |= {"rule": rule, "epsilon": epsilon}
        figures |= _accuracy([right for (_, arm, _), right in marks.items() if arm == name])
        figures |= _quality([each for (_, arm, _), each in likelihoods.items() if arm == name])
    result = summary.frame(**frame) | {
        "reference": PLAIN,
        "prompts": len({record.prompt for record in records}),
        "drafts": dict(drafts),
        "arms": arms,
    }
    return result | summary.kept(records, keep_records or not frame["complete"])


def reference_answer(prompt: Prompt) -> Decimal | None:
    """The number behind GSM8K's mark; None where the prompt has none."""
    if prompt.answer is None or GSM8K_MARK not in prompt.answer:
        return None
    return last_number(prompt.answer.rpartition(GSM8K_MARK)[2])


def last_number(text: str) -> Decimal | None:
    """The last number of a text, without the commas of its thousands; None where there is no number."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


@torch.no_grad()
def log_likelihood(target: Scorer, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """(1/n) Σ ln p(y_i | prompt, y_<i) over the n ``tokens``, at temperature 1."""
    device = target.model.device
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=device)
    at = torch.arange(len(prompt) - 1, ids.shape[1], device=device)
    said = torch.tensor(tokens, device=device)
    parts, done = [], 0
    for logits in target.pieces(ids, at):
        own = logits.gather(-1, said[done : done + len(logits), None])[:, 0]
        parts.append(own - logits.logsumexp(-1))
        done += len(logits)
    return float(torch.cat(parts).double().mean())


def _arms(plan: LeniencePlan, candidate: Candidate) -> list[Arm]:
    """All accept token by token, as lenience is defined; each run follows the runner's seed, one for all arms."""
    common = {"method": "speculative", "drafter": "lm", "draft_length": plan.draft_length, "acceptance": "token"}
    arms = [attached(PLAIN, method="plain")]
    for name, lenience in plan.choices.items():
        arms.append(attached(name, candidate.drafter, lenience=lenience, **common))
    own = OWN_SAMPLED if plan.settings.temperature > 0 else OWN_DISTRIBUTION
    return [replace(arm, kwargs=own) for arm in arms]


def _likelihoods(ground: Ground, records: Sequence[Record], progress: Progress) -> Likelihoods:
    target = Scorer(ground.model)
    prompts = {prompt.id: prompt for prompt in ground.prompts}
    asked = {id: encode(ground.tokenizer, prompt.turns[:1])[0].tolist() for id, prompt in prompts.items()}
    # greedy arms often write the same
    known: dict[tuple[str, tuple[int, ...]], float] = {}
    found = {}
    for done, record in enumerate(records):
        if not record.tokens:
            continue
        progress(done, len(records), prompts[record.prompt], "log-probability")
        text = (record.prompt, tuple(record.tokens))
        if text not in known:
            known[text] = log_likelihood(target, asked[record.prompt], record.tokens)
        found[record.prompt, record.arm, record.repetition] = (known[text], len(record.tokens))
    return found


def _marks(ground: Ground, records: Sequence[Record]) -> dict[tuple[str, str, int], bool]:
    """Which outputs end in the right number; prompts without a reference answer are not marked."""
    answers = {prompt.id: reference_answer(prompt) for prompt in ground.prompts}
    return {
        (record.prompt, record.arm, record.repetition): last_number(
            ground.tokenizer.decode(record.tokens, skip_special_tokens=True)
        )
        == answers[record.prompt]
        for record in records
        if answers[record.prompt] is not None and not record.error
    }


def _accuracy(marks: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(marks), len(marks)) if marks else (None, None)
    share = sum(marks) / len(marks) if marks else None
    return {
        "graded": len(marks),
        "accuracy": share,
        "accuracy_low": low,
        "accuracy_high": high,
    }


def _quality(likelihoods: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Over all tokens; the standard error is that of the outputs' own means."""
    tokens = sum(count for _, count in likelihoods)
    means = [mean for mean, _ in likelihoods]
    return {
        "mean_logprob": sum(mean * count for mean, count in likelihoods) / tokens if tokens else None,
        "logprob_standard_error": stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
    }
