"""Token ids -> text while a request runs: never half a character, and cut at the first stop string.

Knows one request's output. Does not know the engine: the caller pushes ids and reads text.
The window (decode a few known tokens with the new ones, emit the difference) is the technique of Hugging Face's
text-generation-inference, `Model.decode_token`: the cost of a token does not grow with the text before it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from minisgl.request import SamplingParams

INCOMPLETE = "\ufffd"  # what decoders write for bytes that are not, or not yet, UTF-8
MAX_WINDOW = 64  # tokens. A character has at most 4 bytes, so bytes that were nothing for this long stay nothing


class Decodes(Protocol):
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of one request. All that `push` and then `finish` return, joined, is `decode` of all ids,
    cut before the stop string that is complete first. (Bytes that are no UTF-8 may show as another number of U+FFFD.)

    skip_special_tokens: as in `decode`. include_stop_str: cut behind that stop string, not before it. min_tokens: text
    of the first so many may hold a stop string.
    stopped: a stop string was found; ids pushed later are ignored.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ):
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._include_stop_str = include_stop_str
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._window: list[int] = []  # the latest ids
        self._known = 0  # of them, at the front: their text is out and they are context for the rest
        self._emitted = 0  # characters of the window's text that are out
        self._held = ""  # of those, what may be the beginning of a stop string
        self._num_free = min_tokens  # tokens to come whose text may hold a stop string; below 0: it may not any more
        self.stopped = False

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Decodes) -> "Detokenizer":
        """For an answer with these parameters."""
        return cls(
            tokenizer,
            tuple(params.stop),
            skip_special_tokens=params.skip_special_tokens is not False,
            include_stop_str=params.include_stop_str is True,
            min_tokens=params.min_tokens or 0,
        )

    def push(self, ids: Sequence[int]) -> str:
        """Add the next output ids; returns the new text that later ids cannot change (often "")."""
        if self.stopped:
            return ""
        self._num_free -= len(ids)
        self._window += ids
        text = self._decode(self._window)
        certain = text.rstrip(INCOMPLETE)
        complete, full = certain == text, len(self._window) > MAX_WINDOW
        if not complete and full:
            complete, certain = True, text
        new = certain[self._emitted :]
        if complete and new:
            self._advance()
        elif complete and full:
            del self._window[self._known :]  # special tokens: they have no text
        else:
            self._emitted = max(self._emitted, len(certain))
        return self._until_stop(new)

    def finish(self) -> str:
        """The rest of the text, when no more ids come."""
        if self.stopped:
            return ""
        rest = self._until_stop(self._decode(self._window)[self._emitted :])
        rest, self._held = rest + self._held, ""
        self._advance()
        return rest

    def _advance(self) -> None:
        """Drop the old context: the tokens whose text has just come out are the context of the next ones."""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._emitted = len(self._decode(self._window))

    def _until_stop(self, new: str) -> str:
        """`new` behind what was held back, up to a stop string or to what may become one."""
        if not self._stop or self._num_free >= 0 or not new:
            return new
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            end, start = min(found)
            return text[: end if self._include_stop_str else start]
        sizes = range(min(len(text), self._longest_stop - 1), 0, -1)
        size = next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stop)), 0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]
