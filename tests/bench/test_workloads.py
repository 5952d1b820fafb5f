"""The workloads are those that the peers were measured on, and any file of prompts."""

from pathlib import Path

import pytest

from minisgl.bench.workloads import FILE_OUTPUT_LEN, WORKLOADS, Workload, fold, load, uniform
from minisgl.demo import MODEL_PATH
from minisgl.errors import MinisglError

BIG_VOCAB = 151_936


def test_mini_is_the_one_that_peers_were_measured_on() -> None:
    work = load("mini", MODEL_PATH, BIG_VOCAB)
    assert len(work.prompts) == 256
    assert (work.num_prompt_tokens, work.num_output_tokens) == (142_827, 133_966)


@pytest.mark.parametrize(
    ("name", "requests", "prompt_len", "output_len"),
    [("single", 1, 128, 512), ("prefill", 64, 2048, 1), ("shared_prefix", 512, 2176, 128)],
)
def test_the_other_workloads(name: str, requests: int, prompt_len: int, output_len: int) -> None:
    work = WORKLOADS[name](0)
    assert [len(prompt) for prompt in work.prompts] == [prompt_len] * requests
    assert work.output_lens == [output_len] * requests
    assert WORKLOADS[name](0) == work


def test_shared_prefix_has_eight_prefixes() -> None:
    prompts = WORKLOADS["shared_prefix"](0).prompts
    assert len({tuple(prompt[:2048]) for prompt in prompts}) == 8
    assert len({tuple(prompt) for prompt in prompts}) == 512


def test_ids_are_folded_into_a_small_vocabulary() -> None:
    work = load("single", MODEL_PATH, 1024)
    assert max(work.prompts[0]) < 1024
    assert [token % 1024 for token in WORKLOADS["single"](0).prompts[0]] == work.prompts[0]
    assert fold(Workload([[9_000]], [1]), BIG_VOCAB) == Workload([[9_000]], [1])


def test_uniform_shares_nothing() -> None:
    work = uniform(4, 100, 7)
    assert [len(prompt) for prompt in work.prompts] == [100] * 4 and work.output_lens == [7] * 4
    assert len({prompt[0] for prompt in work.prompts}) == 4


def test_a_longer_queue() -> None:
    work = load("mini300", MODEL_PATH, BIG_VOCAB)
    assert len(work.prompts) == len(work.output_lens) == 300
    assert work.prompts[:256] == load("mini", MODEL_PATH, BIG_VOCAB).prompts


def test_a_shape() -> None:
    assert load("16x4x3", MODEL_PATH, BIG_VOCAB) == uniform(3, 16, 4)
    assert len(load("16x4", MODEL_PATH, BIG_VOCAB).prompts) == 256
    with pytest.raises(MinisglError, match="must be at least 1"):
        load("16x0", MODEL_PATH, BIG_VOCAB)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "What is 2 + 3?", "max_tokens": 5, "temperature": 0}\n\n'
        '{"messages": [{"role": "user", "content": "Hi"}]}\n'
        '{"prompt_token_ids": [5, 6, 7], "max_tokens": 9}\n'
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": [[8], [9, 9]]}}\n'
    )
    work = load(str(path), MODEL_PATH, 1024)
    assert work.output_lens == [5, FILE_OUTPUT_LEN, 9, FILE_OUTPUT_LEN, FILE_OUTPUT_LEN]
    assert work.prompts[2:] == [[5, 6, 7], [8], [9, 9]] and all(work.prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', r"p\.jsonl, line 2: "),
        ("\n", "has no rows"),
        ("{", "line 1: "),
        ('{"prompt": "a", "n": 2}', "line 1: a bench asks each prompt once"),
        ('{"prompt": "a", "truncate_prompt_tokens": 1}', "leave out n, tools"),
        ('{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"b": 1}}', "chat_template_kwargs"),
    ],
)
def test_a_file_that_cannot_be_measured(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(MinisglError, match=message):
        load(str(path), MODEL_PATH, 1024)


def test_an_unknown_workload(tmp_path: Path) -> None:
    for name in ("nonsense", str(tmp_path)):
        with pytest.raises(
            MinisglError,
            match="it must be one of mini, single, prefill, shared_prefix, a shape such as 512x128, or a file",
        ):
            load(name, MODEL_PATH, 1024)
