"""Multiple choice with long contexts: `minisgl bench eval`.

Every row has the same solved examples before its own question, and CHOICES answers of several tokens, as tasks with
few-shot prompts have. minisgl runs what `minisgl eval` does, from the file to durable results, with its prefix cache
and without. The baseline is the `hf` model class of lm-evaluation-harness on the same weights and texts; of it only the
scoring is timed. Loading is outside of all times, and the prefix cache is empty before each run.

A model of bench/models has a shape only: random weights and a tokenizer of its vocabulary are written to a folder for
temporary files, from which both engines load it.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from minisgl.bench.engines import SHAPES, MinisglEngine, find_model
from minisgl.bench.harness import environment, write_rows
from minisgl.bench.synthetic_tokenizer import words, write_tokenizer
from minisgl.errors import MinisglError
from minisgl.evaluate.evaluation import Evaluation
from minisgl.evaluate.scoring import likeliest
from minisgl.evaluate.task import Task
from minisgl.models.config import ModelConfig
from minisgl.resolve import resolve_device, resolve_dtype

CHOICES, CHOICE_WORDS, QUESTION_WORDS = 4, 6, 32
VOCABULARY = 20_000  # of the texts: words of any synthetic tokenizer
TASK = Task(name="choice", mode="choice", prompt_column="prompt", options="options", target="answer")
NOT_INSTALLED = "no baseline lm-eval: lm-evaluation-harness is not installed ({error}): pip install 'minisgl[eval]'"


def run(
    model: str,
    *,
    rows: int = 256,
    context: int = 1024,
    repeats: int = 3,
    warmups: int = 1,
    json_path: Path | None = None,
    baseline: str | None = None,
    hf_batch: int = 16,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """A row for minisgl, one without its prefix cache, and one for `baseline` ("lm-eval"), if given; where that is not
    installed, a line on stderr instead.

    context: words of the shared examples; in models of bench/models each is a token. hf_batch: texts that the baseline
    computes at once. Other arguments and errors as in `throughput.run`.
    """
    if json_path:
        write_rows(json_path, [])  # a path that cannot be written should fail now
    disable_progress_bar()
    about = {"bench": "eval", "model": model, "rows": rows, "choices": CHOICES, "context_words": context}
    questions = _questions(rows, context)
    with TemporaryDirectory(prefix="minisgl-bench-") as place:
        folder = _model_folder(model, Path(place) / "model", options)
        sides = [_ours(folder, questions, repeats, warmups, own) for own in (options, {**options, "cache": "none"})]
        if baseline:
            assert baseline == "lm-eval"
            sides.append(_lm_eval(folder, questions, repeats, warmups, options, hf_batch))
        for side in sides:
            for measured in side:
                median = statistics.median(measured["seconds_all"])
                row = {**about, **measured, "seconds": round(median, 4), "rows_per_s": round(rows / median, 2)}
                if json_path:
                    write_rows(json_path, [row])
                yield row


def _questions(rows: int, context: int) -> list[dict[str, Any]]:
    rng, vocabulary = Random(0), words(VOCABULARY)

    def text(count: int) -> str:
        return " ".join(rng.choices(vocabulary, k=count))

    examples = text(context)
    return [
        {
            "prompt": f"{examples} {text(QUESTION_WORDS)}",
            "options": [text(CHOICE_WORDS) for _ in range(CHOICES)],
            "answer": rng.randrange(CHOICES),
        }
        for _ in range(rows)
    ]


def _model_folder(model: str, place: Path, options: dict[str, Any]) -> Path:
    """The folder of a model; of a shape, `place`, with weights and a tokenizer made for it."""
    folder, _ = find_model(model, options)
    if folder.parent != SHAPES:
        return folder
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    device = resolve_device(options.get("device", "auto"))
    dtype = resolve_dtype(options.get("dtype", "auto"), ModelConfig.from_folder(folder).dtype, device)
    with device:
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(place)
    write_tokenizer(place, config.vocab_size)
    return place


def _ours(
    folder: Path, questions: list[dict[str, Any]], repeats: int, warmups: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    seconds: list[float] = []
    with MinisglEngine(folder, options) as engine, TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in questions))
        for repeat in range(-warmups, repeats):
            engine.llm.reset_prefix_cache()
            out = Path(place) / f"{repeat}.eval"
            with Evaluation(TASK, [str(data)], out, model=str(folder), engine=options) as evaluation:
                started = time.perf_counter()
                summary = evaluation.answer(engine.llm)
                evaluation.finish()
                results = evaluation.grade(summary)
                if repeat >= 0:
                    seconds.append(round(time.perf_counter() - started, 4))
            if results["rows_with_errors"]:
                raise MinisglError(f"the rows do not fit the model: {results['first_error']}")
        yield {
            "engine": "minisgl --cache none" if options.get("cache") == "none" else "minisgl",
            "seconds_all": seconds,
            "prompt_tokens": summary.prompt_tokens,
            "cached_tokens": summary.cached_tokens,
            "accuracy": results["metrics"][0]["value"],
            "dtype": engine.dtype,
            **engine.facts(),
            **environment(engine.device),
        }


def _lm_eval(
    folder: Path, questions: list[dict[str, Any]], repeats: int, warmups: int, options: dict[str, Any], hf_batch: int
) -> Iterator[dict[str, Any]]:
    try:
        from lm_eval import __version__ as version
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        print(NOT_INSTALLED.format(error=error), file=sys.stderr)
        return
    device = resolve_device(options.get("device", "auto"))
    dtype = resolve_dtype(options.get("dtype", "auto"), ModelConfig.from_folder(folder).dtype, device)
    model = HFLM(pretrained=str(folder), dtype=dtype, device=str(device), batch_size=hf_batch)
    pairs = [(row["prompt"], TASK.separator + option) for row in questions for option in row["options"]]
    seconds: list[float] = []
    for repeat in range(-warmups, repeats):
        requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
        started = time.perf_counter()
        logprobs = [logprob for logprob, _ in model.loglikelihood(requests, disable_tqdm=True)]
        if repeat >= 0:
            seconds.append(round(time.perf_counter() - started, 4))
    best = [likeliest(logprobs[first : first + CHOICES]) for first in range(0, len(pairs), CHOICES)]
    num_right = sum(choice == row["answer"] for choice, row in zip(best, questions, strict=True))
    yield {
        "engine": "lm-eval hf",
        "engine_version": version,
        "seconds_all": seconds,
        "batch": hf_batch,
        "accuracy": num_right / len(questions),
        "dtype": dtype,
        **environment(device),
    }


def table(row: dict[str, Any]) -> str:
    """A row as text."""
    low, high = min(row["seconds_all"]), max(row["seconds_all"])
    shape = f"{row['rows']:,} rows of {row['choices']} behind {row['context_words']:,} words"
    lines = [f"{row['engine']}, {row['model']}, {shape}, {row['dtype']}, {row['device']}"]
    spread = f"({row['rows'] / high:,.2f} .. {row['rows'] / low:,.2f}), {len(row['seconds_all'])} timed"
    lines.append(f"  {'rows/s':<9} {row['rows_per_s']:,.2f}  {spread}")
    if "prompt_tokens" in row:
        cached = row["cached_tokens"] / row["prompt_tokens"]
        lines.append(f"  {'tokens':<9} {row['prompt_tokens']:,}, {cached:.0%} from the cache")
    lines.append(f"  {'accuracy':<9} {row['accuracy']:.4f}")
    return "\n".join(lines)


def ratio(row: dict[str, Any], baseline: dict[str, Any]) -> float:
    """How many times as fast as the baseline."""
    return float(baseline["seconds"] / row["seconds"])
