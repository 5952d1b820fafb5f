"""Thinking apart from content: `<think>...</think>` at the beginning of an answer, as its text streams.

Knows the tags, and that many templates write the first one, or both, at the end of the prompt. Does not know tokens.
Only the first block is thinking: tags in the content are content.
"""

from typing import Literal, NamedTuple, cast

from minisgl.errors import MinisglError

Style = Literal["none", "qwen3", "deepseek-r1"]
STYLES = ("auto", "none", "qwen3", "deepseek-r1")
START, END = "<think>", "</think>"


class Delta(NamedTuple):
    """What a piece of text adds to the answer."""

    reasoning: str
    content: str


def find_style(name: str, chat_template: str) -> Style:
    """The style that `name`, one of STYLES, stands for with this template. MinisglError for another name.

    qwen3: thinking is what stands behind `<think>`, in the answer or at the end of the prompt. deepseek-r1: an answer
    begins with thinking even if no one wrote `<think>`, for models whose template should have. none: all is content.
    auto: qwen3 for templates that know the tags, else none.
    """
    if name == "auto":
        return "qwen3" if START in chat_template or END in chat_template else "none"
    if name in STYLES:
        return cast(Style, name)
    raise MinisglError(f"reasoning parser {name!r} is not known; choose one of: {', '.join(STYLES)}")


class ReasoningParser:
    """The thinking and the content of one answer. All that `push` and then `finish` return, joined, is the answer
    without the tags and the line breaks beside them; where these are no tags of thinking they stay, in the content.

    An answer that goes on with a message that the prompt already has (continue_final_message): push that message's
    text first, and drop what comes out.
    """

    def __init__(self, style: Style, prompt: str = ""):
        """`prompt` is the rendered text that the answer follows: its end says whether thinking is open or over."""
        end = prompt.rstrip()
        is_over = style == "none" or end.endswith(END)
        self._thinks = not is_over and (style == "deepseek-r1" or end.endswith(START))
        self._may_start = not is_over  # nothing but the beginning of START has come
        self._trims = self._thinks  # line breaks that come now stand behind a tag
        self._held = ""  # text that later text decides on

    @property
    def may_think(self) -> bool:
        """Whether thinking is open, or may begin with what comes next."""
        return self._thinks or self._may_start

    def push(self, text: str) -> Delta:
        """Add the next piece of the answer; returns what later text cannot change."""
        reasoning = ""
        text = self._held + text
        self._held = ""
        if self._may_start:
            begun = text.lstrip()
            if START.startswith(begun) and begun != START:
                self._held = text
                return Delta("", "")
            self._may_start = False
            if begun.startswith(START):
                self._thinks = self._trims = True
                text = begun.removeprefix(START)
        if self._thinks:
            reasoning, text = self._split(self._trim(text))
        return Delta(reasoning, self._trim(text))

    def finish(self) -> Delta:
        """The rest, when no more text comes. Thinking that did not end (max_tokens) stays thinking."""
        rest, self._held = self._held, ""
        return Delta(self._trim(rest), "") if self._thinks else Delta("", rest)

    def _split(self, text: str) -> tuple[str, str]:
        """Thinking, and what follows it."""
        reasoning, tag, rest = text.partition(END)
        if tag:
            self._thinks, self._trims = False, True
            return reasoning.rstrip("\n"), rest
        at = text.rfind(END[0])
        if at < 0 or not END.startswith(text[at:]):
            at = len(text)
        certain = text[:at].rstrip("\n")
        self._held = text[len(certain) :]
        return certain, ""

    def _trim(self, text: str) -> str:
        if not self._trims:
            return text
        text = text.lstrip("\n")
        self._trims = not text
        return text
