"""The routes of /v1/files and /v1/batches.

Knows HTTP, and the keys of their bodies and queries. Does not know how files are kept or batches run.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import FormData, UploadFile

from minisgl.batch_run.openai_batch import FORMS
from minisgl.openai.errors import FieldError
from minisgl.openai.fields import Fields, quoted
from minisgl.server import schema
from minisgl.server.batches import Batches
from minisgl.server.files import FileStore
from minisgl.server.http import json_response, read_json
from minisgl.server.records import Batch, StoredFile

CHUNK_BYTES = 1 << 20
USUAL_LIST, MAX_LIST = {"files": 10_000, "batches": 20}, {"files": 10_000, "batches": 100}  # OpenAI's
MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
EXPIRY_S = (3600, 30 * 24 * 3600)
FORM_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")


def add_file_routes(app: FastAPI, files: FileStore) -> None:
    @app.post("/v1/files", openapi_extra=schema.FILE)
    async def upload(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=len(FORM_FIELDS)) as form:
            file, expires_after_s = _read_form(form)
            name, chunks = file.filename or "file", _chunks(file.file)
            stored = await asyncio.to_thread(files.create, name, "batch", chunks, expires_after_s=expires_after_s)
        return json_response(stored)

    @app.get("/v1/files")
    async def list_files(request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        found = [file for file in files.all() if purpose in (None, file.purpose)]
        return json_response(_page(request, found, "files", "purpose"))

    @app.get("/v1/files/{file_id}")
    async def get_file(file_id: str) -> Response:
        return json_response(files.get(file_id))

    @app.get("/v1/files/{file_id}/content")
    async def content(file_id: str) -> Response:
        stored = files.get(file_id)
        headers = {"x-content-type-options": "nosniff"}  # what a client uploaded is no page of ours
        return FileResponse(files.path(file_id), 200, headers, "application/octet-stream", filename=stored.filename)

    @app.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> Response:
        files.delete(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})


def add_batch_routes(app: FastAPI, batches: Batches) -> None:
    @app.post("/v1/batches", openapi_extra=schema.BATCH)
    async def create(request: Request) -> Response:
        return json_response(_create(batches, await read_json(request)))

    @app.get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        return json_response(_page(request, batches.all(), "batches"))

    @app.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str) -> Response:
        return json_response(batches.get(batch_id))

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Response:
        return json_response(batches.cancel(batch_id))


def _read_form(form: FormData) -> tuple[UploadFile, int | None]:
    """The file of an upload, and the seconds after which it expires."""
    for name in form:
        if name not in FORM_FIELDS:
            raise FieldError(f"{name[:80]} is not supported: leave it out", name[:80])
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise FieldError("file is missing", "file")
    if purpose != "batch":
        raise FieldError(f"purpose is {quoted(purpose)}; it must be batch", "purpose")
    expiry = {
        name: form[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in form
    }
    seconds = str(expiry.get("seconds", ""))
    if seconds:
        expiry["seconds"] = int(seconds) if seconds.isdecimal() and len(seconds) < 10 else seconds  # type: ignore[assignment]
    return file, _read_expiry(expiry, "expires_after") if expiry else None


def _read_expiry(value: Mapping[str, Any], name: str) -> int:
    fields = Fields(value, f"{name}.")
    anchor, seconds = fields.take("anchor", str, "created_at"), fields.take("seconds", int, 0)
    fields.end()
    if anchor != "created_at":
        fields.refuse("anchor", f"is {quoted(anchor)}; it must be created_at")
    if not EXPIRY_S[0] <= seconds <= EXPIRY_S[1]:
        fields.refuse("seconds", f"is {seconds}; it must be from {EXPIRY_S[0]:,} to {EXPIRY_S[1]:,}")
    return seconds


def _create(batches: Batches, body: Any) -> Batch:
    fields = Fields(body)
    file_id, endpoint = fields.take("input_file_id", str, ""), fields.take("endpoint", str, "")
    window, expiry = fields.take("completion_window", str, ""), fields.take_any("output_expires_after")
    metadata = fields.take_any("metadata")
    fields.end()
    if endpoint not in FORMS:
        fields.refuse("endpoint", f"is {quoted(endpoint)}; it must be {' or '.join(FORMS)}")
    if window != "24h":
        fields.refuse("completion_window", f"is {quoted(window)}; it must be 24h")
    if expiry is not None:
        expiry = {"anchor": "created_at", "seconds": _read_expiry(expiry, "output_expires_after")}
    return batches.create(endpoint, file_id, None if metadata is None else _read_metadata(metadata), expiry)


def _read_metadata(value: Any) -> dict[str, str]:
    fits = isinstance(value, dict) and len(value) <= MAX_METADATA
    if not fits or not all(_is_label(key, one) for key, one in value.items()):
        limits = f"{MAX_METADATA} keys of {MAX_KEY_CHARS} characters with strings of {MAX_VALUE_CHARS}"
        raise FieldError(f"metadata must be an object of at most {limits}", "metadata")
    return dict(value)


def _is_label(key: str, value: Any) -> bool:
    return len(key) <= MAX_KEY_CHARS and isinstance(value, str) and len(value) <= MAX_VALUE_CHARS


def _page(request: Request, entries: Sequence[StoredFile | Batch], kind: str, *more_names: str) -> dict[str, Any]:
    """A page of a list: `limit` entries behind the one of id `after`, the latest first unless `order` is asc."""
    query = request.query_params
    for name in query:
        if name not in ("limit", "after", "order", *more_names):
            raise FieldError(f"{name[:80]} is not supported: leave it out", name[:80])
    limit, order, after = query.get("limit", str(USUAL_LIST[kind])), query.get("order", "desc"), query.get("after")
    if not (limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= MAX_LIST[kind]):
        raise FieldError(f"limit is {quoted(limit)}; it must be from 1 to {MAX_LIST[kind]:,}", "limit")
    if order not in ("asc", "desc"):
        raise FieldError(f"order is {quoted(order)}; it must be asc or desc", "order")
    found = list(entries if order == "asc" else reversed(entries))
    if after is not None:
        places = [place for place, entry in enumerate(found) if entry.id == after]
        if not places:
            raise FieldError(f"after is {quoted(after)}, which is not in the list", "after")
        found = found[places[0] + 1 :]
    page = found[: int(limit)]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    more = len(found) > len(page)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more}


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
