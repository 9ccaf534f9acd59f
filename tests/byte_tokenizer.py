"""A tokenizer whose tokens are bytes, so that a tiny model can say anything: half characters, too."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<bos>", "<eos>", "<user>", "<answer>"]
VOCAB_SIZE = len(SPECIAL) + 256
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 3 special, then one token for each of the 256 bytes; no chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
