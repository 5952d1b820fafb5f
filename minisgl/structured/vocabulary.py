"""The model's tokens as llguidance sees them.

Knows a tokenizer, the size of the model's vocabulary and its end-of-text ids. Does not know grammars.
"""

from collections.abc import Iterable
from copy import copy
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from minisgl.errors import RequestError
from minisgl.tokenizer import Tokenizer

Ints = npt.NDArray[np.int32]


class Vocabulary:
    """V ids of the model, of which the tokenizer has the first; W = ceil(V / 32) words of a mask.

    settings: arguments of LLTokenizer. ll: made of them, in seconds for a large vocabulary. special_texts: how special
    tokens are spelled. RequestError where llguidance is not installed or cannot use the tokenizer.

    Rows of masks, int32 [W], bit id % 32 of word id // 32:
    known: what the tokenizer has. eos: the model's end-of-text ids. special: other special tokens.
    `reserved` are the words that have ids of the last two, `padded` those that have ids which are not known.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            message = "structured output needs the package llguidance: pip install minisgl[structured]"
            raise RequestError(message, "invalid_parameter") from error
        backend = tokenizer.backend
        if backend is None:
            _refuse("the model's tokenizer has no tokenizer.json; structured output needs one")
        num_ids = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if num_ids > vocab_size:
            _refuse(f"the tokenizer has {num_ids:,} ids, more than the model's {vocab_size:,}")
        self.num_words = -(-vocab_size // 32)
        self.eos_ids = frozenset(i for i in eos_ids if i < num_ids)
        if not self.eos_ids:
            _refuse("the model has no end-of-text token, by which an answer could end")
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        self.settings = {"tokenizer": backend.to_str(), "n_vocab": vocab_size, "eos_token": sorted(self.eos_ids)}
        try:
            self.ll = llguidance.LLTokenizer(**self.settings)
        except ValueError as error:
            _refuse(f"llguidance cannot use the model's tokenizer: {error}")
        self.executor = llguidance.LLExecutor()
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.special_texts = tuple(token.content for token in added.values() if token.special)
        self.known = self._row(range(num_ids))
        self.eos = self._row(self.eos_ids)
        self.special = self._row({i for i, token in added.items() if token.special} - self.eos_ids)
        words = np.nonzero(self.eos | self.special)[0]
        self.reserved = slice(int(words[0]), int(words[-1]) + 1)
        self.padded = slice(num_ids // 32, self.num_words)

    def _row(self, ids: Iterable[int]) -> Ints:
        bits = np.zeros(self.num_words * 32, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _refuse(message: str) -> NoReturn:
    raise RequestError(message, "invalid_parameter")
