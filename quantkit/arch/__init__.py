"""Facts per architecture as data: which tensors are linears, which of them are fused, what is refused."""

from quantkit.arch.families import FAMILIES, Role
from quantkit.arch.inspection import Inspection, inspect_checkpoint
from quantkit.arch.linears import LinearInfo, Stays, Survey, complete_survey, survey
from quantkit.arch.names import below_layer, place_of
from quantkit.arch.refusals import already_quantized

__all__ = [
    "FAMILIES",
    "Inspection",
    "LinearInfo",
    "Role",
    "Stays",
    "Survey",
    "already_quantized",
    "below_layer",
    "complete_survey",
    "inspect_checkpoint",
    "place_of",
    "survey",
]
