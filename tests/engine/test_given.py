"""What users hand over: names are opened once, whatever is attached, and told apart by kind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from byte_models import byte_llama
from linear_models import random_tensors

import accel
from accel.artifacts import Artifact, Manifest, describe_base, save, store
from accel.engine.given import opened, parted
from accel.errors import ArtifactError
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.lawcat.artifact import Lawcat
from accel.models.linear import LinearSpec


@pytest.fixture
def reads(monkeypatch):
    """How often each manifest was read, by its folder's name."""
    counts: Counter[str] = Counter()
    read_manifest = store.read_manifest

    def read(folder):
        counts[Path(folder).name] += 1
        return read_manifest(folder)

    monkeypatch.setattr(store, "read_manifest", read)
    return counts


@pytest.fixture
def model():
    return byte_llama(max_position_embeddings=64)


@pytest.fixture
def draft(model, tmp_path):
    parameters = {"config": model.config.to_diff_dict()}
    manifest = Manifest(kind="draft", base=describe_base(model.config), parameters=parameters)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(tmp_path / "draft", manifest, {"model.safetensors": weights})


@pytest.fixture
def cartridge(model, tmp_path):
    ids = [5, 6, 7, 8]
    documents = (document.describe("four", len(ids)),)
    made = Cartridge.of("doc", document.read(model, ids), model, method="whole", exact=True, documents=documents)
    return made.save(tmp_path / "doc")


def test_each_name_is_opened_once(model, draft, cartridge, reads):
    ids = torch.tensor([[9, 10]])
    accel.attach(model, str(draft.path), cartridge.path, draft_length=2)
    # the store reads a cartridge's own once more: it must be what was added whenever it is brought into memory
    assert reads == {"draft": 1, "doc": 2}
    model.generate(ids, max_new_tokens=4)
    found = accel.stats(model)
    assert found.drafted_tokens and found.cartridges == ["doc"]
    reads.clear()
    accel.generate(model, ids, artifacts=[draft, cartridge], max_new_tokens=4)
    assert reads == {"doc": 1}


def test_a_conversion_is_opened_once(model, tmp_path, reads):
    spec = LinearSpec(layers=(0,), feature_size=8, gate_rank=3)
    made = Lawcat.of("linear", spec, random_tensors(model.config, spec), model).save(tmp_path / "linear")
    reads.clear()
    accel.attach(model, str(made.path))
    assert reads == {"linear": 1}


def test_folders_of_transformers_and_live_objects_stay_as_they_are(model, draft, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    for given in (str(tmp_path / "plain"), tmp_path / "plain", model, draft, 7):
        assert opened(given) is given
    found = opened(str(draft.path))
    assert isinstance(found, Artifact) and found == draft
    # an artifact that is a transformers folder too
    (draft.path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        opened(draft.path)
    with pytest.raises(ArtifactError, match="no artifact 'nothing'"):
        opened("nothing")


def test_kinds_are_told_apart_in_order(draft, cartridge, model):
    live = Cartridge.load(cartridge, model)
    given = [draft, cartridge, "plain", live, model]
    assert parted(given, Cartridge) == ([cartridge, live], [draft, "plain", model])
    assert parted(given, Lawcat) == ([], given)
