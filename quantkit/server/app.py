"""The routes, and errors in OpenAI's shape whoever raises them."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from quantkit.server.answers import JsonResponse
from quantkit.server.chat import answer_chat
from quantkit.server.chat_schema import ChatBody, ChatCompletion
from quantkit.server.completion_schema import Completion, CompletionBody
from quantkit.server.completions import answer_completion
from quantkit.server.context import Context
from quantkit.server.errors import MAX_SHOWN_CHARS, ApiError, ErrorBody, failed, invalid, of_validation
from quantkit.server.facts import ServedFacts
from quantkit.server.gate import Gate
from quantkit.server.lifecycle import Health, ServedModel, State
from quantkit.server.page import page_response
from quantkit.server.schema import ModelCard, ModelList
from quantkit.server.tokens import DetokenizeBody, Detokenized, TokenizeBody, Tokenized, detokenize, tokenize
from quantkit.version import __version__

TEXT = {"schema": {"type": "string"}}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS = {"text/event-stream": {"schema": EVENT}}  # of each of them, where a body says `stream`
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(context: Context) -> ASGIApp:
    """Everything that HTTP reaches. Its documentation pages are off: they load scripts from another host."""
    app = FastAPI(
        title="quantkit",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=ERRORS,
    )
    _add_generation(app, context)
    _add_models(app, context)
    _add_tokens(app, context)
    _add_state(app, context)
    _add_page(app, context)
    _add_errors(app)
    paths = frozenset(route.path for route in app.routes if "{" not in route.path)  # type: ignore[attr-defined]
    return Gate(app, api_keys=context.settings.api_keys, metrics=context.metrics, paths=paths)


def _add_generation(app: FastAPI, context: Context) -> None:
    @app.post("/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": EVENTS}})
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer_chat(context, body, request)

    @app.post("/v1/completions", responses={200: {"model": Completion, "content": EVENTS}})
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer_completion(context, body, request)


def _add_models(app: FastAPI, context: Context) -> None:
    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def list_models() -> Response:
        return JsonResponse({"object": "list", "data": [_card(context.lifecycle.serving())]})

    @app.get("/v1/models/{model:path}", responses={200: {"model": ModelCard}})
    async def retrieve_model(model: str) -> Response:
        return JsonResponse(_card(context.model_for(model)))


def _card(model: ServedModel) -> ModelCard:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "quantkit",
        "max_model_len": model.engine.max_model_len,
    }


def _add_tokens(app: FastAPI, context: Context) -> None:
    @app.post("/tokenize", responses={200: {"model": Tokenized}})
    async def tokenize_text(body: TokenizeBody) -> Response:
        return JsonResponse(await tokenize(context, body))

    @app.post("/detokenize", responses={200: {"model": Detokenized}})
    async def detokenize_ids(body: DetokenizeBody) -> Response:
        return JsonResponse(await detokenize(context, body))


def _add_state(app: FastAPI, context: Context) -> None:
    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        state = context.lifecycle.state
        return JsonResponse({"status": state}, 200 if state is State.READY else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": TEXT}}})
    async def metrics() -> Response:
        return PlainTextResponse(context.metrics.render(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI, context: Context) -> None:
    @app.get("/", response_class=Response, responses={200: {"content": {"text/html": TEXT}}})
    async def page() -> Response:
        return page_response()

    @app.get("/facts", responses={200: {"model": ServedFacts}})
    async def facts() -> Response:
        model = context.lifecycle.serving()
        found: ServedFacts = {
            "model": model.name,
            "max_model_len": model.engine.max_model_len,
            "num_kv_tokens": model.engine.num_kv_tokens,
            "device": model.engine.device,
            "sampling": model.defaults.settings,
            "checkpoint": model.facts,
        }
        return JsonResponse(found)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return JsonResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
        return await on_api_error(request, of_validation(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        method, path = request.method[:MAX_SHOWN_CHARS], request.url.path[:MAX_SHOWN_CHARS]
        if error.status_code == 404:
            found = ApiError(404, f"Unknown request URL: {method} {path}", code="unknown_url")
        elif error.status_code == 405:
            found = ApiError(405, f"{method} is not for {path}", code="method_not_allowed")
        else:
            found = invalid(str(error.detail), code="invalid_json")
        found.headers |= error.headers or {}
        return await on_api_error(request, found)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_api_error(request, failed("internal error; the server's log has its traceback"))
