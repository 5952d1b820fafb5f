"""The routes.

Knows paths and who answers them. Does not know what is in bodies: `openai`, `completions` and `native` do.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import minisgl
from minisgl.errors import RequestError
from minisgl.openai.bodies import Asked, read_chat, read_completion, read_prompts
from minisgl.openai.embeddings import read_embeddings
from minisgl.openai.fields import Fields
from minisgl.openai.responses import read_response
from minisgl.request import SamplingParams
from minisgl.server import schema
from minisgl.server.answering import Answering, EngineFailed, Unavailable
from minisgl.server.batch_routes import add_batch_routes, add_file_routes
from minisgl.server.batch_rows import RowAnswers
from minisgl.server.batches import Batches
from minisgl.server.completions import Completions
from minisgl.server.config import ServerConfig
from minisgl.server.engine_client import DeadlinePassed, EngineDied
from minisgl.server.files import FileStore
from minisgl.server.guard import Guard
from minisgl.server.http import ClientGone, error_response, event_stream, json_response, read_json, while_connected
from minisgl.server.native import Native, read_generate
from minisgl.server.responses import Responses, embed
from minisgl.server.served import ServedModel
from minisgl.server.traces import TraceParent

PAGE = Path(__file__).parent / "page.html"
HEALTH_TIMEOUT_S = 30.0
# Exception alone would do, but those that it catches close the connection and are logged with their traceback.
ERRORS = (RequestError, HTTPException, Unavailable, ClientGone, DeadlinePassed, EngineDied, EngineFailed, Exception)


def create_app(
    answering: Answering, model: ServedModel, config: ServerConfig, folder: Path, origins: Collection[str] = ()
) -> FastAPI:
    """The ASGI application. `folder`: of files and batches. `origins`: whose pages may ask it."""
    completions = Completions(answering, model)
    files = FileStore(folder / "files", config.max_files_mb << 20)
    batches = Batches(folder / "batches", files, RowAnswers(answering, model, completions), answering, model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batches.start()
        yield
        await batches.close()
        await answering.engine.close()
        await asyncio.to_thread(answering.traces.close)

    app = FastAPI(title="minisgl", version=minisgl.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    for kind in ERRORS:
        app.add_exception_handler(kind, error_response)
    app.add_middleware(
        Guard,
        api_key=config.api_key,
        admin_key=config.admin_key,
        max_body_bytes=config.max_body_mb << 20,
        max_file_bytes=config.max_file_mb << 20,
        origins=origins,
    )
    if answering.traces.on:
        app.add_middleware(TraceParent)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    _add_openai_routes(app, answering, model, completions)
    add_file_routes(app, files)
    add_batch_routes(app, batches)
    _add_native_routes(app, answering, model)
    _add_watching_routes(app, answering, model)
    return app


def _add_openai_routes(app: FastAPI, answering: Answering, model: ServedModel, completions: Completions) -> None:
    responses = Responses(answering, model, completions)

    async def answer(request: Request, read: Callable[[Any], Asked], whole: Any, chunks: Any) -> Response:
        asked = read(await read_json(request))
        model.check(asked.model)
        request_id = request.scope["request_id"]
        if asked.stream:
            return await event_stream(request, chunks(asked, request_id))
        return json_response(await while_connected(request.receive, whole(asked, request_id)))

    @app.post("/v1/chat/completions", openapi_extra=schema.CHAT)
    async def chat(request: Request) -> Response:
        return await answer(request, read_chat, completions.chat, completions.chat_chunks)

    @app.post("/v1/completions", openapi_extra=schema.COMPLETION)
    async def complete(request: Request) -> Response:
        return await answer(request, read_completion, completions.complete, completions.completion_chunks)

    @app.post("/v1/responses", openapi_extra=schema.RESPONSE)
    async def respond(request: Request) -> Response:
        asked = read_response(await read_json(request))
        model.check(asked.model)
        request_id = request.scope["request_id"]
        if asked.stream:
            return await event_stream(request, responses.events(asked, request_id), done="")
        return json_response(await while_connected(request.receive, responses.respond(asked, request_id)))

    @app.post("/v1/embeddings", openapi_extra=schema.EMBEDDINGS)
    async def embeddings(request: Request) -> Response:
        asked = read_embeddings(await read_json(request))
        model.check(asked.model)
        work = embed(answering, model, asked, request.scope["request_id"])
        return json_response(await while_connected(request.receive, work))

    def card() -> dict[str, object]:
        ready = answering.engine.ready
        return model.card(ready.max_len if ready else None)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        model.check(name)
        return json_response(card())


def _add_native_routes(app: FastAPI, answering: Answering, model: ServedModel) -> None:
    native = Native(answering, model)
    tokenizer = model.tokenizer

    @app.post("/generate", openapi_extra=schema.GENERATE)
    async def generate(request: Request) -> Response:
        asked = read_generate(await read_json(request))
        request_id = asked.request_id or request.scope["request_id"]
        if asked.stream:
            return await event_stream(request, native.chunks(asked, request_id))
        return json_response(await while_connected(request.receive, native.generate(asked, request_id)))

    @app.post("/tokenize", openapi_extra=schema.TOKENIZE)
    async def tokenize(request: Request) -> Response:
        """{"prompt"} or {"messages"} -> {"tokens", "count", "max_model_len"}."""
        fields = Fields(await read_json(request))
        model.check(fields.take("model", str, ""))
        special, messages = fields.take("add_special_tokens", bool, True), fields.take_any("messages")
        if messages is not None:
            tokens: Any = await answering.in_thread(tokenizer.apply_chat_template, messages)
        else:
            texts = read_prompts(fields, "prompt")
            if not all(isinstance(text, str) for text in texts):
                fields.refuse("prompt", "must be a string or a list of strings")
            encode = tokenizer.encode_batch if special else tokenizer.encode_rendered
            tokens = await answering.in_thread(encode, texts)
            tokens = tokens if len(texts) > 1 else tokens[0]
        fields.end()
        count = [len(ids) for ids in tokens] if tokens and isinstance(tokens[0], list) else len(tokens)
        ready = answering.engine.ready
        return json_response({"tokens": tokens, "count": count, "max_model_len": ready.max_len if ready else None})

    @app.post("/detokenize", openapi_extra=schema.DETOKENIZE)
    async def detokenize(request: Request) -> Response:
        """{"tokens"} -> {"text"}."""
        fields = Fields(await read_json(request))
        model.check(fields.take("model", str, ""))
        tokens, skip = fields.take("tokens", list, []), fields.take("skip_special_tokens", bool, True)
        fields.end()
        model.check_ids(tokens, tokenizer.vocab_size)
        return json_response({"text": await answering.in_thread(tokenizer.decode, tokens, skip)})

    @app.get("/get_model_info")
    async def model_info() -> Response:
        ready = answering.engine.ready
        about = {"model_path": model.path, "tokenizer_path": model.path, "is_generation": True}
        if ready:
            about |= {"max_context_length": ready.max_len, "max_total_num_tokens": ready.capacity}
            about |= {"page_size": ready.page_size, "dtype": ready.dtype, "vocab_size": ready.vocab_size}
            about |= {"device": ready.device}
        if tokenizer:
            about |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        return json_response(about)

    @app.post("/flush_cache")
    async def flush_cache() -> Response:
        """Forget the prefixes that no running request uses."""
        answering.engine.flush()
        return json_response({"success": True})

    @app.post("/abort_request", openapi_extra=schema.ABORT)
    async def abort_request(request: Request) -> Response:
        """{"rid"}, the x-request-id of the request, or {"abort_all": true}."""
        fields = Fields(await read_json(request))
        request_id, everything = fields.take("rid", str, ""), fields.take("abort_all", bool, False)
        fields.end()
        if not request_id and not everything:
            fields.refuse("rid", "is missing; or give abort_all: true")
        return json_response({"num_aborted": answering.abort(None if everything else request_id)})


def _add_watching_routes(app: FastAPI, answering: Answering, model: ServedModel) -> None:
    engine, metrics = answering.engine, answering.metrics

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are taken."""
        if engine.ready is None or answering.draining:
            status = "draining" if answering.draining else "the engine is starting"
            return json_response({"status": status}, 503, {"retry-after": "1"})
        return json_response({"status": "ok"})

    @app.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        """Whether a token really comes out."""

        async def one_token() -> None:
            pieces = answering.answers([[0]], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
            async with aclosing(pieces):
                async for _ in pieces:
                    pass

        try:
            await while_connected(request.receive, asyncio.wait_for(one_token(), HEALTH_TIMEOUT_S))
        except (asyncio.TimeoutError, EngineDied):
            return json_response({"status": "no token came"}, 503, {"retry-after": "1"})
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        metrics.stats = engine.stats
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats() -> Response:
        """The figures of the page."""
        metrics.stats = engine.stats
        figures = {name: value for name, (value, _) in metrics.figures().items()}
        about = {"model": model.name, "ready": engine.ready is not None, "restarts": engine.num_restarts}
        return json_response({**about, "admitted": answering.num_admitted, **figures})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html", headers={"content-security-policy": POLICY})


POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
