"""The runner on a real engine: what the stand-in of the other tests only pretends."""

import json
from pathlib import Path
from typing import Any

import pytest

from minisgl.batch_run.job import Job, JobOptions
from minisgl.demo import MODEL_PATH
from minisgl.llm import LLM
from minisgl.request import SamplingParams

EXAMPLES = Path(__file__).parents[2] / "examples" / "prompts.jsonl"
pytestmark = pytest.mark.skipif(not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's weights")


def test_requests_that_wait_can_be_taken_back() -> None:
    with LLM(device="cpu", max_len=64, max_running=2) as llm:
        params = SamplingParams(max_tokens=4, ignore_eos=True, stop="never said")
        llm.submit([llm.new_request([index + 1] * 3, params, index=index) for index in range(5)])
        llm.step()
        dropped = {request.index for request in llm.drop_waiting()}
        ended = set()
        while llm.num_unfinished:
            ended |= {request.index for request, _ in llm.step()}
        assert len(dropped) == 3 and len(ended) == 2 and dropped | ended == set(range(5))
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages


def test_a_job_that_stops_and_goes_on_gives_the_same_texts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = [f"What is {index} + 3?" for index in range(40)]
    rows = [{"messages": [{"role": "user", "content": question}], "n": 2, "seed": 7} for question in questions]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def options(name: str) -> JobOptions:
        sampling = {"temperature": 20.0, "max_tokens": 8}  # a trained model says the same at lower ones
        return JobOptions([str(prompts)], str(tmp_path / name), sampling=sampling, ordered=True)

    def texts(name: str) -> list[list[str]]:
        lines = (tmp_path / name).read_text().splitlines()
        return [[sample["text"] for sample in json.loads(line)["samples"]] for line in lines]

    with LLM(device="cpu", max_len=64, max_running=4) as llm:
        with Job(options("whole.jsonl")) as job:
            job.answer(llm)
            job.finish()
        with Job(options("pieces.jsonl")) as job:
            assert job.answer(llm, should_stop=lambda: job.output.num_rows > 10).stopped
            assert 10 < job.output.num_rows < 40
        with Job(options("pieces.jsonl")) as job:
            assert 10 < job.num_done < 40
            job.answer(llm)
            job.finish()
    assert texts("pieces.jsonl") == texts("whole.jsonl")
    assert any(first != second for first, second in texts("whole.jsonl")), "samples have seeds of their own"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_examples_have_the_tokens_that_one_at_a_time_have_on_a_cpu(tmp_path: Path, device: str) -> None:
    def tokens(name: str, **engine: Any) -> dict[str, list[int]]:
        output = tmp_path / name
        options = JobOptions([str(EXAMPLES)], str(output), sampling={"temperature": 0}, return_token_ids=True)
        with LLM(dtype="float32", num_pages=300, **engine) as llm, Job(options) as job:
            job.answer(llm)
            job.finish()
        rows = map(json.loads, output.read_text().splitlines())
        return {row["id"]: row["token_ids"] for row in rows if row["finish_reason"] == "stop"}

    expected = tokens("alone.jsonl", device="cpu", max_running=1)
    assert len(expected) == 50 and tokens("together.jsonl", device=device) == expected


def test_logprobs_are_in_the_row(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "What is 2 + 3?", "logprobs": 2, "prompt_logprobs": 0, "n": 2}))
    options = JobOptions([str(prompts)], str(tmp_path / "out.jsonl"), sampling={"max_tokens": 4, "ignore_eos": True})
    with LLM(device="cpu", max_len=64) as llm, Job(options) as job:
        job.answer(llm)
        job.finish()
    row = json.loads((tmp_path / "out.jsonl").read_text())
    for sample in row["samples"]:
        assert [len(token["top"]) for token in sample["logprobs"]] == [2] * 4
        assert all(token["logprob"] <= 0 and token["token_id"] >= 0 for token in sample["logprobs"])
    assert row["logprobs"] == row["samples"][0]["logprobs"]
    assert len(row["prompt_logprobs"]) == row["usage"]["prompt_tokens"] - 1


def test_the_manifest_has_the_dtype_that_auto_became(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 2 + 3?\n")

    def dtype(**engine: str) -> str:
        with Job(JobOptions([str(prompts)], engine=engine)) as job:
            assert "dtype" not in job.manifest.settings["engine"]
            return str(job.manifest.settings["dtype"])

    assert dtype(device="cpu") == dtype(dtype="float32") == "float32"
    assert dtype(dtype="bfloat16") == "bfloat16"
