"""Answers become samples: what was extracted, the verdict, and the scores that metrics are made of.

    id, index, [group,] prompt, output, answer, target, verdict, scores, finish_reason, error
    samples        with n above 1: a list of {output, answer, verdict, finish_reason} instead of these
    options, logprobs        of mode choice

verdict: right, wrong, no answer (none was found), error (the row could not be asked or compared), not run (code that
nobody allowed to run). A score is a number, or [sum, weight] where rows count by their weight.

Knows lines of answers.jsonl and a task's rules. Does not know files or models.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from minisgl.evaluate import instructions
from minisgl.evaluate.code import in_parallel, runs
from minisgl.evaluate.extract import Extractor, as_text, is_right, normalised
from minisgl.evaluate.scoring import likeliest, shown
from minisgl.evaluate.task import Task

Sample = dict[str, Any]
Scores = dict[str, Any]

RIGHT, WRONG, NO_ANSWER, ERROR, NOT_RUN = "right", "wrong", "no answer", "error", "not run"


def metric_names(task: Task) -> list[str]:
    """The metrics of a task, the main one first."""
    if task.mode == "ppl":
        return ["token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"]
    if task.mode == "choice":
        return ["accuracy", "accuracy_norm"]
    if task.match == "instructions":
        return ["prompt_accuracy", "instruction_accuracy"]
    if task.n == 1:
        return ["pass@1" if task.match == "python" else "accuracy"]
    names = [f"pass@{k}" for k in sample_counts(task.n)]
    return names if task.match == "python" else [*names, "majority"]  # programs are not voted on


def sample_counts(n: int) -> list[int]:
    """The k of pass@k: powers of two, and n."""
    return [*(2**power for power in range(n.bit_length()) if 2**power < n), n]


def pass_at(k: int, n: int, num_right: int) -> float:
    """The chance that one of k samples is right, estimated from n (Chen et al., 2021, section 2.1)."""
    return 1 - math.comb(n - num_right, k) / math.comb(n, k)


def grade_all(task: Task, lines: Iterable[dict[str, Any]], *, allow_code: bool = False) -> Iterator[Sample]:
    """A sample of each line, in order."""
    grader = Grader(task, allow_code=allow_code)
    return in_parallel(grader.grade, lines) if task.match == "python" and allow_code else map(grader.grade, lines)


class Grader:
    """The rules of one task."""

    def __init__(self, task: Task, *, allow_code: bool = False):
        self.task, self.allow_code = task, allow_code
        self._extract = Extractor(task.extract)

    def grade(self, line: dict[str, Any]) -> Sample:
        sample = {name: line.get(name) for name in ("id", "index", "prompt")}
        if line.get("group") is not None:
            sample["group"] = line["group"]
        sample |= {"output": line["text"], "answer": None, "target": line.get("target"), "verdict": ERROR}
        sample |= {"scores": {}, "finish_reason": line["finish_reason"], "error": line["error"]}
        if line["error"]:
            # Of perplexity a row that was not read says nothing; an answer that is not there is not right.
            sample["scores"] = {} if self.task.mode == "ppl" else self._all_wrong()
        elif self.task.mode == "ppl":
            sample |= self._perplexity(line)
        elif self.task.mode == "choice":
            sample |= self._choice(line)
        else:
            try:
                sample |= self._text(line)
            except ValueError as error:  # the target cannot be compared
                sample |= {"error": {"type": "invalid_target", "message": str(error)}, "scores": self._all_wrong()}
        return sample

    def _all_wrong(self) -> Scores:
        return {name: 0.0 for name in metric_names(self.task) if name != "instruction_accuracy"}

    def _text(self, line: dict[str, Any]) -> Sample:
        drafts = [self._one(line, sample) for sample in line.get("samples") or [line]]
        verdicts = [draft["verdict"] for draft in drafts]
        if len(drafts) == 1:
            scores = drafts[0].pop("scores", None) or {metric_names(self.task)[0]: float(verdicts[0] == RIGHT)}
            return {**drafts[0], "scores": {} if verdicts[0] == NOT_RUN else scores}
        chosen = _majority([draft["answer"] for draft in drafts])
        sample: Sample = {
            "answer": None if chosen is None else drafts[chosen]["answer"],
            "verdict": NO_ANSWER if chosen is None else verdicts[chosen],
            "samples": drafts,
        }
        if NOT_RUN in verdicts:
            return sample
        num_right, n = verdicts.count(RIGHT), len(drafts)
        scores = {f"pass@{k}": pass_at(k, n, num_right) for k in sample_counts(n)}
        if "majority" in metric_names(self.task):
            scores["majority"] = float(sample["verdict"] == RIGHT)
        return {**sample, "scores": scores}

    def _one(self, line: dict[str, Any], sample: dict[str, Any]) -> Sample:
        """What one text of a row is worth."""
        text, target = sample["text"], line["target"]
        draft: Sample = {"output": text, "answer": self._extract(text), "finish_reason": sample["finish_reason"]}
        if self.task.match == "instructions":
            followed = instructions.followed(text, target)
            share = [float(sum(followed)), float(len(followed))]
            scores = {"prompt_accuracy": float(all(followed)), "instruction_accuracy": share}
            return {**draft, "answer": followed, "verdict": RIGHT if all(followed) else WRONG, "scores": scores}
        if draft["answer"] is None:
            return {**draft, "verdict": NO_ANSWER}
        if self.task.match == "python":
            return {**draft, "verdict": self._run(draft["answer"], target)}
        right = is_right(draft["answer"], target, self.task.match, self.task.tolerance)
        return {**draft, "verdict": RIGHT if right else WRONG}

    def _run(self, answer: str, target: Any) -> str:
        """The verdict on a program: what comes before the answer, the answer, and the tests after it."""
        if not isinstance(target, list) or len(target) != 2 or not all(isinstance(part, str) for part in target):
            raise ValueError("the target of a program must be a pair: the text before it, and the tests after it")
        if not self.allow_code:
            return NOT_RUN
        return RIGHT if runs(f"{target[0]}{answer}\n{target[1]}") else WRONG

    def _choice(self, line: dict[str, Any]) -> Sample:
        options, logprobs, target = line["options"], line["option_logprobs"], line["target"]
        best = likeliest(logprobs)
        best_norm = likeliest(logprobs, [len(shown(option)) for option in options])  # per character, as lm-eval does
        return {
            "answer": shown(options[best]),
            "verdict": RIGHT if best in target else WRONG,
            "options": options,
            "logprobs": logprobs,
            "scores": {"accuracy": float(best in target), "accuracy_norm": float(best_norm in target)},
        }

    def _perplexity(self, line: dict[str, Any]) -> Sample:
        nats = -line["logprob"]
        per = {"token": "num_tokens", "word": "num_words", "byte": "num_bytes"}
        scores = {f"{unit}_perplexity": [nats, float(line[count])] for unit, count in per.items()}
        scores["bits_per_byte"] = [nats / math.log(2), float(line["num_bytes"])]
        return {"verdict": "scored", "scores": scores}


def _majority(answers: list[Any]) -> int | None:
    """The place of the first of the answers that most samples gave; None when there are none."""
    keys = [None if answer is None else _vote(answer) for answer in answers]
    votes = Counter(key for key in keys if key is not None)
    return keys.index(votes.most_common(1)[0][0]) if votes else None


def _vote(answer: Any) -> str:
    """Equal for answers that differ only in how they are written."""
    text = as_text(answer)
    try:
        return repr(float(text.replace(",", "")))
    except ValueError:
        return normalised(text) or text
