"""quantkit: quantize a language model, measure what it cost, and run the result.

    import quantkit
    quantkit.quantize("demo", "int4", "demo-int4")
    quantkit.evaluate("demo", ["demo-int4"]).candidates[0].damage
    quantkit.LLM("demo-int4").generate("Once upon a time")[0].outputs[0].text

Importing this package imports neither torch nor transformers; the functions do when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.api import quantize
    from quantkit.evaluation.evaluate import evaluate
    from quantkit.runtime.llm import LLM
    from quantkit.runtime.sampling_params import SamplingParams
    from quantkit.runtime.structured_outputs import StructuredOutputsParams

__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__", "evaluate", "quantize"]


_MODULES = {
    "LLM": "quantkit.runtime.llm",
    "SamplingParams": "quantkit.runtime.sampling_params",
    "StructuredOutputsParams": "quantkit.runtime.structured_outputs",
    "evaluate": "quantkit.evaluation.evaluate",
    "quantize": "quantkit.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
