"""A name, folder or hub id → a transformers model and its tokenizer, on a device and in a type.

The only place that asks transformers to load something. Never runs code that comes with a checkpoint.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from accel.errors import ModelError, OptionError
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
_HUB_TIMEOUT_SECONDS = 10.0


def load_model(
    name_or_path: str | os.PathLike[str], *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None). An alias is looked up first, then a folder, then the hub.

    ``device`` "auto" is cuda where there is one, else cpu. ``dtype`` "auto" is float32 on a CPU and the checkpoint's
    own elsewhere. A hub model that is already on this machine is used as it is, without asking for a newer one.
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    name = os.fspath(name_or_path)
    if name in ALIASES:
        return _load(str(local_folder(name)), place, precision, local_only=True)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _load(str(folder), place, precision, local_only=True)
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
    from transformers import AutoModelForCausalLM

    try:
        with progress_only_on_terminal():
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype or "auto", trust_remote_code=False, local_files_only=local_only
            )
            tokenizer = _load_tokenizer(name, local_only)
        return model.to(device).eval(), tokenizer
    except Exception as error:  # whatever the many libraries below raise for a bad file, the user gets one line
        raise ModelError(f"cannot load the model {name!r}: {_first_line(error)}; {_choices()}") from error


def _load_tokenizer(name: str, local_only: bool) -> Any:
    """None only where the checkpoint brings no tokenizer at all; a broken one is an error."""
    from transformers import AutoTokenizer

    if not any(_has_file(name, file, local_only) for file in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)


def _has_file(name: str, file: str, local_only: bool) -> bool:
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return Path(name, file).is_file()
    try:
        return cached_file(name, file, local_files_only=local_only) is not None
    except OSError:
        return False


def _ask_hub(name: str) -> None:
    """One short question before transformers' own attempt, which without a network retries for minutes."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the HTTP library below differs between versions, and so do its exceptions
        raise ModelError(
            f"no model {name!r}: not a folder, not on this machine, and the hub says: {_first_line(error)}; "
            f"{_choices()}"
        ) from error


def _choices() -> str:
    return f"give a folder, a hub id, or one of the known names: {', '.join(sorted(ALIASES))}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
