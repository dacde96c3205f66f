"""The suite `cartridge`: what a small cache keeps of what a document in the prompt gives, and what it saves.

Questions with known answers are asked without the document, with all of it in the prompt, with as much of its beginning
as a cartridge has slots, and behind each cartridge. Quality is the log-probability of the reply that gives the answer
(a sentence where the file has one: how likely a bare word is depends on how a model begins its sentences) and whether
greedy decoding says the answer; cost is bytes of keys and values, time to the first token, and decoding at several
requests at once.

Several documents stand in the prompt one behind the other, and cartridges beside each other are one context more; the
questions of each category are told apart, so that one sees whether every document is still answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import accel
from accel.artifacts import open_artifact, resolve
from accel.bench import environment, saving
from accel.bench.measure import clocked, left_padded, rotated
from accel.bench.metrics import paired_speedup
from accel.bench.report import table
from accel.bench.workloads import Prompt, digest, encode, load_answered
from accel.distill.files import read_document
from accel.errors import AccelError, OptionError
from accel.methods.cartridge import document, parity
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.cartridge.evaluate import log_probabilities
from accel.methods.cartridge.template import document_ids, query_ids

Told = Callable[[str], None]

NONE, FULL, CACHED = "none", "full", "full, cached"
# between the names of cartridges that stand in front of the same questions
BESIDE = "+"
# the document of the cartridge that ships with accel, and held-out questions about it
EMBEDDED = Path(__file__).parent / "data" / "handbook.txt", Path(__file__).parent / "data" / "handbook.jsonl"
# questions whose first token is timed
TIMED = 5
# questions that are answered together
ROWS = 16


@dataclass(frozen=True)
class Plan:
    """``corpora``: the documents' files; ``questions``: JSON lines with question, answer, perhaps reply and category.

    Each of ``artifacts`` is a cartridge, or several with ``BESIDE`` between them that stand together in that order.
    """

    model: str
    artifacts: tuple[str, ...]
    corpora: tuple[Path, ...]
    questions: Path
    limit: int | None = None
    max_new_tokens: int = 24
    # requests that decode at once, and how often that is timed
    concurrency: tuple[int, ...] = (1, 4, 16)
    repeat: int = 3
    device: str = "auto"
    dtype: str = "auto"
    output: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if not self.artifacts:
            raise OptionError("suite 'cartridge' compares cartridges: name one or more with -a")
        if any(not name for each in self.artifacts for name in _members(each)):
            raise OptionError(f"-a {', '.join(self.artifacts)}: A{BESIDE}B names two cartridges that stand together")
        if not self.corpora:
            raise OptionError("suite 'cartridge' needs the documents that the cartridges stand in for")
        if not self.concurrency or min(self.concurrency) < 1 or self.repeat < 1:
            raise OptionError(f"concurrency={self.concurrency}, repeat={self.repeat}: all must be 1 or more")
        if self.max_new_tokens < 2:
            raise OptionError(f"max_new_tokens={self.max_new_tokens}: must be 2 or more")


@dataclass(frozen=True)
class Context:
    """What stands in front of the questions: cartridges, or token ids in the prompt itself."""

    name: str
    cartridges: tuple[Cartridge, ...] = ()
    # the document in the prompt, read anew by each request
    head: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(each.num_tokens for each in self.cartridges) + len(self.head)


def carry_out(plan: Plan, told: Told = lambda message: None) -> dict[str, Any]:
    """Measure as ``plan`` says and return the document, which is also written to ``plan.output``."""
    prompts = _spread(load_answered(plan.questions), plan.limit)
    texts = [read_document(path, "the document") for path in plan.corpora]
    names = list(dict.fromkeys(name for each in plan.artifacts for name in _members(each)))
    opened = {name: open_artifact(resolve(name)) for name in names}
    told("loading the model …")
    loaded = accel.load(plan.model, device=plan.device, dtype=plan.dtype, method="plain")
    model = loaded.model
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        raise OptionError(f"{plan.model} brings no tokenizer: documents cannot be read without one")
    cartridges = {name: Cartridge.load(each, model, tokenizer) for name, each in opened.items()}
    _check_documents(plan, texts, list(cartridges.values()))
    first = cartridges[names[0]].parameters
    text = "\n\n".join(texts)
    told("reading all of it …")
    full_ids = document_ids(tokenizer, text, first.template, first.instruction)
    whole = document.whole(CACHED, model, tokenizer, text, template=first.template, instruction=first.instruction)
    behind = [
        Context(BESIDE.join(each.name for each in some), some)
        for some in (tuple(cartridges[name] for name in _members(each)) for each in plan.artifacts)
    ]
    contexts = [
        Context(NONE),
        Context(FULL, head=tuple(full_ids)),
        Context(CACHED, (whole,)),
        *_truncated(model, tokenizer, text, behind),
        *behind,
    ]
    if len({context.name for context in contexts}) < len(contexts):
        raise OptionError(f"-a {', '.join(plan.artifacts)}: two of these have the same name; compare them one by one")
    asked = [query_ids(tokenizer, [{"role": "user", "content": p.turns[0]}], first.template) for p in prompts]
    answers = [tokenizer(p.reply or p.answer, add_special_tokens=False)["input_ids"] for p in prompts]
    told("proving the path …")
    proved = parity.ratio(model, full_ids, asked[:1])
    if proved > parity.tolerance(model):
        raise AccelError(f"the cartridge path differs from the prompt by {proved:.1e}: nothing is measured")
    rows = {}
    for context in contexts:
        if context.name != FULL:
            told(f"{context.name}: answers …")
            rows[context.name] = _quality(model, tokenizer, context, prompts, asked, answers, plan)
    rows[FULL] = dict(rows[CACHED])  # the same logits, as was just proved; each request holds its own copy
    for name, row in rows.items():
        row["gain_kept"] = _kept(rows, name)
        row["categories"] = _by_category(rows, name, prompts)
    told("time to the first token …")
    for name, times in _first_tokens(model, contexts, asked).items():
        rows[name] |= times
    for count in plan.concurrency:
        told(f"{count} requests at once …")
        for name, figures in _throughput(model, contexts, asked, count, plan).items():
            rows[name][f"at_{count}"] = figures
    result = {
        "version": 1,
        "tool": "accel bench",
        "suite": "cartridge",
        "command": plan.command,
        "settings": {
            "model": plan.model,
            "artifacts": list(plan.artifacts),
            "questions": len(prompts),
            "questions_sha256": digest(prompts),
            "documents": [each.name for each in plan.corpora],
            "document_tokens": len(full_ids),
            "max_new_tokens": plan.max_new_tokens,
            "concurrency": list(plan.concurrency),
            "repeat": plan.repeat,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "environment": environment.describe(model.device),
        "parity": proved,
        "contexts": {context.name: rows[context.name] for context in contexts},
    }
    if plan.output:
        saving.write(plan.output, saving.dump(result))
    return result


def _spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """At most ``limit`` of them from all over the file: its first ones ask about the beginning of a document."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    if limit < 1:
        raise OptionError(f"limit={limit}: at least one question is needed")
    return [prompts[place * len(prompts) // limit] for place in range(limit)]


def _members(given: str) -> list[str]:
    """The cartridges of one -a; a folder may have the sign in its own name."""
    return [given] if Path(given).exists() else given.split(BESIDE)


def _check_documents(plan: Plan, texts: Sequence[str], cartridges: Sequence[Cartridge]) -> None:
    """Every document has a cartridge, every cartridge a document, and all stand in the prompt in the same way."""
    given = {document.describe(text, 0).sha256: path for text, path in zip(texts, plan.corpora, strict=True)}
    made_of = {each.sha256 for cartridge in cartridges for each in cartridge.parameters.documents}
    if lacking := [str(path) for digest, path in given.items() if digest not in made_of]:
        raise OptionError(f"{', '.join(lacking)}: none of the documents that the cartridges were made of")
    for cartridge in cartridges:
        if not {each.sha256 for each in cartridge.parameters.documents} <= set(given):
            raise OptionError(f"cartridge {cartridge.name!r} was made of another document: give it with --corpus too")
    if len({(each.parameters.template, each.parameters.instruction) for each in cartridges}) > 1:
        raise OptionError("the cartridges differ in template or instruction: one prompt cannot stand for all of them")


def _truncated(model: Any, tokenizer: Any, text: str, behind: Sequence[Context]) -> list[Context]:
    """The beginning of the text in as many tokens as each context has slots."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for size in sorted({each.num_tokens for each in behind}):
        about = behind[0].cartridges[0].parameters
        around = len(document_ids(tokenizer, "", about.template, about.instruction))
        if size <= around or size >= len(ids):
            continue
        part = tokenizer.decode(ids[: size - around])
        name = f"first {size} tokens"
        options = {"template": about.template, "instruction": about.instruction}
        found.append(Context(name, (document.whole(name, model, tokenizer, part, **options),)))
    return found


def _prompt(context: Context, asked: Sequence[int]) -> list[int]:
    return [*context.head, *asked]


def _quality(
    model: Any,
    tokenizer: Any,
    context: Context,
    prompts: Sequence[Prompt],
    asked: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    plan: Plan,
) -> dict[str, Any]:
    """Log-probabilities and exact matches. Without a document the chat is the template's own."""
    if context.name == NONE:
        asked = [encode(tokenizer, [prompt.turns[0]])[0].tolist() for prompt in prompts]
    segments = [each.segment for each in context.cartridges]
    sums = log_probabilities(model, segments, asked, answers)
    said = []
    for start in range(0, len(asked), ROWS):
        batch = left_padded(asked[start : start + ROWS], model.device)
        out = model.generate(
            **batch, max_new_tokens=plan.max_new_tokens, do_sample=False, cartridges=list(context.cartridges)
        )
        said += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [str(p.answer).casefold() in text.casefold() for p, text in zip(prompts, said, strict=True)]
    return {
        "tokens": context.num_tokens,
        "kv_bytes": sum(each.nbytes() for each in context.cartridges),
        "log_probability": mean(sums),
        "log_probability_per_token": sum(sums) / sum(len(each) for each in answers),
        "exact_match": mean(right),
        "log_probabilities": sums,
        "said": right,
    }


def _kept(rows: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """The share of what all documents gain over none, in log-probability."""
    none, full = rows[NONE]["log_probability"], rows[CACHED]["log_probability"]
    return (rows[name]["log_probability"] - none) / (full - none) if full > none else None


def _by_category(rows: Mapping[str, Mapping[str, Any]], name: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The same of each category's questions, where there are several."""
    categories = list(dict.fromkeys(each.category for each in prompts))
    if len(categories) < 2:
        return {}
    found = {}
    for category in categories:
        places = [place for place, each in enumerate(prompts) if each.category == category]
        means = {
            other: {"log_probability": mean(rows[other]["log_probabilities"][place] for place in places)}
            for other in (NONE, CACHED, name)
        }
        found[category] = {
            "questions": len(places),
            **means[name],
            "gain_kept": _kept(means, name),
            "exact_match": mean(rows[name]["said"][place] for place in places),
        }
    return found


def _first_tokens(model: Any, contexts: Sequence[Context], asked: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Seconds from call to first token, contexts taken in turn; ratios to the whole document in the prompt."""
    times: dict[str, list[float]] = {context.name: [] for context in contexts}
    for number in range(TIMED + 1):
        for context in rotated(contexts, number):
            batch = left_padded([_prompt(context, asked[number % len(asked)])], model.device)
            one = {"max_new_tokens": 1, "do_sample": False, "cartridges": list(context.cartridges)}
            _, _, seconds = clocked(model, **batch, **one)
            if number:  # the first round warms caches up
                times[context.name].append(seconds)
    return {
        name: {"ttft_ms": 1000 * median(each), "ttft_speedup": _ratio(times[FULL], each)}
        for name, each in times.items()
    }


def _throughput(
    model: Any, contexts: Sequence[Context], asked: Sequence[Sequence[int]], count: int, plan: Plan
) -> dict[str, dict[str, Any]]:
    """Decoded tokens/s of ``count`` requests at once, behind their first token, and bytes held for all of them."""
    seconds: dict[str, list[float]] = {context.name: [] for context in contexts}
    held: dict[str, int] = {}
    tokens = plan.max_new_tokens
    for number in range(plan.repeat):
        for context in rotated(contexts, number):
            some = [asked[(number + place) % len(asked)] for place in range(count)]
            batch = left_padded([_prompt(context, each) for each in some], model.device)
            model.generate(
                **batch,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                cartridges=list(context.cartridges),
            )
            stats = accel.stats(model)
            seconds[context.name].append(stats.seconds["decode"])
            held[context.name] = stats.state_bytes
    made = count * (tokens - 1)
    return {
        name: {
            "tokens_per_second": made / median(each),
            "speedup": _ratio(seconds[FULL], each),
            "state_bytes": held[name],
        }
        for name, each in seconds.items()
    }


def _ratio(reference: Sequence[float], mine: Sequence[float]) -> list[float] | None:
    """Median, p20, p80 of paired ratios: how many times as fast."""
    found = paired_speedup([a / b for a, b in zip(reference, mine, strict=True)])
    return None if found is None else [found.median, found.p20, found.p80]


def terminal(result: Mapping[str, Any]) -> str:
    """The document as tables."""
    settings = result["settings"]
    count = len(settings["documents"])
    head = (
        f"{settings['model']} · {settings['dtype']} · {'document' if count == 1 else f'{count} documents'} of "
        f"{settings['document_tokens']} tokens · {settings['questions']} questions · path proved to "
        f"{result['parity']:.0e}"
    )
    contexts = result["contexts"]
    quality = [
        (
            name,
            str(row["tokens"]),
            f"{row['kv_bytes'] / 1e6:.2f}" if row["kv_bytes"] else "–",
            f"{row['log_probability']:.2f}",
            f"{row['log_probability_per_token']:.2f}",
            _share(row["gain_kept"]),
            f"{row['exact_match']:.0%}",
        )
        for name, row in contexts.items()
    ]
    categories = list(contexts[NONE]["categories"])
    apart = [
        (name, *(part for each in categories for part in _category(row["categories"][each])))
        for name, row in contexts.items()
    ]
    cost = [
        (
            name,
            f"{row['ttft_ms']:.0f}",
            _shown(row["ttft_speedup"]),
            *(part for n in settings["concurrency"] for part in _at(row[f"at_{n}"])),
        )
        for name, row in contexts.items()
    ]
    titles = (part for each in categories for part in (each, "gain kept", "says it"))
    return "\n\n".join(
        [
            head,
            table(("context", "tokens", "KV MB", "ln p(answer)", "a token", "gain kept", "says it"), quality),
            *([table(("context", *titles), apart)] if categories else []),
            table(
                (
                    "context",
                    "TTFT ms",
                    "× full",
                    *(title for n in settings["concurrency"] for title in (f"tokens/s @{n}", "× full", "MB held")),
                ),
                cost,
            ),
            "gain kept: of what the whole text in the prompt adds to ln p(answer). full: read anew by each one. "
            "full, cached: its keys and values read once and shared. Ratios are medians of paired runs [p20–p80].\n",
        ]
    )


def _category(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{row['log_probability']:.2f}", _share(row["gain_kept"]), f"{row['exact_match']:.0%}"


def _share(gain: float | None) -> str:
    return "–" if gain is None else f"{gain:.0%}"


def _at(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{figures['tokens_per_second']:.1f}", _shown(figures["speedup"]), f"{figures['state_bytes'] / 1e6:.1f}"


def _shown(ratio: Sequence[float] | None) -> str:
    return "–" if ratio is None else f"{ratio[0]:.2f}× [{ratio[1]:.2f}–{ratio[2]:.2f}]"
