"""Puts the routes together: an ASGI application out of a frontend, a processor and the limits."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triptych.config import ServerConfig
from triptych.errors import RequestError
from triptych.model.processor import Processor
from triptych.server import schema
from triptych.server.api import Api
from triptych.server.frontend import Frontend
from triptych.server.http import ApiKey, Endpoint, Exchange, Handler, RequestIds, encode_json, error_body
from triptych.server.media import MediaLoader
from triptych.server.openapi import Operation, openapi_document
from triptych.server.operations import Control, Operations
from triptych.server.prompts import PromptBuilder
from triptych.telemetry import Telemetry

CHANGE_PLACEMENT = (
    "Change the placement while the server runs; answers when it is done. Instances are switched, started and stopped "
    "in such an order that every stage is served at every moment. A change that is under way is waited for."
)
CHANGE_ROLE = (
    "Change the role of one instance while the server runs; answers when it is done, with the seconds of each step. "
    "Requests wait while nobody else serves a stage that it leaves. A change that is under way is waited for."
)


def create_app(
    frontend: Frontend,
    processor: Processor,
    config: ServerConfig,
    telemetry: Telemetry,
    *,
    max_model_len: int,
    model_root: str = "",
    control: Control | None = None,
) -> Starlette:
    """`max_model_len` bounds prompt and answer together, in tokens; `model_root` is shown by /v1/models. Without a
    `control` the placement cannot be changed.

    Needs at least one served model name.
    """
    assert config.served_model_names, "no served model name"
    media = MediaLoader(config, processor.modalities)
    prompts = PromptBuilder(processor, media, max_model_len)
    api = Api(frontend, prompts, config, max_model_len=max_model_len, model_root=model_root)
    routes = _routes(api, Operations(frontend, telemetry, control))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await media.close()

    middleware = [Middleware(RequestIds)]
    if config.api_key is not None:
        middleware.append(Middleware(ApiKey, key=config.api_key))
    return Starlette(
        routes=[Route(op.path, Endpoint(handler, frontend.ledger), methods=[op.method]) for op, handler in routes],
        middleware=middleware,
        exception_handlers={HTTPException: _not_routed},
        lifespan=lifespan,
    )


def _routes(api: Api, operations: Operations) -> list[tuple[Operation, Handler]]:
    s = schema
    table: list[tuple[Operation, Handler]] = [
        (
            Operation("POST", "/v1/chat/completions", "Answer to messages", s.ChatRequest, s.ChatResponse),
            api.chat_completions,
        ),
        (
            Operation("POST", "/v1/completions", "Go on with a prompt", s.CompletionRequest, s.CompletionResponse),
            api.completions,
        ),
        (Operation("GET", "/v1/models", "Names that are served", None, s.ModelList), api.models),
        (Operation("GET", "/v1/models/{model:path}", "One of them", None, s.ModelCard), api.model),
        (
            Operation("POST", "/tokenize", "Text or messages to tokens", s.TokenizeRequest, s.TokenizeResponse),
            api.tokenize,
        ),
        (
            Operation("POST", "/detokenize", "Tokens to text", s.DetokenizeRequest, s.DetokenizeResponse),
            api.detokenize,
        ),
        (Operation("GET", "/health", "200 while every stage has an active instance"), operations.health),
        (Operation("GET", "/ping", "200 while the server runs"), operations.ping),
        (Operation("GET", "/version", "Version of the server", None, s.VersionResponse), operations.version),
        (Operation("GET", "/metrics", "Metrics in Prometheus' text format"), operations.metrics),
        (Operation("GET", "/cluster", "Instances, queues, pools, events", None, s.ClusterView), operations.cluster),
        (
            Operation("POST", "/cluster/placement", CHANGE_PLACEMENT, s.PlacementRequest, s.PlacementResponse),
            operations.set_placement,
        ),
        (
            Operation("POST", "/cluster/instances/{id}/role", CHANGE_ROLE, s.RoleRequest, s.RoleResponse),
            operations.set_role,
        ),
    ]
    document = encode_json(openapi_document([operation for operation, _ in table]))

    async def describe(exchange: Exchange) -> None:
        await exchange.payload(document, [(b"content-type", b"application/json")])

    return [*table, (Operation("GET", "/openapi.json", "This document"), describe)]


def _not_routed(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, in the form of every other error."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        text = f"there is no route {request.url.path}"
    elif error.status_code == 405:
        text = f"{request.method} is not allowed on {request.url.path}"
    else:
        text = error.detail
    body = encode_json(error_body(RequestError(text, status=error.status_code, code="unknown_route")))
    return Response(body, error.status_code, error.headers, "application/json")
