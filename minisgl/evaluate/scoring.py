"""Rows of the modes `choice` and `ppl`: loglikelihoods instead of text, written to the same journal as answers are.

    choice   each option is a continuation of the prompt; the answer is the likeliest one   columns: option_logprobs
    ppl      windows of the text, each token scored once   columns: logprob, num_tokens, num_words, num_bytes

Knows the `score` and the tokenizer of an engine, or of a server. Does not know files or which answer is right. An
engine prefills a context once for all of its options, through the prefix cache.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from minisgl.batch_run.answers import Line, format_line
from minisgl.batch_run.rows import BadRow, Row, row_error
from minisgl.errors import RequestError
from minisgl.evaluate.asking import AskingRun
from minisgl.evaluate.task import Task
from minisgl.pairs import Pair
from minisgl.request import Result, Score, Usage

if TYPE_CHECKING:
    from minisgl.evaluate.remote import RemoteModel
    from minisgl.llm import LLM

CHUNK_ROWS = {"choice": 256, "ppl": 16}  # scored at once: what a kill loses


@dataclass(frozen=True)
class Asked:
    """One row's pairs of prompt and continuation, in the order in which their scores come back."""

    row: Row
    pairs: list[Pair]


class ScoreRun(AskingRun):
    """Scores rows a chunk at a time."""

    def __init__(self, llm: "LLM | RemoteModel", task: Task, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.llm, self.task = llm, task

    def answer(self, rows: Iterator[Row | BadRow]) -> Iterator[list[Line]]:
        while chunk := list(islice(rows, CHUNK_ROWS[self.task.mode])):
            if self.should_stop():
                self.summary.stopped = True
                return
            yield list(self._lines(chunk))

    def _lines(self, chunk: list[Row | BadRow]) -> Iterator[Line]:
        asked: list[Asked] = []
        for row in chunk:
            if isinstance(row, BadRow):
                yield self.fail(row.head, row.error)
                continue
            try:
                asked.append(Asked(row, self._pairs(row)))
            except RequestError as refusal:
                yield self.fail(row.head, row_error(refusal.type, str(refusal)))
        pairs = [pair for one in asked for pair in one.pairs]
        scores = iter(self.llm.score([prompt for prompt, _ in pairs], [answer for _, answer in pairs]))
        for one in asked:
            own = list(islice(scores, len(one.pairs)))
            failed = next((score.error for score in own if score.error), None)
            if failed:
                yield self.fail(one.row.head, row_error(failed.type, str(failed)))
            else:
                yield self._line(one.row, own)

    def _line(self, row: Row, scores: Sequence[Score]) -> Line:
        tokens = sum(score.num_prompt_tokens for score in scores)
        usage = Usage(tokens, 0, sum(score.cached_tokens for score in scores))
        self.count(usage, sum(score.num_tokens for score in scores))  # what comes out: their logprobs
        columns, text = dict(row.head.columns), ""
        if self.task.mode == "choice":
            columns["option_logprobs"] = [score.logprob for score in scores]
            text = shown(columns["options"][likeliest(columns["option_logprobs"])])
        else:
            text_scored = columns.pop("prompt")
            columns["logprob"] = sum(score.logprob for score in scores)
            columns["num_tokens"] = sum(score.num_tokens for score in scores)
            columns["num_words"] = len(re.split(r"\s+", text_scored))  # as lm-evaluation-harness counts them
            columns["num_bytes"] = len(text_scored.encode())
        return format_line(replace(row.head, columns=columns), [Result(text, [], "stop", usage)])

    # -- what is scored --

    def _pairs(self, row: Row) -> list[Pair]:
        if self.task.mode == "ppl":
            return self._windows(row)
        return [self._pair(row, option) for option in row.head.columns["options"]]

    def _pair(self, row: Row, option: str | list[str]) -> Pair:
        context, answer = ("", option) if isinstance(option, str) else option
        if row.prompt is not None:
            return row.prompt + context, self.task.separator + answer
        encode = self.llm.tokenizer.encode_rendered
        if row.messages is None:
            return row.prompt_token_ids or [], encode([self.task.separator + answer])[0]
        before = self.llm.tokenizer.render(row.messages) + context
        prompt, whole = encode([before, before + answer])
        return prompt, whole[len(prompt) :]

    def _windows(self, row: Row) -> list[Pair]:
        if row.prompt is None:
            raise RequestError("perplexity is that of a text: the row has messages or token ids", "invalid_row")
        ids = self.llm.tokenizer.encode_rendered([row.prompt])[0]
        if not ids:
            raise RequestError("the text has no tokens", "invalid_prompt")
        room = self.llm.config.max_len
        assert room is not None
        places = windows(len(ids), min(self.task.window or room, room), self.task.stride)
        return [(ids[start:scored], ids[scored:end]) for start, scored, end in places]


def windows(num_tokens: int, window: int, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of windows of at most `window` tokens, which score `stride` tokens each.

    A first token of a text is scored after the model's beginning-of-text token, which takes a place of its window; any
    other window keeps at least one token before those that it scores.
    """
    end = min(num_tokens, window - 1)
    yield 0, 0, end
    step = min(stride or window, window - 1)
    while end < num_tokens:
        scored, end = end, min(num_tokens, end + step)
        yield max(0, end - window), scored, end


def likeliest(logprobs: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The place of the largest logprob, or of the largest per unit of length; the first of equal ones."""
    lengths = lengths or [1] * len(logprobs)
    values = [logprob / max(1, length) for logprob, length in zip(logprobs, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__)


def shown(option: str | list[str]) -> str:
    """An option as an answer: of a pair, what is scored."""
    return option if isinstance(option, str) else option[-1]
