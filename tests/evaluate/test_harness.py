"""lm-evaluation-harness scores the same through our class as through its own `hf` class, on the same random weights."""

import json
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from minisgl.errors import MinisglError

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="lm-eval's hf model class needs it")

from minisgl import LLM
from minisgl.cli.tables import results_table
from minisgl.evaluate import harness, harness_tasks
from tests.evaluate.conftest import read_samples

TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_ppl": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_gen": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files, with data beside them."""
    folder, rng = tmp_path_factory.mktemp("tasks"), Random(0)
    rows = [
        {
            "question": f"the sum of {place} and {rng.randrange(50)} in the end",
            "choices": [str(rng.randrange(99)), "the bin", "in a thing", "an end"],
            "label": rng.randrange(4),
            "text": f"the end of a thing {place} " * rng.randrange(1, 20),
            "answer": "the",
        }
        for place in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    for name, settings in TASKS.items():
        task = {"task": name, **shared, "test_split": "test", "num_fewshot": 0, **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Any:
    with LLM(str(tiny), device="cpu") as llm:
        yield llm


def evaluate(model: Any, tasks: Path, **options: Any) -> Any:
    import lm_eval

    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0, **options)


def test_the_same_score_as_through_the_hf_class(llm: LLM, tiny: Path, tasks: Path) -> None:
    ours_class = harness.MinisglLM(llm)
    ours = evaluate(ours_class, tasks)
    args = {"pretrained": str(tiny), "dtype": "float32", "max_length": ours_class.max_length}
    theirs = evaluate("hf", tasks, model_args=args, device="cpu", batch_size=4)
    for task in TASKS:
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), name
        for our, their in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert our["arguments"] == their["arguments"]
            for a, b in zip(our["resps"], their["resps"], strict=True):
                if task == "local_gen":
                    assert a == b
                else:
                    a, b = (one[0] if isinstance(one[0], tuple) else one for one in (a, b))
                    assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1:] == b[1:]


def test_contexts_that_are_too_long_lose_their_start(llm: LLM) -> None:
    model = harness.MinisglLM(llm)
    ids = [place % 200 for place in range(400)]
    room = model.max_length
    [(cut, _)] = model._loglikelihood_tokens([(None, ids[:390], ids[390:])], disable_tqdm=True)
    [score] = llm.score([ids[400 - room - 1 : 390]], [ids[390:]])
    assert cut == score.logprob


def test_results_are_in_the_files_of_other_evaluations(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    names = ["local_choice", "local_gen"]
    results = harness_tasks.run_tasks(
        names, tmp_path / "out", model=str(tiny), engine={"device": "cpu"}, limit=5, include_path=str(tasks), chat=True
    )
    assert [(one["task"], one["metric"], one["n"]) for one in results["metrics"]] == [
        ("local_choice", "acc", 5),
        ("local_choice", "acc_norm", 5),
        ("local_gen", "exact_match", 5),
    ]
    samples = read_samples(tmp_path / "out")
    assert results["metrics"][0]["value"] == sum(sample["scores"]["acc"] for sample in samples[:5]) / 5
    assert [sample["index"] for sample in samples] == [*range(10)]
    assert "<|im_start|>user" in json.dumps(samples[0]["prompt"])
    assert results["tokens"] > 0 and "local_choice" in results_table(results)


def test_a_task_that_there_is_not(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Indexing the library's own tasks takes many seconds.
    monkeypatch.setattr(harness_tasks, "TaskManager", partial(harness_tasks.TaskManager, include_defaults=False))
    with pytest.raises(MinisglError, match="no task 'local_choise'; did you mean local_choice"):
        harness_tasks.run_tasks(["local_gen", "local_choise"], tmp_path / "out", include_path=str(tasks))
    with pytest.raises(MinisglError, match="is no folder of task files"):
        harness_tasks.run_tasks(["local_gen"], tmp_path / "out", include_path=str(tasks / "missing"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"), [({"num_beams": 2}, "num_beams"), ({"max_gen_toks": 300}, "generates 300 tokens")]
)
def test_generation_that_cannot_be_done(llm: LLM, asked: dict[str, Any], message: str) -> None:
    request = SimpleNamespace(args=("In the", {"until": ["x"], **asked}))
    with pytest.raises(MinisglError, match=message):
        harness.MinisglLM(llm).generate_until([request], disable_tqdm=True)
