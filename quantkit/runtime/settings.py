"""How an engine is set up: what a user may choose, checked when made. Free of torch: a command line reads it."""

from dataclasses import dataclass
from typing import Literal, get_args

from quantkit.errors import GenerationError

DtypeName = Literal["bfloat16", "float16", "float32"]
KVCacheDtypeName = Literal["auto", "bf16", "fp16", "fp32", "fp8", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """None: chosen from the checkpoint and the device when the engine is made.

    dtype: of activations. device: "cpu", "cuda", "cuda:1"; None: the first GPU, else the CPU. kv_cache_dtype: auto is
    the checkpoint's own. max_model_len: tokens of one sequence, prompt and answer; None: the model's, or fewer if the
    KV cache holds fewer. max_num_seqs: sequences computed at once. max_num_batched_tokens: of one step; None: 8192 on
    a GPU, 512 on a CPU. gpu_memory_fraction: of the device, weights and cache together. kv_cache_bytes: for the KV
    cache, instead of what the fraction leaves. batch_invariant: a sequence's tokens do not depend, not even in their
    last bits, on what else is computed; slower. eager: no CUDA graphs.
    """

    dtype: DtypeName | None = None
    device: str | None = None
    kv_cache_dtype: KVCacheDtypeName = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    gpu_memory_fraction: float = 0.9
    kv_cache_bytes: int | None = None
    prefix_caching: bool = True
    batch_invariant: bool = False
    eager: bool = False

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, (None, *get_args(DtypeName)))
        _one_of("kv_cache_dtype", self.kv_cache_dtype, get_args(KVCacheDtypeName))
        _at_least("max_model_len", self.max_model_len, 2)
        _at_least("max_num_seqs", self.max_num_seqs, 1, optional=False)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("kv_cache_bytes", self.kv_cache_bytes, 1)
        _is_bool("prefix_caching", self.prefix_caching)
        _is_bool("batch_invariant", self.batch_invariant)
        _is_bool("eager", self.eager)
        if type(self.gpu_memory_fraction) not in (int, float) or not 0 < self.gpu_memory_fraction <= 1:
            raise GenerationError(
                f"gpu_memory_fraction {self.gpu_memory_fraction!r} makes no sense",
                fix="give a number above 0, up to 1",
            )


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice is not None)
        raise GenerationError(f"{name} {value!r} is not one of {names}", fix="give one of these")


def _is_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise GenerationError(f"{name} {value!r} makes no sense", fix="give True or False")


def _at_least(name: str, value: int | None, least: int, *, optional: bool = True) -> None:
    if (value is None and not optional) or (value is not None and (type(value) is not int or value < least)):
        raise GenerationError(f"{name} {value!r} makes no sense", fix=f"give a number from {least} on")
