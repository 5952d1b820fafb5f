"""The demo tokenizer: any text round-trips, digits and quoted letters stand alone, and the two chat formats agree."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minisgl.demo.chat_tokenizer import (
    END_OF_TEXT_ID,
    TURN_END_ID,
    TURN_START_ID,
    VOCAB_SIZE,
    chat_segments,
    save_tokenizer,
    train_tokenizer,
)
from minisgl.demo.data import Row, training_rows


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(training_rows(seed=0, count=3000))


@pytest.fixture(scope="module")
def loaded(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(trained, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_vocabulary(trained: Tokenizer, loaded: AutoTokenizer) -> None:
    assert trained.get_vocab_size() == VOCAB_SIZE
    special = [trained.id_to_token(i) for i in (END_OF_TEXT_ID, TURN_START_ID, TURN_END_ID)]
    assert special == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (TURN_END_ID, END_OF_TEXT_ID)


@pytest.mark.parametrize("text", ["", "  two\n\n\tlines ", "naïve 日本語 🎉", "e\u0301 \x00 \u200d", "a" * 300, '"q"'])
def test_any_text_round_trips(text: str, trained: Tokenizer, loaded: AutoTokenizer) -> None:
    ids = trained.encode(text).ids
    assert trained.decode(ids, skip_special_tokens=False) == text
    assert loaded.encode(text, add_special_tokens=False) == ids
    assert loaded.decode(ids) == text


def test_digits_and_quoted_letters_stand_alone(trained: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [trained.decode([i]) for i in trained.encode(text).ids]

    assert pieces("What is 123+4567?") == ["What", " is", " ", *"123", "+", *"4567", "?"]
    assert pieces('Reverse the word "planet".') == ["Reverse", " the", " word", ' "', *"planet", '".']
    assert pieces("What is the capital of") == ["What", " is", " the", " capital", " of"]


def test_segments_are_the_template(loaded: AutoTokenizer) -> None:
    for row in training_rows(seed=1, count=200):
        rendered = loaded.apply_chat_template(row, tokenize=False)
        assert "".join(text for text, _ in chat_segments(row)) + "\n" == rendered
        prompt = loaded.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True)
        *before, (answer, is_answer) = chat_segments(row)
        assert "".join(text for text, _ in before) == prompt
        assert is_answer and answer == row[-1]["content"] + "<|im_end|>"


def test_training_and_inference_tokenize_the_prompt_alike(trained: Tokenizer, loaded: AutoTokenizer) -> None:
    for row in training_rows(seed=2, count=200):
        prompt = loaded.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True)
        *before, _ = chat_segments(row)
        in_training = [i for text, _ in before for i in trained.encode(text).ids]
        assert loaded.encode(prompt, add_special_tokens=False) == in_training


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([{"role": "tool", "content": "4"}], "role 'tool' is not one of system, user, assistant"),
        ([{"role": "user", "content": None}], "message content must be text"),
    ],
)
def test_template_refuses(row: Row, complaint: str, loaded: AutoTokenizer) -> None:
    with pytest.raises(Exception, match=complaint):
        loaded.apply_chat_template(row, tokenize=False)
