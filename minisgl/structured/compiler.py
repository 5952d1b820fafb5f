"""Grammars of many requests: compiled once, kept while they are in use, refused when they would take too much.

Knows llguidance's limits. Does not know where a request stands in its grammar (`matcher` does).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from minisgl.errors import RequestError
from minisgl.structured.matcher import Grammar, short
from minisgl.structured.probe import GrammarProbe
from minisgl.structured.response_format import ResponseFormat
from minisgl.structured.vocabulary import Vocabulary
from minisgl.tokenizer import Tokenizer

# Of llguidance's defaults, two allow more than one request may take from the others: a mask of 50,000 items takes 0.5 s
# (a union of 2,000 objects), and a lexer of 250,000 states 500 MB.
LIMITS: dict[str, Any] = {"step_max_items": 10_000, "max_lexer_states": 50_000, "verbose_errors": False}


class GrammarCompiler:
    """Makes `Grammar`s for one model; usable from many threads.

    vocab_size: of the model, whose ids may be more than the tokenizer's; eos_ids: the ids that may end an answer.
    timeout_s: of one grammar. max_grammars: kept, the ones used last; so are the reasons of those that were refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Iterable[int],
        *,
        timeout_s: float = 10.0,
        max_grammars: int = 128,
    ) -> None:
        self._model = (tokenizer, vocab_size, frozenset(eos_ids))
        self._timeout_s = timeout_s
        self._max_grammars = max_grammars
        self._kept: OrderedDict[ResponseFormat, Grammar | RequestError] = OrderedDict()
        self._lock = threading.Lock()  # of what is below, and of _kept
        self._vocabulary: Vocabulary | None = None
        self._probe: GrammarProbe | None = None

    def compile(self, response_format: ResponseFormat) -> Grammar:
        """The grammar of a format. RequestError says why llguidance refused it, or that it takes too long or too much.

        Blocks without the GIL: for about a millisecond when the format is new, for seconds the first time (llguidance
        reads the tokenizer), for `timeout_s` at most when the format is too much.
        """
        with self._lock:
            kept = self._kept.get(response_format)
            if kept is not None:
                self._kept.move_to_end(response_format)
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(*self._model)
                self._probe = GrammarProbe(self._vocabulary.settings, LIMITS, self._timeout_s)
            vocabulary, probe = self._vocabulary, self._probe
            assert probe is not None
        if isinstance(kept, Grammar) and not kept.is_exhausted:
            return kept
        if isinstance(kept, RequestError):
            raise RequestError(str(kept), kept.type)
        made = self._try(response_format, vocabulary, probe)
        with self._lock:
            self._kept[response_format] = made
            self._kept.move_to_end(response_format)
            while len(self._kept) > self._max_grammars:
                self._kept.popitem(last=False)
        if isinstance(made, RequestError):
            raise made
        return made

    def close(self) -> None:
        """End the process that tries grammars. Matchers go on; a new grammar starts it again."""
        if self._probe is not None:
            self._probe.close()

    @staticmethod
    def _try(response_format: ResponseFormat, vocabulary: Vocabulary, probe: GrammarProbe) -> Grammar | RequestError:
        reason, lark = probe.try_grammar(response_format.lark(vocabulary.special_texts))
        if not reason:
            made = _compile(lark, vocabulary, names_tokens=response_format.grammar is not None)
            if isinstance(made, Grammar):
                return made
            reason = made
        return RequestError(f"{response_format.kind} cannot be used: {short(reason)}", "invalid_parameter")


class GrammarCopies:
    """Grammars that a `GrammarCompiler` of the same model has passed in another process, made again here."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int], *, max_grammars: int = 128):
        self._vocabulary = Vocabulary(tokenizer, vocab_size, frozenset(eos_ids))
        self._max_grammars = max_grammars
        self._kept: OrderedDict[tuple[str, bool], Grammar] = OrderedDict()

    def get(self, lark: str, names_tokens: bool) -> Grammar:
        """See `Grammar`."""
        kept = self._kept.pop((lark, names_tokens), None)
        if kept is None or kept.is_exhausted:
            made = _compile(lark, self._vocabulary, names_tokens=names_tokens)
            assert isinstance(made, Grammar), made
            kept = made
        self._kept[lark, names_tokens] = kept
        while len(self._kept) > self._max_grammars:
            self._kept.popitem(last=False)
        return kept


def _compile(lark: str, vocabulary: Vocabulary, *, names_tokens: bool) -> Grammar | str:
    """The grammar, or what llguidance has against it."""
    from llguidance import LLMatcher, LLParserLimits

    prototype = LLMatcher(vocabulary.ll, lark, log_level=0, limits=LLParserLimits(**LIMITS))
    return prototype.get_error() or Grammar(prototype, vocabulary, lark, names_tokens=names_tokens)
