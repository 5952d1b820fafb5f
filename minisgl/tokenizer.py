"""Text -> token ids and back, and chat templates: what transformers' AutoTokenizer does, checked for one request.

Knows a model folder's tokenizer files. Does not know sampling, stop strings or streaming (`detokenizer` does).
Code from a checkpoint never runs; chat templates run in transformers' sandboxed Jinja.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minisgl.errors import MinisglError, RequestError

Messages = Sequence[Mapping[str, Any]]  # [{"role": "user", "content": "..."}, ...]
ROLES = ("system", "user", "assistant", "tool")


class Tokenizer:
    """The tokenizer of a model folder. Loading imports transformers, which takes a few seconds.

    vocab_size: ids are below it; the model's own may be padded to more.
    """

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # not at the top: 3 s

        try:
            self._hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # ValueError, OSError, ImportError, and what the Rust side raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise MinisglError(
                f"{folder} has no tokenizer that transformers can load ({reason}); "
                "copy tokenizer.json and tokenizer_config.json of the model into it"
            ) from error
        self._rust = self._hf.backend_tokenizer if self._hf.is_fast else None
        self.vocab_size = len(self._hf)
        self.eos_id: int | None = self._hf.eos_token_id
        self.has_chat_template: bool = bool(self._hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the special tokens that the model expects around it (such as a first BOS)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel and without the GIL. RequestError when one is not valid Unicode."""
        return self._encode(texts, add_special_tokens=True)

    def apply_chat_template(self, messages: Messages) -> list[int]:
        """The ids of a conversation, ending where the assistant's answer begins. RequestError says what is wrong."""
        return self.encode_rendered([self.render(messages)])[0]

    def render(self, messages: Messages) -> str:
        """The text of a conversation, with the special tokens that its template writes. RequestError as above."""
        check_messages(messages)
        if not self.has_chat_template:
            raise RequestError(
                "the model has no chat template: send a prompt instead of messages, or use a chat model",
                "no_chat_template",
            )
        try:
            text: str = self._hf.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template is the model's code: it may raise anything
            raise RequestError(
                f"the model's chat template refused the messages: {error}", "invalid_messages"
            ) from error
        _check_unicode(text)
        return text

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` of texts that `render` made: no special tokens are added."""
        return self._encode(texts, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD.

        Spaces before punctuation stay as the model wrote them (transformers calls their removal clean-up).
        """
        if self._rust is not None:  # past transformers: 1.4 us instead of 5 for a few ids
            text: str = self._rust.decode(ids, skip_special_tokens=True)
        else:
            text = self._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        for text in texts:
            _check_unicode(text)
        if not texts:
            return []
        encoded = self._hf(
            list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the prompt is not valid Unicode: {error.reason} at character {error.start}"
        raise RequestError(message, "invalid_prompt") from error


def check_messages(messages: Messages) -> None:
    """RequestError unless `messages` is a non-empty list of objects, each with a known role and a text."""
    if not isinstance(messages, (list, tuple)) or not messages:
        _refuse('messages must be a non-empty list such as [{"role": "user", "content": "Hello"}]')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            _refuse(f"messages[{index}] is {_kind(message)}; it must be an object with role and content")
        if message.get("role") not in ROLES:
            _refuse(f"messages[{index}] has role {message.get('role')!r}; accepted: {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            _refuse(f"messages[{index}] has content that is {_kind(message.get('content'))}; it must be a string")


def _refuse(message: str) -> NoReturn:
    raise RequestError(message, "invalid_messages")


def _kind(value: object) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"
