"""Shorter demonstrations, with a stand-in for llmlingua: what it is told, what is kept whole, and what is refused."""

from __future__ import annotations

import json
import random
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cascade_fakes import Scripted, WordEmbedder
from refusals import refusal

from accel.methods.cascade.compress import NAMES, Compressor
from accel.methods.cascade.options import CascadeOptions
from accel.methods.cascade.router import Cascade
from accel.methods.cascade.store import Demonstration, DemonstrationStore, Situation, Step


class Stub:
    """Every other word; seeds all generators, as llmlingua does."""

    made: list[dict[str, object]]

    def __init__(self, **told):
        self.made.append(told)
        random.seed(42)
        np.random.seed(42)  # noqa: NPY002
        torch.manual_seed(42)
        self.asked = []

    def compress_prompt(self, text, **told):
        self.asked.append((text, told))
        time.sleep(0.02)
        if "broken" in text:
            raise ValueError("no\nway")
        if "unknown" in text:
            raise IndexError("index -1")
        return {"compressed_prompt": "" if "nothing" in text else " ".join(text.split()[::2])}


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    module = types.ModuleType("llmlingua")
    module.PromptCompressor = type("PromptCompressor", (Stub,), {"made": []})
    monkeypatch.setitem(sys.modules, "llmlingua", module)
    return module.PromptCompressor


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "any name"
    where.mkdir()
    (where / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (where / "model.safetensors").write_bytes(b"")
    return where


def test_what_llmlingua_is_told(folder, stub):
    made = Compressor(folder, rate=0.3, least=0, device="cpu")
    (told,) = stub.made
    assert told == {
        "model_name": str(folder),
        "device_map": "cpu",
        "use_llmlingua2": True,
        # its own default runs code of the model's folder
        "model_config": {"trust_remote_code": False, "local_files_only": True},
    }
    # it reads the kind of model from the name alone, and a folder may be called anything
    assert made._compressor.model_name == NAMES["bert"]
    assert made("you see a lamp") == "you a"
    assert made._compressor.asked == [
        ("you see a lamp", {"rate": 0.3, "force_tokens": ["\n"], "force_reserve_digit": True})
    ]


def test_generators_go_on_as_they_were(folder):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()  # noqa: NPY002
    Compressor(folder)
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[2], torch.random.get_rng_state())


def test_a_text_is_read_once_whoever_asks(folder):
    made = Compressor(folder, least=0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(made, ["you see a lamp"] * 40)) == {"you a"}
    assert len(made._compressor.asked) == 1
    assert made("you hear a lamp") == "you a" and len(made._compressor.asked) == 2


@pytest.mark.parametrize("text", ["", " \n", "short", "nothing is left", "unknown to the model"])
def test_what_stays_whole(folder, text):
    assert Compressor(folder, least=6)(text) == text


def test_failures_are_one_line(folder):
    made = Compressor(folder, least=0)
    assert refusal(lambda: made("broken text")) == "llmlingua cannot shorten 'broken text': no"


def test_observations_are_shortened_and_actions_are_not(folder, tmp_path):
    small = Scripted("small", "go")
    with DemonstrationStore(tmp_path / "demos.sqlite", WordEmbedder()) as store:
        store.add([Demonstration("find it", (Step("you see a lamp", "take the lamp", "I need a light"),))])
        made = Cascade(small, None, CascadeOptions(), store=store, shorten=Compressor(folder, least=0))
        made.answer([{"role": "user", "content": "q"}], Situation(goal="find it"))
    shown = small.questions[0][0][0]["content"]
    assert "Observation: you a\nReasoning: I need a light\nAction: take the lamp" in shown


def test_refusals(folder, monkeypatch, stub):
    for rate in (0, 1.5, "x", float("nan"), True):
        assert "rate=" in refusal(lambda rate=rate: Compressor(folder, rate=rate))
    assert "least=-1" in refusal(lambda: Compressor(folder, least=-1))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "is a gpt2: llmlingua knows bert and xlm-roberta" in refusal(lambda: Compressor(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))

    def no_table(self, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr(stub, "__init__", no_table)
    said = refusal(lambda: Compressor(folder))
    assert "no network" in said and "TIKTOKEN_CACHE_DIR" in said
    (folder / "model.safetensors").unlink()
    assert "needs config.json and *.safetensors" in refusal(lambda: Compressor(folder))
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    assert "pip install accel-runtime[compress]" in refusal(lambda: Compressor(folder))
