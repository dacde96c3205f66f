"""How a row's token is chosen: the numbers a user sets, checked once and laid out as one table for every step.

Knows no logits. A table is made once for a batch and device, so that a step of decoding sets nothing up again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

# the columns of the table; 1 in GREEDY takes the argmax of the penalised logits
SCALE, GREEDY, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(8)


@dataclass(frozen=True, eq=False)
class Settings:
    """Each one a number for all rows or a tensor [R] with one for each row; what is left out changes nothing.

    ``temperature`` ≥ 0: 0 takes the argmax, and then only penalties count, as with transformers' do_sample=False.
    ``top_k`` ≥ 0: keep the k largest and what equals the k-th; 0 keeps all. ``top_p`` in [0, 1]: keep a token while
    those strictly above it have less than this share. ``min_p`` in [0, 1]: keep what has at least this share of the
    most likely token's probability. ``repetition_penalty`` > 0 (CTRL: divides positive logits, multiplies negative
    ones), ``presence_penalty`` and ``frequency_penalty`` (OpenAI's) hold for tokens that occurred.
    """

    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    repetition_penalty: float | Tensor = 1.0
    presence_penalty: float | Tensor = 0.0
    frequency_penalty: float | Tensor = 0.0
    _tables: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        allowed = {
            "temperature": ("≥ 0", lambda x: x >= 0),
            "top_k": ("≥ 0", lambda x: x >= 0),
            "top_p": ("in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
            "min_p": ("in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
            "repetition_penalty": ("> 0", lambda x: x > 0),
        }
        for name, (range_, holds) in allowed.items():
            value = getattr(self, name)
            # a tensor on a GPU is taken at its word: a look at it would wait for the device
            if not (isinstance(value, Tensor) and value.is_cuda) and not bool(torch.as_tensor(holds(value)).all()):
                raise ValueError(f"{name}={value}: must be {range_}")

    def _changes(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, Tensor) or value != type(self).__dataclass_fields__[name].default

    @property
    def truncates(self) -> bool:
        """Whether some row may have tokens cut off; tensors may, whatever they hold."""
        return not self.greedy and any(self._changes(name) for name in ("top_k", "top_p", "min_p"))

    @property
    def penalises(self) -> bool:
        """Whether some row's logits may depend on what occurred before."""
        return any(self._changes(f"{name}_penalty") for name in ("repetition", "presence", "frequency"))

    @property
    def greedy(self) -> bool:
        """Whether all rows take the argmax, so that no randomness is asked for."""
        return not isinstance(self.temperature, Tensor) and self.temperature == 0

    def table(self, R: int, device: torch.device) -> Tensor:
        """fp32 [R, 8] on ``device``; the same tensor every time. Settings given as tensors are read once."""
        made = self._tables.get((R, device))
        if made is None:
            columns = [getattr(self, f.name) for f in fields(self) if f.init]
            for f, value in zip(fields(self), columns, strict=False):
                if isinstance(value, Tensor) and value.shape != (R,):
                    raise ValueError(f"{f.name} has shape {list(value.shape)}: give a number or a tensor [R] = [{R}]")
            temperature, *others = (torch.as_tensor(c, device=device).float().expand(R) for c in columns)
            greedy = temperature == 0
            # a temperature so small that its inverse overflows: 0 · scale must stay 0 for the most likely token
            scale = torch.where(greedy, 1.0, 1 / temperature).clamp(max=torch.finfo(torch.float32).max)
            made = self._tables[R, device] = torch.stack([scale, greedy.float(), *others], 1)
        return made
