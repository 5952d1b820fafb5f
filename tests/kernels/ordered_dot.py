"""A dot for Triton's interpreter that adds products in order, as a tensor core does for every place of a block.

The interpreter's own is numpy's: its library chooses its code by the size of a block, and by the place in it.
"""

import numpy as np
import pytest


def dot(a, b, dtype):
    """a  # [M, K] times b  # [K, N], the products of each element added one after another."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for column, row in zip(a.T.astype(dtype), b.astype(dtype), strict=True):
        total += column[:, None] * row[None, :]
    return total


@pytest.fixture
def ordered_dot(monkeypatch):
    monkeypatch.setattr(np, "matmul", dot)
