"""The OpenAPI 3.1 document, made from the same structs that decode requests and encode responses."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

import triptych
from triptych.server.schema import ErrorResponse

Json = dict[str, object]
References = Mapping[type[msgspec.Struct], Json]


@dataclass(frozen=True)
class Operation:
    """One row of the table of routes, as far as a client has to know it."""

    method: str
    path: str
    summary: str
    request: type[msgspec.Struct] | None = None
    response: type[msgspec.Struct] | None = None


def openapi_document(operations: list[Operation]) -> Json:
    bodies = [kind for op in operations for kind in (op.request, op.response) if kind is not None]
    kinds: list[type[msgspec.Struct]] = list(dict.fromkeys([*bodies, ErrorResponse]))
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    by_kind: References = dict(zip(kinds, references, strict=True))
    paths: dict[str, Json] = {}
    for op in operations:
        paths.setdefault(op.path.replace(":path}", "}"), {})[op.method.lower()] = _describe(op, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": triptych.__version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _describe(op: Operation, references: References) -> Json:
    ok: Json = {"description": "OK"}
    if op.response is not None:
        ok["content"] = {"application/json": {"schema": references[op.response]}}
    error = {"description": "Error", "content": {"application/json": {"schema": references[ErrorResponse]}}}
    described: Json = {"summary": op.summary, "responses": {"200": ok, "4XX": error, "5XX": error}}
    if op.request is not None:
        body = {"application/json": {"schema": references[op.request]}}
        described["requestBody"] = {"required": True, "content": body}
    if "{" in op.path:
        name = op.path.partition("{")[2].partition("}")[0].partition(":")[0]
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    return described
