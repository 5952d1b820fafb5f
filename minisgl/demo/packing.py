"""Training rows -> fixed-length token sequences, several rows in each, ready to stay on the device.

Knows rows and the tokenizer, not the model. Every sequence has the same length, so that a training step has one shape.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minisgl.demo.chat_tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, chat_segments
from minisgl.demo.data import Row, training_rows

SEQUENCE_LENGTH = 128  # 99 % of the rows are shorter than this; their mean is about 45 tokens
OPEN_SEQUENCES = 16  # sequences that still take rows: leaves about 3 % of the positions empty, 18 % with one
ROWS_PER_TASK = 20_000
ENCODE_BATCH = 500


class PackedRows(NamedTuple):
    """S sequences of T = SEQUENCE_LENGTH tokens."""

    tokens: np.ndarray  # [S, T] int16
    row_numbers: np.ndarray  # [S, T] uint8: which row of the sequence a token belongs to, from 1; 0 is padding
    is_answer: np.ndarray  # [S, T] bool: the model's own words, the only ones with a loss


class _Sequence:
    """One sequence being filled."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.row_numbers: list[int] = []
        self.is_answer: list[bool] = []
        self.num_rows = 0

    def fits(self, tokens: list[int]) -> bool:
        return len(self.tokens) + len(tokens) <= SEQUENCE_LENGTH

    def add(self, tokens: list[int], is_answer: list[bool]) -> None:
        self.num_rows += 1
        self.tokens += tokens
        self.row_numbers += [self.num_rows] * len(tokens)
        self.is_answer += is_answer

    def pad(self) -> None:
        missing = SEQUENCE_LENGTH - len(self.tokens)
        self.tokens += [END_OF_TEXT_ID] * missing
        self.row_numbers += [0] * missing
        self.is_answer += [False] * missing


def pack_rows(rows: Iterable[Row], tokenizer: Tokenizer) -> PackedRows:
    """First-fit packing; the few rows longer than a whole sequence are dropped."""
    done: list[_Sequence] = []
    being_filled: list[_Sequence] = []
    for tokens, is_answer in _encoded(iter(rows), tokenizer):
        if len(tokens) > SEQUENCE_LENGTH:
            continue
        sequence = next((s for s in being_filled if s.fits(tokens)), None)
        if sequence is None:
            if len(being_filled) == OPEN_SEQUENCES:
                done.append(being_filled.pop(0))
            sequence = _Sequence()
            being_filled.append(sequence)
        sequence.add(tokens, is_answer)
    done += being_filled
    for sequence in done:
        sequence.pad()
    assert np.iinfo(np.int16).max >= VOCAB_SIZE
    return PackedRows(
        np.array([s.tokens for s in done], np.int16),
        np.array([s.row_numbers for s in done], np.uint8),
        np.array([s.is_answer for s in done], np.bool_),
    )


def pack_training_rows(num_rows: int, tokenizer: Tokenizer, num_workers: int) -> PackedRows:
    """Generate, encode and pack `num_rows` rows; the result does not depend on `num_workers`."""
    num_tasks = -(-num_rows // ROWS_PER_TASK)
    tasks = [(seed, min(num_rows, ROWS_PER_TASK), tokenizer.to_str()) for seed in range(num_tasks)]
    if num_workers > 1:
        # fork: a spawned worker would import torch again, for several seconds each
        with multiprocessing.get_context("fork").Pool(num_workers) as pool:
            parts = pool.map(_pack_task, tasks, chunksize=1)
    else:
        parts = [_pack_task(task) for task in tasks]
    return PackedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _pack_task(task: tuple[int, int, str]) -> PackedRows:
    seed, num_rows, tokenizer_json = task
    return pack_rows(training_rows(seed, num_rows), Tokenizer.from_str(tokenizer_json))


def _encoded(rows: Iterator[Row], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    while batch := list(islice(rows, ENCODE_BATCH)):
        segments = [list(chat_segments(row)) for row in batch]
        encodings = iter(tokenizer.encode_batch_fast([text for row in segments for text, _ in row]))
        for row_segments in segments:
            tokens: list[int] = []
            is_answer: list[bool] = []
            for _, answers in row_segments:
                ids = next(encodings).ids
                tokens += ids
                is_answer += [answers] * len(ids)
            yield tokens, is_answer
