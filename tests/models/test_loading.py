"""Loading a tiny model from a folder or alias, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accel.artifacts import Manifest, describe_base, save, saved_files
from accel.errors import ArtifactError, ModelError, OptionError
from accel.models import loading
from accel.models.aliases import DEFAULT_MODEL
from accel.models.loading import load_model, resolve_device, resolve_dtype


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).train().save_pretrained(folder)
    return folder


@pytest.fixture
def with_tokenizer(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "with_tokenizer"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches the network, whatever the machine can do."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert DEFAULT_MODEL in message
    return message


def test_folder_without_a_tokenizer(checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint, device="cpu")
    assert tokenizer is None
    assert not model.training
    # the checkpoint is bfloat16; a CPU gets float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_folder_with_a_tokenizer(with_tokenizer: Path) -> None:
    model, tokenizer = load_model(str(with_tokenizer), device="cpu", dtype="bf16")
    assert tokenizer("a")["input_ids"] == [1]
    assert model.dtype is torch.bfloat16


def test_a_broken_tokenizer_is_an_error_and_not_none(with_tokenizer: Path) -> None:
    (with_tokenizer / "tokenizer.json").write_text("{")
    assert str(with_tokenizer) in refusal(str(with_tokenizer))


def test_the_checkpoints_own_type_off_the_cpu(checkpoint: Path) -> None:
    model, _ = loading._load(str(checkpoint), torch.device("cpu"), None, local_only=True)
    assert model.dtype is torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda")) is None


def test_alias(with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(loading, "local_folder", lambda name: asked.append(name) or with_tokenizer)
    model, tokenizer = load_model(DEFAULT_MODEL, device="cpu")
    assert asked == [DEFAULT_MODEL]
    assert model.config.hidden_size == 8
    assert tokenizer is not None


def test_an_artifact_that_is_a_whole_model(
    with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCEL_ARTIFACTS", str(tmp_path))
    base = describe_base(LlamaConfig(vocab_size=8), name="tiny")
    made = save(tmp_path / "tiny", Manifest(kind="model", base=base), *saved_files(with_tokenizer))
    model, tokenizer = load_model("tiny", device="cpu")
    assert model.config.hidden_size == 8 and tokenizer("a")["input_ids"] == [1]
    (made.path / "stray.txt").touch()
    with pytest.raises(ArtifactError, match="stray"):
        load_model("tiny", device="cpu")


def test_an_artifact_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_ARTIFACTS", str(tmp_path))
    save(tmp_path / "part", Manifest(kind="draft", base=describe_base(LlamaConfig(vocab_size=8), name="tiny")), {})
    assert "part is a draft artifact" in refusal("part")


def test_no_bars_in_a_log(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(checkpoint, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "%" not in captured.err


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "", "a/b/c", "../x", "name with spaces"])
def test_what_can_be_no_model(name: str) -> None:
    assert f"no model {name!r}" in refusal(name)


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "smollm2-135m-instruc"])
def test_a_hub_id_offline_is_refused_at_once(name: str) -> None:
    message = refusal(name)
    assert f"no model {name!r}: not a folder, not on this machine, and the hub says" in message


def test_a_hub_id_is_fetched_only_after_the_local_look(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    calls: list[object] = []

    def load(name: str, *_: object, local_only: bool) -> tuple[str, None]:
        calls.append(local_only)
        if local_only:
            raise ModelError("absent") from OSError("absent")
        return "model", None

    class Hub:
        def model_info(self, name: str, timeout: float) -> None:
            calls.append(name)

    monkeypatch.setattr(loading, "_load", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert load_model("maker/model", device="cpu") == ("model", None)
    assert calls == [True, "maker/model", False]


def test_broken_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refusal(str(empty))

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in checkpoint.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    torn = copy("torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    refusal(str(torn.parent))
    unknown = copy("unknown") / "config.json"
    unknown.write_text(json.dumps({"model_type": "nobodys", "architectures": ["NobodysModel"]}))
    refusal(str(unknown.parent))


def test_code_of_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    raw = json.loads((checkpoint / "config.json").read_text())
    raw |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refusal(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("float32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("auto", torch.float32),
    ],
)
def test_types(given: str | torch.dtype, expected: torch.dtype) -> None:
    assert resolve_dtype(given, torch.device("cpu")) is expected


@pytest.mark.parametrize("given", ["int8", "bfloat", "", torch.int64, 32, None])
def test_unknown_types(given: object) -> None:
    with pytest.raises(OptionError, match=r"^dtype='.*': choose from auto, float32") as caught:
        resolve_dtype(given, torch.device("cpu"))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    assert resolve_device(torch.device("cpu")).type == "cpu"
    for given in ("cuda", "cuda:1", "gpu", "", "meta", "cpu:x", "xla", None):
        with pytest.raises(OptionError) as caught:
            resolve_device(given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:0").index == 0
    with pytest.raises(OptionError, match="this machine has 1 usable cuda device"):
        resolve_device("cuda:1")
