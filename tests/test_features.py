"""What a request can ask for beyond a prompt: each feature against transformers' logits, or against its own words."""

import math

import pytest
import torch

from minisgl import LLM, SamplingParams
from minisgl.errors import MinisglError, RequestError
from tests.tiny_models import VOCAB_SIZE, make

SMALL = {"device": "cpu", "dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64}
PROMPTS = [[5, 6, 7], list(range(90)), list(range(100, 250, 3))]  # the second takes two chunks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, **SMALL) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_leaks(llm):
    yield
    llm.reset_prefix_cache()
    assert llm.num_unfinished == 0 and llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(max_tokens=16, **asked):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **asked)


def generate_with(model, prompt, edit, max_tokens=16):
    """Greedy ids of transformers' model; `edit(ids, logits)` gives the logits of the next token."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = edit(ids, model(ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


def bias(values):
    def edit(ids, logits):
        for token, value in values.items():
            logits[:, token] += value
        return logits

    return edit


def presence_and_frequency(presence, frequency, prompt):
    def edit(ids, logits):
        count = torch.bincount(ids[0, len(prompt) :], minlength=logits.shape[1])
        return logits - presence * (count > 0) - frequency * count

    return edit


@pytest.mark.parametrize("prompt", PROMPTS)
def test_edited_logits_equal_those_of_transformers(llm, model, prompt):
    from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

    plain = llm.generate(prompt, greedy())[0].token_ids
    stop = plain[3]
    until = MinNewTokensLengthLogitsProcessor(len(prompt), 9, [stop])
    cases = [
        (greedy(repetition_penalty=1.7), RepetitionPenaltyLogitsProcessor(1.7)),
        (greedy(presence_penalty=1.5, frequency_penalty=0.8), presence_and_frequency(1.5, 0.8, prompt)),
        (greedy(logit_bias={plain[0]: -100, 7: 3.5}), bias({plain[0]: -100, 7: 3.5})),
        (greedy(min_tokens=9, stop_token_ids=[stop]), until),
    ]
    results = llm.generate([prompt] * len(cases), [params for params, _ in cases])
    for (params, edit), result in zip(cases, results, strict=True):
        expected = generate_with(model, prompt, edit)
        if stop in params.stop_token_ids and stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert result.token_ids == expected
    assert sum(result.token_ids != plain for result in results) >= 3


def test_penalties_see_a_cached_prompt(llm, model):
    """Its tokens are not computed again, in rows that held other texts."""
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt = PROMPTS[1]
    llm.generate([prompt, *([one] * 40 for one in range(200, 212))], greedy())
    [result] = llm.generate([prompt], greedy(repetition_penalty=1.7))
    assert result.usage.cached_tokens == 80
    assert result.token_ids == generate_with(model, prompt, RepetitionPenaltyLogitsProcessor(1.7))


def test_bad_words_do_not_come(llm):
    """In one token and in several; the words' beginnings may."""
    [free] = llm.generate([[5, 6, 7]], greedy(30))
    words = [free.text[0], free.text[10:13]]
    assert all(words) and len(llm.tokenizer.encode(words[1])) > 1
    [result] = llm.generate([[5, 6, 7]], greedy(30, bad_words=words))
    assert not any(word in result.text for word in words) and result.token_ids != free.token_ids


def test_penalties_hold_through_preemption_and_reused_rows(folder, llm):
    """A pool so small that requests are preempted, rows taken by requests that ask for nothing, and back."""
    edits = [{"repetition_penalty": 1.5}, {}, {"frequency_penalty": 1.0}, {"logit_bias": {3: 2.0}}]
    asked = [greedy(40, **edit) for edit in edits * 3]
    prompts = [list(range(start, start + 60)) for start in range(12)]
    expected = [llm.generate(prompt, params)[0].token_ids for prompt, params in zip(prompts, asked, strict=True)]
    with LLM(folder, **SMALL, num_pages=12) as small:
        assert [result.token_ids for result in small.generate(prompts, asked)] == expected
        assert small.core.scheduler.num_preemptions > 0


def logprobs_of(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("num_top", [0, 3, 20])
def test_logprobs_equal_those_of_transformers(llm, model, num_top):
    """Of output and prompt, in chunks; also where the prompt is in the prefix cache."""
    asked = [greedy(logprobs=num_top, prompt_logprobs=num_top)] * len(PROMPTS)
    llm.generate(PROMPTS, greedy())
    for result, prompt in zip(llm.generate(PROMPTS, asked), PROMPTS, strict=True):
        text = prompt + result.token_ids
        expected = logprobs_of(model, text)
        found = [*result.prompt_logprobs, *result.logprobs]
        assert [one.token_id for one in found] == text[1:]
        for place, one in enumerate(found):
            assert one.logprob == pytest.approx(expected[place, text[place + 1]].item(), abs=1e-4)
            top = expected[place].topk(num_top)
            assert [token for token, _ in one.top] == top.indices.tolist()
            assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_logprobs_are_of_the_edited_logits(llm):
    [result] = llm.generate([[1, 2]], greedy(3, logprobs=1, logit_bias={9: 100.0}))
    assert result.token_ids == [9, 9, 9] and all(one.logprob == pytest.approx(0, abs=1e-6) for one in result.logprobs)


def test_none_of_it_is_given_unasked(llm):
    [plain, asked] = llm.generate([[1, 2]] * 2, [greedy(3), greedy(3, logprobs=0)])
    assert plain.logprobs is None and plain.prompt_logprobs is None and asked.prompt_logprobs is None
    assert [one.top for one in asked.logprobs] == [()] * 3 and plain.choices == ()


def test_scores_equal_transformers(llm, model):
    prompts = [[1, 2, 3], [1, 2, 3], list(range(70)), []]
    continuations = [[4, 5], [9], list(range(50)), [8, 9]]
    scores = llm.score(prompts, continuations)
    for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
        text = (prompt or [llm.tokenizer.eos_id]) + continuation
        expected = logprobs_of(model, text)
        each = [expected[place - 1, text[place]].item() for place in range(len(text) - len(continuation), len(text))]
        assert score.token_logprobs == pytest.approx(each, abs=1e-4) and score.num_tokens == len(continuation)
        assert score.logprob == pytest.approx(sum(each), abs=1e-4)
        best = expected[len(text) - len(continuation) - 1 : -1].argmax(-1).tolist()
        assert score.is_greedy == (best == continuation)


def test_options_of_one_context_compute_it_once(llm):
    context = list(range(64))
    scores = llm.score([context] * 5, [[option] for option in range(5)])
    assert sorted(score.cached_tokens for score in scores) == [0, 48, 48, 48, 48]  # the last token's logits are needed


def test_a_score_may_fill_the_context(llm, model):
    max_len = llm.config.max_len
    ids = [token % VOCAB_SIZE for token in range(max_len + 1)]
    [whole, over] = llm.score([ids[:5], ids[:5]], [ids[5:-1], ids[5:]])
    assert whole.token_logprobs[-1] == pytest.approx(logprobs_of(model, ids[:-1])[-2, ids[-2]].item(), abs=1e-3)
    assert whole.num_tokens == max_len - 5 and over.error.type == "prompt_too_long"


def test_scores_of_text(llm):
    [joined, spaced] = llm.score(["the inn", "the inn "], [" a", "a"])
    assert joined == spaced and joined.num_tokens == len(llm.tokenizer.encode(" a"))
    [nothing, mixed] = llm.score(["the", "the"], ["", [3]])
    assert "adds no tokens" in str(nothing.error) and "both" in str(mixed.error)


@pytest.mark.parametrize("prompt", ["the inn", [{"role": "user", "content": "the inn"}], [5, 6, 7]])
def test_a_stream_is_the_answer_in_pieces(llm, prompt):
    params = greedy(12, logprobs=2)
    [whole] = llm.chat(prompt, params) if isinstance(prompt[0], dict) else llm.generate([prompt], params)
    deltas = list(llm.stream(prompt, params))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [one.token_id for delta in deltas for one in delta.logprobs or ()] == whole.token_ids
    assert [delta.result is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].result.token_ids == whole.token_ids and len(deltas) > 6


def test_streams_run_side_by_side_and_end_early(llm):
    params = greedy(40)
    expected = [result.token_ids for result in llm.generate([[1, 2], [3, 4]], params)]
    streams = [llm.stream([1, 2], params), llm.stream([3, 4], params)]
    got = [[], []]
    for _ in range(5):
        for tokens, stream in zip(got, streams, strict=True):
            tokens += next(stream).token_ids
    streams[0].close()
    got[1] += [token for delta in streams[1] for token in delta.token_ids]
    assert got[0] == expected[0][: len(got[0])] and got[1] == expected[1]


def test_a_stream_whose_request_is_ended_elsewhere_says_so(llm):
    stream = llm.stream("Hello", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    [request] = llm.core.scheduler.running
    llm.abort(request)
    with pytest.raises(MinisglError, match="ended while its stream was read"):
        list(stream)


def test_requests_that_end_during_other_calls_are_told_by_the_next_step(llm):
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    for call in (
        lambda: list(llm.stream("Hello", SamplingParams(max_tokens=10, ignore_eos=True))),
        lambda: llm.generate(["a", "b"], [params, SamplingParams(max_tokens=9, ignore_eos=True)]),
    ):
        request = llm.new_request([5, 6, 7], params, index=0)
        llm.submit([request])
        call()
        assert request.finish_reason == "length" and llm.num_unfinished == 1
        [(told, result)] = llm.step()
        assert told is request and result.usage.completion_tokens == 3 and llm.num_unfinished == 0


def test_a_stop_string_ends_a_stream(llm):
    [free] = llm.generate([[5, 6, 7]], greedy(30))
    stop = free.text[4:7]
    for include in (False, True):
        params = greedy(30, stop=stop, include_stop_str=include)
        deltas = list(llm.stream([5, 6, 7], params))
        text = "".join(delta.text for delta in deltas)
        assert text == free.text[: free.text.index(stop)] + stop * include == deltas[-1].result.text
        assert deltas[-1].result.finish_reason == "stop"


def test_min_tokens_holds_stop_strings_back(llm):
    [free] = llm.generate([[5, 6, 7]], greedy(30))
    [result] = llm.generate([[5, 6, 7]], greedy(30, stop=free.text[1], min_tokens=30))
    assert result.text == free.text


def test_an_abort_at_any_moment_gives_the_pages_back(llm):
    requests = [llm.new_request(list(range(start, start + 70)), greedy(30), index=start) for start in range(6)]
    llm.submit(requests)
    kept = requests.pop(2)
    for request in requests:
        llm.step()
        llm.abort(request)
        llm.abort(request)
        assert request.finish_reason == "abort"
    ended = []
    while llm.num_unfinished:
        ended += llm.step()
    [(request, result)] = ended
    assert request is kept and result.finish_reason == "length" and len(result.token_ids) == 30


def test_n_answers_differ_and_are_the_same_again(llm):
    params = SamplingParams(temperature=1.0, max_tokens=8, n=3, seed=5)
    [first], [again] = (llm.generate([[1, 2, 3]], params) for _ in range(2))
    texts = [choice.token_ids for choice in first.choices]
    assert len(texts) == 3 and first.token_ids == texts[0] and len({tuple(ids) for ids in texts}) > 1
    assert texts == [choice.token_ids for choice in again.choices]


def test_echo_and_truncation(llm):
    ids = llm.tokenizer.encode("the inn in the inn")
    [result] = llm.generate(["the inn in the inn"], greedy(4, echo=True, truncate_prompt_tokens=3))
    assert result.usage.prompt_tokens == 3
    assert result.text == llm.tokenizer.decode(ids[-3:]) + llm.tokenizer.decode(result.token_ids)


def test_special_tokens_are_shown_when_asked(llm):
    end = VOCAB_SIZE - 1
    params = greedy(2, logit_bias={end: 100})
    assert llm.generate([[1]], params)[0].text == ""
    [shown] = llm.generate([[1]], greedy(2, logit_bias={end: 100}, skip_special_tokens=False))
    assert shown.text == llm.tokenizer.decode([end], False) * 2 != ""


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"repetition_penalty": 0}, "from 0.01 to 100"),
        ({"presence_penalty": 3}, "from -2 to 2"),
        ({"frequency_penalty": math.nan}, "a number"),
        ({"logit_bias": {"a": 1}}, "token ids to numbers"),
        ({"logit_bias": {1: 101}}, "from -100 to 100"),
        ({"logit_bias": {1: math.nan}}, "from -100 to 100"),
        ({"logit_bias": [1]}, "object"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"n": 0}, "from 1 to 128"),
        ({"bad_words": [""]}, "non-empty"),
        ({"bad_words": ["x"] * 33}, "at most 32"),
        ({"stop": ["a\ud800"]}, "stop has half of a surrogate pair"),
        ({"truncate_prompt_tokens": 0}, "from 1 to"),
        ({"max_tokens": 2**64}, "from 1 to 2147483647"),
        ({"stop_token_ids": [True]}, "integers"),
        ({"stop_token_ids": [2**31]}, "from 0 to"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token id -1"),
        ({"logit_bias": {1: 10**400}}, "token ids to numbers"),
    ],
)
def test_parameters_out_of_range_are_refused(asked, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**asked)


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"min_tokens": 20}, "above max_tokens"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids: token id"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias: token id"),
        ({"bad_words": ["a very long word of many tokens"]}, "at most 8"),
        ({"logit_bias": dict.fromkeys(range(VOCAB_SIZE), 1.0), "min_tokens": 1}, ""),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_error_results(llm, asked, words):
    [result] = llm.generate([[1, 2]], greedy(8, **asked))
    assert (words in str(result.error)) if words else result.error is None


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_equal_the_hidden_states_of_transformers(folder, llm, model, pooling):
    """In chunks, beside a request that decodes, and twice: the cache must not shorten a mean."""
    prompts = [*PROMPTS, PROMPTS[1]]
    with torch.inference_mode():
        states = [model.model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]
    expected = [state[-1] if pooling == "last" else state.mean(0) for state in states]
    llm.generate(prompts, greedy())
    neighbour = llm.stream([9, 9], greedy(100))
    next(neighbour)
    for normalize in (False, True):
        found = llm.embed(prompts, pooling=pooling, normalize=normalize)
        assert [one.num_tokens for one in found] == [len(prompt) for prompt in prompts]
        for one, vector in zip(found, expected, strict=True):
            wanted = vector / vector.norm() if normalize else vector
            torch.testing.assert_close(torch.from_numpy(one.vector), wanted, atol=1e-4, rtol=1e-4)
    neighbour.close()
    with LLM(folder, **SMALL, num_pages=12) as small:  # preempted
        for one, again in zip(small.embed(prompts * 3, pooling=pooling), found * 3, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(one.vector), torch.from_numpy(again.vector), atol=1e-4, rtol=1e-4
            )


def test_an_embedding_of_a_bad_prompt_has_an_error(llm):
    [bad, good] = llm.embed([[VOCAB_SIZE], [1]])
    assert "outside" in str(bad.error) and good.error is None and len(good.vector) == 60
