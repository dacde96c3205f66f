"""A tokenizer of bytes for prompts that tests write."""

from __future__ import annotations

import pytest
from byte_tokenizer import byte_tokenizer


@pytest.fixture
def bytewise():
    return byte_tokenizer()
