"""Packing, the loss, and one tiny training run on the CPU, from nothing to a checkpoint that transformers loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisgl.demo.chat_tokenizer import train_tokenizer
from minisgl.demo.checkpoint import new_model
from minisgl.demo.data import SKILLS, training_rows
from minisgl.demo.packing import SEQUENCE_LENGTH, pack_rows, pack_training_rows
from minisgl.demo.train import PEAK_LEARNING_RATE, answer_loss, learning_rate, main


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(training_rows(seed=0, count=2000))


def test_packing_keeps_every_row_and_marks_the_answers(tokenizer: Tokenizer) -> None:
    rows = list(training_rows(seed=1, count=300))
    packed = pack_rows(rows, tokenizer)
    assert packed.tokens.shape == packed.row_numbers.shape == packed.is_answer.shape
    assert packed.tokens.shape[1] == SEQUENCE_LENGTH
    found = []
    for tokens, row_numbers, is_answer in zip(*packed, strict=True):
        assert not is_answer[row_numbers == 0].any()
        for number in range(1, row_numbers.max() + 1):
            of_row = row_numbers == number
            text = tokenizer.decode(tokens[of_row], skip_special_tokens=False)
            answers = tokenizer.decode(tokens[of_row & is_answer], skip_special_tokens=False)
            found.append((text, answers))
    expected = []
    for row in rows:
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row).removesuffix("\n")
        answers = "".join(f"{m['content']}<|im_end|>" for m in row if m["role"] == "assistant")
        if len(tokenizer.encode(text).ids) <= SEQUENCE_LENGTH:
            expected.append((text, answers))
    assert sorted(found) == sorted(expected)
    assert len(expected) > 280
    assert (packed.row_numbers > 0).mean() > 0.85


def test_packing_does_not_depend_on_the_number_of_workers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.demo.packing.ROWS_PER_TASK", 100)
    for one, two in zip(pack_training_rows(250, tokenizer, 1), pack_training_rows(250, tokenizer, 2), strict=True):
        np.testing.assert_array_equal(one, two)


def test_packed_rows_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    """The loss of packed sequences is the mean over the rows' answer tokens, each row computed alone."""
    torch.manual_seed(0)
    model = new_model()
    assert model.dtype == torch.float32
    packed = pack_rows(training_rows(seed=2, count=8), tokenizer)
    tokens, row_numbers, is_answer = (torch.from_numpy(array) for array in packed)
    tokens = tokens.long()
    total, num_answer_tokens = 0.0, 0
    for sequence in range(len(tokens)):
        for number in range(1, int(row_numbers[sequence].max()) + 1):
            of_row = row_numbers[sequence] == number
            alone = (part[sequence][of_row][None] for part in (tokens, row_numbers, is_answer))
            count = int(is_answer[sequence][of_row].sum())
            total += answer_loss(model, *alone).item() * count
            num_answer_tokens += count
    with torch.no_grad():
        loss = answer_loss(model, tokens, row_numbers, is_answer).item()
    assert loss == pytest.approx(total / num_answer_tokens, rel=1e-5)


def test_learning_rate_rises_holds_and_falls() -> None:
    rates = [learning_rate(progress) for progress in (0.0, 0.01, 0.1, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([share * PEAK_LEARNING_RATE for share in (0, 0.5, 1, 1, 0.5, 0)])


def test_a_tiny_run_writes_a_checkpoint(tmp_path: Path) -> None:
    options = "--steps 2 --rows 1500 --batch 2 --workers 1 --questions 1 --device cpu"
    result = CliRunner().invoke(main, ["--out", str(tmp_path), *options.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "step      2" in result.output

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(model).__name__, model.dtype) == ("Qwen3ForCausalLM", torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == [2, 0]
    assert (tmp_path / "model.safetensors").stat().st_size <= 12_000_000

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    hello = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(hello, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(tokenizer.encode(prompt)) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    report = json.loads((tmp_path / "scores.json").read_text())
    assert set(report["exact_match"]) == {"float32", "bfloat16"}
    assert report["questions"] == dict.fromkeys(SKILLS, 1)
    assert report["steps"] == 2
