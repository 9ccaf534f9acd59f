"""Facts per architecture as data: which tensors are linears, which of them are fused, what is refused."""

from quantkit.arch.families import FAMILIES, Family, Part, Role
from quantkit.arch.inspection import Inspection, inspect_checkpoint
from quantkit.arch.linears import LinearInfo, Stays, Survey, complete_survey, survey
from quantkit.arch.names import below_layer, layer_of, place_of
from quantkit.arch.refusals import already_quantized

__all__ = [
    "FAMILIES",
    "Family",
    "Inspection",
    "LinearInfo",
    "Part",
    "Role",
    "Stays",
    "Survey",
    "already_quantized",
    "below_layer",
    "complete_survey",
    "inspect_checkpoint",
    "layer_of",
    "place_of",
    "survey",
]
