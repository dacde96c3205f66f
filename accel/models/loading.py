"""A name, folder, artifact or hub id → a transformers model and its tokenizer, on a device and in a type.

The only place that asks transformers to load something. Never runs code that comes with a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel.artifacts import find_artifact, open_artifact
from accel.errors import AccelError, ModelError, OptionError, first_line
from accel.models.aliases import ALIASES, local_folder, progress_only_on_terminal

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
    "fp64": torch.float64,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
# any of these means that a checkpoint brings a tokenizer
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
# kinds of artifacts that are a folder of transformers
WHOLE = ("dparallel", "model")
# a LoRA adapter as PEFT saves it
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_HUB_TIMEOUT_SECONDS = 10.0


def load_model(
    name_or_path: str | os.PathLike[str], *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None). An alias is looked up first, then a folder, then an artifact
    that is a whole model (its kind is ``model`` or ``dparallel``), then the hub.

    ``device`` "auto" is cuda where there is one, else cpu. ``dtype`` "auto" is float32 on a CPU and the checkpoint's
    own elsewhere. A hub model that is already on this machine is used as it is, without asking for a newer one.
    A folder with a LoRA adapter alone is the base model that it names, with the adapter merged. Masked-diffusion
    models come with their facts (``accel.models.diffusion.facts_of``).
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    name = os.fspath(name_or_path)
    if name in ALIASES:
        return _load(str(local_folder(name)), place, precision, local_only=True)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _load(str(folder), place, precision, local_only=True)
    if (found := find_artifact(name)) is not None:
        artifact = open_artifact(found)
        if artifact.kind not in WHOLE:
            raise ModelError(f"{name} is a {artifact.kind} artifact and no model: give it with a model, {_choices()}")
        return _load(str(artifact.path), place, precision, local_only=True)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"no model {name!r}: there is no such folder; {_choices()}")
    try:
        return _load(name, place, precision, local_only=True)
    except ModelError as error:
        # only an absent file is worth asking for; a checkpoint that is here and does not load stays that way
        if not isinstance(error.__cause__, OSError):
            raise
        _ask_hub(name)
        return _load(name, place, precision, local_only=False)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by the user's word, checked to exist here."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={device!r}: choose auto, cpu, cuda, cuda:N or mps") from error
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise OptionError(f"device={str(place)!r}: this machine has {count} usable cuda devices; use cpu or auto")
    elif place.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError("device='mps': not available on this machine; use cpu or auto")
    elif place.type not in ("cpu", "mps"):
        raise OptionError(f"device={str(place)!r}: choose auto, cpu, cuda, cuda:N or mps")
    return place


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The type to load in, or None for the checkpoint's own."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise OptionError(f"dtype={str(dtype)!r}: choose from auto, {', '.join(DTYPES)}")


def _load(name: str, device: torch.device, dtype: torch.dtype | None, *, local_only: bool) -> tuple[Any, Any]:
    try:
        with progress_only_on_terminal():
            raw = _read_json(name, "config.json", local_only)
            if raw is None and _file(name, _ADAPTER[0], local_only) is not None:
                return _load_adapted(name, device, dtype, local_only)
            model, kind = _load_weights(name, raw or {}, dtype, local_only)
            tokenizer = _load_tokenizer(name, local_only, kind)
        return model.to(device).eval(), tokenizer
    except AccelError:
        # one line already, and no other model's name would help
        raise
    except Exception as error:  # whatever the many libraries below raise for a bad file, the user gets one line
        raise ModelError(f"cannot load the model {name!r}: {first_line(error)}; {_choices()}") from error


def _load_weights(
    name: str, raw: dict[str, Any], dtype: torch.dtype | None, local_only: bool
) -> tuple[Any, str | None]:
    """The model on the CPU, and the class of its tokenizer where the checkpoint cannot be asked for it."""
    from transformers import AutoModelForCausalLM

    from accel.models.diffusion import facts_of, published

    family = published.family_of(raw)
    if family is not None:
        find = partial(_file, name, local_only=local_only)
        return published.load_published(raw, family, find, name, dtype), family.tokenizer
    if published.is_masked_lm_config(raw):
        return published.load_masked_lm(raw, name, dtype, local_only), None
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype or "auto", trust_remote_code=False, local_files_only=local_only
    )
    # facts that cannot be true of the model are refused here, not when it first decodes
    facts_of(model)
    return model, None


def _load_adapted(name: str, device: torch.device, dtype: torch.dtype | None, local_only: bool) -> tuple[Any, Any]:
    """A folder with a LoRA adapter alone: the base model that it names, with the adapter merged into it."""
    from accel.models.diffusion.lora import merge_lora, read_adapter_config

    config, weights = (_file(name, file, local_only) for file in _ADAPTER)
    assert config is not None
    if weights is None:
        raise FileNotFoundError(f"{_ADAPTER[0]} without {_ADAPTER[1]}: weights are read from safetensors only")
    base = read_adapter_config(config).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{config}: base_model_name_or_path is {base!r}: write the base model's folder or id there")
    if Path(base).is_dir() and not Path(base, "config.json").is_file():
        raise ModelError(f"{config}: the base model {base!r} is no folder of a model: merge adapters one by one")
    model, tokenizer = load_model(base, device=device, dtype=dtype or "auto")
    merge_lora(model, config, weights)
    own = _load_tokenizer(name, local_only)
    return model, tokenizer if own is None else own


def _load_tokenizer(name: str, local_only: bool, kind: str | None = None) -> Any:
    """None only where the checkpoint brings no tokenizer at all; a broken one is an error. ``kind``: its class."""
    import transformers

    if all(_file(name, file, local_only) is None for file in _TOKENIZER_FILES):
        return None
    cls = getattr(transformers, kind or "AutoTokenizer")
    return cls.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)


def _file(name: str, file: str, local_only: bool) -> Path | None:
    """A file of a folder, of the hub's cache, or (not ``local_only``) of the hub; None where there is none."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        found = cached_file(name, file, local_files_only=local_only)
    except OSError:
        return None
    return None if found is None else Path(found)


def _read_json(name: str, file: str, local_only: bool) -> dict[str, Any] | None:
    path = _file(name, file, local_only)
    if path is None:
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    return raw if isinstance(raw, dict) else {}


def _ask_hub(name: str) -> None:
    """One short question before transformers' own attempt, which without a network retries for minutes."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the HTTP library below differs between versions, and so do its exceptions
        raise ModelError(
            f"no model {name!r}: not a folder, not on this machine, and the hub says: {first_line(error)}; {_choices()}"
        ) from error


def _choices() -> str:
    return f"give a folder, a hub id, or one of the known names: {', '.join(sorted(ALIASES))}"
