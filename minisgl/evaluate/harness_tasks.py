"""`minisgl eval --harness`: tasks of lm-evaluation-harness, with results in the same files as other evaluations have.

Knows what lm-eval's task library and its results look like. Does not know models: `harness` has the class for these.
"""

import json
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from minisgl.batch_run.job import revision
from minisgl.errors import MinisglError
from minisgl.evaluate.harness import MinisglLM  # first: it says what to install
from minisgl.evaluate.results import check_folder, save_results, save_samples, timing
from minisgl.llm import LLM


def run_tasks(
    tasks: Sequence[str],
    folder: Path,
    *,
    model: str | None = None,
    engine: dict[str, Any] | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
    include_path: str | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval's library, or of the files in `include_path`; write samples and results to `folder` and
    return the latter. MinisglError for a task that there is not, before the model is loaded."""
    check_folder(folder)
    manager = _task_manager(tasks, include_path)
    seed = int((engine or {}).get("seed", 0))
    with LLM(model, **(engine or {})) as llm:
        counted = MinisglLM(llm)
        started_s = time.perf_counter()
        found = lm_eval.simple_evaluate(
            model=counted,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=chat,
            system_instruction=system,
            random_seed=seed,
            fewshot_random_seed=seed,
        )
        seconds = time.perf_counter() - started_s
    folder.mkdir(exist_ok=True)
    num_rows = sum(1 for _ in save_samples(folder, _samples(found["samples"])))
    settings = {"few_shot": few_shot, "chat": chat, "system": system, "limit": limit, "include_path": include_path}
    return save_results(
        folder,
        {
            "task": ",".join(tasks),
            "metrics": _metrics(found),
            "rows": num_rows,
            "rows_with_errors": 0,  # lm-eval has none: one ends the run
            "model": model or "demo",
            "model_revision": revision(model),
            "seed": seed,
            **timing(seconds, counted.num_tokens),
            "settings": {**settings, "engine": engine or {}, "lm_eval": lm_eval.__version__},
        },
    )


def _task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """What finds the tasks. The library's own are indexed, which takes many seconds, when one of them is named."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise MinisglError(f"--include-path: {include_path} is no folder of task files")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise MinisglError(f"lm-evaluation-harness has no task {name!r}; {hint}")
    return manager


def _metrics(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, filtered_by = name.partition(",")
            if metric.endswith("_stderr") or isinstance(value, (str, bool)) or not filtered_by:
                continue
            stderr = values.get(f"{metric}_stderr,{filtered_by}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered_by == "none" else f"{metric} ({filtered_by})",
                    "value": float(value),
                    "stderr": None if isinstance(stderr, str) or stderr is None else float(stderr),
                    "stderr_by": "lm-eval",
                    "n": found["n-samples"].get(task, {}).get("effective", 0),
                }
            )
    return rows


def _samples(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    for task, rows in found.items():
        for row in rows:
            scores = {name: row[name] for name in row["metrics"] if isinstance(row[name], (int, float))}
            verdict = "scored" if not scores else "right" if next(iter(scores.values())) == 1 else "wrong"
            samples.append(
                {
                    "id": f"{task}/{row['doc_id']}",
                    "index": len(samples),
                    "group": task,
                    "prompt": row["arguments"],
                    "output": row["resps"],
                    "answer": row["filtered_resps"],
                    "target": row["target"],
                    "verdict": verdict,
                    "scores": {name: float(value) for name, value in scores.items()},
                }
            )
    return json.loads(json.dumps(samples, default=str))  # type: ignore[no-any-return]  # documents hold anything
