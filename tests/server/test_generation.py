"""What waits for a reader comes as one, and nothing is lost or reordered."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from minisgl.request import TokenLogprobs
from minisgl.server.engine_client import EngineDied, Generation
from minisgl.server.protocol import Tokens


def logprobs(*ids: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(id, -1.0, ()) for id in ids]


async def read(*items: Tokens | Exception) -> list[Any]:
    """What a reader gets that comes late; ends with the error, if any."""
    engine: Any = SimpleNamespace(abort=lambda id: None)
    generation = Generation(engine, 1)
    for item in items:
        generation.put(item)
    found: list[Any] = []
    try:
        while not found or not found[-1].finish_reason:
            found.append(await asyncio.wait_for(anext(generation), 1))
    except Exception as error:
        found.append(error)
    return found


def test_steps_that_wait_come_as_one() -> None:
    steps = [
        Tokens(1, [5], 64, logprobs=logprobs(5)),
        Tokens(1, [6, 7], 64, logprobs=logprobs(6, 7)),
        Tokens(1, [8], 64, "stop", by_token=True, logprobs=logprobs(8)),
    ]
    assert asyncio.run(read(*steps)) == [
        Tokens(1, [5, 6, 7, 8], 64, "stop", by_token=True, logprobs=logprobs(5, 6, 7, 8))
    ]


@pytest.mark.parametrize("error", [EngineDied(), ValueError("refused")])
def test_an_error_comes_behind_what_came_before_it(error: Exception) -> None:
    assert asyncio.run(read(Tokens(1, [5], 0), Tokens(1, [6], 0), error)) == [Tokens(1, [5, 6], 0), error]


def test_an_abort_keeps_what_there_is() -> None:
    assert asyncio.run(read(Tokens(1, [5], 3), Tokens(1, [], 0, "abort"))) == [Tokens(1, [5], 3, "abort")]
