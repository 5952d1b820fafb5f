"""Steps on their way from the first rank to the others: only what changed since the last one, mostly nothing.

A message is a JSON header and int32 arrays behind it. A step that decodes the same rows as the one before, with no new
pages, is the empty message. The others rebuild requests as far as an engine reads them: by row, with the parameters,
length and tokens that steps name. They know no text, no queue and no prefix tree.

Knows steps and requests. Does not know how messages travel.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from minisgl.cascade import CascadePlan
from minisgl.request import Request, SamplingParams
from minisgl.scheduler import Chunk, Step
from minisgl.upload import Ints, ints

HEADER_BYTES = 4  # of the header's length
PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "logit_bias", "logprobs", "prompt_logprobs"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


def pack(header: dict[str, Any], *arrays: Ints) -> bytes:
    """A message of JSON and flat arrays, whose lengths the header must tell."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([len(text).to_bytes(HEADER_BYTES, "little"), text, *(array.tobytes() for array in arrays)])


def unpack(message: bytes) -> tuple[dict[str, Any], Ints]:
    """The header, and all arrays end to end."""
    end = HEADER_BYTES + int.from_bytes(message[:HEADER_BYTES], "little")
    header: dict[str, Any] = json.loads(message[HEADER_BYTES:end])
    return header, np.frombuffer(message[end:], np.int32)


CLOSE = pack({"close": True})


def pack_masks(masks: Ints, mask_of: Ints) -> bytes:
    """The masks that the last step waits for; see `Masks`."""
    return pack({"masks": masks.shape}, masks, mask_of)


@dataclass(frozen=True)
class Plan:
    """A step to run now; `masked`: it is sampled once its masks are there."""

    step: Step
    masked: bool


@dataclass(frozen=True)
class Masks:
    """What `Engine.sample` takes: masks  # [M, W], mask_of  # [N]."""

    masks: Ints
    mask_of: Ints


class PlanWriter:
    """Turns each step into a message for the `PlanReader`s of the other ranks."""

    def __init__(self) -> None:
        self._decodes: list[int | None] = []  # the last step's
        self._cascade: CascadePlan | None = None

    def write(self, step: Step, *, masked: bool) -> bytes:
        """See `Plan`."""
        header: dict[str, Any] = {}
        arrays: list[Ints] = []
        decodes = [request.row for request in step.decodes]
        if decodes != self._decodes:
            header["decodes"] = self._decodes = decodes
        if step.new_rows:
            header["new"] = [_describe(request) for request in step.new_rows]
            arrays += [request.tokens[: _text_length(request)] for request in step.new_rows]
        if step.chunks:
            header["chunks"] = [
                (chunk.request.row, chunk.start, chunk.count, chunk.store_from, chunk.samples, chunk.scored)
                for chunk in step.chunks
            ]
            arrays += [chunk.request.tokens[chunk.start : _end_of_tokens(chunk)] for chunk in step.chunks]
        if step.page_updates:
            header["pages"] = len(step.page_updates)
            arrays.append(ints([number for update in step.page_updates for number in update]))
        if step.cascade is not self._cascade:
            self._cascade = plan = step.cascade
            header["cascade"] = plan and (len(plan.shared_splits), len(plan.tile_splits), plan.tile_members)
            arrays += [plan.shared_splits, plan.tile_splits, plan.members] if plan else []
        if masked:
            header["masked"] = True
        return pack(header, *arrays) if header else b""


class PlanReader:
    """Makes the steps again, with requests that have what an `Engine` reads."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}  # by row
        self._decodes: list[Request] = []
        self._cascade: CascadePlan | None = None

    def read(self, message: bytes) -> Plan | Masks | None:
        """What to do next; None: end."""
        header, rest = unpack(message) if message else ({}, ints([]))
        if "close" in header:
            return None
        if "masks" in header:
            size = header["masks"][0] * header["masks"][1]
            return Masks(rest[:size].reshape(header["masks"]), rest[size:])

        def take(count: int) -> Ints:
            nonlocal rest
            taken, rest = rest[:count], rest[count:]
            return taken

        new = [_rebuild(described) for described in header.get("new", ())]
        for request in new:
            assert request.row is not None
            self._requests[request.row] = request
            request.tokens[: _text_length(request)] = take(_text_length(request))
        if "decodes" in header:
            self._decodes = [self._requests[row] for row in header["decodes"]]
        for request in self._decodes:
            request.length += 1
        chunks = []
        for row, start, count, store_from, samples, scored in header.get("chunks", ()):
            chunk = Chunk(self._requests[row], start, count, store_from, samples, tuple(scored))
            chunk.request.tokens[start : _end_of_tokens(chunk)] = take(_end_of_tokens(chunk) - start)
            chunk.request.length = start + count
            chunks.append(chunk)
        pages = take(3 * header.get("pages", 0)).reshape(-1, 3)
        if "cascade" in header:
            self._cascade = None
            if header["cascade"]:
                batch, num_tiles, tile_members = header["cascade"]
                members = take(batch), take(num_tiles), take(num_tiles * tile_members).reshape(-1, tile_members)
                self._cascade = CascadePlan(*members)
        updates = [(row, place, page) for row, place, page in pages.tolist()]
        step = Step(self._decodes, chunks, new, updates, cascade=self._cascade)
        return Plan(step, header.get("masked", False))


def _text_length(request: Request) -> int:
    """Tokens that a new row needs at once: `RowEdits` puts the whole text of those that it edits into the table."""
    return request.num_tokens if request.edits_logits else 0


def _end_of_tokens(chunk: Chunk) -> int:
    """The end of the tokens that a chunk computes or scores."""
    return max(chunk.start + chunk.count, chunk.scored[1])


def _describe(request: Request) -> dict[str, Any]:
    given = {name: value for name in PARAMS if (value := getattr(request.params, name)) is not None}
    return {
        "row": request.row,
        "lengths": (request.num_prompt, request.num_tokens, request.max_total),
        "params": given,
        "stop_ids": sorted(request.stop_ids) if request.params.min_tokens else [],
        "bans": request.bans,
        "pooling": request.pooling,
    }


def _rebuild(described: dict[str, Any]) -> Request:
    num_prompt, num_tokens, max_total = described["lengths"]
    request = Request(
        described["row"],
        np.zeros(num_prompt, np.int32),
        SamplingParams(**described["params"]),
        max_total,
        frozenset(described["stop_ids"]),
        bans=described["bans"],
        pooling=described["pooling"],
    )
    request.row, request.num_tokens = described["row"], num_tokens
    return request
