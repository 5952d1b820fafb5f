"""What a replica and the process that hands out the work tell each other: see `plan.pack` for the form.

    to a replica    begin     the model to load
                    submit    requests, and their prompts
                    abort     ids of requests to end
                    forget    every cached prefix that no running request uses
                    drop      take back the requests that wait
                    close
                    nothing   a sign of life
    from a replica  ready     the config as it was resolved there
                    progress  what a step added to requests
                    dropped   ids of the requests that waited
                    failed    why the replica ends

Knows requests. Does not know how messages travel.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from minisgl.core import CoreStats
from minisgl.errors import RequestError
from minisgl.plan import pack
from minisgl.request import Request, SamplingParams, TokenLogprobs
from minisgl.structured import Grammar
from minisgl.upload import Ints, ints

Header = dict[str, Any]
CLOSE, FORGET, DROP, BEAT = pack({"close": True}), pack({"forget": True}), pack({"drop": True}), pack({})


def pack_requests(requests: Mapping[int, Request]) -> bytes:
    """Requests by id, as new as they were made."""
    described = [_describe(id, request) for id, request in requests.items()]
    prompts = [request.tokens[: request.scored_end] for request in requests.values()]
    return pack({"submit": described}, *prompts)


def unpack_requests(
    header: Header, prompts: Ints, eos_ids: frozenset[int], grammar: Callable[[str, bool], Grammar]
) -> dict[int, Request]:
    """`grammar` makes one of its text, and whether that names tokens."""
    found: dict[int, Request] = {}
    for described in header["submit"]:
        num_prompt, num_known, max_total = described["lengths"]
        known, prompts = prompts[:num_known], prompts[num_known:]
        lark, names_tokens, after_id = described["grammar"] or ("", False, None)
        found[described["id"]] = Request(
            described["id"],
            known[:num_prompt],
            SamplingParams(**described["params"]),
            max_total,
            eos_ids,
            scored_from=described["scored_from"],
            target=int(known[-1]) if num_known > num_prompt else None,
            pooling=described["pooling"],
            bans=described["bans"],
            matcher=grammar(lark, names_tokens).matcher(after_id) if described["grammar"] else None,
        )
    return found


def pack_progress(progressed: Iterable[tuple[int, Request, int]], stats: CoreStats) -> bytes:
    """What requests (by id) have got beyond so many output tokens."""
    table: list[tuple[int, int, int]] = []
    more: dict[int, Header] = {}
    tokens: list[Ints] = []
    sums: list[Ints] = []
    for id, request, num_sent in progressed:
        table.append((id, request.num_output - num_sent, request.cached_tokens))
        tokens.append(request.tokens[request.num_prompt + num_sent : request.num_tokens])
        extra: Header = {}
        if request.params.logprobs is not None:
            extra["logprobs"] = [(one.token_id, one.logprob, one.top) for one in request.logprobs[num_sent:]]
        if request.finish_reason:
            extra["reason"] = request.finish_reason
            if request.prompt_logprobs:
                extra["scored"] = [(one.token_id, one.logprob, one.top) for one in request.prompt_logprobs]
            if request.error:
                extra["error"] = str(request.error), request.error.type
            if request.hidden_sum is not None:
                extra["pooled"] = len(request.hidden_sum), request.num_pooled
                sums.append(request.hidden_sum.view(np.int32))
        if extra:
            more[id] = extra
    header = {"progress": len(table), "more": more, "stats": stats}
    return pack(header, np.array(table, np.int32).ravel(), *tokens, *sums)


def read_progress(header: Header, arrays: Ints, requests: Mapping[int, Request]) -> list[tuple[int, Request, int]]:
    """Give it to the requests; returns them, with their ids and the number of their new tokens. Unknown ids are left
    out."""
    size = 3 * header["progress"]
    table, rest = arrays[:size].reshape(-1, 3).tolist(), arrays[size:]
    sums = rest[sum(count for _, count, _ in table) :].view(np.float32)
    progressed = []
    for id, count, cached_tokens in table:
        tokens, rest = rest[:count], rest[count:]
        extra = header["more"].get(str(id), {})  # JSON's keys are strings
        request = requests.get(id)
        if "pooled" in extra:
            size, num_pooled = extra["pooled"]
            if request:
                request.hidden_sum, request.num_pooled = sums[:size], num_pooled
            sums = sums[size:]
        if request is None:  # it was aborted meanwhile
            continue
        request.tokens[request.num_tokens : request.num_tokens + count] = tokens
        request.num_tokens += count
        request.cached_tokens = cached_tokens
        if extra:
            request.logprobs += _logprobs(extra.get("logprobs", ()))
            request.prompt_logprobs += _logprobs(extra.get("scored", ()))
            request.finish_reason = extra.get("reason")
            request.error = RequestError(*extra["error"]) if "error" in extra else None
        progressed.append((id, request, count))
    return progressed


def pack_ids(what: str, ids: Iterable[int]) -> bytes:
    """What happens, or happened, to the requests of these ids."""
    numbers = ints(list(ids))
    return pack({what: len(numbers)}, numbers)


def _describe(id: int, request: Request) -> Header:
    matcher = request.matcher
    grammar = matcher and (matcher.grammar.lark, matcher.grammar.names_tokens, matcher.after_id)
    return {
        "id": id,
        "lengths": (request.num_prompt, request.scored_end, request.max_total),
        "params": request.params.for_engine(),
        "scored_from": request.scored_from,
        "pooling": request.pooling,
        "bans": request.bans,
        "grammar": grammar,
    }


def _logprobs(described: Iterable[Any]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token, value, tuple(map(tuple, top))) for token, value, top in described]
