"""lm-evaluation-harness on this engine: its task library, its prompts and its metrics; our prefill, cache and decode.

    lm_eval.simple_evaluate(model=MinisglLM(model="path/to/model"), tasks=["arc_easy"])

Knows lm-eval's model class (https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/model.py). Token ids are
made as its own `hf` model makes them, so that both score the same tokens. Needs the extra `eval`.
"""

from collections.abc import Sequence
from typing import Any

from minisgl.errors import MinisglError

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
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
        self.num_tokens = 0  # of prompts and answers so far
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
        """Tokens that lm-eval may send: a score reads one token more."""
        assert self.llm.config.max_len is not None
        return self.llm.config.max_len - 1

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
            self.num_tokens += score.num_prompt_tokens
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
            self.num_tokens += result.usage.prompt_tokens + result.usage.completion_tokens
            self.cache_hook.add_partial("generate_until", request.args, result.text)
        return [result.text for result in results]

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        given: dict[str, Any] = {**normalize_gen_kwargs(asked, self.max_gen_toks)}
        given |= {"max_tokens": given.pop("max_gen_toks"), "stop": [text for text in given.pop("until") if text]}
        return SamplingParams(temperature=0).merge({key: given[key] for key in given if key not in IGNORED})


def _check(answer: Score | Result) -> None:
    if answer.error:
        raise answer.error
