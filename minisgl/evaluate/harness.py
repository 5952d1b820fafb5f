"""lm-evaluation-harness on this engine: its task library, its prompts and its metrics; our prefill, cache and decode.

    lm_eval.simple_evaluate(model=MinisglLM(model="path/to/model"), tasks=["arc_easy"])

Knows lm-eval's model class (https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/model.py). Token ids are
made as its own `hf` model makes them, so that both score the same tokens. Needs the extra `eval`.
"""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from minisgl.errors import MinisglError

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MinisglError(
        f"--harness needs lm-evaluation-harness ({error}): pip install 'minisgl[eval]', or 'lm-eval'"
    ) from error

from minisgl.llm import LLM
from minisgl.request import Result, SamplingParams, Score
from minisgl.weights import resolve_model

Pair = tuple[Any, list[int], list[int]]  # what the cache of lm-eval knows it by, context, continuation

DEFAULT_GEN_TOKENS = 256  # of tasks that do not say; as in lm-eval's own models
IGNORED = ("do_sample",)  # generation arguments that say nothing more than the temperature does


@register_model("minisgl")
class MinisglLM(TemplateLM):  # type: ignore[misc]
    """A model class of lm-eval. Give an `LLM`, which stays open, or the arguments to make one.

    Raises MinisglError where a request cannot be served: lm-eval has no place for the errors of single rows.
    """

    def __init__(self, llm: LLM | None = None, *, model: str | None = None, **options: Any) -> None:
        super().__init__()
        for ours in ("batch_size", "max_batch_size"):  # what lm-eval hands to every model; here steps are mixed
            options.pop(ours, None)
        self.llm = llm or LLM(model, **options)
        from transformers import AutoTokenizer  # slow to import; loaded by LLM anyway

        # lm-eval asks it for chat templates and names; the engine's own class of a tokenizer has neither.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(self.llm.config.model))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens that lm-eval may send: a score reads one token more, and the engine keeps room for one answer."""
        assert self.llm.config.max_len is not None
        return self.llm.config.max_len - 2

    @property
    def max_gen_toks(self) -> int:
        return DEFAULT_GEN_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **given)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # -- what lm-eval asks for --

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Sum of logprobs and whether greedy decoding says the same, for each pair. Contexts lose their start where a
        pair is too long, as in lm-eval's own models."""
        contexts, continuations = [], []
        for _, context, continuation in requests:
            scored = continuation[-self.max_length :]
            contexts.append(context[max(0, len(context) + len(scored) - self.max_length - 1) :])
            continuations.append(scored)
        scores = self.llm.score(contexts, continuations, progress=not disable_tqdm)
        answers = []
        for (key, _, _), score in zip(requests, scores, strict=True):
            _check(score)
            answers.append((score.logprob, score.is_greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The sum over all tokens of each text, in windows that share no scored token."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            made = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in made]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, which ends before the first of its stop strings."""
        prompts, params = [], []
        for request in requests:
            context, asked = request.args
            own = self._params(asked)
            assert own.max_tokens is not None
            room = self.max_length - own.max_tokens
            if room < 1:
                raise MinisglError(
                    f"a task generates {own.max_tokens:,} tokens; the context has {self.max_length:,}: raise --max-len"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(own)
        results = self.llm.generate(prompts, params, progress=not disable_tqdm)
        for request, result in zip(requests, results, strict=True):
            _check(result)
            self.cache_hook.add_partial("generate_until", request.args, result.text)
        return [result.text for result in results]

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        given: dict[str, Any] = {**normalize_gen_kwargs(asked, self.max_gen_toks)}
        given |= {"max_tokens": given.pop("max_gen_toks"), "stop": [text for text in given.pop("until") if text]}
        return SamplingParams(temperature=0).merge({key: given[key] for key in given if key not in IGNORED})


def _check(answer: Score | Result) -> None:
    if answer.error:
        raise answer.error


# -- `minisgl eval --harness` --


def run(
    llm: LLM,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
    seed: int = 0,
    include_path: str | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run tasks of lm-eval's library, or of the files in `include_path`. Returns rows of metrics and samples, as other
    evaluations have them. MinisglError for a task that there is not."""
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise MinisglError(f"lm-evaluation-harness has no task {name!r}; {hint}")
    found = lm_eval.simple_evaluate(
        model=MinisglLM(llm),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=few_shot,
        limit=limit,
        apply_chat_template=chat,
        system_instruction=system,
        random_seed=seed,
        fewshot_random_seed=seed,
    )
    return _metrics(found), _samples(found["samples"])


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
