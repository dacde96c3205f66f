"""From records to document, tables and page, on records whose figures are worked out by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from accel.bench import gate, html, report, saving, summary
from accel.bench.measure import Record

ENVIRONMENT = {"accel": "0.1", "commit": None, "torch": "2", "transformers": "5", "cpu": "a <cpu>", "threads": 2}
SETTINGS = {"model": "m", "dtype": "float32", "temperature": 0.0, "max_new_tokens": 10, "repeat": 1}


def record(arm, prompt, group, seconds, tokens=10, verdict=gate.IDENTICAL, **fields):
    times = [seconds * (i + 1) / tokens for i in range(tokens)]
    given = {"tokens": list(range(tokens)), "times": times, "peak_bytes": 5_000_000, "prompt_tokens": 7, **fields}
    return Record(prompt, group, group, arm, seconds=seconds, verdict=verdict, **given)


def stats(**counts):
    zero = {
        "row_calls": 0,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "cost_ratio": None,
        "lossless": True,
        "notes": [],
    }
    return {**zero, **counts}


def build(records, arms, complete=True, settings=SETTINGS, **kwargs):
    return summary.document(
        records,
        arms,
        "transformers",
        settings=settings,
        environment=ENVIRONMENT,
        command="accel bench",
        date="2026-01-01",
        complete=complete,
        **{"keep_records": False, **kwargs},
    )


@pytest.fixture
def found():
    drafted = stats(row_calls=5, drafted_tokens=10, accepted_tokens=5, cost_ratio=0.25, notes=["a note"])
    lengths = {"qa": [1.0, 2.0], "rag": [4.0]}
    records = []
    for group, seconds in lengths.items():
        for index, reference in enumerate(seconds):
            prompt = f"{group}{index}"
            records += [
                record("transformers", prompt, group, reference),
                record("accel-plain", prompt, group, reference / 1.25, stats=stats(row_calls=9)),
                record("accel-auto", prompt, group, reference / (2 if group == "qa" else 0.5), stats=drafted),
            ]
    return build(records, ["transformers", "accel-plain", "accel-auto"])


def test_flat_keys_of_an_arm(found):
    arm = found["arms"]["accel-auto"]
    # 30 tokens in 0.5 + 1 + 8 seconds
    assert arm["output_throughput"] == pytest.approx(30 / 9.5)
    assert (arm["completed"], arm["failed"], arm["total_output_tokens"], arm["total_input_tokens"]) == (3, 0, 30, 21)
    assert arm["duration"] == pytest.approx(9.5)
    assert arm["median_ttft_ms"] == pytest.approx(100)
    assert arm["median_tpot_ms"] == pytest.approx(100)
    assert arm["mean_e2el_ms"] == pytest.approx(9500 / 3)
    assert arm["speedup"] == pytest.approx(2)
    assert (arm["speedup_p20"], arm["speedup_p80"]) == (pytest.approx(0.5 + 0.4 * 1.5), pytest.approx(2))
    # rates 10, 5, 2.5 against 20, 10, 1.25
    assert arm["speedup_of_means"] == pytest.approx(31.25 / 17.5)
    assert arm["speedup_vs_plain"] == pytest.approx(1.6)
    assert (arm["mean_accepted_length"], arm["acceptance_rate"]) == (pytest.approx(2), pytest.approx(0.5))
    assert arm["mean_draft_length"] == pytest.approx(2)
    assert arm["predicted_speedup_vs_plain"] == pytest.approx(2 / 1.5)
    assert arm["peak_memory_mb"] == pytest.approx(5)
    assert (arm["gate"], arm["identical"]) == ("yes", 3)
    assert found["arms"]["transformers"]["speedup"] == pytest.approx(1)
    assert found["arms"]["transformers"]["mean_accepted_length"] == pytest.approx(1)


def test_groups_show_where_an_arm_loses(found):
    assert found["groups"]["qa"]["accel-auto"]["speedup"] == pytest.approx(2)
    assert found["groups"]["rag"]["accel-auto"]["speedup"] == pytest.approx(0.5)
    assert found["groups"]["qa"]["accel-auto"]["prompts"] == 2


def test_repetitions_are_paired_with_their_own():
    records = []
    for repetition, (reference, arm) in enumerate([(1.0, 0.5), (3.0, 1.0), (10.0, 2.0)]):
        records.append(record("transformers", "1", "qa", reference, repetition=repetition))
        records.append(record("b", "1", "qa", arm, repetition=repetition))
    # ratios 2, 3 and 5; the median over repetitions is one prompt's ratio
    arm = build(list(reversed(records)), ["transformers", "b"])["arms"]["b"]
    assert (arm["speedup"], arm["speedup_p20"], arm["speedup_p80"]) == (3, 3, 3)


def test_a_failed_gate_takes_every_speedup_away():
    records = [record(arm, p, "qa", s) for p in ("1", "2") for arm, s in (("transformers", 1.0), ("accel-plain", 0.9))]
    wrong = [record("b", "1", "qa", 0.1, stats=stats(row_calls=1, drafted_tokens=1, cost_ratio=0.1))]
    wrong.append(record("b", "2", "qa", 0.1, verdict=gate.FAILED, reason="token 3 is 7"))
    document = build(records + wrong, ["transformers", "accel-plain", "b"])
    arm = document["arms"]["b"]
    keys = ["speedup", "speedup_p20", "speedup_of_means", "speedup_vs_plain", "predicted_speedup_vs_plain"]
    assert [arm[key] for key in keys] == [None] * 5
    assert document["groups"]["qa"]["b"]["speedup"] is None
    assert arm["gate"] == "FAILED"
    text = report.terminal(document)
    assert "b FAILED the output check, so no speed-up is given: prompt 2: token 3 is 7" in text
    row = next(line for line in text.splitlines() if line.startswith("b "))
    assert "FAILED" in row
    assert "×" not in row
    assert '<td class="failed">FAILED</td>' in html.page(document)


def test_a_failed_plain_arm_is_nobodys_measure():
    records = [record("transformers", "1", "qa", 1.0), record("b", "1", "qa", 0.5)]
    records.append(record("accel-plain", "1", "qa", 0.5, verdict=gate.FAILED, reason="wrong"))
    arm = build(records, ["transformers", "accel-plain", "b"])["arms"]["b"]
    assert arm["speedup"] == 2
    assert arm["speedup_vs_plain"] is None


def test_ties_lossy_methods_and_samples_are_told_apart():
    records = [record("transformers", "1", "qa", 1.0), record("b", "1", "qa", 1.0, verdict=gate.SIMILAR, margin=2e-4)]
    records.append(record("lossy", "1", "qa", 1.0, verdict=gate.LOSSY, stats=stats(lossless=False)))
    document = build(records, ["transformers", "b", "lossy"])
    assert document["arms"]["b"]["gate"] == "yes"
    assert document["arms"]["lossy"]["gate"] == "lossy"
    assert report.identical(document["arms"]["b"]) == "0/1 +1 tied"
    assert "at most 0.0002 apart" in report.terminal(document)
    sampled = [record("transformers", "1", "qa", 1.0, verdict=gate.SAMPLED)]
    document = build(sampled, ["transformers"], settings={**SETTINGS, "temperature": 0.7})
    assert document["arms"]["transformers"]["gate"] == "sampled"
    assert "are not compared" in report.terminal(document)


def test_terminal_report(found):
    text = report.terminal(found)
    lines = text.splitlines()
    assert lines[0] == "m · float32 · a <cpu>, 2 threads"
    assert "3 prompts × 10 new tokens × 1, greedy" in lines[1]
    row = next(line for line in lines if line.startswith("accel-auto"))
    cells = [cell for cell in row.split("  ") if cell]
    assert [cell.strip() for cell in cells] == [
        *("accel-auto", "3.2", "2.00× [1.10–2.00]", "1.60", "1.33", "100", "2.00", "50", "0.250", "yes", "3/3", "5")
    ]
    assert "Speed-up over transformers by task group" in text
    assert "accel-auto: a note" in text
    assert "Slower than" not in text


def test_losses_are_said_aloud():
    records = [record("transformers", "1", "qa", 1.0), record("b", "1", "qa", 2.0), record("c", "1", "qa", 1.001)]
    text = report.terminal(build(records, ["transformers", "b", "c"]))
    assert "Slower than transformers: b (0.50×)\n" in text
    assert "by task group" not in text


def test_an_unfinished_document_says_so_and_keeps_records(found):
    document = build([record("transformers", "1", "qa", 1.0)], ["transformers", "b"], complete=False)
    assert "UNFINISHED" in report.terminal(document)
    assert len(document["records"]) == 1
    assert document["arms"]["b"]["gate"] == "not run"
    assert "records" not in found
    # nothing measured yet
    assert "0 prompts" in report.terminal(build([], ["transformers"], complete=False))


def test_html_page_is_well_formed_escaped_and_self_contained(found):
    text = html.page(found)
    void = {"meta"}

    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.stack = []

        def handle_starttag(self, tag, attrs):
            if tag not in void:
                self.stack.append(tag)
            assert not {"src", "href"} & dict(attrs).keys()

        def handle_startendtag(self, tag, attrs): ...

        def handle_endtag(self, tag):
            assert self.stack.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.stack == []
    assert "a &lt;cpu&gt;" in text
    assert "<cpu>" not in text
    assert text.count("<rect") == 3
    assert "2.00× [1.10–2.00]" in text


def test_saving_round_trips_and_replaces_in_one_step(tmp_path, found):
    file = tmp_path / "new" / "out.json"
    saving.write(file, "old")
    saving.write(file, saving.dump(found))
    assert [path.name for path in file.parent.iterdir()] == ["out.json"]
    assert saving.load(file)["arms"]["accel-auto"]["speedup"] == pytest.approx(2)
    (tmp_path / "file").write_text("")
    with pytest.raises(saving.ResultsError, match="cannot write"):
        saving.write(tmp_path / "file" / "out.json", "x")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 99, "settings": {}}'])
def test_foreign_files_are_not_results(tmp_path, text):
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(saving.ResultsError):
        saving.load(tmp_path / "out.json")


def test_resume_gives_back_the_records_or_says_what_differs(tmp_path):
    records = [
        record("transformers", "1", "qa", 1.0, margin=0.5),
        record("b", "1", "qa", 2.0, stats=stats(row_calls=3)),
    ]
    document = json.loads(saving.dump(build(records, ["transformers", "b"], complete=False)))
    assert saving.resume(document, SETTINGS, tmp_path) == records
    with pytest.raises(saving.OptionError, match="max_new_tokens was 10 and is 20"):
        saving.resume(document, {**SETTINGS, "max_new_tokens": 20}, tmp_path)
    with pytest.raises(saving.OptionError, match="is complete"):
        saving.resume({**build(records, ["transformers"])}, SETTINGS, tmp_path)
    with pytest.raises(saving.ResultsError, match="cannot be read"):
        saving.resume({**document, "records": [{"prompt": "1"}]}, SETTINGS, tmp_path)
