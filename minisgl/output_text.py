"""The text of a request while it runs: where stop strings end it, and what a stream has got of it.

Knows a request and the tokenizer. Does not know who runs the request.
"""

from collections import deque
from dataclasses import dataclass

from minisgl.detokenizer import Detokenizer
from minisgl.request import Request, Result, TokenLogprobs
from minisgl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Delta:
    """What a streamed request has got since the last one; `result` is the whole answer, with the last delta."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    result: Result | None = None


class OutputText:
    """The text of a request while it runs."""

    def __init__(self, request: Request, tokenizer: Tokenizer, streamed: bool) -> None:
        self._request = request
        self._detokenizer = Detokenizer.of(request.params, tokenizer)
        self._pieces: list[str] = []
        self._num_seen = 0  # output tokens
        self.deltas: deque[Delta] | None = deque() if streamed else None

    def update(self) -> bool:
        """Take in the tokens that the request has got; True when a stop string ends it."""
        request = self._request
        new = request.tokens[request.num_prompt + self._num_seen : request.num_tokens].tolist()
        text = ""
        for token in new:
            self._num_seen += 1
            if token not in request.stop_ids:
                text += self._detokenizer.push([token])
        self._pieces.append(text)
        if self.deltas is not None and new:
            logprobs = None if request.params.logprobs is None else request.logprobs[-len(new) :]
            self.deltas.append(Delta(text, new, logprobs))
        return self.stopped

    @property
    def stopped(self) -> bool:
        """Whether a stop string cut the text: the last may show only when no more tokens come."""
        return self._detokenizer.stopped

    def finish(self) -> tuple[str, str]:
        """(the whole text, what no delta has of it yet)."""
        rest = self._detokenizer.finish()
        return "".join([*self._pieces, rest]), rest
