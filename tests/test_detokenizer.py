import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from minisgl.detokenizer import MAX_WINDOW, Detokenizer
from minisgl.tokenizer import Tokenizer
from tests.tiny_models import EOS_ID, VOCAB_SIZE, make_tokenizer

TEXT = "naïve 😀👩‍👩‍👧 日本語, the  end.\n\tthe �"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Byte-level BPE: most characters outside ASCII are several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(folder)


class Sentencepiece:
    """Like Llama 2's tokenizer: spaces are part of tokens, the first one is dropped, unknown characters are bytes."""

    def __init__(self):
        tokens = (
            [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [f"▁{letter}" for letter in "theund"] + [*"theund."]
        )
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", x) for x in "theund"], byte_fallback=True)
        self.rust = RustTokenizer(bpe)
        self.rust.pre_tokenizer = pre_tokenizers.Metaspace()
        self.rust.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def encode(self, text):
        return self.rust.encode(text).ids

    def decode(self, ids, skip_special_tokens=True):
        return self.rust.decode(ids, skip_special_tokens=skip_special_tokens)


def in_chunks(ids, sizes):
    """`ids` cut into pieces of these sizes, in turn; what is left comes one by one."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(ids[at : at + size])
        at += size
    return pieces + [[i] for i in ids[at:]]


def cut_at_stop(text, stops, include=False):
    """The text before the stop string whose last character comes first, or with it."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[0 if include else 1]] if ends else text


chunk_sizes = st.lists(st.integers(0, 5), max_size=20)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=MAX_WINDOW - 4), sizes=chunk_sizes, skip=st.booleans())
def test_pieces_join_to_the_whole(tokenizer, ids, sizes, skip):
    """Any ids at all: broken bytes and special tokens too."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.push(piece) for piece in in_chunks(ids, sizes)]
    assert "".join([*pieces, detokenizer.finish()]) == tokenizer.decode(ids, skip)


@settings(deadline=None)
@given(text=st.text(max_size=40), sizes=chunk_sizes)
def test_never_emits_half_a_character(tokenizer, text, sizes):
    detokenizer = Detokenizer(tokenizer)
    text = text.replace("\ufffd", "")
    pieces = [detokenizer.push(piece) for piece in in_chunks(tokenizer.encode(text), sizes)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


@settings(deadline=None)
@given(text=st.text("the und.日😀", max_size=40), sizes=chunk_sizes)
def test_sentencepiece(text, sizes):
    tokenizer = Sentencepiece()
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(piece) for piece in in_chunks(ids, sizes)]
    assert "".join([*pieces, detokenizer.finish()]) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc 日", max_size=30),
    stops=st.lists(st.text("abc 日", min_size=1, max_size=5), min_size=1, max_size=3),
    sizes=chunk_sizes,
    include=st.booleans(),
)
def test_stop_strings(tokenizer, text, stops, sizes, include):
    detokenizer = Detokenizer(tokenizer, stops, include_stop_str=include)
    pieces = [detokenizer.push(piece) for piece in in_chunks(tokenizer.encode(text), sizes)]
    assert "".join([*pieces, detokenizer.finish()]) == cut_at_stop(text, stops, include)
    assert detokenizer.stopped == any(stop in text for stop in stops)


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in tokenizer.encode("a😀b日")] == [*"a", "", "", "", "😀", "b", "", "", "日"]


def test_a_possible_stop_string_is_held_back(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["</answer>"])
    assert [detokenizer.push([i]) for i in tokenizer.encode("a<b</an")] == ["a", "", "<b", "", "", "", ""]
    assert detokenizer.push(tokenizer.encode("d")) == "</and"
    assert detokenizer.push(tokenizer.encode("c</answer>tail")) == "c"
    assert detokenizer.stopped
    assert detokenizer.push(tokenizer.encode("more")) == detokenizer.finish() == ""


def test_what_was_held_back_comes_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["ab�"])
    assert detokenizer.push(tokenizer.encode("xab")) == "x"
    assert detokenizer.finish() == "ab"


def test_a_stop_string_may_end_in_the_last_bytes(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["b\ufffd"])
    assert detokenizer.push(tokenizer.encode("ab😀")[:-1]) == "a"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped


@pytest.mark.parametrize("repeated", [["x"], [TEXT], ["\x80"], ["<|im_end|>"], ["😀"]])
def test_cost_does_not_grow_with_the_text(tokenizer, repeated):
    """Whatever the tokens are, decoding sees a bounded window of them."""
    ids = [tokenizer.encode("é")[0]] * 500 if repeated == ["\x80"] else tokenizer.encode(repeated[0] * 500)[:5000]
    windows = []

    class Counting:
        def decode(self, window, skip_special_tokens=True):
            windows.append(len(window))
            return tokenizer.decode(window, skip_special_tokens)

    detokenizer = Detokenizer(Counting())
    text = "".join([*(detokenizer.push([i]) for i in ids), detokenizer.finish()])
    assert max(windows) <= 2 * MAX_WINDOW
    assert text == tokenizer.decode(ids)


def test_special_tokens_between_words_do_not_eat_spaces(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = [*tokenizer.encode("one"), *[EOS_ID] * 3 * MAX_WINDOW, *tokenizer.encode(" two")]
    assert "".join(detokenizer.push([i]) for i in ids) == "one two"


def test_a_special_token_may_be_a_stop_string_where_it_is_text(tokenizer):
    ids = [*tokenizer.encode("one"), EOS_ID, *tokenizer.encode("two")]
    shown = Detokenizer(tokenizer, ["<|im_end|>"], skip_special_tokens=False, include_stop_str=True)
    assert shown.push(ids) == "one<|im_end|>"
    assert shown.stopped
    hidden = Detokenizer(tokenizer, ["<|im_end|>"])
    assert hidden.push(ids) == "onetwo"
