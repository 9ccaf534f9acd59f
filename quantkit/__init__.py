"""quantkit: quantize a language model, measure what it cost, and run the result.

    import quantkit
    quantkit.quantize("demo", "int4", "demo-int4")
    quantkit.evaluate("demo", ["demo-int4"]).candidates[0].damage
    quantkit.LLM("demo-int4").generate("Once upon a time")[0].outputs[0].text

Importing this package imports neither torch nor transformers; the functions do when they are first used.
"""

from typing import TYPE_CHECKING, Any

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.api import quantize
    from quantkit.evaluation.evaluate import evaluate
    from quantkit.runtime.llm import LLM
    from quantkit.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__", "evaluate", "quantize"]


def __getattr__(name: str) -> Any:
    if name == "quantize":
        from quantkit.api import quantize

        return quantize
    if name == "evaluate":
        from quantkit.evaluation.evaluate import evaluate

        return evaluate
    if name == "LLM":
        from quantkit.runtime.llm import LLM

        return LLM
    if name == "SamplingParams":
        from quantkit.runtime.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
