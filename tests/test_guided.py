"""Answers within grammars, through the whole engine: valid, and without a trace in the answers beside them."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("llguidance", reason="structured output needs minisgl[structured]")
jsonschema = pytest.importorskip("jsonschema")

from minisgl import LLM, SamplingParams  # noqa: E402
from minisgl.demo import MODEL_PATH  # noqa: E402
from minisgl.errors import RequestError  # noqa: E402
from minisgl.structured import ResponseFormat  # noqa: E402
from tests.test_structured import schemas  # noqa: E402

SMALL = {"device": "cpu", "dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64}
PROMPT = [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bob"]},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
KEYS = "a_rather_long_name_of_a_property_that_must_come_as_it_is"
LONG = {"type": "object", "properties": {KEYS: {"enum": [1, 2]}}, "required": [KEYS], "additionalProperties": False}


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "no-overlap"])
def llm(folder, request):
    with LLM(folder, **SMALL, overlap=request.param) as llm:
        yield llm
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages


def asking(max_tokens=120, **one):
    return SamplingParams(temperature=1.0, seed=3, max_tokens=max_tokens, response_format=ResponseFormat(**one))


def test_answers_have_the_form(llm):
    asked = [
        asking(json_schema=SCHEMA),
        asking(regex=r"[a-f]{3}-\d{2}"),
        asking(choice=["red", "green", "blue"]),
        asking(grammar='start: "x" | "(" start ")"'),
        asking(json_schema=LONG),
    ]
    schema, regex, choice, grammar, long = llm.generate([PROMPT] * len(asked), asked)
    assert {result.finish_reason for result in (schema, regex, choice, grammar, long)} == {"stop"}
    jsonschema.validate(json.loads(schema.text), SCHEMA)
    assert re.fullmatch(r"[a-f]{3}-\d{2}", regex.text) and choice.text in ("red", "green", "blue")
    assert re.fullmatch(r"\(*x\)*", grammar.text)
    jsonschema.validate(json.loads(long.text), LONG)


def test_tokens_that_must_come_are_computed_at_once(llm, monkeypatch):
    """The same answer in fewer steps; what was in flight for the request does not count."""
    steps, answers = [], []
    for least in (8, 10**9):
        monkeypatch.setattr(llm.core, "min_jump", least)
        [request] = llm.new_requests(PROMPT, asking(json_schema=LONG), index=0)
        llm.submit([request])
        ended, count = [], 0
        while not ended:
            ended, count = llm.step(), count + 1
        answers.append(ended[0][1])
        steps.append(count)
    assert answers[0].text == answers[1].text and answers[0].token_ids == answers[1].token_ids
    assert steps[0] < steps[1] - 8


def test_neighbours_do_not_notice(llm, folder):
    """Crowded, chunked and preempted, each gets the tokens that it gets alone."""
    plain = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True)
    asked = [asking(json_schema=LONG), plain, asking(json_schema=SCHEMA), plain, asking(regex="[ab]{40}"), plain] * 2
    prompts = [list(range(start, start + 50)) for start in range(len(asked))]
    alone = [llm.generate(prompt, own)[0].token_ids for prompt, own in zip(prompts, asked, strict=True)]
    assert [result.token_ids for result in llm.generate(prompts, asked)] == alone
    with LLM(folder, **SMALL, num_pages=12) as small:
        assert [result.token_ids for result in small.generate(prompts, asked)] == alone
        assert small.core.scheduler.num_preemptions > 0


def test_an_answer_that_is_cut_says_so(llm):
    [result] = llm.generate(PROMPT, asking(max_tokens=4, json_schema=SCHEMA))
    assert result.finish_reason == "length" and len(result.token_ids) == 4


def test_logprobs_come_with_every_token(llm):
    params = SamplingParams(temperature=0, max_tokens=100, logprobs=2, response_format=ResponseFormat(json_schema=LONG))
    [result] = llm.generate(PROMPT, params)
    assert [one.token_id for one in result.logprobs] == result.token_ids
    assert all(one.logprob == pytest.approx(0, abs=1e-6) for one in result.logprobs if len(one.top) == 1)


def test_a_grammar_that_cannot_be_used_fails_its_request_alone(llm):
    wrong = [asking(regex="("), asking(json_schema={"type": "nonsense"}), asking(grammar="begin: x")]
    *failed, fine = llm.generate([PROMPT] * 4, [*wrong, asking(choice=["yes"])])
    assert [result.finish_reason for result in failed] == ["error"] * 3 and fine.text == "yes"
    assert all("cannot be used" in str(result.error) for result in failed)


def test_an_abort_in_the_middle(llm):
    [request] = llm.new_requests(PROMPT, asking(json_schema=LONG), index=0)
    llm.submit([request])
    for _ in range(3):
        llm.step()
    llm.abort(request)
    while llm.num_unfinished:
        llm.step()
    assert llm.generate(PROMPT, asking(choice=["yes"]))[0].text == "yes"


def test_openai_form_and_what_is_wrong_with_it():
    params = SamplingParams(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}})
    assert params.response_format == ResponseFormat(json_schema=SCHEMA)
    assert SamplingParams(response_format={"type": "text"}).response_format is None
    with pytest.raises(RequestError, match="response_format"):
        SamplingParams(response_format={"type": "xml"})


def test_random_schemas_of_the_demo_model():
    """Batches of different grammars: what is complete is valid, and what is cut says so."""
    drawn = []

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(schema=schemas)
    def collect(schema):
        drawn.append(schema)

    collect()
    with LLM(MODEL_PATH, device="cpu", max_running=64) as llm:
        texts = {llm.tokenizer.decode([token]): token for token in range(llm.tokenizer.vocab_size)}
        # Without a bias it goes on for long.
        closing = {token: 10.0 for text, token in texts.items() if text[:1] in ('"', "}", "]")}
        question = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Sort these: 3, 9, 1."}])
        free = SamplingParams(temperature=1.0, max_tokens=80, logit_bias=closing)
        params = [
            replace(free, seed=seed, response_format=ResponseFormat(json_schema=schema))
            for seed, schema in enumerate(drawn)
        ]
        results = llm.generate([question] * len(drawn), params)
    outcomes = Counter(result.finish_reason for result in results)
    for schema, result in zip(drawn, results, strict=True):
        if result.finish_reason == "stop":
            jsonschema.validate(json.loads(result.text), schema, jsonschema.Draft202012Validator)
        elif result.finish_reason == "error":
            assert "json_schema cannot be used" in str(result.error)
    assert len(drawn) == 500 and outcomes["stop"] > 350 and outcomes["error"] < 50, outcomes
