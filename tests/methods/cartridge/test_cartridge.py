"""A cartridge's artifact: what it says, what is refused when it does not fit, and what comes back from disk."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from accel.artifacts import file_digest, open_artifact
from accel.errors import ArtifactError, IncompatibleError
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge, Geometry, Parameters, check_together
from accel.models.row_cache import Segment

IDS = list(range(3, 23))


@pytest.fixture
def model(tiny):
    return tiny.pair("llama")[0]


@pytest.fixture
def artifact(model, tmp_path):
    return made(model).save(tmp_path / "doc")


def made(model, **parameters):
    given = {"method": "whole", "exact": True, "documents": (document.describe("text", 20),)} | parameters
    return Cartridge.of("doc", document.read(model, IDS), model, **given)


def rewrite(artifact, change):
    """Edit a manifest as an attacker could: everything else stays consistent."""
    path = artifact.path / "accel.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return open_artifact(artifact.path)


def test_what_is_saved_comes_back(model, artifact):
    back = Cartridge.load(artifact, model)
    before = made(model)
    assert back.parameters == before.parameters and back.name == "doc"
    pairs = zip(back.segment.keys + back.segment.values, before.segment.keys + before.segment.values, strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert back.segment.num_positions == 20 and back.nbytes() == before.nbytes() == 2 * 2 * 2 * 20 * 8 * 4


def test_rounding_is_asked_for_and_said(model, tmp_path):
    artifact = made(model).save(tmp_path / "half", dtype="bfloat16")
    assert artifact.manifest.parameters["dtype"] == "bfloat16"
    back = Cartridge.load(artifact, model)
    assert back.segment.keys[0].dtype == torch.float32
    torch.testing.assert_close(back.segment.keys[0], made(model).segment.keys[0], rtol=2**-8, atol=1e-6)
    with pytest.raises(ArtifactError, match="dtype='int8'"):
        made(model).save(tmp_path / "int", dtype="int8")


def test_a_bias_survives_with_its_hidden_slots(model, tmp_path):
    segment = document.read(model, IDS)
    bias = tuple(torch.zeros(2, 20).index_fill(1, torch.tensor([3]), -torch.inf) for _ in range(2))
    cartridge = Cartridge.of("b", dataclasses.replace(segment, bias=bias), model, method="converted")
    back = Cartridge.load(cartridge.save(tmp_path / "b"), model)
    assert back.segment.bias is not None
    assert (back.segment.bias[1][:, 3].exp() == 0).all() and (back.segment.bias[0][:, 4] == 0).all()


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"num_hidden_layers": 3}, "has layers 2, the model 3"),
        ({"num_key_value_heads": 4}, "has kv_heads 2, the model 4"),
        ({"head_dim": 16}, "has head_dim 8, the model 16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rotated with rope_theta 10000, .* 500"),
        ({"vocab_size": 71}, "vocabulary size 67, this model has 71"),
        ({"intermediate_size": 64}, "config digest"),
    ],
)
def test_a_cartridge_of_another_model_is_refused_with_both_values(tiny, artifact, extra, match):
    with pytest.raises(ArtifactError, match=match):
        Cartridge.load(artifact, tiny.build("llama", **extra))


def test_a_rotation_that_moves_is_refused(tiny):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(IncompatibleError, match="changes with the length"):
        made(tiny.build("llama", rope_parameters=rope))


def test_thinned_slots_and_sliding_windows_do_not_go_together(tiny):
    model, _ = tiny.pair("gemma3_text")
    thinned = dataclasses.replace(document.read(model, IDS), num_positions=100)
    with pytest.raises(IncompatibleError, match="20 slots for 100 positions"):
        Cartridge.of("thin", thinned, model, method="converted")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("tokens", 0, "tokens is 0"),
        ("tokens", 19, r"\[2, 20, 8\], the parameters say \[2, 19, 8\]"),
        ("positions", "20", "positions is '20'"),
        ("sink_tokens", 21, "more than the 20 tokens"),
        ("dtype", "float16", "is torch.float32, the parameters say torch.float16"),
        ("dtype", "float64", "dtype is 'float64', it must be one of"),
        ("template", "jinja", "template is 'jinja'"),
        ("has_bias", True, "missing .*layers.0.bias"),
        ("geometry", None, "parameters of no cartridge"),
        ("surprise", 1, "parameters of no cartridge.*surprise"),
    ],
)
def test_parameters_that_lie_are_refused(model, artifact, name, value, match):
    changed = rewrite(artifact, lambda raw: raw["parameters"].update({name: value}))
    with pytest.raises(ArtifactError, match=match) as caught:
        Cartridge.load(changed, model)
    assert "\n" not in str(caught.value)


def test_missing_parameters_are_refused(model, artifact):
    changed = rewrite(artifact, lambda raw: raw["parameters"].pop("positions"))
    with pytest.raises(ArtifactError, match="positions"):
        Cartridge.load(changed, model)


def test_another_kind_is_refused(model, artifact):
    with pytest.raises(ArtifactError, match="is a lawcat artifact"):
        Cartridge.load(rewrite(artifact, lambda raw: raw.update(kind="lawcat")), model)


def test_numbers_that_are_none_are_refused(model, artifact):
    import safetensors.torch

    path = artifact.path / "cartridge.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["layers.1.values"][0, 3, 2] = float("nan")
    safetensors.torch.save_file(tensors, path)
    entry = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    changed = rewrite(artifact, lambda raw: raw["files"].update({"cartridge.safetensors": entry}))
    with pytest.raises(ArtifactError, match=r"layers\.1\.values holds NaN"):
        Cartridge.load(changed, model)


def test_a_truncated_file_is_refused(model, artifact):
    path = artifact.path / "cartridge.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="bytes"):
        Cartridge.load(open_artifact(artifact.path), model)


def test_a_name_that_leaves_the_folder_is_refused(artifact):
    entry = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(ArtifactError, match="not a safe relative name"):
        rewrite(artifact, lambda raw: raw["files"].update({"../cartridge.safetensors": entry}))


def test_an_empty_document_and_one_too_long_are_refused(model):
    from accel.errors import OptionError

    with pytest.raises(OptionError, match="empty document"):
        document.read(model, [])
    with pytest.raises(OptionError, match="has 257 tokens, the model 256 positions"):
        document.read(model, [3] * 257)


def test_reading_in_pieces_is_reading_at_once(model, monkeypatch):
    whole = document.read(model, IDS)
    monkeypatch.setattr(document, "CHUNK", 7)
    pieces = document.read(model, IDS)
    for mine, theirs in zip(pieces.keys + pieces.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_who_was_trained_together_is_known(model):
    def of(own, others):
        documents = (document.describe(own, 1),)
        digests = tuple(document.describe(each, 1).sha256 for each in others)
        return made(model, documents=documents, trained_with=digests)

    assert check_together([of("a", "b"), of("b", "a")]) == []
    assert check_together([of("a", "")]) == []
    assert "doc: not trained" in check_together([of("a", "b"), of("b", "")])[0]
    assert check_together([of("a", "b"), of("c", "ab")])


def test_geometry_is_what_the_cache_holds(tiny):
    """Asked of the config, and compared with what each family really puts into a cache."""
    for family in ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi3"):
        model, _ = tiny.pair(family)
        segment: Segment = document.read(model, [5, 6, 7])
        config = copy.deepcopy(model.config)
        if family in ("gpt2", "gpt_neox"):
            del config.num_key_value_heads  # the tiny models' own extra: these families know no such thing
        geometry = Geometry.of(config)
        assert len(segment.keys) == geometry.layers, family
        assert tuple(segment.keys[0].shape) == (geometry.kv_heads, 3, geometry.head_dim), family


def test_parameters_go_through_json(model):
    parameters = made(model).parameters
    assert Parameters.parse(json.loads(json.dumps(parameters.as_dict())), "here") == parameters
