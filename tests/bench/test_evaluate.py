"""The benches of evaluations, on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest

from minisgl.bench import engines, evaluate, perplexity
from minisgl.bench.synthetic_tokenizer import words, write_tokenizer
from minisgl.tokenizer import Tokenizer

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """`shape(vocab_size)` is the name of a shape as those in bench/models."""
    for module in (engines, evaluate):
        monkeypatch.setattr(module, "SHAPES", tmp_path / "models")

    def make(vocab_size: int) -> str:
        folder = tmp_path / "models" / "tiny"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab_size}))
        return folder.name

    return make


SMALL = {"rows": 6, "context": 100, "repeats": 1, "warmups": 0, "device": "cpu"}


def test_multiple_choice(shape, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm-eval's hf model class needs it")
    path = tmp_path / "rows.jsonl"
    rows = list(evaluate.run(shape(1500), **SMALL, baseline="lm-eval", json_path=path))
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    ours, without_cache, theirs = rows
    assert [row["engine"] for row in rows] == ["minisgl", "minisgl --cache none", "lm-eval hf"]
    assert ours["accuracy"] == without_cache["accuracy"] == theirs["accuracy"]
    assert ours["cached_tokens"] > 0 and without_cache["cached_tokens"] == 0
    assert ours["prompt_tokens"] == without_cache["prompt_tokens"] > 6 * 4 * (100 + 32 + 6)
    assert evaluate.ratio(ours, theirs) == theirs["seconds"] / ours["seconds"]
    assert "6 rows of 4 behind 100 words" in evaluate.table(ours) and "accuracy" in evaluate.table(theirs)


def test_without_lm_eval_a_line_says_so(
    shape,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert len(list(evaluate.run(shape(1500), **SMALL, baseline="lm-eval"))) == 2
    assert "no baseline lm-eval: lm-evaluation-harness is not installed" in capsys.readouterr().err


def test_rows_that_do_not_fit(shape) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(evaluate.MinisglError, match="the rows do not fit the model: row 0: the prompt has "):
        list(evaluate.run(shape(1500), **SMALL, max_len=50))


def test_the_logits_of_a_long_text_are_never_all_there(shape, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "rows.jsonl"
    options = {"device": "cpu", "max_step_tokens": 512, "num_pages": 64}
    [row] = perplexity.run(shape(151_936), tokens=1024, json_path=path, **options)
    assert json.loads(path.read_text()) == row
    assert row["all_logits_mb"] == pytest.approx(622.3, abs=0.1)
    assert row["read_mb"] < row["scored_mb"] < 600  # the logits of 256 tokens, and what reading them needs
    assert "all logits in fp32 are 622.3 MB" in perplexity.table(row)
    with pytest.raises(perplexity.MinisglError, match="the text does not fit the model"):
        list(perplexity.run("tiny", tokens=5000, **options))


def test_a_synthetic_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 1500)
    tokenizer, known = Tokenizer(tmp_path), words(1500)
    assert tokenizer.vocab_size == 1500 and len(known) == len(set(known)) == 1500 - 1059
    text = "".join(f" {word}" for word in known)
    ids = tokenizer.encode(text)
    assert len(ids) == len(known) and tokenizer.decode(ids) == text
    other = "Any “other” text,\n\tzz!"
    assert tokenizer.decode(tokenizer.encode(other)) == other
