"""Loglikelihoods and perplexity equal those of transformers on a small random model, in float32 to 1e-4."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisgl.evaluate.scoring import likeliest, windows
from minisgl.evaluate.task import Task
from tests.evaluate.conftest import evaluate, read_samples, values

TEXT = "In the end the thing is in a bin, and then the rest of it is there. " * 6  # 350 tokens
ROWS = [
    {"q": "In the", "options": [" end", " bin of a thing", "x"], "answer": 1},
    {"q": "A thing is", "options": [" there", " in the end"], "answer": 0},
    {"q": "In the  ", "options": ["end", "a"], "answer": 0},  # spaces at the end of a prompt are the option's
]


@pytest.fixture(scope="module")
def reference(tiny: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(tiny)


def logprobs_of(model: Any, ids: list[int]) -> torch.Tensor:
    """The logprob of each token but the first behind those before it.  # [T - 1]"""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_logprobs_of_options(tiny: Path, reference: tuple[Any, Any], write: Callable[..., str], tmp_path: Path) -> None:
    model, tokenizer = reference
    task = Task(mode="choice", prompt_column="q", options="options", separator="")
    results = evaluate(task, write(ROWS), tmp_path / "out", model=str(tiny))
    samples = read_samples(tmp_path / "out")
    for row, sample in zip(ROWS, samples, strict=True):
        for option, logprob in zip(row["options"], sample["logprobs"], strict=True):
            before = tokenizer.encode(row["q"].rstrip())
            ids = tokenizer.encode(row["q"] + option)
            assert logprob == pytest.approx(logprobs_of(model, ids)[len(before) - 1 :].sum().item(), abs=1e-4)
        lengths = [len(option) for option in row["options"]]
        per_char = [logprob / length for logprob, length in zip(sample["logprobs"], lengths, strict=True)]
        assert sample["answer"] == row["options"][sample["logprobs"].index(max(sample["logprobs"]))]
        assert sample["scores"]["accuracy_norm"] == (per_char.index(max(per_char)) == row["answer"])
    assert values(results)["accuracy"] == sum(sample["verdict"] == "right" for sample in samples) / 3


def test_options_after_different_contexts(
    tiny: Path, reference: tuple[Any, Any], write: Callable[..., str], tmp_path: Path
) -> None:
    model, tokenizer = reference
    task = Task(mode="choice", template="", options='[["The bin", "is there"], ["A thing", "is there"]]', target="1")
    evaluate(task, write([{}]), tmp_path / "out", model=str(tiny))
    [sample] = read_samples(tmp_path / "out")
    for context, logprob in zip(("The bin", "A thing"), sample["logprobs"], strict=True):
        expected = logprobs_of(model, tokenizer.encode(f"{context} is there"))[len(tokenizer.encode(context)) - 1 :]
        assert logprob == pytest.approx(expected.sum().item(), abs=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (100, 100), (100, 37), (64, 1)])
def test_perplexity(
    tiny: Path,
    reference: tuple[Any, Any],
    write: Callable[..., str],
    tmp_path: Path,
    window: int | None,
    stride: int | None,
) -> None:
    model, tokenizer = reference
    text = TEXT[:200] if window == 64 else TEXT
    task = Task(mode="ppl", prompt_column="text", window=window, stride=stride)
    results = evaluate(task, write([{"text": text}]), tmp_path / "out", model=str(tiny))
    ids, size = tokenizer.encode(text, add_special_tokens=False), window or 256
    total, done = 0.0, 0
    while done < len(ids):  # written as the sum over windows that it is, in another way than the code under test
        end = min(len(ids), done + (size - 1 if done == 0 else min(stride or size, size - 1)))
        seen = ids[max(0, end - size) : end] if done else [tokenizer.eos_token_id, *ids[:end]]
        total -= logprobs_of(model, seen)[-(end - done) :].sum().item()
        done = end
    measured = values(results)
    assert measured["token_perplexity"] == pytest.approx(math.exp(total / len(ids)), rel=1e-4)
    assert measured["byte_perplexity"] == pytest.approx(math.exp(total / len(text.encode())), rel=1e-4)
    assert measured["word_perplexity"] == pytest.approx(math.exp(total / len(text.split(" "))), rel=1e-3)
    assert measured["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-4)


def test_rows_that_cannot_be_scored_are_counted(tiny: Path, write: Callable[..., str], tmp_path: Path) -> None:
    long = {**ROWS[0], "q": "thing " * 200}
    task = Task(mode="choice", prompt_column="q", options="options")
    results = evaluate(task, write([long, ROWS[1], {**ROWS[1], "options": []}]), tmp_path / "out", model=str(tiny))
    assert (results["rows"], results["rows_with_errors"]) == (3, 2)
    assert "prompt" in results["first_error"]
    samples = read_samples(tmp_path / "out")
    assert [sample["verdict"] == "error" for sample in samples] == [True, False, True]
    assert samples[0]["scores"] == {"accuracy": 0.0, "accuracy_norm": 0.0}

    task = Task(mode="ppl", prompt_column="text")
    results = evaluate(task, write([{"text": ""}, {"text": TEXT}]), tmp_path / "ppl", model=str(tiny))
    assert (results["rows"], results["rows_with_errors"], results["metrics"][0]["n"]) == (2, 1, 1)


@given(st.integers(1, 400), st.integers(2, 50), st.one_of(st.none(), st.integers(1, 50)))
def test_windows_score_each_token_once(num_tokens: int, window: int, stride: int | None) -> None:
    scored = []
    for place, (start, first, end) in enumerate(windows(num_tokens, window, stride)):
        assert end - start + (place == 0) <= window
        assert place == 0 or start < first
        scored += range(first, end)
    assert scored == [*range(num_tokens)]


def test_the_likeliest() -> None:
    assert likeliest([-3.0, -1.0, -2.0]) == 1
    assert likeliest([-3.0, -1.0, -2.0], [10, 1, 2]) == 0
    assert likeliest([-1.0, -1.0]) == 0
    assert likeliest([-1.0, -0.5], [1, 0]) == 1  # an empty option has no length to divide by
