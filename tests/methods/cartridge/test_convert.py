"""Foreign cache files, written here as their makers write them: what is read, and what is refused in one line."""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from accel.artifacts.foreign_files import load_plain
from accel.errors import AccelError, ArtifactError, OptionError
from accel.methods.cartridge.convert import FORMATS, Foreign, read

LAYERS, HEADS, SIZE = 3, 2, 4
INF = math.inf


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def some(tokens: int, *, heads: int = HEADS, size: int = SIZE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, heads, tokens, size).to(dtype) for _ in range(LAYERS)]


def listed(tensors: list[Tensor], frozen: bool = False) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor, requires_grad=not frozen) for tensor in tensors])


def hazy(frozen: str = "frozen", num_frozen: int = 3, **dtype: Any) -> dict[str, Any]:
    """The dict that the authors' ``save`` hands to torch.save."""
    content = {f"trainable_{kind}": listed(some(5, **dtype)) for kind in ("keys", "values")}
    for kind in ("keys", "values"):
        content[f"{frozen}_{kind}"] = listed(some(num_frozen, **dtype) if num_frozen else [], frozen=True)
    return content


def triples(*lengths: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(C1, beta, C2) a layer."""
    return [
        (
            torch.randn(1, HEADS, length, SIZE).to(dtype),
            torch.randn(1, HEADS, length).to(dtype),
            torch.randn(1, HEADS, length, SIZE).to(dtype),
        )
        for length in lengths
    ]


def pairs(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    return [(keys, values) for keys, _, values in triples(*lengths)]


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path / "cache.pt")
    return path / "cache.pt"


def refusal(path: Path, format: str = "auto", **options: Any) -> str:
    """The message of the refusal: one line that names the file."""
    with pytest.raises(ArtifactError) as caught:
        read(path, format, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ") and len(message) < len(str(path)) + 400
    # what torch says of such files is advice to load them without restrictions
    assert "weights_only" not in message
    return message


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """query [Hkv, n, D], keys [Hkv, P, D], values [Hkv, P, D], bias [Hkv, P] → [Hkv, n, D], as the equation says."""
    scores = query @ keys.mT / math.sqrt(keys.shape[-1]) + bias[:, None]
    return scores.softmax(-1) @ values


# -- cartridges --


@pytest.mark.parametrize(("frozen", "layout"), [("fixed", "v1"), ("frozen", "v2")])
def test_frozen_tokens_lead_the_trained_ones(tmp_path: Path, frozen: str, layout: str) -> None:
    content = hazy(frozen)
    found = read(saved(tmp_path, content))
    for kind, layers in (("keys", found.keys), ("values", found.values)):
        assert len(layers) == LAYERS
        for layer, first, rest in zip(layers, content[f"{frozen}_{kind}"], content[f"trainable_{kind}"], strict=True):
            assert torch.equal(layer, torch.cat([first, rest], dim=2)[0])
            assert type(layer) is Tensor and not layer.requires_grad
    # three frozen tokens and two heads: counted on the wrong axis this is 2
    assert (found.sink_tokens, found.num_positions, found.num_slots, found.bias) == (3, 8, 8, None)
    assert found.details == {"format": "hazy", "layout": layout, "num_trained": 5}
    assert found.source == str(tmp_path / "cache.pt")


@pytest.mark.parametrize("how", ["empty", "absent", "zero length", "null"])
def test_no_frozen_tokens(tmp_path: Path, how: str) -> None:
    content = hazy(num_frozen=0)
    for kind in ("keys", "values"):
        if how == "absent":
            del content[f"frozen_{kind}"]
        elif how == "zero length":
            content[f"frozen_{kind}"] = listed(some(0))
        elif how == "null":
            content[f"frozen_{kind}"] = None
    found = read(saved(tmp_path, content))
    assert (found.sink_tokens, found.num_positions) == (0, 5)
    assert all(torch.equal(a, b[0]) for a, b in zip(found.keys, content["trainable_keys"], strict=True))
    assert all(torch.equal(a, b[0]) for a, b in zip(found.values, content["trainable_values"], strict=True))


def test_types_stay_or_widen(tmp_path: Path) -> None:
    assert read(saved(tmp_path, hazy(dtype=torch.bfloat16))).keys[0].dtype == torch.bfloat16
    content = hazy(dtype=torch.bfloat16) | {"frozen_keys": listed(some(3))}
    found = read(saved(tmp_path, content))
    assert (found.keys[0].dtype, found.values[0].dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(found.keys[0][:, :3], content["frozen_keys"][0][0])
    assert torch.equal(found.keys[0][:, 3:], content["trainable_keys"][0][0].float())


def test_keys_and_values_may_differ_in_size(tmp_path: Path) -> None:
    content = {"trainable_keys": some(5), "trainable_values": some(5, size=6), "note": "by hand"}
    found = read(saved(tmp_path, content))
    assert (found.keys[0].shape, found.values[0].shape) == ((HEADS, 5, SIZE), (HEADS, 5, 6))
    assert found.details == {"format": "hazy", "layout": "v1 or v2", "num_trained": 5, "note": "by hand"}


def with_nan(tensors: list[Tensor], value: float = math.nan) -> list[Tensor]:
    tensors[1][0, 1, 2, 3] = value
    return tensors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trainable_values": None}, "has no list 'trainable_values': it holds 'frozen_keys', 'frozen_values', "),
        ({"trainable_keys": []}, "0 layers of keys, 3 of values: as many of each"),
        ({"trainable_values": some(5)[:2]}, "3 layers of keys, 2 of values: as many of each"),
        ({"trainable_values": some(4)}, "layer 0 has keys [2, 8, 4] and values [2, 7, 4]: heads and slots"),
        ({"trainable_keys": some(5)[:2] + some(6)[:1]}, "layer 2 has keys [2, 9, 4]"),
        ({"trainable_keys": some(5, heads=1)}, "frozen [2, 3, 4], trained [1, 5, 4]: heads and sizes"),
        ({"trainable_keys": [torch.randn(2, HEADS, 5, SIZE)] * LAYERS}, "trainable_keys[0] is [2, 2, 5, 4]: [1, heads"),
        ({"trainable_keys": [torch.randn(5, SIZE)] * LAYERS}, "trainable_keys[0] is [5, 4]: [1, heads"),
        ({"trainable_keys": [torch.ones(1, HEADS, 5, SIZE).int()] * LAYERS}, "trainable_keys[0] is torch.int32"),
        ({"trainable_keys": [1.0] * LAYERS}, "trainable_keys[0] is of type float: a tensor"),
        ({"trainable_keys": torch.randn(3, 1, HEADS, 5, SIZE)}, "has no list 'trainable_keys'"),
        ({"trainable_keys": with_nan(some(5))}, "keys of layer 1 hold NaN or infinity: finite numbers are allowed"),
        ({"trainable_values": with_nan(some(5), -INF)}, "values of layer 1 hold NaN or infinity"),
        ({"frozen_keys": some(3)[:2]}, "2 frozen layers, 3 trained: as many of each"),
        ({"frozen_keys": some(1)}, "1 and 3 frozen tokens, by layer or by keys and values"),
        ({"frozen_values": []}, "0 and 3 frozen tokens, by layer or by keys and values"),
        ({"fixed_keys": some(1)}, "holds fixed_* and frozen_* tokens: one of the two"),
        ({"trainable_beta": [torch.zeros(1, HEADS, 5)]}, "holds tensors in 'trainable_beta': only "),
    ],
)
def test_broken_cartridges(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    assert reason in refusal(saved(tmp_path, hazy() | change))


def test_a_cartridge_without_tokens(tmp_path: Path) -> None:
    content = {"trainable_keys": some(0), "trainable_values": some(0)}
    assert "layer 0 has keys [2, 0, 4]" in refusal(saved(tmp_path, content))


# -- Attention Matching --


def test_a_compacted_cache(tmp_path: Path) -> None:
    cache = triples(6, 6, dtype=torch.bfloat16)
    found = read(saved(tmp_path, {"cache": cache, "original_seq_len": 120, "model": "some/model", "ratio": 0.05}))
    assert found.bias is not None
    for index, (keys, beta, values) in enumerate(cache):
        assert torch.equal(found.keys[index], keys[0])
        assert torch.equal(found.bias[index], beta[0])
        assert torch.equal(found.values[index], values[0])
    assert (found.num_positions, found.sink_tokens, found.num_slots) == (120, 0, 6)
    assert found.details == {
        "format": "attention-matching",
        "num_layer_slots": [6, 6],
        "model": "some/model",
        "ratio": 0.05,
    }


def test_layers_alone_state_no_length(tmp_path: Path) -> None:
    cache = tuple((keys[0], beta[0], values[0]) for keys, beta, values in triples(6, 6))
    found = read(saved(tmp_path, cache))
    assert found.num_positions is None
    assert torch.equal(found.keys[1], cache[1][0])
    assert read(saved(tmp_path, {"compacted_cache": cache, "original_seq_len": 9})).num_positions == 9


def test_padding_changes_no_attention(tmp_path: Path) -> None:
    """Heads of unequal budgets, layers of unequal lengths: each head attends as it did in its own layer."""
    cache = triples(7, 4, 6)
    for _, beta, _ in cache:
        beta[0, 0, 2:] = -INF
        beta[0, 1, -2:] = -INF
    cache[0][1][0, 1, 3] = -INF  # hidden in layer 0, seen in layer 2
    found = read(saved(tmp_path, {"cache": cache, "original_seq_len": 50}))
    assert found.bias is not None
    # slots 5 and 6 are hidden in every layer and head
    assert (found.num_slots, found.details["num_dropped_slots"], found.num_positions) == (5, 2, 50)
    assert found.details["num_layer_slots"] == [7, 4, 6]
    query = torch.randn(HEADS, 3, SIZE)
    for index, (keys, beta, values) in enumerate(cache):
        expected = attend(query, keys[0], values[0], beta[0])
        actual = attend(query, found.keys[index], found.values[index], found.bias[index])
        torch.testing.assert_close(actual, expected)


def test_a_slot_seen_by_one_head_stays(tmp_path: Path) -> None:
    cache = triples(4, 4)
    for _, beta, _ in cache:
        beta[0, :, 1] = -INF
    cache[1][1][0, 1, 1] = 0.5
    found = read(saved(tmp_path, {"cache": cache, "original_seq_len": 50}))
    assert found.bias is not None
    assert found.num_slots == 4 and "num_dropped_slots" not in found.details
    assert found.bias[0][:, 1].tolist() == [-INF, -INF] and found.bias[1][:, 1].tolist() == [-INF, 0.5]


def changed(layer: int, item: int, tensor: Tensor) -> list[tuple[Tensor, ...]]:
    cache: list[tuple[Tensor, ...]] = list(triples(6, 6))
    cache[layer] = tuple(tensor if index == item else old for index, old in enumerate(cache[layer]))
    return cache


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"cache": changed(1, 1, torch.full((1, HEADS, 6), INF))},
            "bias of layer 1 hold NaN or infinity: finite numbers",
        ),
        ({"cache": changed(1, 1, torch.full((1, HEADS, 6), math.nan))}, "bias of layer 1 hold NaN or infinity"),
        ({"cache": changed(0, 2, torch.full((1, HEADS, 6, SIZE), -INF))}, "values of layer 0 hold NaN or infinity"),
        ({"cache": changed(1, 1, torch.zeros(1, HEADS, 5))}, "but a bias [2, 5]: [heads, slots] is allowed"),
        ({"cache": changed(1, 2, torch.zeros(1, HEADS, 5, SIZE))}, "values [2, 5, 4]: heads and slots must agree"),
        ({"cache": changed(1, 2, torch.zeros(1, HEADS, 4, SIZE))[:1] + pairs(6)}, "layer 1 is no triple"),
        ({"cache": [(k, torch.full_like(b, -INF), v) for k, b, v in triples(6, 6)]}, "every slot has a beta of -inf"),
        ({"cache": triples(6), "original_seq_len": "many"}, "num_positions is 'many': an integer from the 6 slots on"),
        ({"cache": triples(6), "original_seq_len": True}, "num_positions is True"),
        ({"cache": triples(6), "original_seq_len": 5}, "num_positions is 5: an integer from the 6 slots on"),
        ({"cache": triples(6), "compacted_cache": triples(6)}, "holds tensors in 'compacted_cache'"),
    ],
)
def test_broken_compacted_caches(tmp_path: Path, content: Any, reason: str) -> None:
    assert reason in refusal(saved(tmp_path, content))


# -- kvpress --


@pytest.mark.parametrize("form", ["pairs", "tuples", "lists", "iterated", "named", "safetensors"])
def test_every_form_of_a_pressed_cache(tmp_path: Path, form: str) -> None:
    layers = pairs(6, 6)
    keys, values = [key for key, _ in layers], [value for _, value in layers]
    path = tmp_path / "cache.pt"
    if form == "pairs":
        torch.save(layers, path)
    elif form == "tuples":
        torch.save(tuple(layers), path)
    elif form == "lists":
        torch.save([list(layer) for layer in layers], path)
    elif form == "iterated":
        torch.save(list(DynamicCache(layers)), path)
    elif form == "named":
        torch.save({"key_cache": keys, "value_cache": values}, path)
    else:
        path = tmp_path / "cache.safetensors"
        tensors = {f"key_cache.{i}": key for i, key in enumerate(keys)}
        tensors |= {f"value_cache.{i}": value for i, value in enumerate(values)}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    found = read(path)
    assert all(torch.equal(a, b[0]) for a, b in zip(found.keys, keys, strict=True))
    assert all(torch.equal(a, b[0]) for a, b in zip(found.values, values, strict=True))
    assert (found.num_positions, found.sink_tokens, found.bias) == (None, 0, None)
    assert found.details == {"format": "kvpress", "num_layer_slots": [6, 6]}


def test_safetensors_keep_the_order_of_ten_layers(tmp_path: Path) -> None:
    tensors = {f"{kind}_cache.{i}": torch.full((1, 1, 2, 1), float(i)) for kind in ("key", "value") for i in range(12)}
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors", metadata={"context_length": "2048", "press": "x"})
    found = read(tmp_path / "c.safetensors")
    assert [layer[0, 0, 0].item() for layer in found.keys] == list(range(12))
    assert found.num_positions == 2048 and found.details["press"] == "x"


def test_a_length_stated_beside_the_lists(tmp_path: Path) -> None:
    content: dict[str, Any] = {"key_cache": some(6), "value_cache": some(6)}
    assert read(saved(tmp_path, content | {"original_length": 77})).num_positions == 77
    for length, reason in ((0, "states {'context_length': 0}"), (12.5, "states"), ("x\ny", "states"), (5, "is 5: an")):
        assert reason in refusal(saved(tmp_path, content | {"context_length": length}))
    assert "states" in refusal(saved(tmp_path, content | {"context_length": 80, "original_length": 81}))


def test_layers_of_unequal_lengths_are_padded_with_hidden_slots(tmp_path: Path) -> None:
    layers = pairs(6, 4)
    found = read(saved(tmp_path, layers))
    assert found.bias is not None
    assert found.num_slots == 6 and found.details["num_layer_slots"] == [6, 4]
    query = torch.randn(HEADS, 3, SIZE)
    for index, (keys, values) in enumerate(layers):
        expected = attend(query, keys[0], values[0], torch.zeros(HEADS, keys.shape[2]))
        torch.testing.assert_close(attend(query, found.keys[index], found.values[index], found.bias[index]), expected)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"key_cache": some(6)}, "key_cache and value_cache are not two lists of as many tensors"),
        ({"key_cache": some(6), "value_cache": some(6)[:2]}, "not two lists of as many tensors"),
        ([*pairs(6), (torch.zeros(1, HEADS, 6, SIZE),)], "layer 1 is no pair"),
        ([*pairs(6), (None, None)], "key of layer 1 is of type NoneType"),
        ([(*pairs(6)[0], torch.tensor(128))], "layer 0 has a sliding window"),
        ([*pairs(6), (some(6)[0], some(5)[0])], "layer 1 has keys [2, 6, 4] and values [2, 5, 4]: heads and slots"),
        ([*pairs(6), (some(4)[0], some(6)[0])], "heads and slots must agree"),
        ([(some(6, size=3)[0], some(6)[0]), *pairs(6)], "layer 0 [2, 6, 3] and [2, 6, 4]: layers must agree"),
        ([*pairs(6), (some(6)[0] / 0, some(6)[0])], "keys of layer 1 hold NaN or infinity"),
    ],
)
def test_broken_pressed_caches(tmp_path: Path, content: Any, reason: str) -> None:
    assert reason in refusal(saved(tmp_path, content))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["key_cache.0", "value_cache.0", "bias.0"], "holds 'bias.0': tensors named key_cache.0, "),
        (["key_cache.0", "value_cache.0", "key_cache.2", "value_cache.2"], "key_cache is numbered [0, 2]"),
        (["key_cache.00", "value_cache.0"], "holds 'key_cache.00'"),
        (["key_cache.0"], "not two lists of as many tensors"),
        ([], "holds 'no tensor'"),
    ],
)
def test_broken_safetensors(tmp_path: Path, names: list[str], reason: str) -> None:
    path = tmp_path / "cache.safetensors"
    safetensors.torch.save_file({name: torch.ones(1, HEADS, 3, SIZE) for name in names}, path)
    assert reason in refusal(path)
    path.write_bytes(path.read_bytes()[:-1] if names else b"\x00" * 40)
    assert "is not a readable safetensors file" in refusal(path)


# -- which format --


def test_a_named_format_is_used_and_explains(tmp_path: Path) -> None:
    path = saved(tmp_path, hazy())
    assert read(path, "hazy").details["format"] == "hazy"
    assert "holds no list of (C1, beta, C2)" in refusal(path, "attention-matching")
    assert "key_cache and value_cache are not two lists" in refusal(path, "kvpress")
    assert "holds a list: a dict with trainable_keys" in refusal(saved(tmp_path, pairs(3)), "hazy")


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        read(tmp_path / "never looked at", "safetensor")
    assert str(caught.value) == f"unknown format 'safetensor': choose from {', '.join(sorted(['auto', *FORMATS]))}"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"weights": torch.ones(2), "line\nbreak": 1}, r"holds a dict with 'line\nbreak', 'weights', which is none of"),
        ({}, "holds a dict with no entries, which is none of"),
        ([], "holds a list, which is none of"),
        (torch.ones(2), "holds a Tensor, which is none of"),
        (hazy() | {"key_cache": [], "value_cache": []}, "which could be hazy or kvpress: say which"),
    ],
)
def test_unknown_content(tmp_path: Path, content: Any, found: str) -> None:
    message = refusal(saved(tmp_path, content))
    assert found in message
    assert "say which" in message or message.endswith("known formats: attention-matching, hazy, kvpress")


# -- files that are no data --


class Harmful:
    """Pickled as a call that leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("place", ["alone", "in an entry", "in a parameter list", "plain pickle"])
def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "ran"
    content: Any = Harmful(marker)
    if place == "in an entry":
        content = hazy() | {"note": content}
    elif place == "in a parameter list":
        content = hazy()
        content["trainable_keys"].note = Harmful(marker)
    path = tmp_path / "cache.pt"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    message = refusal(path)
    assert f"names '{os.name}.system', so that reading it could run code" in message
    assert not marker.exists()
    # the file is as harmful as it is meant to be
    if place == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_whole_cache_object_is_refused_by_name(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, DynamicCache(pairs(3))))
    assert "names 'transformers.cache_utils.DynamicCache', so that reading it could run code" in message


class Disguised:
    """Pickled as an OrderedDict {"layers": 7} with attributes named like its methods."""

    def __reduce__(self) -> Any:
        function = torch._utils._rebuild_parameter
        return OrderedDict, (), {"items": function, "keys": function, "get": function}, None, iter([("layers", 7)])


def test_attributes_do_not_stand_in_for_methods(tmp_path: Path) -> None:
    """A file may give its objects attributes that are functions; were they called, this would not read."""
    parameter: Any = nn.Parameter(torch.ones(1, HEADS, 5, SIZE))
    parameter.detach = parameter.numel = torch._utils._rebuild_parameter
    content = {"trainable_keys": [parameter], "trainable_values": some(5)[:1], "rest": Disguised()}
    found = read(saved(tmp_path, content))
    assert found.details["rest"] == {"layers": 7} and type(found.details["rest"]) is dict
    assert torch.equal(found.keys[0], torch.ones(HEADS, 5, SIZE))


def knot() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def fan() -> list[Any]:
    """Small in the file, 10^7 entries to whoever follows every reference."""
    level: list[Any] = [0] * 10
    for _ in range(6):
        level = [level] * 10
    return level


def odd_list(**state: Any) -> nn.ParameterList:
    """A parameter list whose file gives it other entries than its class would."""
    parameters = listed(some(2))
    parameters.__dict__.update(state)
    return parameters


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: odd_list(_parameters=None), "holds a torch.nn.ParameterList without parameters"),
        (lambda: odd_list(_parameters={"0": some(2)[0], "2": some(2)[0]}), "parameters are not named 0, 1, 2, …"),
        (lambda: {"tokens": {1, 2}}, "holds a set: tensors and plain containers"),
        (lambda: {(1, 2): 3}, "holds a dict whose names are neither strings nor integers"),
        (knot, "nests more than 16 containers"),
        (fan, "or has over 100000 entries"),
        (lambda: torch.zeros(1).expand(2**40), "describes tensors of more: save them as contiguous copies"),
        (lambda: torch.ones(3, 3).to_sparse(), "holds a tensor that is torch.sparse_coo on cpu"),
        (lambda: torch.ones(3, device="meta"), "holds a tensor that is torch.strided on meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "holds a tensor that is"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_no_cache_needs(tmp_path: Path, content: Any, reason: str) -> None:
    assert reason in refusal(saved(tmp_path, content()))


def test_plain_values_come_back_as_they_are(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, True, "x"], 3: (torch.bfloat16, torch.device("cuda:0"), torch.Size([2, 3]))}
    content["list"] = listed(some(2))
    loaded = load_plain(saved(tmp_path, content))
    tensors = loaded.pop("list")
    assert loaded == {"a": [1, 2.5, None, True, "x"], 3: ("torch.bfloat16", "cuda:0", (2, 3))}
    assert type(tensors) is list and [type(tensor) for tensor in tensors] == [Tensor] * LAYERS


def test_tensors_of_another_device_come_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = saved(tmp_path, hazy())
    assert b"cuda:0" in path.read_bytes()
    assert {layer.device.type for layer in read(path).keys} == {"cpu"}


@pytest.mark.parametrize("part", [0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, part: float) -> None:
    path = saved(tmp_path, hazy())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert "cannot be read as a file of torch.save: it is cut off" in refusal(path)


def test_what_is_no_file_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    assert "cannot be read: No such file" in refusal(path)
    path.write_bytes(b"")
    assert "has 0 bytes, 1 to max_bytes=" in refusal(path)
    path.write_text("key_cache = value_cache\n" * 20)
    assert "cannot be read as a file of torch.save: it is cut off" in refusal(path)
    assert "is not a regular file" in refusal(tmp_path)


def test_the_largest_size_is_the_callers(tmp_path: Path) -> None:
    path = saved(tmp_path, hazy())
    size = path.stat().st_size
    assert read(path, max_bytes=size).num_slots == 8
    assert f"has {size} bytes, 1 to max_bytes={size - 1} are allowed" in refusal(path, max_bytes=size - 1)
    tensors = {"key_cache.0": torch.ones(1, 1, 2, 2), "value_cache.0": torch.ones(1, 1, 2, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors")
    assert "max_bytes=10 are allowed" in refusal(tmp_path / "c.safetensors", max_bytes=10)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    content = {"trainable_keys": [torch.zeros(1, 1, 4096, 8)], "trainable_values": [torch.zeros(1, 1, 4096, 8)]}
    path = saved(tmp_path, content)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "files of torch.save are not compressed" in refusal(packed)


# -- Foreign by itself --


def test_what_a_caller_may_not_state() -> None:
    keys, values = tuple(torch.ones(2, HEADS, 3, SIZE)), tuple(torch.ones(2, HEADS, 3, SIZE))
    whole: dict[str, Any] = {
        "keys": keys,
        "values": values,
        "bias": None,
        "sink_tokens": 3,
        "num_positions": 3,
        "source": "here",
    }
    assert Foreign(**whole).num_slots == 3
    for change, reason in (
        ({"sink_tokens": 4}, "sink_tokens is 4: an integer from 0 to the 3 slots"),
        ({"sink_tokens": -1}, "sink_tokens is -1"),
        ({"sink_tokens": True}, "sink_tokens is True"),
        ({"num_positions": 2}, "num_positions is 2: an integer from the 3 slots on"),
        ({"keys": (), "values": ()}, "0 layers of keys, 0 of values"),
        ({"keys": tuple(torch.ones(2, HEADS, 3))}, "[heads, slots, size], each at least 1"),
        ({"keys": tuple(torch.ones(2, HEADS, 3, SIZE).long())}, "keys of layer 0 are torch.int64"),
        ({"bias": (torch.zeros(HEADS, 3),)}, "1 layers of bias, 2 of keys"),
    ):
        with pytest.raises(AccelError) as caught:
            Foreign(**whole | change)
        assert str(caught.value).startswith("here: ") and reason in str(caught.value)
