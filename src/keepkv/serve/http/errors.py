"""Errors over HTTP: OpenAI's shape, and the status that says who can do something about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from keepkv.errors import Busy, ContextExists, ContextMissing, KeepKVError, Stopped, TooLarge
from keepkv.serve.request import Failed

LONGEST = 2000  # characters of a message; what a client sent may be in it
STATUS: dict[type[KeepKVError], int] = {
    TooLarge: 400, Busy: 429, Stopped: 503, ContextMissing: 404, ContextExists: 409,
}  # fmt: skip
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 413: "too_large", 429: "busy", 503: "stopping", 500: "failed"}


class Refused(KeepKVError):
    """A request that is refused by the front, with the ``status`` and ``code`` that it is answered with."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class Broken(KeepKVError):
    """A reply that could not go on, as the engine said."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.error)
        self.status = 400 if failed.refused else 500


def status_of(error: KeepKVError) -> int:
    """The HTTP status of what the front or the engine raised; what is not known to be otherwise is a bad request."""
    if isinstance(error, (Refused, Broken)):
        return error.status
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)


def body_of(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """``{"error": …}``. Text that cannot be written as UTF-8 is replaced."""
    text = message[:LONGEST].encode("utf-8", "replace").decode("utf-8")
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": text, "type": kind, "param": param, "code": code or CODES.get(status)}}


def body_of_error(error: KeepKVError) -> dict[str, Any]:
    """The same for what was raised."""
    code = "context_length_exceeded" if isinstance(error, TooLarge) else getattr(error, "code", None)
    return body_of(status_of(error), str(error), code, getattr(error, "param", None))


def answer(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A response that tells an error."""
    return JSONResponse(body_of(status, message, code, param), status, dict(headers or {}))


def install(app: FastAPI) -> None:
    """Have ``app`` tell every error in this shape. ``app.state.retry_after`` gives the seconds of a 429."""

    @app.exception_handler(KeepKVError)
    async def refused(request: Request, error: KeepKVError) -> JSONResponse:
        status = status_of(error)
        headers = {"Retry-After": str(request.app.state.retry_after())} if status == 429 else None
        return JSONResponse(body_of_error(error), status, headers)

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        said = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            where, said = "", f"the body is not JSON: {(first.get('ctx') or {}).get('error', 'cannot be read')}"
        return answer(400, f"{where}: {said}" if where else said, "invalid_value", where or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "the server failed at this request; its log says how")
