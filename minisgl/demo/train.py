"""Train the demo model from nothing: `python -m minisgl.demo.train --out DIR --minutes 5`.

Generates the data, trains the tokenizer and the model, and writes a checkpoint folder with its held-out scores. Needs
no network. The learning rate follows the clock, so training ends in time on any machine, and a checkpoint is written
every minute, so a run that is cut short still leaves a model.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from minisgl.demo.chat_tokenizer import train_tokenizer
from minisgl.demo.checkpoint import greedy_answers, new_model, save_checkpoint
from minisgl.demo.data import ExamQuestion, exact_match, exam, training_rows
from minisgl.demo.packing import SEQUENCE_LENGTH, pack_training_rows

# Shapes: B sequences a step, S sequences in all, T tokens in a sequence, V vocabulary

PEAK_LEARNING_RATE = 2e-3
WARM_UP, DECAY_FROM = 0.02, 0.5  # as shares of the run: constant in between, then linear to zero
LOG_EVERY_S, CHECKPOINT_EVERY_S = 15.0, 60.0
PROGRESS_QUESTIONS = 64
TOKENIZER_ROWS = 60_000

LossFunction = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def answer_loss(model: Any, tokens: Tensor, row_numbers: Tensor, is_answer: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens; a token sees the earlier tokens of its own row only.

    tokens [B, T] int64; row_numbers [B, T] uint8; is_answer [B, T] bool. An answer never starts a row, so the token
    before an answer token is always of the same row.
    """
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()  # [T, T]
    mask = causal & (row_numbers[:, :, None] == row_numbers[:, None, :])  # [B, T, T]
    logits = model(input_ids=tokens, attention_mask=mask[:, None], use_cache=False).logits  # [B, T, V]
    targets = tokens[:, 1:].masked_fill(~is_answer[:, 1:], -100)  # [B, T - 1]
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100)


def learning_rate(progress: float) -> float:
    """Warm-up, plateau, linear decay; `progress` is the share of the run that is over, 0 to 1."""
    return PEAK_LEARNING_RATE * max(0.0, min(1.0, progress / WARM_UP, (1 - progress) / (1 - DECAY_FROM)))


class Trainer:
    """The model, its optimizer and the data, all on one device."""

    def __init__(self, model: Any, data: tuple[Tensor, Tensor, Tensor], batch_size: int, device: torch.device) -> None:
        self.model = model
        self.data = data  # tokens, row_numbers, is_answer: [S, T] each
        self.batch_size = batch_size
        self.device = device
        self.loss_function: LossFunction = answer_loss
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")

    def compile(self) -> None:
        """Compile the loss; where that does not work (no C compiler, say) training goes on, slower."""
        self.loss_function = torch.compile(answer_loss, dynamic=False)
        try:
            self.step(rate=0.0)
        except Exception as error:
            click.echo(f"torch.compile failed, training without it: {type(error).__name__}: {str(error)[:500]}")
            self.loss_function = answer_loss

    def step(self, rate: float) -> Tensor:
        """One optimizer step on a random batch; returns the loss without waiting for it."""
        chosen = torch.randint(self.data[0].shape[0], (self.batch_size,), device=self.device)
        tokens, row_numbers, is_answer = (part[chosen] for part in self.data)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss_function(self.model, tokens.long(), row_numbers, is_answer)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def run_training(trainer: Trainer, minutes: float, max_steps: int | None, checkpoint: Callable[[], None]) -> int:
    """Train for `minutes`, or for `max_steps` steps where given; returns the number of steps."""
    start = last_log = last_checkpoint = time.monotonic()
    step = steps_at_last_log = 0
    while True:
        now = time.monotonic()
        progress = step / max_steps if max_steps else (now - start) / (60 * minutes)
        if progress >= 1:
            return step
        loss = trainer.step(learning_rate(progress))
        step += 1
        if now - last_log > LOG_EVERY_S or step in (1, max_steps):
            loss_value = loss.item()  # waits for the device, so what follows is true time
            now = time.monotonic()
            step_ms = 1000 * (now - last_log) / (step - steps_at_last_log)
            rate = learning_rate(progress)
            click.echo(f"step {step:6d}  {now - start:5.0f} s  loss {loss_value:.4f}  {step_ms:.1f} ms  lr {rate:.1e}")
            last_log, steps_at_last_log = now, step
        if now - last_checkpoint > CHECKPOINT_EVERY_S:
            checkpoint()
            last_checkpoint = last_log = time.monotonic()
            steps_at_last_log = step


def score_checkpoint(
    folder: Path, questions: list[ExamQuestion], device: torch.device, dtype: torch.dtype, wrong_answers_shown: int = 0
) -> dict[str, float]:
    """Exact match by skill of the weights on disk, computed in `dtype`; prints it, and a few answers that are wrong."""
    answers = greedy_answers(folder, questions, dtype, device)
    scores = exact_match(questions, answers)
    shares = "  ".join(f"{skill} {100 * share:.1f}" for skill, share in scores.items())
    click.echo(f"held out, {str(dtype).removeprefix('torch.')}: {shares}")
    shown: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        if answer.strip() != question.answer and shown[question.skill] < wrong_answers_shown:
            shown[question.skill] += 1
            click.echo(f"  {question.messages[-1]['content']!r}: {answer!r} is not {question.answer!r}")
    return scores


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoint folder.")
@click.option("--minutes", default=5.0, show_default=True, help="Training time, without data, compilation and scoring.")
@click.option("--steps", type=click.IntRange(min=1), help="Train for this many steps instead.")
@click.option("--rows", default=5_000_000, show_default=True, help="Conversations to generate.")
@click.option("--batch", default=512, show_default=True, help=f"Sequences of {SEQUENCE_LENGTH} tokens a step.")
@click.option("--workers", default=min(16, os.cpu_count() or 1), show_default=True, help="Data processes.")
@click.option("--questions", default=500, show_default=True, help="Held-out questions of each skill at the end.")
@click.option("--device", "device_name", help="Default: cuda where there is one, else cpu.")
def main(
    out: Path, minutes: float, steps: int | None, rows: int, batch: int, workers: int, questions: int,
    device_name: str | None,
) -> None:  # fmt: skip
    """Train the demo model and write it to --out."""
    started = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)

    tokenizer = train_tokenizer(training_rows(seed=-1, count=min(rows, TOKENIZER_ROWS)))
    click.echo(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.monotonic() - started:.0f} s")
    packed = pack_training_rows(rows, tokenizer, workers)
    data = tuple(torch.from_numpy(array).to(device) for array in packed)
    seconds = time.monotonic() - started
    click.echo(f"data: {packed.tokens.size:,} tokens, {(packed.row_numbers > 0).mean():.1%} filled, {seconds:.0f} s")

    model = new_model().to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    trainer = Trainer(model, (data[0], data[1], data[2]), batch, device)
    if device.type == "cuda":
        trainer.compile()
    click.echo(f"model: {num_parameters:,} parameters, {time.monotonic() - started:.0f} s; training")

    progress_exam = exam(PROGRESS_QUESTIONS)

    def checkpoint() -> None:
        save_checkpoint(model, tokenizer, out)
        try:
            score_checkpoint(out, progress_exam, device, torch.bfloat16)
        except Exception as error:  # a progress report must not cost the run
            click.echo(f"not scored: {type(error).__name__}: {str(error)[:500]}")

    num_steps = run_training(trainer, minutes, steps, checkpoint)
    save_checkpoint(model, tokenizer, out)

    final_exam = exam(questions)
    scores = {
        "float32": score_checkpoint(out, final_exam, device, torch.float32),
        "bfloat16": score_checkpoint(out, final_exam, device, torch.bfloat16, wrong_answers_shown=3),
    }
    num_questions = Counter(question.skill for question in final_exam)
    report = {
        "exact_match": scores,
        "questions": dict(num_questions),
        "steps": num_steps,
        "tokens_per_step": batch * SEQUENCE_LENGTH,
        "seconds": round(time.monotonic() - started),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }  # fmt: skip
    (out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"wrote {out}, {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
