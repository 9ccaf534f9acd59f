"""What endpoints share: the model if it serves, the engine, the settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from quantkit.runtime.sampling_params import SamplingParams
from quantkit.server.answers import Answer, StreamedAnswer, WholeAnswer
from quantkit.server.engine_client import EngineClient
from quantkit.server.errors import MAX_SHOWN_CHARS, ApiError, invalid
from quantkit.server.generation import Generation
from quantkit.server.grammar_client import GrammarClient
from quantkit.server.lifecycle import Lifecycle, ServedModel
from quantkit.server.messages import Choice
from quantkit.server.metrics import Metrics
from quantkit.server.prompts import Prompts
from quantkit.server.schema import SamplingBody, Usage
from quantkit.server.settings import ServerSettings


class Shape(Protocol):
    """An endpoint's objects."""

    def whole(self, choices: list[Choice], generation: Generation) -> Any: ...

    def pieces(self, choices: list[Choice]) -> list[dict[str, Any]]: ...

    def usage(self, generation: Generation) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Of one server."""

    settings: ServerSettings
    lifecycle: Lifecycle
    engine: EngineClient
    prompts: Prompts
    grammars: GrammarClient
    metrics: Metrics

    def model_for(self, name: str | None) -> ServedModel:
        """The model, called by its name. Raises ApiError if it does not serve, or there is none of that name."""
        model = self.lifecycle.serving()
        if name not in (None, model.name):
            raise ApiError(
                404,
                f"The model '{str(name)[:MAX_SHOWN_CHARS]}' does not exist; this server has '{model.name}'.",
                param="model",
                code="model_not_found",
            )
        return model

    def answer(
        self,
        request: Request,
        body: SamplingBody,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        shape: Shape,
    ) -> Answer:
        """Give the prompts to the engine; the response that its answers become."""
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream to be true", param="stream_options")
        generation = self.engine.submit(
            prompts, params, arrival=request.state.arrival, is_streamed=bool(body.stream)
        )
        request.state.generation = generation
        request.state.user = body.user
        timeout = self.settings.request_timeout
        if not body.stream:
            return WholeAnswer(
                generation,
                self.engine,
                timeout=timeout,
                make=lambda choices: shape.whole(choices, generation),
            )
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        nothing = {"usage": None} if wants_usage else {}
        return StreamedAnswer(
            generation,
            self.engine,
            timeout=timeout,
            make=lambda choices: [{**piece, **nothing} for piece in shape.pieces(choices)],
            last=lambda: [shape.usage(generation)] if wants_usage else [],
        )


def usage_of(generation: Generation) -> Usage:
    """Of a generation that has ended."""
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": generation.num_tokens,
        "total_tokens": generation.num_prompt_tokens + generation.num_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }
