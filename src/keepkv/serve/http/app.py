"""The application: paths, errors and the door in front of them, over one engine."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.trustedhost import TrustedHostMiddleware

import keepkv.serve.http.paths.chat as chat
import keepkv.serve.http.paths.completions as completions
import keepkv.serve.http.paths.contexts as contexts
from keepkv.serve.config import Config
from keepkv.serve.engine import Engine
from keepkv.serve.http import errors
from keepkv.serve.http.door import Door
from keepkv.serve.http.front import Front
from keepkv.serve.http.metrics import Metrics
from keepkv.serve.http.shapes.pieces import Pieces
from keepkv.serve.http.shapes.prompts import Prompts
from keepkv.serve.page import POLICY, page

LOCAL = ["localhost", "127.0.0.1", "[::1]"]  # names by which a server on the loopback address is called


def front_of(engine: Engine, tokenizer: Any, config: Config) -> Front:
    """What paths share. engine: started. tokenizer: of transformers; its copy is used, for the engine uses it too."""
    own = copy.deepcopy(tokenizer)
    return Front(engine, config, Prompts(own), Pieces(own), Metrics(engine))


def application(front: Front) -> FastAPI:
    """The server of ``front``, whose engine has been started."""
    app = FastAPI(title="keepkv", openapi_url="/openapi.json", docs_url=None, redoc_url=None)  # those load from a CDN
    app.state.retry_after = front.retry_after
    errors.install(app)
    for part in (chat, completions, contexts):
        app.include_router(part.routes(front))
    app.include_router(_own(front))
    key, config = front.config.api_key, front.config
    app.add_middleware(
        Door, max_body=config.max_body, api_key=key.get_secret_value() if key else None, stopping=lambda: front.stopping
    )
    if config.loopback:  # a page of another site could else reach it under that site's name
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL, www_redirect=False)
    return app


def _own(front: Front) -> APIRouter:
    """Models, health, metrics and the page."""
    router = APIRouter()

    @router.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(front)]}

    @router.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        front.check_model(name)
        return _model(front)

    @router.get("/health")
    def health() -> JSONResponse:
        now = front.engine.stats()
        state = "stopping" if front.stopping else now.state
        told = {"status": state, "rows": now.rows, "waiting": now.waiting, "bytes": now.bytes, "limit": now.limit}
        return JSONResponse(told, 200 if state == "running" else 503)

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse(page(), headers={"Content-Security-Policy": POLICY})

    return router


def _model(front: Front) -> dict[str, Any]:
    """The model as OpenAI tells of one, and beside that what may be asked of keepkv."""
    config = front.config
    told = {
        "method": config.method,
        "budget": config.budget,
        "methods": list(front.engine.methods()),
        "max_budget": config.max_budget,
        "chat": bool(front.prompts.tokenizer.chat_template),
    }
    return {
        "id": config.served, "object": "model", "created": front.created, "owned_by": "keepkv",
        "max_model_len": front.engine.limit_tokens, "keepkv": told,
    }  # fmt: skip
