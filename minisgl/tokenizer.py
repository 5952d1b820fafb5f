"""Text -> token ids and back, and chat templates: what transformers' AutoTokenizer does, checked for one request.

Knows a model folder's tokenizer files. Does not know sampling, stop strings or streaming (`detokenizer` does), nor what
an answer with thinking or tool calls looks like (`parsers` do). Code from a checkpoint never runs; chat templates run
in transformers' sandboxed Jinja.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisgl.chat_template import check_template_kwargs, names_read
from minisgl.errors import MinisglError, RequestError
from minisgl.messages import Message, Messages, normalize_messages, with_text_arguments

Tools = Sequence[Mapping[str, Any]]  # [{"type": "function", "function": {"name", "description", "parameters"}}, ...]


# Tokens of common vocabularies are shorter (Qwen's longest is 128 spaces). Tokenizing megabytes takes seconds, so a
# text that cannot fit the context is refused before.
MAX_CHARS_PER_TOKEN = 256


def check_chars(num_chars: int, max_len: int) -> None:
    """RequestError when no tokenizer can make a prompt of so many characters fit a context of `max_len` tokens."""
    if num_chars > MAX_CHARS_PER_TOKEN * max_len:
        raise RequestError(
            f"the prompt has {num_chars:,} characters, which the context of {max_len:,} tokens cannot hold: shorten it",
            "prompt_too_long",
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the files of a tokenizer."""
    return any(folder.glob("tokenizer*"))


class Tokenizer:
    """The tokenizer of a model folder. Loading imports transformers, which takes a few seconds.

    vocab_size: ids are below it; the model's own may be padded to more.
    chat_template: its text, "" when the model has none; several, such as one with tools, follow one another.
    """

    @classmethod
    def of_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model folder; None where it has none: token ids in and out need none."""
        return cls(folder) if has_tokenizer(folder) else None

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # not at the top: 3 s

        try:
            self._hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # ValueError, OSError, ImportError, and what the Rust side raises
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            fix = "copy tokenizer.json and tokenizer_config.json of the model into it"
            if (folder / "tokenizer.json").exists():
                fix = f"correct what it names, or {fix} anew"
            raise MinisglError(f"{folder} has no tokenizer that transformers can load ({reason}); {fix}") from error
        self._rust = self._hf.backend_tokenizer if self._hf.is_fast else None
        if self._rust is not None:  # what transformers does before each call
            self._rust.no_truncation()
            self._rust.no_padding()
            self._rust.encode_special_tokens = self._hf.split_special_tokens
        self.vocab_size = len(self._hf)
        self.bos_id: int | None = self._hf.bos_token_id
        self.eos_id: int | None = self._hf.eos_token_id
        templates = self._hf.chat_template or ""
        templates = list(templates.values()) if isinstance(templates, dict) else [templates]
        if not all(isinstance(template, str) for template in templates):
            raise MinisglError(f"{folder}: chat_template is no text: correct tokenizer_config.json, or remove it there")
        self.chat_template = "\n".join(templates)
        try:
            self._template_names = frozenset[str]().union(*map(names_read, templates))
        except MinisglError as error:
            fix = "correct it in chat_template.jinja or tokenizer_config.json, or remove it there"
            raise MinisglError(f"{folder}: {error}; {fix}") from error

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` that does the work; None when the model has a slow tokenizer only."""
        return self._rust

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the special tokens that the model expects around it (such as a first BOS)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel and without the GIL. RequestError when one is not valid Unicode."""
        return self._encode(texts, add_special_tokens=True)

    def apply_chat_template(
        self, messages: Messages, tools: Tools | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of a conversation, ending where the assistant's answer begins. RequestError says what is wrong."""
        return self.encode_rendered([self.render(messages, tools, template_kwargs)])[0]

    def render(
        self, messages: Messages, tools: Tools | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a conversation, with the special tokens that its template writes. RequestError as above.

        tools: OpenAI's, checked before (`parsers.check_tools`); refused when the template has no place for them.
        template_kwargs: those of `chat_template.TEMPLATE_KWARGS` that the template reads, with None as "not given".
        `continue_final_message` leaves the last message, the assistant's, open so that the answer goes on with it.
        """
        conversation = normalize_messages(messages)
        if not self.has_chat_template:
            raise RequestError(
                "the model has no chat template: send a prompt instead of messages, or use a chat model",
                "no_chat_template",
            )
        if tools and "tools" not in self._template_names:
            raise RequestError(
                "the model's chat template has no place for tools: leave tools out, or use a model trained on them",
                "invalid_parameter",
            )
        kwargs = check_template_kwargs(template_kwargs or {}, self._template_names)
        goes_on = kwargs.get("continue_final_message", False)
        if goes_on and conversation[-1]["role"] != "assistant":
            raise RequestError(
                f"continue_final_message needs the assistant's message as the last one, not the "
                f"{conversation[-1]['role']}'s",
                "invalid_messages",
            )
        kwargs.setdefault("add_generation_prompt", not goes_on)
        try:
            text = self._render(conversation, tools, kwargs)
        except Exception as error:  # the template is the model's code: it may raise anything
            raise RequestError(
                f"the model's chat template refused the messages: {error}", "invalid_messages"
            ) from error
        _check_unicode(text)
        return text

    def _render(self, conversation: list[Message], tools: Tools | None, kwargs: Mapping[str, Any]) -> str:
        options = {"tokenize": False, "tools": [dict(tool) for tool in tools] if tools else None, **kwargs}
        try:
            text: str = self._hf.apply_chat_template(conversation, **options)
        except TypeError:
            as_text = with_text_arguments(conversation)
            if as_text == conversation:
                raise
            text = self._hf.apply_chat_template(as_text, **options)  # DeepSeek-R1's adds arguments to a string
        return text

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` of texts that `render` made: no special tokens are added."""
        return self._encode(texts, add_special_tokens=False)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids, without special tokens or with them; bytes that are no UTF-8 become U+FFFD.

        Spaces before punctuation stay as the model wrote them (transformers calls their removal clean-up).
        """
        if self._rust is not None:  # past transformers: 1.4 us instead of 5 for a few ids
            text: str = self._rust.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            text = self._hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        for text in texts:
            _check_unicode(text)
        if not texts:
            return []
        ids: list[list[int]]
        if self._rust is not None:  # past transformers: a quarter less time, and 2 us with the GIL instead of 16
            encoded = self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            ids = [one.ids for one in encoded]
        else:
            options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
            ids = self._hf(list(texts), **options)["input_ids"]
        return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the prompt is not valid Unicode: {error.reason} at character {error.start}"
        raise RequestError(message, "invalid_prompt") from error
