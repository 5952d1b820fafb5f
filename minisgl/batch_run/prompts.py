"""Rows become requests: chat templates, token ids, what to do with prompts that are too long, n samples of one row.

Knows the tokenizer and the engine's interface. Does not know sources or outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from minisgl.batch_run.parser import question_hash
from minisgl.batch_run.rows import BadRow, Head, Row, RowError, row_error
from minisgl.errors import MinisglError, RequestError
from minisgl.request import Request

if TYPE_CHECKING:
    from minisgl.llm import LLM

OnLong = Literal["error", "truncate-left", "truncate-right"]

# Tokens of common vocabularies are shorter (Qwen's longest is 128 spaces). Tokenizing megabytes takes seconds, so a
# text that cannot fit the context is refused before.
MAX_CHARS_PER_TOKEN = 256
SAMPLE_STRIDE = 1 << 40  # between the request indices of one row's samples: there is no input of so many rows
MAX_CUTS = 8  # of a conversation that is too long; each leaves less than it must, so the second mostly fits


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row on its way to the engine: its requests; or why it has none; or the earlier row that asks the same."""

    head: Head
    requests: Sequence[Request] = ()
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
    """Prepares rows, a burst at a time. Used by one thread; only reads from the engine."""

    def __init__(self, llm: "LLM", *, on_long: OnLong = "error", leaders: "Leaders | None" = None):
        """`leaders`: rows that ask the same as an earlier one get no requests of their own."""
        self.llm, self.on_long, self.leaders = llm, on_long, leaders

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
        for row, prompt in self.tokenize(asked):
            try:
                if isinstance(prompt, RequestError):
                    raise prompt
                done[row.head.index] = Prepared(row.head, self._requests(row, prompt))
            except RequestError as refusal:
                done[row.head.index] = Prepared(row.head, error=row_error(refusal.type, str(refusal)))
        return [done[row.head.index] for row in rows]

    def _requests(self, row: Row, ids: list[int]) -> list[Request]:
        """One request for each sample; their seeds differ."""
        if self.on_long != "error":
            ids = self._shorten(row, ids)
        requests = []
        for sample in range(row.n):
            params = row.params
            if sample and params.seed is not None:
                params = replace(params, seed=(params.seed + sample) % 2**63)
            requests.append(self.llm.new_request(ids, params, index=row.head.index + sample * SAMPLE_STRIDE))
        return requests

    # -- text to token ids --

    def tokenize(self, rows: list[Row]) -> list[tuple[Row, list[int] | RequestError]]:
        """Each row with its prompt's token ids, or with why it has none. Texts are encoded together: in parallel."""
        tokenized: list[tuple[Row, list[int] | RequestError]] = []
        texts: list[tuple[Row, str]] = []
        rendered: list[tuple[Row, str]] = []
        for row in rows:
            if row.prompt_token_ids is not None:
                tokenized.append((row, row.prompt_token_ids))
            elif refusal := self._refuse_text(row):
                tokenized.append((row, refusal))
            elif row.prompt is not None:
                texts.append((row, row.prompt))
            else:
                try:
                    rendered.append((row, self.llm.tokenizer.render(row.messages or [])))
                except RequestError as error:
                    tokenized.append((row, error))
        if texts:
            encoded = self.llm.tokenizer.encode_batch([text for _, text in texts])
            tokenized += [(row, ids) for (row, _), ids in zip(texts, encoded, strict=True)]
        if rendered:
            encoded = self.llm.tokenizer.encode_rendered([text for _, text in rendered])
            tokenized += [(row, ids) for (row, _), ids in zip(rendered, encoded, strict=True)]
        return tokenized

    def _refuse_text(self, row: Row) -> RequestError | None:
        """Why the row's text cannot become tokens, whatever it says."""
        try:
            _ = self.llm.tokenizer
        except MinisglError as error:
            return RequestError(str(error), "no_tokenizer")
        messages = row.messages or [{"content": row.prompt}]
        num_chars = sum(len(message["content"]) for message in messages)
        if num_chars <= MAX_CHARS_PER_TOKEN * self._max_len or self.on_long != "error":
            return None
        message = f"the prompt has {num_chars:,} characters, which the context of {self._max_len:,} tokens cannot hold"
        return RequestError(f"{message}: shorten it", "prompt_too_long")

    # -- prompts that are too long --

    @property
    def _max_len(self) -> int:
        max_len = self.llm.config.max_len
        assert max_len is not None
        return max_len

    def _shorten(self, row: Row, ids: list[int]) -> list[int]:
        """The ids, cut so that the prompt and max_tokens fit; those of a conversation by cutting its longest message,
        since its template must stay whole."""
        if len(ids) < self._max_len:
            return ids
        max_tokens = self.llm.new_request(ids[:1], row.params, index=row.head.index).params.max_tokens or 1
        room = max(1, self._max_len - max_tokens)
        if row.messages is None:
            return self._cut(ids, len(ids) - room)
        messages = [dict(message) for message in row.messages]
        tokenizer = self.llm.tokenizer
        for _ in range(MAX_CUTS):
            excess = len(ids) - room
            if excess <= 0:
                break
            longest = max(messages, key=lambda message: len(message["content"]))
            content = tokenizer.encode(longest["content"])
            longest["content"] = tokenizer.decode(self._cut(content, min(excess, len(content)))).strip("\ufffd")
            ids = tokenizer.apply_chat_template(messages)
        return ids

    def _cut(self, ids: list[int], excess: int) -> list[int]:
        return ids[excess:] if self.on_long == "truncate-left" else ids[: len(ids) - excess]
