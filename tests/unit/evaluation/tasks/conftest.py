"""A byte-level tokenizer over every byte."""

import pytest

from tests import byte_tokenizer as bytes_as_tokens


@pytest.fixture
def byte_tokenizer():
    """PreTrainedTokenizerFast: ids 0 to 3 special, then one token for each of the 256 bytes."""
    return bytes_as_tokens.byte_tokenizer()
