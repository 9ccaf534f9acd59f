"""The transformers model of a checkpoint without its weights; one decoder layer at a time is given them.

How a layer is called (masks, rotary embeddings, positions) is found by running the model once on real tokens
with recorders in the places of its layers, so nothing of transformers is rewritten or patched.

Shape suffixes: S samples, L tokens of a sample, E hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantkit.arch import FAMILIES
from quantkit.arch.experts import EXPERTS, ExpertNames
from quantkit.arch.names import place_of
from quantkit.arch.skeleton import build_language_model
from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint


class Call(NamedTuple):
    """How the model calls one of its layers, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Skeleton:
    """A model on the meta device, its layers to be filled one by one.

    dtype: what everything is computed in. Raises UnsupportedModelError for a family that is not known.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        check_known(checkpoint)
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.model = build_language_model(checkpoint).eval().requires_grad_(False)
        self.base: Any = self.model.get_submodule("model")
        self._names = {
            place: name for name in checkpoint.tensors if (place := _layer_and_rest(name)) is not None
        }
        for name, buffer in self.model.named_buffers():
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent).register_buffer(leaf, buffer.to(device), persistent=False)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.base.layers)

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """The layer's tensors by their names on disk below it, as they are on disk."""
        names = {rest: name for (number, rest), name in self._names.items() if number == layer}
        return {rest: self.checkpoint.read(name) for rest, name in sorted(names.items())}

    def name_on_disk(self, layer: int, rest: str) -> str:
        """The full name of a tensor of the layer."""
        return self._names[layer, rest]

    def fill_layer(self, layer: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer's module with these weights; `empty_layer` takes them out again."""
        state = {
            name: tensor.to(self.device, self.dtype)
            for name, tensor in to_module_names(tensors, self.checkpoint.model_type).items()
        }
        module: nn.Module = self.base.layers[layer]
        self._refuse([f"layer {layer}: {name}" for name in self._load(module, state)])
        return module.requires_grad_(False)

    def empty_layer(self, layer: int) -> None:
        """Drop the layer's weights."""
        for module in self.base.layers[layer].modules():
            _empty(module)

    def empty_outside(self) -> None:
        """Drop the weights that are in no layer; after `start` the layers do not need them."""
        inside = {id(module) for module in self.base.layers.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                _empty(module)

    def module_name(self, name: str) -> str:
        """A linear's name below the layer as its module has it (experts excepted: they are one module)."""
        return _module_name(name, EXPERTS.get(self.checkpoint.model_type))

    def start(
        self, ids_SL: Tensor, outside: Mapping[str, Tensor], batch: int
    ) -> tuple[list[Tensor], list[Call]]:
        """Hidden states before the first layer, in batches of [batch, L, E], and how each layer is called.

        outside: tensors that are in no layer, by their names on disk: the embedding and the final norm.
        """
        self.fill_outside(outside)
        layers = self.base.layers
        recorders = [_Recorder() for _ in layers]
        self.base.layers = nn.ModuleList(recorders)
        hidden: list[Tensor] = []
        try:
            self.base(input_ids=ids_SL[:1].to(self.device), use_cache=False)
            calls = [recorder.call for recorder in recorders]
            for ids in torch.split(ids_SL, batch):
                self.base(input_ids=ids.to(self.device), use_cache=False)
                hidden.append(recorders[0].hidden_SLE)
        finally:
            self.base.layers = layers
        assert all(call is not None for call in calls), "the model calls each of its layers"
        return hidden, [call for call in calls if call is not None]

    def fill_outside(self, tensors: Mapping[str, Tensor]) -> None:
        """Give weights to what is in no layer; a tied head becomes the embedding."""
        state = {text_name(name): tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        missing = self._load(self.model, state)
        self._refuse([name for name in missing if name != "lm_head.weight" and not place_of(name)])
        head = self.model.get_submodule("lm_head")
        if head.get_parameter("weight").is_meta:
            head.register_parameter("weight", self.base.embed_tokens.weight)
        self.model.requires_grad_(False)

    def _load(self, module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
        """Give a module these tensors, those it has no place for left out; returns what it misses."""
        try:
            return list(module.load_state_dict(state, strict=False, assign=True).missing_keys)
        except RuntimeError as error:  # a tensor of another shape
            reason = str(error).splitlines()[-1].strip()
            raise SourceError(
                f"{self.checkpoint.path}: config.json and the weights do not fit together ({reason})",
                fix="fetch the checkpoint again: config.json is of another model, or of another version",
            ) from None

    def _refuse(self, names: Sequence[str]) -> None:
        if names:
            raise SourceError(
                f"{self.checkpoint.path}: {names[0]} is missing, and the model cannot run without it",
                fix="the checkpoint is incomplete: fetch it again; or use a data-free recipe, such as int4-rtn",
            )

    def outside_names(self) -> list[str]:
        """Tensors of the language model that are in no layer, by their names on disk."""
        wanted = {name for name, _ in self.model.named_parameters()}
        return [name for name in self.checkpoint.tensors if text_name(name) in wanted and not place_of(name)]


def check_known(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError for a family whose layers are not known."""
    if checkpoint.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{checkpoint.path}: nothing is known about the layers of {checkpoint.model_type}: which linears share "
            "an input, and which norm feeds them",
            fix="use a data-free recipe, such as int4-rtn, int8 or fp8; calibration knows "
            f"{', '.join(sorted(FAMILIES))}",
        )


def _empty(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


class _Recorder(nn.Module):
    """Stands in for a layer: notes how it is called, and passes hidden states through."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Call | None = None
        self.hidden_SLE = torch.empty(0)

    def forward(self, hidden_SLE: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.call is None:  # the first call is for one sample: its masks and positions fit any number
            self.call = Call(args, kwargs)
        self.hidden_SLE = hidden_SLE
        return hidden_SLE


@torch.no_grad()
def run_layer(module: nn.Module, hidden_SLE: Tensor, call: Call) -> Tensor:
    """Hidden states after the layer."""
    return run_layer_with(module, {}, hidden_SLE, call)


def run_layer_with(
    module: nn.Module, parameters: Mapping[str, Tensor], hidden_SLE: Tensor, call: Call
) -> Tensor:
    """Hidden states after the layer with other parameters, by names in the module; differentiable in them."""
    out = functional_call(module, dict(parameters), (hidden_SLE, *call.args), call.kwargs)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def to_module_names(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """A layer's tensors on disk as the module of transformers has them: experts in one tensor each."""
    experts = EXPERTS.get(model_type)
    places = [place_of(f"layers.0.{name}") for name in tensors]
    numbers = sorted({place.expert for place in places if place and place.expert is not None})
    if experts is None or not numbers:
        return {_module_name(name, experts): tensor for name, tensor in tensors.items()}

    def stacked(*parts: str) -> Tensor:
        """Of every expert these parts, one below the other."""
        weights = [
            [tensors[f"{experts.linear(number, part)}.weight"] for part in parts] for number in numbers
        ]
        return torch.stack([torch.cat(of_one) for of_one in weights])

    fused = {
        f"{experts.module}.gate_up_proj": stacked(experts.gate, experts.up),
        f"{experts.module}.down_proj": stacked(experts.down),
    }
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{experts.on_disk}.")}
    return {_module_name(name, experts): tensor for name, tensor in others.items()} | fused


def _module_name(name: str, experts: ExpertNames | None) -> str:
    """Mixtral's block_sparse_moe is a module called mlp."""
    if experts is None:
        return name
    on_disk, module = experts.on_disk.rpartition(".")[0], experts.module.rpartition(".")[0]
    return module + name.removeprefix(on_disk) if name.startswith(f"{on_disk}.") else name


def _layer_and_rest(name: str) -> tuple[int, str] | None:
    place = place_of(name)
    return None if place is None else (place.layer, name.removeprefix(place.prefix))


def text_name(name: str) -> str:
    """The name that a tensor outside the layers has in the language model alone."""
    return (
        name.replace("language_model.model.", "model.")
        .replace("model.language_model.", "model.")
        .removeprefix("language_model.")
    )
