"""What the bodies of /v1/chat/completions and /v1/completions ask.

    https://platform.openai.com/docs/api-reference/chat/create
    https://platform.openai.com/docs/api-reference/completions/create

Knows OpenAI's keys, and those that other servers add: every field of SamplingParams, chat_template_kwargs,
continue_final_message, add_generation_prompt, separate_reasoning, stream_options.continuous_usage_stats. Does not know
models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minisgl.errors import RequestError
from minisgl.messages import Message, normalize_messages
from minisgl.openai.errors import FieldError
from minisgl.openai.fields import Fields, quoted
from minisgl.parsers import read_tools
from minisgl.request import MAX_INT, SamplingParams

NO_PARAMS = SamplingParams()
MAX_PROMPTS = 1024  # in one body
# They say who asks and why, or are hints: no answer is another one for them.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# The values of unsupported keys that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
SHARED_PARAMS = {name: name for name in SamplingParams.names() if name not in ("logprobs", "echo")}
CHAT_PARAMS = SHARED_PARAMS | {"max_completion_tokens": "max_tokens"}
COMPLETION_PARAMS = SHARED_PARAMS | {"logprobs": "logprobs", "echo": "echo"}
TEMPLATE_KEYS = ("continue_final_message", "add_generation_prompt", "reasoning_effort", "documents")


@dataclass(frozen=True)
class Asked:
    """A body, read. Either `messages` or `prompts` are there; each prompt gets `params.n` answers."""

    model: str
    params: SamplingParams
    messages: tuple[Message, ...] = ()
    prompts: tuple[str | list[int], ...] = ()
    chat_options: Mapping[str, Any] = field(default_factory=dict)  # of ChatFormat.prompt
    separate_reasoning: bool = True  # thinking comes as reasoning_content, and not within the content
    stream: bool = False
    include_usage: bool = False  # a last chunk of the stream has it
    usage_in_chunks: bool = False  # every chunk has that of its answer so far, and every token is in a chunk at once


def read_chat(body: Any, defaults: SamplingParams = NO_PARAMS) -> Asked:
    """A body of /v1/chat/completions. RequestError, or FieldError with the key, for what cannot be asked."""
    fields = Fields(body)
    head = _read_head(fields)
    params = fields.take_params(CHAT_PARAMS, defaults)
    if fields.take("logprobs", bool, False):
        params = replace(params, logprobs=0)
    num_top = fields.take_any("top_logprobs")
    if num_top:
        if params.logprobs is None:
            fields.refuse("top_logprobs", "needs logprobs: true")
        try:
            params = replace(params, logprobs=num_top)
        except RequestError:
            fields.refuse("top_logprobs", f"is {quoted(num_top)}; it must be an integer from 0 to 20")
    try:
        messages = normalize_messages(fields.take_any("messages"))
    except RequestError as error:
        raise FieldError(str(error), "messages", error.type) from None
    asked = Asked(
        params=params,
        messages=tuple(messages),
        chat_options={**_read_tools(fields), "template_kwargs": _read_template_kwargs(fields)},
        separate_reasoning=fields.take("separate_reasoning", bool, True),
        **head,
    )
    fields.end(LABELS, NEUTRAL)
    return asked


def read_completion(body: Any, defaults: SamplingParams = NO_PARAMS) -> Asked:
    """A body of /v1/completions, as above."""
    fields = Fields(body)
    head = _read_head(fields)
    params = fields.take_params(COMPLETION_PARAMS, defaults)
    prompts = read_prompts(fields, "prompt")
    fields.end(LABELS, NEUTRAL)
    return Asked(params=params, prompts=prompts, **head)


def read_prompts(fields: Fields, name: str) -> tuple[str | list[int], ...]:
    """One prompt or a list of them; a prompt is a string or a list of token ids."""
    value = fields.take_any(name)
    if value is None:
        fields.refuse(name, "is missing", "invalid_prompt")
    several = isinstance(value, list) and value and isinstance(value[0], (str, list))
    prompts = value if several else [value]
    if len(prompts) > MAX_PROMPTS:
        fields.refuse(name, f"has {len(prompts):,} prompts; at most {MAX_PROMPTS:,} are allowed", "invalid_prompt")
    for prompt in prompts:
        ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        if not isinstance(prompt, str) and not ids:
            fields.refuse(name, "must be a string, a list of token ids, or a list of these", "invalid_prompt")
        if ids and not 0 <= min(prompt) <= max(prompt) <= MAX_INT:
            fields.refuse(name, f"has a token id that is not from 0 to {MAX_INT}", "invalid_token_id")
    return tuple(prompts)


def _read_head(fields: Fields) -> dict[str, Any]:
    """Model, stream, and where the stream has usage, as fields of Asked."""
    head = {"model": fields.take("model", str, ""), "stream": fields.take("stream", bool, False)}
    options = fields.take_any("stream_options")
    if options is None:
        return head
    if not head["stream"]:
        fields.refuse("stream_options", "needs stream: true")
    own = Fields(options, "stream_options.")
    head["include_usage"] = own.take("include_usage", bool, False)
    head["usage_in_chunks"] = own.take("continuous_usage_stats", bool, False)  # vLLM's name
    own.end(neutral={"include_obfuscation": (False, True)})  # padding against eavesdroppers who count bytes
    return head


def _read_tools(fields: Fields) -> dict[str, Any]:
    values = {name: fields.take_any(name) for name in ("tools", "tool_choice", "parallel_tool_calls")}
    try:
        read_tools(**values)
    except RequestError as error:
        named = [name for name in values if str(error).startswith(name)]
        raise FieldError(str(error), max(named, key=len, default="tools"), error.type) from None
    return values


def _read_template_kwargs(fields: Fields) -> dict[str, Any]:
    """chat_template_kwargs, and those that have a key of their own."""
    kwargs = dict(fields.take("chat_template_kwargs", dict, {}))
    for name in TEMPLATE_KEYS:
        value = fields.take_any(name)
        if value is not None:
            kwargs[name] = value
    return kwargs
