"""A model behind an OpenAI-compatible server, as evaluations ask it (`minisgl eval --url`).

    generate     /v1/chat/completions for messages, /v1/completions for text
    choice, ppl  /tokenize, and prompt_logprobs in /v1/completions: `minisgl serve` and vLLM have both

Knows the forms of bodies and answers. HTTP and its retries are the client's.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from random import Random
from typing import Any

from minisgl.batch_run.answers import Line, format_line
from minisgl.batch_run.rows import BadRow, Row, row_error
from minisgl.client import Client, Refused, check_no_engine
from minisgl.config import EngineConfig
from minisgl.errors import MinisglError, RequestError
from minisgl.evaluate.asking import AskingRun
from minisgl.messages import Message
from minisgl.openai.answers import read_usage
from minisgl.pairs import PairIds, Prompt, encode_pairs
from minisgl.request import Result, SamplingParams, Score, Usage

RETRIES = 6  # half a minute
NOT_ASKED = ("logprobs", "prompt_logprobs", "echo")  # no evaluation reads them, and servers differ in their forms
MALFORMED = (LookupError, TypeError, AttributeError)  # what reading an answer of another form raises


class RemoteModel:
    """The part of `LLM` that evaluations need. `name`: of several models; None where there is one."""

    def __init__(self, url: str, name: str | None, engine: dict[str, Any], concurrency: int):
        check_no_engine(setting for setting in engine if setting != "seed")
        self.client = Client(url, concurrency=concurrency, retries=RETRIES)
        self.name = name or self.client.model(None)
        self.concurrency, self.seed = concurrency, int(engine.get("seed", 0))
        self.tokenizer = RemoteTokenizer(self)

    def __enter__(self) -> "RemoteModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @cached_property
    def pool(self) -> ThreadPool:
        return ThreadPool(self.concurrency)

    def close(self) -> None:
        """Give up what is asked."""
        if "pool" in vars(self):
            self.pool.terminate()

    def check(self, mode: str) -> None:
        """MinisglError where the server has not this model, or not what the mode needs."""
        self.client.model(self.name)
        if mode == "generate":
            return
        try:
            ids = self.tokenizer.encode_batch(["1 2 3"])[0]
            _ = self.config
            _prompt_logprobs(self.complete(ids), ids)
        except (Refused, *MALFORMED) as error:
            raise MinisglError(
                f"mode {mode} needs /tokenize with max_model_len, and prompt_logprobs in /v1/completions, which "
                f"{self.client.url} does not have ({error}): ask `minisgl serve` or vLLM, or use mode generate"
            ) from error
        if mode == "ppl":
            _ = self.start_id

    def ask(self, path: str, **body: Any) -> Any:
        return self.client.ask(path, {"model": self.name, **body})

    # -- text --

    def answer(self, row: Row) -> list[Result]:
        """The answers to a row. RequestError, its own fault or the server's, where it has none."""
        body = {**_params(row.params), **({"n": row.n} if row.n > 1 else {})}
        if row.params.temperature != 0 and row.params.seed is None:
            body["seed"] = Random(f"{self.seed} {row.head.index}").getrandbits(31)
        if row.messages is None:
            value = self.ask("/v1/completions", prompt=row.prompts[0], **body)
        elif unknown := sorted(set(row.chat_options) - {"template_kwargs"}):
            raise RequestError(f"{unknown[0]} is not asked of a server by evaluations: leave it out")
        else:
            if kwargs := row.chat_options.get("template_kwargs"):
                body["chat_template_kwargs"] = kwargs
            value = self.ask("/v1/chat/completions", messages=row.messages, **body)
        try:
            choices = sorted(value["choices"], key=lambda choice: choice.get("index", 0))
            usage = read_usage(value["usage"]) if value.get("usage") else Usage()
            return [_result(choices[0], usage), *(_result(choice, Usage()) for choice in choices[1:])]
        except MALFORMED as error:
            raise _malformed(value) from error

    # -- loglikelihoods --

    @cached_property
    def config(self) -> EngineConfig:
        """max_len: one less than the server's, since a token is generated behind what is scored."""
        return EngineConfig(model=self.name, max_len=int(self.ask("/tokenize", prompt="1")["max_model_len"]) - 1)

    @cached_property
    def start_id(self) -> int:
        """The token before a text that has nothing before it. MinisglError where the server does not say."""
        ids = self.tokenizer.encode_batch([""])[0]
        if ids:
            return ids[0]
        try:
            info = self.client.ask("/get_model_info")
        except Refused:
            info = {}
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(info.get(name), int):
                return int(info[name])
        raise MinisglError(
            f"{self.client.url} does not say which token begins a text: /tokenize adds none, and /get_model_info has "
            "no bos_token_id or eos_token_id. Load the model with -m instead"
        )

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[Prompt]) -> list[Score]:
        """As `LLM.score`."""
        return self.pool.map(self._score, encode_pairs(self, list(zip(prompts, continuations, strict=True))), 1)

    def complete(self, ids: list[int]) -> Any:
        return self.ask("/v1/completions", prompt=ids, max_tokens=1, temperature=0, prompt_logprobs=1)

    def _score(self, pair: PairIds | RequestError) -> Score:
        if isinstance(pair, RequestError):
            return Score(0.0, [], False, 0, error=pair)
        before, whole = pair
        try:
            value = self.complete(whole)
        except Refused as error:
            return Score(0.0, [], False, 0, error=error)
        try:
            scored = _prompt_logprobs(value, whole)[len(before) :]
            usage = read_usage(value["usage"])
        except MALFORMED:
            return Score(0.0, [], False, 0, error=_malformed(value))
        logprobs = [logprob for logprob, _ in scored]
        return Score(
            logprob=sum(logprobs),
            token_logprobs=logprobs,
            is_greedy=all(is_best for _, is_best in scored),
            num_tokens=len(scored),
            num_prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
        )


class RemoteTokenizer:
    """A server's tokenizer. RequestError for what it refuses."""

    def __init__(self, model: RemoteModel):
        self._model = model

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, True)

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, False)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation."""
        ids = self._model.ask("/tokenize", messages=messages)["tokens"]
        value = self._model.ask("/detokenize", tokens=ids, skip_special_tokens=False)
        return str(value["text"] if "text" in value else value["prompt"])  # ours and vLLM's

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        def encode(text: str) -> list[int]:
            ids: list[int] = self._model.ask("/tokenize", prompt=text, add_special_tokens=special)["tokens"]
            return ids

        unique = list(dict.fromkeys(texts))  # a prompt is there once for each of its options
        ids_of = dict(zip(unique, self._model.pool.map(encode, unique, 1), strict=True))
        return [ids_of[text] for text in texts]


class RemoteRun(AskingRun):
    """Asks for the text of `concurrency` rows at a time."""

    def __init__(self, model: RemoteModel, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.model = model

    def answer(self, rows: Iterator[Row | BadRow]) -> Iterator[list[Line]]:
        done: SimpleQueue[tuple[Row, list[Result] | Exception]] = SimpleQueue()
        num_asked = 0
        for row in rows:
            if self.should_stop():
                self.summary.stopped = True
                break
            if isinstance(row, BadRow):
                yield [self.fail(row.head, row.error)]
                continue
            self.model.pool.apply_async(self._ask, (row,), callback=done.put)
            num_asked += 1
            if num_asked == self.model.concurrency:
                yield [self._line(*done.get())]
                num_asked -= 1
        for _ in range(num_asked):
            yield [self._line(*done.get())]

    def _ask(self, row: Row) -> tuple[Row, list[Result] | Exception]:
        try:
            return row, self.model.answer(row)
        except Exception as error:  # raised again by the thread that waits for it
            return row, error

    def _line(self, row: Row, answer: list[Result] | Exception) -> Line:
        if isinstance(answer, RequestError):
            return self.fail(row.head, row_error(answer.type, str(answer)))
        if isinstance(answer, Exception):
            raise answer
        self.count(answer[0].usage, answer[0].usage.completion_tokens)
        return format_line(row.head, answer)


def _params(params: SamplingParams) -> dict[str, Any]:
    """What was given of the parameters, as keys of a body."""
    given = {name: value for name, value in vars(params).items() if value is not None and value != ()}
    for name in NOT_ASKED:
        if name in given:
            raise RequestError(f"{name} is not asked of a server by evaluations: leave it out", "invalid_parameter")
    if "response_format" in given:
        given["response_format"] = given["response_format"].to_openai()
    return given


def _result(choice: dict[str, Any], usage: Usage) -> Result:
    if choice.get("finish_reason") in ("abort", "error"):
        raise RequestError("the server gave up on the answer", "server_failed")
    message = choice.get("message")
    text = choice["text"] if message is None else message["content"]
    reasoning = (message or {}).get("reasoning_content") or ""
    is_cut = choice.get("finish_reason") == "length"
    return Result(text or "", [], "length" if is_cut else "stop", usage, reasoning=reasoning)


def _malformed(value: Any) -> RequestError:
    return RequestError(f"the server's answer is no completion: {json.dumps(value)[:200]}", "server_failed")


def _prompt_logprobs(value: Any, ids: Sequence[int]) -> list[tuple[float, bool]]:
    """The logprob of each token of a prompt, and whether it is the likeliest; the first has none, and stands for 0.
    One of MALFORMED where the answer has them not."""
    found: list[dict[str, dict[str, float]]] = value["choices"][0]["prompt_logprobs"]
    scored = [(0.0, True)]
    for place in range(1, len(ids)):
        entries = found[place]
        logprob = entries[str(ids[place])]["logprob"]
        scored.append((logprob, logprob >= max(one["logprob"] for one in entries.values())))
    return scored
