"""The lines of a batch: what makes a file of them unfit, and the answer to one line.

Knows lines through the batch runner's code, so that they mean what they mean to `minisgl run`. Does not know when they
are answered or where answers go.
"""

import logging
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisgl.batch_run.formats import read_lines
from minisgl.batch_run.parser import RowParser
from minisgl.batch_run.rows import RefusedRow, Row, RowError, row_error
from minisgl.errors import RequestError
from minisgl.openai.bodies import Asked
from minisgl.request import Result, SamplingParams
from minisgl.server.answering import Answering, EngineFailed, Piece
from minisgl.server.completions import Completions
from minisgl.server.engine_client import EngineDied
from minisgl.server.served import ServedModel

log = logging.getLogger("minisgl.server")

PARSER = RowParser(SamplingParams())
MAX_LINES = 50_000  # OpenAI's
MAX_ERRORS = 100  # that are told
MAX_DEATHS = 3  # of engines, while they answered the same line

Error = dict[str, Any]


def check_lines(path: Path, endpoint: str, model: ServedModel) -> tuple[int, list[Error]]:
    """How many lines there are, and why they cannot be a batch; none of the errors are of what a body says."""
    ids: set[str] = set()
    errors: list[Error] = []
    count = 0
    with path.open("rb") as file:
        for index, value in read_lines(file):
            count += 1
            try:
                values = PARSER.load(value)
            except RefusedRow as refused:
                errors.append(_error("invalid_json_line", str(refused), index))
                continue
            errors += [_error(*error, index) for error in _faults(values, ids, endpoint, model)]
            if len(errors) >= MAX_ERRORS:
                break
    if not count:
        errors.append(_error("empty_file", "the file has no lines"))
    if count > MAX_LINES:
        errors.append(_error("too_many_tasks", f"the file has {count:,} lines; at most {MAX_LINES:,} are allowed"))
    return count, errors[:MAX_ERRORS]


def _faults(values: dict[str, Any], ids: set[str], endpoint: str, model: ServedModel) -> list[tuple[str, str]]:
    custom_id, body = values.get("custom_id"), values.get("body")
    found = []
    if not isinstance(custom_id, str):
        found.append(("invalid_custom_id", "custom_id must be a string"))
    elif custom_id in ids:
        found.append(("duplicate_custom_id", f"the custom_id {custom_id[:80]!r} is given twice"))
    else:
        ids.add(custom_id)
    if values.get("method") != "POST":
        found.append(("invalid_method", "method must be POST"))
    if values.get("url") != endpoint:
        found.append(("mismatched_url", f"url must be the batch's endpoint, {endpoint}"))
    if not isinstance(body, dict):
        found.append(("invalid_body", "body must be an object"))
    elif isinstance(name := body.get("model", ""), str):
        try:
            model.check(name)
        except RequestError as error:
            found.append((error.type, str(error)))
    return found


def _error(code: str, message: str, index: int | None = None) -> Error:
    return {"code": code, "message": message, "param": None, "line": None if index is None else index + 1}


class RowAnswers:
    """Answers rows, whatever happens to engines meanwhile."""

    def __init__(self, answering: Answering, model: ServedModel, completions: Completions) -> None:
        self._answering = answering
        self._model = model
        self._completions = completions

    async def answer(self, row: Row, request_id: str) -> list[Result] | RowError:
        """The results of a row's prompts, each with `n` answers that follow one another, or why there are none.
        EngineDied when no engine comes back."""
        deaths = 0
        while deaths < MAX_DEATHS:
            try:
                results = await self._try(row, request_id)
            except EngineDied:
                deaths += 1
                await self._answering.engine.wait_ready()
            except RequestError as error:
                return row_error(error.type, str(error))
            except EngineFailed as error:
                return RowError("server_error", str(error))
            except Exception:
                log.error("a line of %s failed inside the server", request_id, exc_info=True)
                return RowError("server_error", "internal error")
            else:
                if all(result.finish_reason != "abort" for result in results):
                    return results
        return RowError("server_error", "the engine died each time that it answered this line")

    async def _try(self, row: Row, request_id: str) -> list[Result]:
        params, messages = replace(row.params, n=row.n), row.messages
        chat = None
        if messages is None:
            prompts = await self._answering.encode(row.prompts)
            pieces = self._answering.answers(prompts, params, request_id=request_id, whole=True, patient=True)
        else:
            asked = Asked(
                "", params, messages=tuple(messages), chat_options={"template_kwargs": {}, **row.chat_options}
            )
            chat, ids = await self._completions.prepare_chat(asked)
            prompts = [ids]
            pieces = self._completions.answers_to_chat(chat, ids, request_id, whole=True, patient=True)
        results: dict[int, Result] = {}
        async with aclosing(pieces):
            async for place, piece in pieces:
                result = _result(piece, self._model.echo(prompts[place // row.n], params))
                results[place] = self._model.chat_format.apart(result, chat) if chat else result
        return [results[place] for place in range(len(results))]


def _result(piece: Piece, echo: str) -> Result:
    assert piece.finish_reason
    return Result(
        echo + piece.text,
        piece.token_ids,
        piece.finish_reason,
        piece.usage,
        logprobs=piece.logprobs,
        prompt_logprobs=piece.prompt_logprobs,
    )
