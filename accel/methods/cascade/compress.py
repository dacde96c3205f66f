"""Observations made shorter by LLMLingua-2 (arXiv 2403.12968): a small model marks the words that may go.

Needs the package ``llmlingua`` and a folder with its model; knows texts, and nothing of demonstrations or prompts.
"""

from __future__ import annotations

import functools
import importlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from accel.errors import AccelError, ModelError, OptionError, first_line
from accel.models.aliases import progress_only_on_terminal

# what llmlingua looks for in a model's name before it knows how its tokens make words, by the kind of model
NAMES = {"bert": "bert-base-multilingual-cased", "xlm-roberta": "xlm-roberta-large"}
# texts whose short ones are kept: a demonstration is shown again and again
REMEMBERED = 4096


class Compressor:
    """A ``Shorten`` (see ``prompt``): keeps about the share ``rate`` of a text's tokens, digits and line ends always.

    ``folder``: a token classifier of LLMLingua-2 in safetensors, on this machine. Texts of fewer than ``least``
    characters stay as they are, and so does one without a word that the model knows. One text at a time; others wait.

    llmlingua counts tokens with tiktoken, which fetches its table from the network when it is made for the first time,
    without a limit, and then keeps it in ``TIKTOKEN_CACHE_DIR``: with that folder filled nothing is fetched.
    """

    def __init__(self, folder: str | Path, *, rate: float = 0.5, least: int = 200, device: str = "cpu") -> None:
        if type(rate) not in (int, float) or not 0 < rate <= 1:
            raise OptionError(f"rate={rate!r}: the share of the tokens to keep, above 0 and at most 1")
        if type(least) is not int or least < 0:
            raise OptionError(f"least={least!r}: characters of a text that is worth shortening, a whole number ≥ 0")
        self.rate, self.least = rate, least
        self._compressor = _loaded(Path(folder), device)
        self._lock = threading.Lock()
        self._shortened = functools.lru_cache(REMEMBERED)(self._shorten)

    def __call__(self, text: str) -> str:
        """The text with fewer words; the same for the same text, which is read once."""
        if len(text) < self.least or not text.strip():
            return text
        with self._lock:
            return self._shortened(text)

    def _shorten(self, text: str) -> str:
        try:
            made = self._compressor.compress_prompt(
                text, rate=self.rate, force_tokens=["\n"], force_reserve_digit=True
            )["compressed_prompt"]
        except IndexError:  # of a text in which it knows no word
            return text
        except Exception as error:  # whatever else the library below raises
            raise AccelError(f"llmlingua cannot shorten {text[:40]!r}: {first_line(error)}") from error
        return str(made) if str(made).strip() else text


def _loaded(folder: Path, device: str) -> Any:
    """llmlingua's ``PromptCompressor`` over the folder, and nothing of it from a hub."""
    try:
        # by name: the package is an extra, and its import is slow
        llmlingua = importlib.import_module("llmlingua")
    except ImportError as error:
        raise OptionError(
            f"shortening demonstrations needs llmlingua ({first_line(error)}): pip install accel-runtime[compress]"
        ) from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} is no folder of an LLMLingua-2 model: it needs config.json and *.safetensors")
    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        kind = AutoConfig.from_pretrained(folder, **safe).model_type
        if kind not in NAMES:
            raise ModelError(f"{folder} is a {kind}: llmlingua knows {' and '.join(NAMES)}")
        with _generators_kept(), progress_only_on_terminal():
            made = llmlingua.PromptCompressor(
                model_name=str(folder), device_map=device, use_llmlingua2=True, model_config=dict(safe)
            )
    except ModelError:
        raise
    except Exception as error:  # whatever the libraries below raise
        raise ModelError(
            f"llmlingua cannot load {folder}: {first_line(error)}; where tiktoken has no network, TIKTOKEN_CACHE_DIR "
            "must name a folder with its cl100k_base table"
        ) from error
    # a folder may be called anything
    made.model_name = NAMES[kind]
    return made


@contextmanager
def _generators_kept() -> Iterator[None]:
    """llmlingua seeds every generator there is; samples drawn elsewhere are not to be the same because of it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is the global one that is seeded
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
