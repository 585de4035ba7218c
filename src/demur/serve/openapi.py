"""The OpenAPI document of the gateway, where routes read their body themselves."""

from __future__ import annotations

from typing import Any

from demur.serve.api import request_schema

BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
}
_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_WHY = {
    400: "The request is not valid.",
    401: "No API key, or a wrong one.",
    403: "An operating point that requests may not name, or a page of another site.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too many requests are running and waiting.",
    500: "An error in the gateway.",
    502: "The engine failed.",
    504: "No answer in time.",
}


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Error responses for OpenAPI; all of them when none are named."""
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {code: {"description": _WHY[code], "content": schema} for code in codes or _WHY}


def document(app: Any) -> None:
    """Put the schemas that routes name by hand into the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        whole: dict[str, Any] = made()
        request, parts = request_schema()
        schemas = whole.setdefault("components", {}).setdefault("schemas", {})
        schemas.update({**parts, "ChatRequest": request, "Error": _ERROR_SCHEMA})
        return whole

    app.openapi = openapi
