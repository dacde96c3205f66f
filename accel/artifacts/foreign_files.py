"""Reads files that other projects wrote, without running anything in them: ``torch.save``'s and safetensors.

torch's restricted unpickler does the reading, with one class more than it allows by itself; what it returns is turned
into plain containers here, and no method of a loaded object is ever called. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import re
import stat
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter, ParameterList
from torch.serialization import safe_globals

from accel.errors import ArtifactError

MAX_BYTES = 16 * 2**30
# Parameter and OrderedDict, which such files name too, are on torch's own list
ALLOWED: list[Any] = [ParameterList]
# a few hundred layers of a few tensors; containers that refer to each other again and again have more than any cache
_MAX_NODES = 100_000
_MAX_DEPTH = 16

_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def load_plain(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """What ``path`` holds: dicts, lists, tuples, strings, numbers, None and detached tensors on the CPU."""
    path = Path(path)
    size = regular_file(path, max_bytes)
    try:
        _refuse_compressed(path, size)
        # an open file, because torch picks other readers by the name; broken bytes also cause warnings
        with open(path, "rb") as file, safe_globals(ALLOWED), warnings.catch_warnings(action="ignore"):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except ArtifactError:
        raise
    except Exception as error:  # the unpickler raises whatever broken bytes lead it to
        raise ArtifactError(f"{path}: {_why_not(error)}") from error
    return _Plain(path, size).convert(loaded)


def read_safetensors(path: str | Path, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and the file's metadata."""
    path = Path(path)
    regular_file(path, max_bytes)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(f"{path}: is not a readable safetensors file: {reason}") from error


def regular_file(path: Path, max_bytes: int) -> int:
    """The size of ``path``; refused unless it is a file of 1 to ``max_bytes`` bytes."""
    try:
        info = path.stat()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(info.st_mode):
        raise ArtifactError(f"{path}: is not a regular file")
    if not 0 < info.st_size <= max_bytes:
        raise ArtifactError(f"{path}: has {info.st_size} bytes, 1 to max_bytes={max_bytes} are allowed")
    return info.st_size


def _refuse_compressed(path: Path, size: int) -> None:
    """A small file may not unpack to a large one; torch.save never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise ArtifactError(
            f"{path}: has {size} bytes that unpack to {unpacked}: files of torch.save are not compressed"
        )


def _why_not(error: Exception) -> str:
    # torch's own words would advise the reader to load the file without restrictions
    if found := _REFUSED_GLOBAL.search(str(error)):
        return (
            f"names {found[1][:100]!r}, so that reading it could run code: tensors in lists, tuples, dicts and "
            "torch.nn.ParameterList are allowed; save those instead"
        )
    return "cannot be read as a file of torch.save: it is cut off, damaged, or of another kind"


class _Plain:
    """Turns what one file holds into plain containers; refuses what is none, or more than the file can hold."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.nodes = 0
        self.tensor_bytes = 0

    def convert(self, value: Any, depth: int = 0) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise self._refusal(f"nests more than {_MAX_DEPTH} containers or has over {_MAX_NODES} entries")
        kind = type(value)
        # exact types: a subclass could bring methods of its own
        if value is None or kind in (bool, int, float, str):
            return value
        if kind in (dict, OrderedDict):
            return self._dict(value, depth)
        if kind in (list, tuple, torch.Size):
            items = [self.convert(item, depth + 1) for item in value]
            return items if kind is list else tuple(items)
        if kind is ParameterList:
            return self._parameter_list(value, depth)
        if kind in (Tensor, Parameter):
            return self._tensor(value)
        if kind in (torch.dtype, torch.device):
            return str(value)
        raise self._refusal(f"holds a {kind.__name__}: tensors and plain containers are allowed")

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[Any, Any]:
        # dict.items, not value.items: a file can give an OrderedDict attributes that hide its methods
        items = dict.items(value)
        if any(type(name) not in (str, int) for name, _ in items):
            raise self._refusal("holds a dict whose names are neither strings nor integers")
        return {name: self.convert(item, depth + 1) for name, item in items}

    def _parameter_list(self, value: ParameterList, depth: int) -> list[Any]:
        parameters: Any = vars(value).get("_parameters")
        if type(parameters) not in (dict, OrderedDict):
            raise self._refusal("holds a torch.nn.ParameterList without parameters")
        named = self._dict(parameters, depth)
        if set(named) != {str(index) for index in range(len(named))}:
            raise self._refusal("holds a torch.nn.ParameterList whose parameters are not named 0, 1, 2, …")
        return [named[str(index)] for index in range(len(named))]

    def _tensor(self, value: Tensor) -> Tensor:
        tensor = torch.Tensor.detach(value)
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise self._refusal(f"holds a tensor that is {tensor.layout} on {tensor.device}: dense tensors are allowed")
        self.tensor_bytes += tensor.numel() * tensor.element_size()
        # strides of 0 and sizes beyond the storage make a large tensor out of a small file
        if self.tensor_bytes > self.size:
            raise self._refusal(f"has {self.size} bytes but describes tensors of more: save them as contiguous copies")
        return tensor

    def _refusal(self, text: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: {text}")
