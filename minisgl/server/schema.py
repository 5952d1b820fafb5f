"""The OpenAPI form of bodies, made from the table of sampling parameters.

Knows names, types and ranges. The readers in `openai` decide; this is for people and tools that read documents.
"""

from dataclasses import fields
from typing import Any, get_args

from minisgl.batch_run.openai_batch import FORMS
from minisgl.openai import bodies, responses
from minisgl.request import SamplingParams
from minisgl.server import native

Schema = dict[str, Any]
TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}
STRINGS: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
TEXTS: Schema = {"anyOf": [*STRINGS["anyOf"], IDS, {"type": "array", "items": IDS}]}
OBJECT: Schema = {"type": "object"}
MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant", "tool"]}, "content": {"type": "string"}},
    },
}
STREAM: Schema = {"model": {"type": "string"}, "stream": {"type": "boolean"}}


def _parameter(name: str) -> Schema:
    setting = next(setting for setting in fields(SamplingParams) if setting.name == name)
    others = {"stop": STRINGS, "bad_words": STRINGS, "stop_token_ids": IDS}
    if not setting.metadata:
        return others.get(name, OBJECT)
    kind = (get_args(setting.type) or (setting.type,))[0].__name__
    schema: Schema = {"type": TYPES[kind], "description": setting.metadata["help"]}
    limits = {"minimum": setting.metadata["low"], "maximum": setting.metadata["high"]}
    return schema | {key: value for key, value in limits.items() if value is not None}


def _parameters(names: dict[str, str]) -> Schema:
    return {key: _parameter(name) for key, name in names.items()}


def _body(properties: Schema, *required: str) -> Schema:
    schema = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


CHAT = _body(
    {
        "messages": MESSAGES,
        **STREAM,
        **_parameters(bodies.CHAT_PARAMS),
        "stream_options": OBJECT,
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "tools": {"type": "array", "items": OBJECT},
        "tool_choice": {"anyOf": [{"type": "string"}, OBJECT]},
        "parallel_tool_calls": {"type": "boolean"},
        "chat_template_kwargs": OBJECT,
        "separate_reasoning": {"type": "boolean"},
    },
    "messages",
)
COMPLETION = _body(
    {"prompt": TEXTS, **STREAM, **_parameters(bodies.COMPLETION_PARAMS), "stream_options": OBJECT}, "prompt"
)
RESPONSE = _body(
    {
        "input": {"anyOf": [{"type": "string"}, MESSAGES]},
        "instructions": {"type": "string"},
        "text": OBJECT,
        **STREAM,
        **_parameters(responses.PARAMS),
    },
    "input",
)
EMBEDDINGS = _body(
    {
        "input": TEXTS,
        "model": {"type": "string"},
        "encoding_format": {"enum": ["float", "base64"]},
        "pooling": {"enum": ["last", "mean"]},
    },
    "input",
)
GENERATE = _body(
    {
        "text": STRINGS,
        "input_ids": {"anyOf": [IDS, {"type": "array", "items": IDS}]},
        "sampling_params": {"type": "object", "properties": _parameters(native.PARAMS)},
        "stream": {"type": "boolean"},
        "rid": {"type": "string"},
        "return_logprob": {"type": "boolean"},
        "top_logprobs_num": {"type": "integer", "minimum": 0, "maximum": 20},
        "logprob_start_len": {"enum": [-1, 0]},
    }
)
TOKENIZE = _body(
    {
        "prompt": STRINGS,
        "messages": MESSAGES,
        "model": {"type": "string"},
        "add_special_tokens": {"type": "boolean"},
    }
)
DETOKENIZE = _body({"tokens": IDS, "model": {"type": "string"}, "skip_special_tokens": {"type": "boolean"}}, "tokens")
ABORT = _body({"rid": {"type": "string"}, "abort_all": {"type": "boolean"}})
FILE: Schema = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"enum": ["batch"]},
                        "expires_after[anchor]": {"enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                }
            }
        },
    }
}
BATCH = _body(
    {
        "input_file_id": {"type": "string"},
        "endpoint": {"enum": list(FORMS)},
        "completion_window": {"enum": ["24h"]},
        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
        "output_expires_after": OBJECT,
    },
    "input_file_id",
    "endpoint",
    "completion_window",
)
