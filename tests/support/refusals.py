"""What a refusal is: an error of ours in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from accel.errors import AccelError


def refusal(call: Callable[[], object]) -> str:
    """The message of the AccelError that ``call`` raises; it must be one line."""
    with pytest.raises(AccelError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 300
    return message
