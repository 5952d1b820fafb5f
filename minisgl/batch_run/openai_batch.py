"""OpenAI's Batch format: {"custom_id", "method", "url", "body"} in, {"id", "custom_id", "response", "error"} out.

    https://platform.openai.com/docs/api-reference/batch

Knows that format. The model that a body names is not used, -m chooses it, and comes back in the answer. Keys of the
body that ask for what this engine does not do are refused, unless their value says that it is not wanted.
"""

import time
from dataclasses import replace
from typing import Any

from minisgl.batch_run.rows import (
    PARAMETERS,
    Head,
    Row,
    RowError,
    kind,
    read_messages,
    read_n,
    read_params,
    read_prompt,
    read_token_ids,
    refuse,
)
from minisgl.request import Result, SamplingParams

FORMS = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}

IGNORED = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("stream_options", "parallel_tool_calls"),
)
UNANSWERED = ("logprobs", "prompt_logprobs")  # parameters of ours whose answer is in another form there
# What asks for nothing. None always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}


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
    if not isinstance(body, dict):
        refuse(f"body must be an object, not {kind(body)}")
    return _read_body(head, body, defaults, default_n)


def _read_body(head: Head, body: dict[str, Any], defaults: SamplingParams, default_n: int) -> Row:
    source = "messages" if head.form == "chat.completion" else "prompt"
    body = {key: value for key, value in body.items() if not _asks_nothing(key, value)}
    for key in body:
        if key not in (source, "n", *PARAMETERS, *IGNORED) or key in UNANSWERED:
            refuse(f"{key!r} in the body is not supported; leave it out", "invalid_parameter")
    params, n = read_params(body, defaults), read_n(body.get("n"), default_n)
    for name in UNANSWERED:
        if getattr(params, name) is not None:
            refuse(f"{name} (a flag) is not supported for OpenAI's lines; leave it out", "invalid_parameter")
    value = body.get(source)
    if value is None:
        refuse(f"the body has no {source}")
    if source == "messages":
        return Row(head, params, messages=read_messages(value), n=n)
    several = isinstance(value, list) and value and isinstance(value[0], (str, list))
    prompts = [_read_prompt(prompt) for prompt in (value if several else [value])]
    first = prompts[0]
    asked = {"prompt": first} if isinstance(first, str) else {"prompt_token_ids": first}
    return Row(replace(head, num_prompts=len(prompts)), params, n=n, more_prompts=tuple(prompts[1:]), **asked)


def _asks_nothing(key: str, value: Any) -> bool:
    return value is None or any(type(value) is type(none) and value == none for none in NEUTRAL.get(key, ()))


def _read_prompt(value: Any) -> str | list[int]:
    return read_token_ids(value) if isinstance(value, list) else read_prompt(value)


def answer_values(head: Head, outcome: list[Result] | RowError) -> dict[str, Any]:
    """The output line of an OpenAI line. Its id holds the row's index and key."""
    name = _name(head)
    error = None
    if isinstance(outcome, RowError):
        error = {"code": outcome.type, "message": outcome.message}
        status, body = 400, {"error": {**error, "type": "invalid_request_error", "param": None}}
    else:
        status, body = 200, _completion(head, outcome)
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


def _completion(head: Head, results: list[Result]) -> dict[str, Any]:
    choices = []
    for index, result in enumerate(results):
        content: dict[str, Any] = {"text": result.text}
        if head.form == "chat.completion":
            content = {"message": {"role": "assistant", "content": result.text, "refusal": None}}
        choices.append({"index": index, **content, "logprobs": None, "finish_reason": result.finish_reason})
    firsts = results[:: len(results) // head.num_prompts]  # the answers to one prompt follow one another
    prompt_tokens = sum(result.usage.prompt_tokens for result in firsts)
    completion_tokens = sum(result.usage.completion_tokens for result in results)
    return {
        "id": _completion_id(head),
        "object": head.form,
        "created": int(time.time()),
        "model": head.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(result.usage.cached_tokens for result in firsts)},
        },
    }
