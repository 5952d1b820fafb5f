"""Bad words -> the token sequences that an answer may not have.

Knows how a tokenizer spells a word. Does not know logits (`kernels.logits` bans the sequences).
"""

from minisgl.errors import RequestError
from minisgl.request import MAX_BAN_TOKENS, SamplingParams
from minisgl.tokenizer import Tokenizer


def bans_of(tokenizer: Tokenizer, params: SamplingParams) -> list[list[int]]:
    """The token ids of each of `params.bad_words`, at the start of a text and behind a space: other tokens may still
    spell it. RequestError for one that is too long."""
    return [ban for word in params.bad_words for ban in _spellings(tokenizer, word)]


def _spellings(tokenizer: Tokenizer, word: str) -> list[list[int]]:
    found = tokenizer.encode_rendered(list(dict.fromkeys((word, " " + word.lstrip()))))
    longest = max(map(len, found))
    if longest > MAX_BAN_TOKENS:
        raise RequestError(f"bad_words: {word!r} has {longest} tokens; at most {MAX_BAN_TOKENS} are allowed")
    return found
