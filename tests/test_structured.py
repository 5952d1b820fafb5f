"""Structured output with the demo model's tokenizer: answers drawn at random from the masks."""

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisgl.demo import MODEL_PATH
from minisgl.errors import RequestError
from minisgl.structured import GrammarCompiler, ResponseFormat, fill_masks
from minisgl.structured.response_format import MAX_SOURCE_BYTES
from minisgl.structured.vocabulary import Vocabulary
from minisgl.tokenizer import Tokenizer

jsonschema = pytest.importorskip("jsonschema")

EOS_IDS = (2, 0)  # <|im_end|>, <|endoftext|>
IM_START = 1
VOCAB_SIZE = 1050  # the model's, padded: the tokenizer has 1,024 ids
NUM_WORDS = -(-VOCAB_SIZE // 32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MODEL_PATH)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, EOS_IDS, timeout_s=60.0)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def closing_ids(tokenizer):
    """Tokens that tend to end an answer; a random one seldom does."""
    texts = {tokenizer.decode([i]): i for i in range(1024)}
    return {i for text, i in texts.items() if text[:1] in ('"', "}", "]")} | set(EOS_IDS)


def allowed_ids(matcher):
    mask = np.full(NUM_WORDS, 0x55555555, np.int32)  # what was there before must not stay
    matcher.fill_mask(mask)
    return np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist()


def draw(matcher, random, closing_ids=frozenset(), max_tokens=300):
    """(token ids without the last, whether that was an end of text) of a random answer."""
    ids = []
    while len(ids) < max_tokens:
        allowed = allowed_ids(matcher)
        assert matcher.error is None, matcher.error
        assert max(allowed) < 1024
        forced = matcher.forced_tokens()
        if forced:
            assert allowed == forced[:1]
        closing = [i for i in allowed if i in closing_ids]
        token = int(random.choice(closing if closing and random.random() < 0.4 else allowed))
        matcher.advance(token)
        assert matcher.error is None, matcher.error
        if token in EOS_IDS:
            assert matcher.finished
            assert sorted(allowed_ids(matcher)) == sorted(EOS_IDS)
            return ids, True
        assert token != IM_START
        ids.append(token)
    return ids, False


def answer(compiler, tokenizer, seed=0, closing_ids=frozenset(), **form):
    ids, complete = draw(
        compiler.compile(ResponseFormat(**form)).matcher(), np.random.default_rng(seed), closing_ids, max_tokens=1000
    )
    assert complete
    return tokenizer.decode(ids)


def walk(matcher, ids):
    for token in ids:
        matcher.advance(token)
    assert matcher.error is None, matcher.error
    return matcher


# -- JSON --


names = st.text('abz_é"< ', min_size=1, max_size=5)
scalars = st.none() | st.booleans() | st.integers(-9, 999) | st.text(max_size=8)
low, high = st.integers(-99, 0), st.integers(1, 999)


def node(kind, needed=None, **optional):
    """Schemas of one type, each with some of the optional keywords."""
    return st.fixed_dictionaries({"type": st.just(kind), **(needed or {})}, optional=optional)


def containers(inner):
    few, properties = st.integers(0, 3), st.dictionaries(names, inner, max_size=4)
    return st.one_of(
        node("array", items=inner, minItems=few, maxItems=st.integers(3, 5)),
        node("array", {"prefixItems": st.lists(inner, min_size=1, max_size=3)}, items=st.booleans(), minItems=few),
        node(
            "object",
            {"properties": properties},
            required=st.lists(names, max_size=2, unique=True),
            additionalProperties=st.booleans() | inner,
        ),
        properties.map(lambda some: {"type": "object", "properties": some, "required": [*some][::2]}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
    )


schemas = st.recursive(
    st.one_of(
        node("null"),
        node("boolean"),
        node("integer", minimum=low, maximum=high, multipleOf=st.integers(1, 7)),
        node("number", exclusiveMinimum=low, maximum=high),
        node("string", minLength=st.integers(0, 3), maxLength=st.integers(3, 9)),
        node("string", {"pattern": st.sampled_from(["^[a-c]+$", "x.y", "^(ab|ba){1,4}$", "\\d{2}-\\w"])}),
        st.fixed_dictionaries({"enum": st.lists(scalars, min_size=1, max_size=4)}),
        st.fixed_dictionaries({"const": scalars}),
        st.just({}),
    ),
    containers,
    max_leaves=8,
)


def test_random_schemas(compiler, tokenizer, closing_ids):
    """What is complete is valid, and nearly all is complete; what cannot be satisfied is refused with the reason."""
    outcomes = Counter()

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(schema=schemas, seed=st.integers(0, 2**32))
    def check(schema, seed):
        try:
            grammar = compiler.compile(ResponseFormat(json_schema=schema))
        except RequestError as error:
            assert "json_schema cannot be used" in str(error)
            outcomes["refused"] += 1
            return
        ids, complete = draw(grammar.matcher(), np.random.default_rng(seed), closing_ids)
        outcomes[complete] += 1
        if complete:
            jsonschema.validate(json.loads(tokenizer.decode(ids)), schema, jsonschema.Draft202012Validator)

    check()
    assert outcomes[True] > 400, outcomes
    assert outcomes["refused"] < 50, outcomes


@pytest.mark.parametrize("seed", range(5))
def test_json_object(compiler, tokenizer, closing_ids, seed):
    assert isinstance(json.loads(answer(compiler, tokenizer, seed, closing_ids, json_object=True)), dict)


def test_schema_as_text_keeps_the_order_of_its_properties(compiler, tokenizer, closing_ids):
    schema = '{"type": "object", "properties": {"z": {"const": 1}, "a": {"const": 2}}, "required": ["a", "z"]}'
    schema = schema[:-1] + ', "additionalProperties": false}'
    assert list(json.loads(answer(compiler, tokenizer, closing_ids=closing_ids, json_schema=schema))) == ["z", "a"]
    assert ResponseFormat(json_schema=schema) == ResponseFormat(json_schema=json.loads(schema))


def test_white_space_comes_to_an_end(compiler, tokenizer):
    matcher = walk(compiler.compile(ResponseFormat(json_object=True)).matcher(), tokenizer.encode("{"))
    (space,) = tokenizer.encode(" ")
    count = 0
    while space in allowed_ids(matcher):
        matcher.advance(space)
        count += 1
    assert count == 40


def test_no_special_token_in_a_string(compiler, tokenizer):
    matcher = walk(compiler.compile(ResponseFormat(json_schema={"type": "string"})).matcher(), tokenizer.encode('"a'))
    assert not {IM_START, *EOS_IDS} & set(allowed_ids(matcher))
    for token in tokenizer.encode("é😀"):  # pieces of characters: bytes of their own in this tokenizer
        assert token in allowed_ids(matcher)
        matcher.advance(token)
    (half,) = tokenizer.encode("😀")[:1]
    assert ord('"') not in (set(allowed_ids(walk(matcher, [half]))) & set(tokenizer.encode('"')))


# -- regex, choice, grammar --


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-c]{3,9}\d",
        "^a/b$",
        r"(\w+ ){2}[^a]",
        "(?i)yes|no",
        r"\d{4}-[01]\d\\/",
        "a\nb|c",
        "naïve?",
        ".{5}",
        "(ab|b)*",
    ],
)
def test_regex(compiler, tokenizer, regex):
    for seed in range(5):
        assert re.fullmatch(regex, answer(compiler, tokenizer, seed, frozenset(EOS_IDS), regex=regex))


def test_choice(compiler, tokenizer):
    choice = ["yes", "no", "", 'a"b\\n/\n', "日本😀", "<|im_end|>", "yes, and <|im_start|>"]
    grammar = compiler.compile(ResponseFormat(choice=choice))
    for text in choice:
        matcher = grammar.matcher()
        for byte_token in spelled(tokenizer, text):
            assert byte_token in allowed_ids(matcher)
            matcher.advance(byte_token)
        assert set(EOS_IDS) <= set(allowed_ids(matcher))
    drawn = {answer(compiler, tokenizer, seed, choice=choice) for seed in range(40)}
    assert drawn <= set(choice)
    assert len(drawn) > 3


def spelled(tokenizer, text):
    """The ids of a text, special tokens spelled out."""
    backend = tokenizer.backend
    backend.encode_special_tokens = True
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False


def test_many_choices(compiler, tokenizer):
    choice = [f"value number {i}" for i in range(10_000)]
    assert answer(compiler, tokenizer, choice=choice) in choice


LARK = """
start: sum
sum: NUMBER | sum OPERATOR NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,4}/
OPERATOR: "+" | "*"
"""
GBNF = """
root ::= "[" item ("," item)* "]"
item ::= [0-9]+ | "null"
"""


def test_lark(compiler, tokenizer):
    for seed in range(5):
        text = answer(compiler, tokenizer, seed, frozenset(EOS_IDS), grammar=LARK)
        assert re.fullmatch(r"[0-9+*()]+", text)
        eval(re.sub(r"\b0+(?=\d)", "", text))  # it parses


def test_gbnf(compiler, tokenizer, closing_ids):
    for seed in range(5):
        items = answer(compiler, tokenizer, seed, closing_ids, grammar=GBNF)[1:-1].split(",")
        assert items
        assert all(item.isdigit() or item == "null" for item in items)


def test_only_a_grammar_names_special_tokens(compiler, tokenizer):
    matcher = compiler.compile(ResponseFormat(grammar='start: <|im_start|> "ok" <[*]>')).matcher()
    assert allowed_ids(matcher) == [IM_START]
    walk(matcher, [IM_START, *tokenizer.encode("ok")])
    anything = set(allowed_ids(matcher))
    assert anything == set(range(1024)) - set(EOS_IDS)  # no padded id; the end is not yet there


@pytest.mark.parametrize("special", ["[<]\\|im_start\\|>", "[<]\\|im_end\\|>"])
def test_a_text_that_hides_a_special_token_ends_its_request_only(compiler, special):
    """llguidance would answer with the special token; `lark` sees most spellings, and no mask lets the others pass."""
    matcher = compiler.compile(ResponseFormat(regex=special)).matcher()
    other = compiler.compile(ResponseFormat(choice=["yes"])).matcher()
    masks = np.zeros((2, NUM_WORDS), np.int32)
    fill_masks([matcher, other], masks)
    assert "special token" in str(matcher.error)
    assert other.error is None
    assert matcher.forced_tokens() == []
    assert sorted(allowed_ids(matcher)) == sorted(EOS_IDS)


# -- the walk through a grammar --


def test_end_of_text_when_the_answer_may_end_and_only_then(compiler, tokenizer):
    a, b = (tokenizer.encode(text)[0] for text in "ab")
    matcher = compiler.compile(ResponseFormat(regex="ab?")).matcher()
    assert not set(EOS_IDS) & set(allowed_ids(matcher))
    matcher.advance(a)
    assert set(allowed_ids(matcher)) == {*EOS_IDS, b}
    assert not matcher.finished
    matcher.advance(b)
    assert matcher.finished
    for token in EOS_IDS:
        assert set(allowed_ids(matcher)) == set(EOS_IDS)
        assert matcher.forced_tokens() == []
        matcher.advance(token)
        assert matcher.finished
    early = walk(compiler.compile(ResponseFormat(regex="ab?")).matcher(), [a, EOS_IDS[1]])
    assert early.finished


@pytest.mark.parametrize("token", [EOS_IDS[0], EOS_IDS[1], IM_START, 500, 1030, 1 << 30])
def test_a_token_that_no_mask_allowed(compiler, tokenizer, token):
    grammar = compiler.compile(ResponseFormat(regex="a{500}"))
    bystander = walk(grammar.matcher(), tokenizer.encode("a"))
    matcher = walk(grammar.matcher(), tokenizer.encode("a"))
    matcher.advance(token)
    assert matcher.error.type == "structured_output_failed"
    assert not matcher.finished
    assert sorted(allowed_ids(matcher)) == sorted(EOS_IDS)
    matcher.advance(tokenizer.encode("a")[0])  # nothing more happens
    assert bystander.error is None
    assert allowed_ids(bystander)
    assert compiler.compile(ResponseFormat(regex="a{500}")) is not grammar


def test_forced_tokens_are_the_text(compiler, tokenizer):
    schema = {"type": "object", "properties": {"temperature": {"type": "boolean"}}, "required": ["temperature"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None}}
    matcher = compiler.compile(ResponseFormat(json_schema=schema)).matcher()
    forced = matcher.forced_tokens()
    assert len(forced) > 1
    assert '{"temperature":'.startswith(tokenizer.decode(forced))
    assert matcher.forced_tokens() == forced  # not advanced over
    for token in forced:
        assert allowed_ids(matcher) == [token]
        matcher.advance(token)
    assert len(allowed_ids(matcher)) > 1


@pytest.mark.parametrize("form", [{"regex": "yes[<]\\|im_end\\|>"}, {"grammar": 'start: "yes" <[1030]>'}])
def test_forced_tokens_end_before_one_that_must_not_come(compiler, tokenizer, form):
    matcher = compiler.compile(ResponseFormat(**form)).matcher()
    forced = matcher.forced_tokens()
    assert tokenizer.decode(forced) == "yes"
    walk(matcher, forced)
    assert matcher.forced_tokens() == []
    allowed_ids(matcher)
    assert "no token can come next" in str(matcher.error)


def test_thinking_first(compiler, tokenizer):
    (after,) = tokenizer.encode("!")
    matcher = compiler.compile(ResponseFormat(choice=["yes"])).matcher(after_id=after)
    anything = set(range(1024)) - set(EOS_IDS)  # an answer has to come
    assert set(allowed_ids(matcher)) == anything
    walk(matcher, tokenizer.encode("yes or no?"))
    assert matcher.is_waiting
    assert matcher.forced_tokens() == []
    assert not matcher.finished
    assert set(allowed_ids(matcher)) == anything
    walk(matcher, [after])
    assert tokenizer.decode(matcher.forced_tokens()) == "yes"
    assert len(allowed_ids(matcher)) == 1


def test_a_batch_is_its_rows(compiler, tokenizer):
    forms = [{"regex": r"[a-c]{3,9}\d"}, {"json_object": True}, {"grammar": LARK}, {"choice": ["yes", "no"]}]
    grammars = [compiler.compile(ResponseFormat(**form)) for form in forms]
    matchers = [grammar.matcher() for grammar in grammars for _ in range(5)]
    matchers += [grammars[0].matcher(after_id=7), grammars[0].matcher()]
    matchers[-1].advance(EOS_IDS[0])
    random = np.random.default_rng(0)
    masks = np.zeros((len(matchers) + 2, NUM_WORDS), np.int32)
    for _ in range(20):
        masks[:] = 0x55555555
        fill_masks(matchers, masks[1:-1])
        assert (masks[[0, -1]] == 0x55555555).all()
        for matcher, row in zip(matchers, masks[1:-1], strict=True):
            ids = np.nonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[0].tolist()
            assert ids == allowed_ids(matcher)
            matcher.advance(int(random.choice(ids)))
    fill_masks([], masks[:0])
    for wrong in (masks, masks[1:-1].astype(np.int64), np.zeros((NUM_WORDS, len(matchers)), np.int32).T):
        with pytest.raises(ValueError, match="contiguous int32"):
            fill_masks(matchers, wrong)


# -- the compiler --


def chain(length):
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$defs": links | {f"a{length}": {"type": "string"}}, "$ref": "#/$defs/a0"}


LONG_CHAIN = "start: a0\n" + "".join(f'a{i}: a{i + 1} "x"\n' for i in range(5000)) + 'a5000: "y"\n'
PRODUCT = {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": True}} for j in range(3)]} for i in range(30)]}


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"json_schema": {"type": "colour"}}, "Invalid type: colour"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "minLength \\(5\\) is greater"),
        ({"json_schema": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": "hello"}, "Expected ::="),
        ({"grammar": "start: <[1030]>"}, "no token"),  # a padded id: compiles, and has no first token
        # and the explosive ones
        ({"regex": "a{1000000000000}"}, "regex parse error"),
        ({"regex": "(" * 100_000}, "unclosed group"),
        ({"regex": ".*" + "".join(f"(?:{c}.*)?" for c in "abcdefghijklmnopqrstuvwxyz" * 20)}, "lexer"),
        ({"grammar": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000}, "too deeply nested"),
        ({"grammar": "root ::= " + "(" * 100_000}, "RecursionError"),
        ({"grammar": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "y"'}, "too big"),
        ({"grammar": "start: a\na: b\nb: a"}, "NoExtension"),
        ({"grammar": LONG_CHAIN}, "nests too deeply"),  # overflows the stack of llguidance
        ({"json_schema": chain(6000)}, "nests too deeply"),
        ({"json_schema": PRODUCT}, "schema too large"),
        ({"json_schema": {"anyOf": [{"properties": {f"p{i}": True}} for i in range(2000)]}}, "Too many items"),
    ],
)
def test_bad_and_explosive_grammars_are_refused(compiler, form, reason):
    """By what is wrong with them, whatever time that takes here; the explosive ones would take hours or all memory."""
    response_format = ResponseFormat(**form)
    for _ in range(2):
        with pytest.raises(RequestError, match=reason) as caught:
            grammar = compiler.compile(response_format)
            matcher = grammar.matcher()
            matcher.fill_mask(np.zeros(NUM_WORDS, np.int32))
            raise matcher.error
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    assert compiler.compile(ResponseFormat(choice=["yes"])).matcher().forced_tokens()


def test_what_takes_too_long_is_refused_in_time_and_the_reason_is_kept(tokenizer):
    patterns = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 30)]}
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, EOS_IDS, timeout_s=2.0)
    compiler.compile(ResponseFormat(choice=["yes"]))  # the tokenizer is read
    took = []
    for _ in range(2):
        start = time.perf_counter()
        with pytest.raises(RequestError, match="not compiled within 2 s"):
            compiler.compile(ResponseFormat(json_schema=patterns))
        took.append(time.perf_counter() - start)
    assert took[0] < 20 and took[1] < 2  # 2 s and microseconds, where nothing else runs
    assert compiler.compile(ResponseFormat(choice=["yes"])).matcher().forced_tokens()
    compiler.close()


@pytest.mark.parametrize(
    "form", [{"regex": "((a|b){1,1000}c){1,1000}"}, {"json_schema": {"type": "array", "minItems": 10**6}}]
)
def test_large_counts_cost_nothing(compiler, form):
    start = time.perf_counter()
    ids, complete = draw(compiler.compile(ResponseFormat(**form)).matcher(), np.random.default_rng(0), max_tokens=50)
    assert complete or len(ids) == 50
    assert time.perf_counter() - start < 20  # 0.1 s, where nothing else runs


def test_equal_formats_share_a_grammar_and_the_oldest_is_dropped(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, EOS_IDS, max_grammars=2)
    first = compiler.compile(ResponseFormat(regex="a"))
    compiler.compile(ResponseFormat(regex="b"))
    assert compiler.compile(ResponseFormat(regex="a")) is first
    compiler.compile(ResponseFormat(regex="c"))
    assert compiler.compile(ResponseFormat(regex="a")) is first
    compiler.close()
    compiler.compile(ResponseFormat(regex="b"))  # starts the process again
    assert compiler.compile(ResponseFormat(regex="a")) is first
    compiler.compile(ResponseFormat(regex="c"))
    compiler.compile(ResponseFormat(regex="b"))
    assert compiler.compile(ResponseFormat(regex="a")) is not first
    compiler.close()


def test_the_process_was_killed_while_it_waited(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, EOS_IDS)
    compiler.compile(ResponseFormat(regex="a"))
    child = compiler._probe._child
    child.kill()
    child.wait()
    assert compiler.compile(ResponseFormat(regex="b")).matcher().forced_tokens()
    compiler.close()


def test_many_threads(compiler):
    results = []

    def work(number):
        grammar = compiler.compile(ResponseFormat(choice=[f"answer {number % 3}"]))
        for _ in range(20):
            results.append((number % 3, tuple(grammar.matcher().forced_tokens())))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 120
    assert len(set(results)) == 3


def test_models_and_tokenizers_that_do_not_fit(tokenizer):
    for vocab_size, eos_ids, reason in [
        (1000, EOS_IDS, "1,024 ids, more than the model's 1,000"),
        (VOCAB_SIZE, (), "no end-of-text token"),
        (VOCAB_SIZE, (1040,), "no end-of-text token"),  # the tokenizer does not have it
    ]:
        with pytest.raises(RequestError, match=reason):
            GrammarCompiler(tokenizer, vocab_size, eos_ids).compile(ResponseFormat(regex="a"))
    vocabulary = Vocabulary(tokenizer, 1024, EOS_IDS)
    assert (vocabulary.known == -1).all()


def test_without_the_package():
    code = """
import sys
sys.modules["llguidance"] = None
from minisgl.structured import GrammarCompiler, ResponseFormat
try:
    GrammarCompiler(None, 10, [1]).compile(ResponseFormat(regex="a"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install minisgl[structured]" in done.stdout


# -- what a request may say --


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "not regex and choice"),
        ({"json_object": 1}, "json_object"),
        ({"json_schema": "{"}, "not valid JSON"),
        ({"json_schema": "[" * 100_000}, "not valid JSON"),
        ({"json_schema": "true"}, "must be an object"),
        ({"json_schema": {"const": {1, 2}}}, "not valid JSON"),
        ({"json_schema": {"const": float("nan")}}, "not valid JSON"),
        ({"json_schema": {"x-guidance": 1}}, "x-guidance"),
        ({"json_schema": {"const": "x" * MAX_SOURCE_BYTES}}, "at most 262,144"),
        ({"regex": ""}, "non-empty string"),
        ({"regex": 3}, "non-empty string"),
        ({"regex": "\ud83d"}, "not valid Unicode"),
        ({"choice": []}, "non-empty list"),
        ({"choice": "yes"}, "non-empty list"),
        ({"choice": ["a", 1]}, "non-empty list"),
        ({"grammar": "x" * (1 << 20)}, "1,048,576 bytes"),
    ],
)
def test_bad_formats(form, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        ResponseFormat(**form)
    assert caught.value.type == "invalid_parameter"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat(json_object=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "null"}}},
            ResponseFormat(json_schema={"type": "null"}),
        ),
        ({"type": "regex", "regex": "a"}, ResponseFormat(regex="a")),
        ({"type": "grammar", "grammar": LARK}, ResponseFormat(grammar=LARK)),
        ({"type": "choice", "choice": ["a"]}, ResponseFormat(choice=("a",))),
    ],
)
def test_openai(value, expected):
    assert ResponseFormat.from_openai(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("json_object", "must be an object"),
        ({"type": "xml"}, "one of text, json_object"),
        ({"type": ["text"]}, "one of text, json_object"),
        ({"type": "regex"}, "needs 'regex'"),
        ({"type": "text", "regex": "a"}, "unknown key 'regex'"),
        ({"type": "json_schema", "json_schema": "x"}, "must be an object"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "needs 'schema'"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "size": 1}}, "unknown key 'size'"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}, "strict"),
    ],
)
def test_bad_openai(value, reason):
    with pytest.raises(RequestError, match=reason):
        ResponseFormat.from_openai(value)
