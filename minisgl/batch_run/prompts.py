"""Rows become requests: chat templates, token ids, what to do with prompts that are too long, n samples of one row.

Knows the tokenizer and how requests are made. Does not know sources, engines or outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from minisgl.batch_run.parser import question_hash
from minisgl.batch_run.rows import BadRow, Head, Row, RowError, row_error
from minisgl.chat import ChatPrompt
from minisgl.errors import MinisglError, RequestError
from minisgl.request import CHOICE_STRIDE, Request
from minisgl.text_requests import TextRequests
from minisgl.tokenizer import check_chars

OnLong = Literal["error", "truncate-left", "truncate-right"]

MAX_CUTS = 8  # of a conversation that is too long; each leaves less than it must, so the second mostly fits


class Tokenized(NamedTuple):
    """A row and the ids of its prompts, or why it has none. chat: the prompt of a conversation."""

    row: Row
    prompts: list[list[int]]
    chat: ChatPrompt | None = None
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row on its way to the engine: its requests; or why it has none; or the earlier row that asks the same. chat:
    the prompt of a conversation, by which its answers are read."""

    head: Head
    requests: Sequence[Request] = ()
    chat: ChatPrompt | None = None
    error: RowError | None = None
    leader: int | None = None


class Leaders:
    """The first row of all that ask the same. Memory grows with the number of different rows."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}

    def find(self, row: Row) -> int | None:
        """The index of an earlier row that asks the same; None makes this one the first."""
        first = self._index.setdefault(question_hash(row), row.head.index)
        return None if first == row.head.index else first


class PromptMaker:
    """Prepares rows, a burst at a time. Used by one thread."""

    def __init__(self, model: TextRequests, *, on_long: OnLong = "error", leaders: "Leaders | None" = None):
        """`leaders`: rows that ask the same as an earlier one get no requests of their own."""
        self.model, self.on_long, self.leaders = model, on_long, leaders

    def prepare(self, rows: Sequence[Row | BadRow]) -> list[Prepared]:
        """Every row, in order."""
        done: dict[int, Prepared] = {}
        asked = []
        for row in rows:
            if isinstance(row, BadRow):
                done[row.head.index] = Prepared(row.head, error=row.error)
            elif self.leaders and (leader := self.leaders.find(row)) is not None:
                done[row.head.index] = Prepared(row.head, leader=leader)
            else:
                asked.append(row)
        for one in self.tokenize(asked):
            head = one.row.head
            try:
                if one.error:
                    raise one.error
                done[head.index] = Prepared(head, self._requests(one), one.chat)
            except RequestError as refusal:
                cut = "; --on-long cuts it" if refusal.type == "prompt_too_long" and self.on_long == "error" else ""
                done[head.index] = Prepared(head, error=row_error(refusal.type, f"{refusal}{cut}"))
        return [done[row.head.index] for row in rows]

    def _requests(self, asked: Tokenized) -> list[Request]:
        """One request for each sample of each prompt, prompt by prompt; their indices are CHOICE_STRIDE apart."""
        row, chat = asked.row, asked.chat
        params = chat.params if chat else row.params
        if row.n > 1:
            params = replace(params, n=row.n)
        requests: list[Request] = []
        for ids in asked.prompts:
            if self.on_long != "error":
                ids = self._shorten(row, ids)
            index = row.head.index + len(requests) * CHOICE_STRIDE
            requests += self.model.new_requests(ids, params, index=index, thinks=chat is not None and chat.thinks)
        return requests

    # -- text to token ids --

    def tokenize(self, rows: list[Row]) -> list[Tokenized]:
        """Each row with the ids of its prompts, or with why it has none. Texts are encoded together: in parallel."""
        tokenized: list[Tokenized] = []
        texts: list[tuple[list[int], str]] = []  # with the list that gets its ids
        rendered: list[tuple[list[int], str]] = []
        for row in rows:
            try:
                self._check_text(row)
                if row.messages is not None:
                    chat = self.model.chat_format.prompt(row.messages, row.params, **row.chat_options)
                    tokenized.append(Tokenized(row, [[]], chat))
                    rendered.append((tokenized[-1].prompts[0], chat.text))
                else:
                    prompts = [[] if isinstance(prompt, str) else prompt for prompt in row.prompts]
                    texts += [
                        (ids, text) for ids, text in zip(prompts, row.prompts, strict=True) if isinstance(text, str)
                    ]
                    tokenized.append(Tokenized(row, prompts))
            except RequestError as error:
                tokenized.append(Tokenized(row, [], error=error))
        if texts:
            _fill(texts, self.model.tokenizer.encode_batch)
        if rendered:
            _fill(rendered, self.model.tokenizer.encode_rendered)
        return tokenized

    def _check_text(self, row: Row) -> None:
        """RequestError when the row's text cannot become tokens, whatever it says."""
        texts = (
            [sum(len(message["content"]) for message in row.messages)]
            if row.messages is not None
            else [len(prompt) for prompt in row.prompts if isinstance(prompt, str)]
        )
        needs_spellings = row.head.form != "row" and (row.params.logprobs, row.params.prompt_logprobs) != (None, None)
        if not texts and not needs_spellings:
            return
        try:
            _ = self.model.tokenizer
        except MinisglError as error:
            raise RequestError(str(error), "no_tokenizer") from error
        if self.on_long == "error":
            check_chars(max(texts, default=0), self._max_len)

    # -- prompts that are too long --

    @property
    def _max_len(self) -> int:
        max_len = self.model.config.max_len
        assert max_len is not None
        return max_len

    def _shorten(self, row: Row, ids: list[int]) -> list[int]:
        """The ids; those that do not fit cut so that max_tokens fit too, of a conversation by cutting its longest
        messages, since its template must stay whole. RequestError when max_tokens leave no room."""
        if len(ids) < self._max_len:
            return ids
        max_tokens = self.model.new_request(ids[:1], row.params, index=row.head.index).params.max_tokens or 1
        room = self._max_len - max_tokens
        if room < 1:
            raise RequestError(
                f"max_tokens is {max_tokens:,}, and of the context of {self._max_len:,} tokens nothing is left for the "
                "prompt: lower it",
                "prompt_too_long",
            )
        if row.messages is None:
            return self._cut(ids, len(ids) - room)
        messages = [dict(message) for message in row.messages]
        tokenizer = self.model.tokenizer
        for _ in range(MAX_CUTS):
            excess = len(ids) - room
            if excess <= 0:
                break
            for longest in sorted(messages, key=lambda message: len(message["content"]), reverse=True):
                if excess > 0:
                    content = tokenizer.encode(longest["content"])
                    kept = self._cut(content, min(excess, len(content)))
                    longest["content"] = tokenizer.decode(kept).strip("\ufffd")
                    excess -= len(content) - len(kept)
            text = self.model.chat_format.prompt(messages, row.params, **row.chat_options).text
            [ids] = tokenizer.encode_rendered([text])
        return ids

    def _cut(self, ids: list[int], excess: int) -> list[int]:
        return ids[excess:] if self.on_long == "truncate-left" else ids[: len(ids) - excess]


def _fill(texts: list[tuple[list[int], str]], encode: Callable[[list[str]], list[list[int]]]) -> None:
    for (ids, _), found in zip(texts, encode([text for _, text in texts]), strict=True):
        ids += found
