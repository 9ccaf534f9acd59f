"""A byte-level tokenizer over every byte, and a chat template for it."""

import pytest

from tests import byte_tokenizer as bytes_as_tokens

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture
def byte_tokenizer():
    """PreTrainedTokenizerFast: ids 0 to 3 special, then one token for each of the 256 bytes."""
    return bytes_as_tokens.byte_tokenizer()
