"""Where requests stand in their grammars: masks of the tokens that may come next.

Legend: M matchers, V vocabulary of the model, W = ceil(V / 32) words. masks  # [M, W] int32, bit id % 32 of word id //
32, as `kernels.logits` reads them.

Knows one grammar and the tokens of one answer. Does not know how grammars are made, nor the engine: what goes wrong
ends the request that asked for it, and stands in `Matcher.error`.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from minisgl.errors import RequestError
from minisgl.structured.vocabulary import Ints, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher


NO_TOKEN = "no token can come next, or only a special one: the text that must come spells a special token of the model"


class Grammar:
    """A compiled grammar, as it is before the first token.

    Matchers of one grammar share its lexer, whose states one finds for all: llguidance computes their masks one after
    another, those of different grammars side by side. When the states become too many, `is_exhausted`: the compiler
    then makes a new one for later requests.
    """

    def __init__(self, prototype: "LLMatcher", vocabulary: Vocabulary, lark: str, *, names_tokens: bool) -> None:
        """lark: what it was compiled from. names_tokens: it can name special tokens, and means them where its masks
        have them."""
        self.lark = lark
        self._prototype = prototype
        self.vocabulary = vocabulary
        self.names_tokens = names_tokens
        self.is_exhausted = False

    def matcher(self, after_id: int | None = None) -> "Matcher":
        """For one request, in microseconds. With `after_id`, the grammar begins after this token (`</think>`); until
        then any token may come but the end of the text."""
        return Matcher(self, self._prototype.deep_copy(), after_id)


class Matcher:
    """One request in its grammar. Use it from one thread at a time.

    error: None, or why the request must end; it stays, and masks then allow the end of the text only. after_id: the
    token behind which the grammar begins; None once it has begun.
    """

    def __init__(self, grammar: Grammar, ll: "LLMatcher", after_id: int | None) -> None:
        self.error: RequestError | None = None
        self.grammar = grammar
        self.ll = ll
        self.after_id = after_id

    @property
    def is_waiting(self) -> bool:
        """The grammar has not begun: `after_id` has not been seen."""
        return self.after_id is not None

    @property
    def finished(self) -> bool:
        """The answer is complete: only the end of the text can come, or has come."""
        return self.error is None and not self.is_waiting and self.ll.is_stopped()

    def advance(self, token_id: int) -> None:
        """Go on by a token of the answer, the end of the text included. A token that no mask allowed sets `error`."""
        if self.error is not None:
            return
        if self.is_waiting:
            if token_id == self.after_id:
                self.after_id = None
            return
        if not self.ll.consume_token(token_id):
            self._fail(self.ll.get_error())

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would split their text; [] when there is a choice, or the
        end. They are not advanced over."""
        if self.error is not None or self.is_waiting or self.ll.is_stopped():
            return []
        tokens = self.ll.compute_ff_tokens()
        if not tokens:
            return []
        vocabulary, ids = self.grammar.vocabulary, np.asarray(tokens)
        row = vocabulary.known & ~vocabulary.eos
        if not self.grammar.names_tokens:
            row &= ~vocabulary.special
        fits = (row[ids // 32] >> ids % 32 & 1).astype(bool)
        return tokens if fits.all() else tokens[: int(fits.argmin())]  # a mask says why

    def fill_mask(self, mask: Ints) -> None:
        """Write the tokens that may come next into `mask`  # [W] int32, contiguous."""
        fill_masks([self], mask[None])

    def _check(self, mask: Ints) -> None:
        """After llguidance filled the mask, which ends the text when it failed: cut what must not come."""
        vocabulary, words = self.grammar.vocabulary, self.grammar.vocabulary.reserved
        if self.ll.is_error():
            self._fail(self.ll.get_error())
            mask[:] = vocabulary.eos
            return
        cut = self.grammar.names_tokens  # ids that the tokenizer has not: only a grammar can name them
        if cut:
            mask[vocabulary.padded] &= vocabulary.known[vocabulary.padded]
        elif (mask[words] & vocabulary.special[words]).any():
            mask &= ~vocabulary.special
            cut = True
        if (mask[words] & vocabulary.eos[words]).any() and not self.ll.is_accepting():
            mask &= ~vocabulary.eos
            cut = True
        if cut and not mask.any():
            self.error = _error(NO_TOKEN)
            mask[:] = vocabulary.eos

    def _fail(self, reason: str) -> None:
        """llguidance gave up; where its lexer has too many states, so would the grammar's next matcher."""
        self.error = _error(reason)
        self.grammar.is_exhausted = True


def fill_masks(matchers: Sequence[Matcher], masks: Ints) -> None:
    """Write the tokens that may come next for each matcher into its row of `masks`  # [M, W] int32, contiguous.

    Matchers are of one compiler, and each is there once. Never raises for what a request did: see `Matcher.error`.
    Threads of llguidance compute side by side, without the GIL.
    """
    if not matchers:
        return
    vocabulary = matchers[0].grammar.vocabulary
    shape = (len(matchers), vocabulary.num_words)
    if masks.dtype != np.int32 or masks.shape != shape or not masks.flags.c_contiguous:
        raise ValueError(f"masks: must be contiguous int32 {shape}, not {masks.dtype} {masks.shape}")
    asking = []
    for row, matcher in enumerate(matchers):
        if matcher.error is not None:
            masks[row] = vocabulary.eos
        elif matcher.is_waiting:
            masks[row] = vocabulary.known & ~vocabulary.eos
        else:
            asking.append((matcher.ll, row))
    if asking:
        vocabulary.executor.unsafe_compute_mask_ptr(asking, masks.ctypes.data, masks.shape[1] * 4, len(matchers))
    for _, row in asking:
        matchers[row]._check(masks[row])


def short(reason: str) -> str:
    """What llguidance says, in one line of bounded length, without the listing of the grammar."""
    line = " ".join(re.split(r"\n\s*\d+ \||<non-verbose/>", reason)[0].split())
    return line if len(line) <= 400 else f"{line[:200]} ... {line[-200:]}"


def _error(reason: str) -> RequestError:
    return RequestError(f"structured output: {short(reason)}", "structured_output_failed")
