"""The tensors of a checkpoint as a decoder asks for them: checked against the config, counted, nothing left over."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.compressed_tensors import StoredLinear, linear_layout, read_linear
from quantkit.formats.quantization_config import QuantizedModules
from quantkit.runtime.device_checkpoint import DeviceCheckpoint
from quantkit.runtime.heap import release_freed_memory
from quantkit.runtime.layers.build_experts import build_experts
from quantkit.runtime.layers.build_linear import build_linear
from quantkit.runtime.layers.linear_part import LinearPart, quantized_part
from quantkit.runtime.layers.mlp import Activation
from quantkit.runtime.layers.moe import Experts
from quantkit.runtime.layers.rows import AnyLinear
from quantkit.runtime.target import Target
from quantkit.schemes import PerGroup, Scheme
from quantkit_kernels.float8 import has_nan

# Where the language model lies: its layers, its head. A text-only model; Gemma 3 as published; as transformers 5
# may write it.
PLACES = (
    ("model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
)
UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")  # computed here; read by the KV pool


class Weights:
    """One checkpoint being read. `base` starts the decoder's tensor names, `head` is the output head's name."""

    def __init__(self, checkpoint: Checkpoint, quantized: QuantizedModules, target: Target) -> None:
        self.base, self.head = find_place(checkpoint)
        self.target = target
        self._checkpoint = checkpoint
        self._quantized = quantized
        self._used: set[str] = set()

    def begin_layer(self, number: int) -> None:
        """Say that a layer's tensors are asked for from here on: on a GPU the next layer's are read meanwhile."""
        release_freed_memory()  # of the layer before
        if isinstance(self._checkpoint, DeviceCheckpoint):
            for ahead in (number, number + 1):
                prefix = f"{self.base}layers.{ahead}."
                names = [name for name in self._checkpoint.tensors if name.startswith(prefix)]
                self._checkpoint.expect(name for name in names if name not in self._used)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in the model's dtype. Raises SourceError if it is missing, or of another shape or kind."""
        info = self._checkpoint.info(name)
        if info.shape != shape:
            raise self._wrong(name, f"has shape {list(info.shape)}", f"makes it {list(shape)}")
        if info.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise self._wrong(name, f"holds {info.dtype}", "does not say that it is quantized")
        self._used.add(name)
        return self._checkpoint.read(name).to(self.target.dtype)

    def linear(self, modules: Mapping[str, int], num_cols: int, *, has_bias: bool) -> AnyLinear:
        """Linears of one input with their numbers of rows, as one whose outputs lie side by side in that order."""
        parts = [self.part(module, rows, num_cols, has_bias=has_bias) for module, rows in modules.items()]
        return build_linear(parts, self.target)

    def experts(
        self,
        gate: Sequence[str],
        up: Sequence[str],
        down: Sequence[str],
        inner: int,
        size: int,
        activation: Activation,
    ) -> Experts:
        """The experts of a layer, each with linears [inner, size] twice and [size, inner], by the modules' names."""

        def parts(modules: Sequence[str], num_rows: int, num_cols: int) -> Iterator[LinearPart]:
            return (self.part(module, num_rows, num_cols, has_bias=False) for module in modules)

        return build_experts(
            zip(parts(gate, inner, size), parts(up, inner, size), strict=True),
            parts(down, size, inner),
            len(down),
            self._quantized.scheme_of(gate[0]),
            activation,
            self.target,
        )

    def part(self, module: str, num_rows: int, num_cols: int, *, has_bias: bool) -> LinearPart:
        """A linear [num_rows, num_cols] as stored, quantized if config.json says so."""
        bias = self.tensor(f"{module}.bias", (num_rows,)) if has_bias else None
        scheme = self._quantized.scheme_of(module)
        if scheme is None:
            return LinearPart(module, self.tensor(f"{module}.weight", (num_rows, num_cols)), bias_N=bias)
        stored = read_linear(self._checkpoint, module, scheme)
        if stored.codes_NK.shape != (num_rows, num_cols):
            raise self._wrong(
                module, f"has shape {list(stored.codes_NK.shape)}", f"makes it {[num_rows, num_cols]}"
            )
        self._check_numbers(module, stored, scheme)
        layout = linear_layout(scheme, num_rows, num_cols, torch.bfloat16)
        self._used.update(f"{module}.{suffix}" for suffix in layout)
        return quantized_part(module, stored, scheme, bias)

    def _check_numbers(self, module: str, stored: StoredLinear, scheme: Scheme) -> None:
        for values in (stored.qparams, stored.input_qparams):
            if values is not None and not bool(torch.isfinite(values.scale.float()).all()):
                raise self._damaged(module, "a scale that is not a finite number")
        if stored.codes_NK.dtype == torch.float8_e4m3fn and has_nan(stored.codes_NK):
            raise self._damaged(module, "NaN among its FP8 codes")
        if scheme.activation is not None and isinstance(scheme.activation.granularity, PerGroup):
            num_cols, size = stored.codes_NK.shape[1], scheme.activation.granularity.size
            if num_cols % size:
                raise self._damaged(module, f"{num_cols} inputs, which groups of {size} do not divide")

    def skip_tied_head(self) -> None:
        """The head is the embedding; a copy stored under its name is not read."""
        if (
            self._quantized.scheme_of(self.head) is not None
            and f"{self.head}.weight" not in self._checkpoint.tensors
        ):
            raise UnsupportedModelError(
                f"{self._checkpoint.path}: {self.head} is tied to the 16-bit embedding, "
                "but quantization_config gives it a scheme",
                fix=f"list {self.head} under `ignore` in config.json",
            )
        self._used.add(f"{self.head}.weight")

    def finish(self) -> None:
        """Raise UnsupportedModelError if the language model has a tensor that no module asked for."""
        for name in self._checkpoint.tensors:
            is_ours = name.startswith((self.base, f"{self.head}."))
            if is_ours and name not in self._used and not name.endswith(UNUSED_SUFFIXES):
                raise UnsupportedModelError(
                    f"{self._checkpoint.path}: tensor {name} has no place in this architecture",
                    fix="use a checkpoint whose tensors and config.json are of one version; "
                    "if they are, the model is of a variant that the runtime does not have",
                )
        release_freed_memory()

    def _wrong(self, name: str, found: str, expected: str) -> SourceError:
        return SourceError(
            f"{self._checkpoint.path}: {name} {found}, but config.json {expected}",
            fix="config.json and the weights are not of one version: fetch the checkpoint again",
        )

    def _damaged(self, module: str, finding: str) -> SourceError:
        return SourceError(
            f"{self._checkpoint.path}: {module} has {finding}",
            fix="quantize the checkpoint again, or fetch it again",
        )


def find_place(checkpoint: Checkpoint) -> tuple[str, str]:
    """What the decoder's tensor names start with, and the head's name. Raises SourceError: no embedding."""
    for base, head in PLACES:
        if f"{base}embed_tokens.weight" in checkpoint.tensors:
            return base, head
    checkpoint.info(f"{PLACES[0][0]}embed_tokens.weight")  # raises: it is missing
    raise AssertionError("the line above raised")
