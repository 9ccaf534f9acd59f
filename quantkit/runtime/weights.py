"""The tensors of a checkpoint as a decoder asks for them: checked against the config, counted, nothing left over."""

import torch
from torch import Tensor, nn

from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.compressed_tensors import StoredLinear, linear_layout, read_linear
from quantkit.formats.quantization_config import QuantizedModules
from quantkit.runtime.layers.linear import Linear, QuantLinear
from quantkit.schemes import PerGroup, Scheme
from quantkit_kernels.float8 import has_nan

# Where the language model lies: its layers, its head. A text-only model; Gemma 3 as published; as transformers 5
# may write it.
PLACES = (
    ("model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
)
UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".k_scale", ".v_scale")  # computed here; read by the KV cache


class Weights:
    """One checkpoint being read. `base` starts the decoder's tensor names, `head` is the output head's name."""

    def __init__(self, checkpoint: Checkpoint, quantized: QuantizedModules, dtype: torch.dtype) -> None:
        self.base, self.head = _place(checkpoint)
        self._checkpoint = checkpoint
        self._quantized = quantized
        self._dtype = dtype
        self._used: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in the model's dtype. Raises SourceError if it is missing, or of another shape or kind."""
        info = self._checkpoint.info(name)
        if info.shape != shape:
            raise self._wrong(name, f"has shape {list(info.shape)}", f"makes it {list(shape)}")
        if info.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise self._wrong(name, f"holds {info.dtype}", "does not say that it is quantized")
        self._used.add(name)
        return self._checkpoint.read(name).to(self._dtype)

    def linear(self, module: str, num_rows: int, num_cols: int, *, has_bias: bool) -> nn.Module:
        """A linear [num_rows, num_cols], quantized if config.json says so."""
        bias = self.tensor(f"{module}.bias", (num_rows,)) if has_bias else None
        scheme = self._quantized.scheme_of(module)
        if scheme is None:
            return Linear(self.tensor(f"{module}.weight", (num_rows, num_cols)), bias)
        stored = read_linear(self._checkpoint, module, scheme)
        if stored.codes_NK.shape != (num_rows, num_cols):
            raise self._wrong(
                module, f"has shape {list(stored.codes_NK.shape)}", f"makes it {[num_rows, num_cols]}"
            )
        self._check_numbers(module, stored, scheme)
        layout = linear_layout(scheme, num_rows, num_cols, torch.bfloat16)
        self._used.update(f"{module}.{suffix}" for suffix in layout)
        return QuantLinear(stored, scheme, bias, dtype=self._dtype)

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


def _place(checkpoint: Checkpoint) -> tuple[str, str]:
    for base, head in PLACES:
        if f"{base}embed_tokens.weight" in checkpoint.tensors:
            return base, head
    checkpoint.info(f"{PLACES[0][0]}embed_tokens.weight")  # raises: it is missing
    raise AssertionError("the line above raised")
