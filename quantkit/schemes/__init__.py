"""Number formats as data: grids, granularities, schemes, and which of them can be stored and run."""

from quantkit.schemes.specs import (
    FloatSpec,
    Granularity,
    IntSpec,
    KVScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QParams,
    Scheme,
    Spec,
)

__all__ = [
    "FloatSpec",
    "Granularity",
    "IntSpec",
    "KVScheme",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QParams",
    "Scheme",
    "Spec",
]
