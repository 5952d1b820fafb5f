"""Structured output: what an answer has to look like, as masks of allowed tokens from `llguidance`.

    response_format  what a request asks for, and its llguidance grammar
    vocabulary       the model's tokens as llguidance sees them
    probe            a process of its own that tries a grammar before the engine does
    compiler         grammars of many requests: compiled once, kept, handed out
    matcher          where one request stands in its grammar, and the masks of a batch

Knows token ids and text. Does not know the engine, devices or tensors. Needs `pip install minisgl[structured]`.
"""

from minisgl.structured.compiler import GrammarCompiler, GrammarCopies
from minisgl.structured.matcher import Grammar, Matcher, fill_masks
from minisgl.structured.response_format import ResponseFormat

__all__ = ["Grammar", "GrammarCompiler", "GrammarCopies", "Matcher", "ResponseFormat", "fill_masks"]
