"""How many samples a data set has and how long they are, without encoding all of a large one."""

from __future__ import annotations

from collections.abc import Sequence

from spin.core.errors import DataError
from spin.data.messages import ChatMessage
from spin.data.read import encode_all
from spin.data.survey import MOST_ENCODED
from spin.data.tokenizer import Encoded, PromptTokenizer, value_of

_EVERY = 31  # a prime number, because rows may take turns


class LengthTokenizer:
    """Takes a tokenizer's place where a data set is read for its size and lengths.

    Behind the first 2,000 conversations it encodes every 31st, which stands for those up to the next.

    Args:
        tokenizer (PromptTokenizer | None): None gives every prompt and every response one token.

    Attributes:
        max_seq_len (int | None): the tokenizer's.
        encoded (int): conversations that were encoded.
        is_sampled (bool): others were not.
    """

    def __init__(self, tokenizer: PromptTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.max_seq_len = None if tokenizer is None else tokenizer.max_seq_len
        self.encoded, self.is_sampled = 0, False

    def encode_pair(self, messages: Sequence[ChatMessage]) -> Encoded:
        return value_of(self.encode_pairs([list(messages)])[0])

    def encode_pairs(self, conversations: Sequence[list[ChatMessage]]) -> list[Encoded | DataError]:
        """As :meth:`spin.data.ChatTokenizer.encode_pairs`."""
        if self._tokenizer is None:
            return [([0], [0])] * len(conversations)
        step = 1 if self.encoded < MOST_ENCODED else _EVERY
        found = encode_all(self._tokenizer, conversations[::step])
        self.encoded += len(found)
        self.is_sampled |= len(found) < len(conversations)
        return [found[index // step] for index in range(len(conversations))]
