"""Tokens to text, piece by piece, without splitting a character."""

from collections.abc import Callable

UNFINISHED = "�"  # what a tokenizer puts for bytes that are not (yet) a character
MAX_TOKENS = 32  # looked at together
MAX_CONTEXT = 8  # of tokens without an end in sight, kept; a character has four bytes
MAX_PENDING = 3  # bytes of a character without its last


class Detokenizer:
    """Pieces of text that join to `decode` of all tokens. A piece comes as soon as no later token can change it.

        tokens   …|---- context ----|---- new ----|        decoded together: what a token reads as depends on
        text     …|---- given -----------|--- unfinished?  the one before it, but not on those before that

    So a token costs two short calls of `decode`, however long the text is. Bytes that never become a character are
    given out as such after 32 tokens; a tokenizer that decodes runs of bytes together may find another number of them
    in all tokens at once.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, skipped: frozenset[int] = frozenset()) -> None:
        """skipped: tokens that `decode` leaves out."""
        self._decode = decode
        self._skipped = skipped
        self._tokens: list[int] = []
        self._num_context = 0
        self._text = ""  # of `_tokens`
        self._num_given = 0  # characters of `_text`

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; often empty."""
        if token_id in self._skipped:
            return ""
        self._tokens.append(token_id)
        text = self._decode(self._tokens)
        before, self._text = self._text, text
        certain = text.rstrip(UNFINISHED)
        if len(certain) == len(text):
            if text == before:  # a token without text; it may still decide how the next one reads
                del self._tokens[MAX_TOKENS:]
                return ""
            return self._give(len(text), keep=len(self._tokens) - self._num_context)
        if len(self._tokens) > MAX_TOKENS:
            return self._give(max(len(certain), len(text) - MAX_PENDING), keep=MAX_CONTEXT)
        return self._take(len(certain))

    def flush(self) -> str:
        """What is left when no token follows."""
        return self._take(len(self._text))

    def _take(self, end: int) -> str:
        piece = self._text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def _give(self, end: int, *, keep: int) -> str:
        """The text up to a character; the last `keep` tokens become the context of what follows."""
        piece, num_pending = self._take(end), len(self._text) - end
        self._tokens = self._tokens[-keep:]
        self._num_context = len(self._tokens)
        self._text = self._decode(self._tokens)
        self._num_given = len(self._text) - num_pending
        return piece
