"""OpenAI's Batch format: {"custom_id", "method", "url", "body"} in, {"id", "custom_id", "response", "error"} out.

    https://platform.openai.com/docs/api-reference/batch

Knows that format. The model that a body names is not used, -m chooses it, and comes back in the answer. Keys of the
body that ask for what this engine does not do are refused, unless their value says that it is not wanted.
"""

import time
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
# What asks for nothing. None always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
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
    for key, value in body.items():
        known = key in (source, "n", *PARAMETERS, *IGNORED) or value is None
        if not known and value not in NEUTRAL.get(key, ()):
            refuse(f"{key!r} in the body is not supported; leave it out", "invalid_parameter")
    params, n = read_params(body, defaults), read_n(body.get("n"), default_n)
    value = body.get(source)
    if value is None:
        refuse(f"the body has no {source}")
    if source == "messages":
        return Row(head, params, messages=_read_messages(value), n=n)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, list) and value and not isinstance(value[0], int):
        refuse("prompt has several prompts; give one in each line", "invalid_prompt")
    if isinstance(value, list):
        return Row(head, params, prompt_token_ids=read_token_ids(value), n=n)
    return Row(head, params, prompt=read_prompt(value), n=n)


def _read_messages(value: Any) -> list[dict[str, Any]]:
    """OpenAI calls the system role of its newer models "developer"."""
    if isinstance(value, list):
        value = [
            {**item, "role": "system"} if isinstance(item, dict) and item.get("role") == "developer" else item
            for item in value
        ]
    return read_messages(value)


def answer_values(head: Head, outcome: list[Result] | RowError) -> dict[str, Any]:
    """The output line of an OpenAI line. Its id holds the row's index and key."""
    name = _name(head)
    error = None
    if isinstance(outcome, RowError):
        error = {"code": outcome.type, "message": outcome.message}
        status, body = 400, {"error": {**error, "type": "invalid_request_error", "param": None}}
    else:
        status, body = 200, _completion(head, name, outcome)
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": head.id, "response": response, "error": error}


def read_mark(values: dict[str, Any]) -> tuple[int, int, bool]:
    """Index, key and whether it failed, of an output line. KeyError, TypeError or ValueError when it is none."""
    index, key = values["id"].removeprefix("batch_req_").split("-")
    return int(index), int(key, 16), values["response"]["status_code"] != 200


def relabel(values: dict[str, Any], head: Head) -> dict[str, Any]:
    """The values of an answer as those of another line, which asked the same."""
    name = _name(head)
    response = {**values["response"], "request_id": f"req_{name}"}
    return {**values, "id": f"batch_req_{name}", "custom_id": head.id, "response": response}


def _name(head: Head) -> str:
    return f"{head.index}-{head.key:016x}"


def _completion(head: Head, name: str, results: list[Result]) -> dict[str, Any]:
    chat = head.form == "chat.completion"
    choices = []
    for index, result in enumerate(results):
        content: dict[str, Any] = {"text": result.text}
        if chat:
            content = {"message": {"role": "assistant", "content": result.text, "refusal": None}}
        choices.append({"index": index, **content, "logprobs": None, "finish_reason": result.finish_reason})
    prompt_tokens = results[0].usage.prompt_tokens
    completion_tokens = sum(result.usage.completion_tokens for result in results)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": head.form,
        "created": int(time.time()),
        "model": head.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": results[0].usage.cached_tokens},
        },
    }
