"""OpenAI's Batch format: {"custom_id", "method", "url", "body"} in, {"id", "custom_id", "response", "error"} out.

    https://platform.openai.com/docs/api-reference/batch

Knows that format; bodies and answers are `minisgl.openai`'s. The model that a body names is not used, -m chooses it,
and comes back in the answer.
"""

import time
from dataclasses import replace
from typing import Any

from minisgl.batch_run.rows import Head, Row, RowError, kind, read_prompt, read_token_ids, refuse
from minisgl.errors import RequestError
from minisgl.openai.answers import (
    Spell,
    chat_logprobs,
    completion,
    completion_logprobs,
    prompt_logprobs_object,
    tool_call_object,
    usage_object,
)
from minisgl.openai.bodies import read_chat, read_completion
from minisgl.openai.errors import error_object
from minisgl.request import Result, SamplingParams

FORMS = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}


def is_batch_line(values: dict[str, Any]) -> bool:
    return "custom_id" in values and ("body" in values or "url" in values)


def read_batch_head(values: dict[str, Any], head: Head) -> Head:
    """What answering a line in kind takes, whether or not the line can be asked."""
    custom_id, url, body = (values.get(name) for name in ("custom_id", "url", "body"))
    form = FORMS.get(url, "chat.completion") if isinstance(url, str) else "chat.completion"
    model = body.get("model") if isinstance(body, dict) else None
    return Head(
        head.index,
        head.key,
        custom_id if isinstance(custom_id, str) else head.id,
        head.place,
        {},
        form,
        str(model or ""),
    )


def read_batch_row(values: dict[str, Any], head: Head, defaults: SamplingParams, default_n: int) -> Row:
    """What a line asks. RefusedRow when it cannot be asked."""
    custom_id, method, url, body = (values.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str):
        refuse(f"custom_id must be a string, not {kind(custom_id)}")
    if method not in (None, "POST"):
        refuse(f"method is {method!r}; it must be POST")
    if not isinstance(url, str) or url not in FORMS:
        refuse(f"url is {url!r}; answered are {' and '.join(FORMS)}")
    return _read_body(head, body, defaults, default_n)


def _read_body(head: Head, body: Any, defaults: SamplingParams, default_n: int) -> Row:
    is_chat = head.form == "chat.completion"
    try:
        asked = (read_chat if is_chat else read_completion)(body, defaults)
    except RequestError as error:
        refuse(str(error), error.type)
    params, n = replace(asked.params, n=None), asked.params.n or default_n
    if asked.stream:
        refuse("stream is not for files: leave it out", "invalid_parameter")
    if not asked.separate_reasoning:
        refuse("separate_reasoning is always true in files: leave it out", "invalid_parameter")
    if is_chat:
        return Row(head, params, messages=list(asked.messages), chat_options=dict(asked.chat_options), n=n)
    if params.echo and params.logprobs is not None:
        refuse("echo with logprobs is not supported in files: ask for prompt_logprobs", "invalid_parameter")
    prompts = [_read_prompt(prompt) for prompt in asked.prompts]
    first = prompts[0]
    question = {"prompt": first} if isinstance(first, str) else {"prompt_token_ids": first}
    return Row(replace(head, num_prompts=len(prompts)), params, n=n, more_prompts=tuple(prompts[1:]), **question)


def _read_prompt(value: str | list[int]) -> str | list[int]:
    return read_token_ids(value) if isinstance(value, list) else read_prompt(value)


def answer_values(head: Head, outcome: list[Result] | RowError, spell: Spell | None = None) -> dict[str, Any]:
    """The output line of an OpenAI line. Its id holds the row's index and key. `spell`: for answers with logprobs."""
    name = _name(head)
    error = None
    if isinstance(outcome, RowError):
        error = {"code": outcome.type, "message": outcome.message}
        status, body = 400, error_object(outcome.message, code=outcome.type)
    else:
        choices = [_choice(head, index, result, spell) for index, result in enumerate(outcome)]
        usage = usage_object([result.usage for result in outcome], len(outcome) // head.num_prompts)
        status, body = 200, completion(head.form, _completion_id(head), head.model, int(time.time()), choices, usage)
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": head.id, "response": response, "error": error}


def read_mark(values: dict[str, Any]) -> tuple[int, int, bool]:
    """Index, key and whether it failed, of an output line. KeyError, TypeError or ValueError when it is none."""
    index, key = values["id"].removeprefix("batch_req_").split("-")
    return int(index), int(key, 16), values["response"]["status_code"] != 200


def relabel(values: dict[str, Any], head: Head) -> dict[str, Any]:
    """The values of an answer as those of another line, which asked the same."""
    name, body = _name(head), values["response"]["body"]
    if "id" in body:
        body = {**body, "id": _completion_id(head), "model": head.model}
    response = {**values["response"], "request_id": f"req_{name}", "body": body}
    return {**values, "id": f"batch_req_{name}", "custom_id": head.id, "response": response}


def _name(head: Head) -> str:
    return f"{head.index}-{head.key:016x}"


def _completion_id(head: Head) -> str:
    return f"{'chatcmpl' if head.form == 'chat.completion' else 'cmpl'}-{_name(head)}"


def _choice(head: Head, index: int, result: Result, spell: Spell | None) -> dict[str, Any]:
    is_chat = head.form == "chat.completion"
    choice: dict[str, Any] = {"index": index, **({"message": _message(result)} if is_chat else {"text": result.text})}
    reason = "tool_calls" if result.tool_calls and result.finish_reason == "stop" else result.finish_reason
    choice |= {"logprobs": None, "finish_reason": reason}
    if spell and result.logprobs is not None:
        choice["logprobs"] = (chat_logprobs if is_chat else completion_logprobs)(result.logprobs, spell)
    if spell and result.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs_object(result.prompt_logprobs, spell)
    return choice


def _message(result: Result) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    if result.tool_calls:
        message |= {"content": result.text or None, "tool_calls": [*map(tool_call_object, result.tool_calls)]}
    return message
