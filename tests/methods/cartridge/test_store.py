"""The cartridges a model holds: names, references, a byte budget, and reading again what changed on disk."""

from __future__ import annotations

import threading

import pytest
import torch

from accel.errors import AccelError, ArtifactError, OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.methods.cartridge.store import CartridgeStore


@pytest.fixture
def made(tiny, tmp_path):
    """Three artifacts of one size for one model: folders by name, bytes of one, and how they are read."""
    model, _ = tiny.pair("llama")
    folders = {}
    for index, name in enumerate(("a", "b", "c")):
        ids = torch.randint(3, 67, (20,), generator=torch.Generator().manual_seed(index)).tolist()
        cartridge = Cartridge.of(name, document.read(model, ids), model, method="whole", exact=True)
        folders[name] = cartridge.save(tmp_path / name).path
    return folders, cartridge.nbytes(), lambda artifact: Cartridge.load(artifact, model)


def test_what_is_added_is_used_in_the_order_asked_and_gone_when_removed(made):
    folders, _, load = made
    store = CartridgeStore(load)
    assert [store.add(folders[name]) for name in "abc"] == ["a", "b", "c"]
    assert store.add(folders["a"]) == "a", "the same one again changes nothing"
    with store.use(["c", "a"]) as held:
        assert [each.name for each in held] == ["c", "a"]
    store.remove("b")
    assert store.names() == ["a", "c"]
    with pytest.raises(OptionError, match=r"unknown cartridge 'b'.*a, c"), store.use(["b"]):
        pass
    with pytest.raises(OptionError, match="unknown cartridge 'b'"):
        store.remove("b")


def test_another_cartridge_under_a_taken_name_is_refused(made):
    folders, _, load = made
    store = CartridgeStore(load)
    store.add(folders["a"])
    with pytest.raises(OptionError, match="'a' is there already"):
        store.add(folders["b"], name="a")


def test_the_least_recently_used_leaves_first_and_comes_back_when_asked(made):
    folders, size, load = made
    store = CartridgeStore(load, max_bytes=2 * size)
    store.add(folders["a"])
    store.add(folders["b"])
    with store.use(["a"]):
        pass
    store.add(folders["c"])
    assert [row["resident"] for row in store.report()] == [True, False, True]
    assert store.nbytes() == 2 * size
    with store.use(["b"]) as (again,):
        assert again.num_tokens == 20
        assert store.nbytes() == 2 * size
    assert [row["resident"] for row in store.report()] == [False, True, True]


def test_what_is_in_use_never_leaves(made):
    folders, size, load = made
    store = CartridgeStore(load, max_bytes=2 * size)
    store.add(folders["a"])
    store.add(folders["b"])
    with store.use(["a", "b"]) as held:
        with pytest.raises(AccelError, match=f"takes {size} bytes: {2 * size} of the {2 * size} allowed are in use"):
            store.add(folders["c"])
        assert [each.name for each in held] == ["a", "b"]
    assert store.add(folders["c"]) == "c"


def test_removing_what_is_in_use_frees_it_when_the_last_user_leaves(made):
    folders, size, load = made
    store = CartridgeStore(load)
    store.add(folders["a"])
    with store.use(["a"]):
        with store.use(["a"]):
            store.remove("a")
            assert store.names() == [] and store.nbytes() == size
        assert store.nbytes() == size
    assert store.nbytes() == 0


def test_a_live_cartridge_stays_whatever_the_budget(made, tiny):
    folders, size, load = made
    model, _ = tiny.pair("llama")
    live = Cartridge.of("live", document.read(model, list(range(3, 23))), model, method="whole")
    store = CartridgeStore(load, max_bytes=size)
    store.add(live)
    with pytest.raises(AccelError, match="allowed are in use"):
        store.add(folders["a"])
    with store.use(["live"]) as (held,):
        assert held is live


def test_what_changed_on_disk_is_not_read_again(made):
    folders, size, load = made
    store = CartridgeStore(load, max_bytes=size)
    store.add(folders["a"])
    store.add(folders["b"])  # a leaves
    manifest = folders["a"] / "accel.json"
    manifest.write_text(manifest.read_text().replace('"whole"', '"other"'))
    with pytest.raises(ArtifactError, match="changed since it was added"), store.use(["a"]):
        pass
    assert [row["users"] for row in store.report()] == [0, 0]


def test_a_broken_file_is_not_read_again(made):
    folders, size, load = made
    store = CartridgeStore(load, max_bytes=size)
    store.add(folders["a"])
    store.add(folders["b"])
    weights = folders["a"] / "cartridge.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(ArtifactError, match="sha256"), store.use(["a"]):
        pass


def test_threads_share_what_is_loaded_once(made):
    folders, size, load = made
    loads = []
    store = CartridgeStore(lambda artifact: loads.append(artifact.path.name) or load(artifact), max_bytes=size)
    store.add(folders["a"])
    seen, go = [], threading.Barrier(4)

    def work():
        go.wait()
        for _ in range(20):
            with store.use(["a"]) as (held,):
                seen.append(held)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert len(seen) == 80 and len(set(map(id, seen))) == 1 and loads == ["a"]
    assert store.report()[0]["users"] == 0


def test_a_budget_of_nothing_is_refused(made):
    with pytest.raises(OptionError, match="cartridge_max_bytes=0"):
        CartridgeStore(made[2], max_bytes=0)
