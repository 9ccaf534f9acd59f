"""What runs a model: quantkit's runtime, transformers, or bitsandbytes within transformers.

A backend is a function that loads a `Model`, and one that says from headers what would go wrong. Other packages are
imported by their backend's file alone, when a model of it is asked for.
"""

import gc

import torch

from quantkit.evaluation.backends.quantkit import check_served, load_served
from quantkit.evaluation.serving import Model, Serving
from quantkit.evaluation.subjects import Subject
from quantkit.runtime.heap import release_freed_memory


def check_runnable(subject: Subject, serving: Serving) -> tuple[str, ...]:
    """Notes on how it will be run. Raises QuantkitError, from headers, for what cannot be run like this."""
    if subject.backend == "quantkit":
        check_served(subject, serving)
        return ()
    from quantkit.evaluation.backends.transformers import check_transformers

    return check_transformers(subject, serving)


def load_subject(subject: Subject, serving: Serving) -> Model:
    """Load a model with its backend, once the memory of the one before is free. Raises QuantkitError."""
    gc.collect()  # a model of transformers is held by cycles
    release_freed_memory()
    if serving.target.device.type == "cuda":
        torch.cuda.empty_cache()
    if subject.backend == "quantkit":
        return load_served(subject, serving)
    if subject.backend == "bitsandbytes":
        from quantkit.evaluation.backends.bitsandbytes import load_bitsandbytes

        return load_bitsandbytes(subject, serving)
    from quantkit.evaluation.backends.transformers import load_transformers

    return load_transformers(subject, serving)
