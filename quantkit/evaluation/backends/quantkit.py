"""Models run as they are served: by the engine's decoder, over windows of text that are there already.

The same kernels, paged KV cache and tokens per step; no scheduler and no sampler, since nothing is written.
"""

from quantkit.errors import MemoryPlanError
from quantkit.evaluation.serving import Model, Serving
from quantkit.evaluation.subjects import Subject
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.quantization_config import read_quantization
from quantkit.runtime.load import check_kernels, kv_format, load_model
from quantkit.runtime.memory_plan import plan_memory
from quantkit.runtime.model import LOGITS_ELEMENTS
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import reserved_bytes


def check_served(subject: Subject, serving: Serving) -> None:
    """Raise SchemeError, from headers, for a KV cache or a number format that cannot be run like this."""
    checkpoint = subject.checkpoint
    kv_format(checkpoint, read_spec(checkpoint), serving.target, serving.kv_cache_dtype)
    if serving.target.has_kernels:
        check_kernels(checkpoint, read_quantization(checkpoint.config), serving.target)


def load_served(subject: Subject, serving: Serving) -> Model:
    """Load what serves. Raises what `load_model` does; MemoryPlanError, before reading, if a GPU is too small."""
    target = serving.target
    if target.device.type == "cuda":
        _check_memory(subject.checkpoint, serving)
    return load_model(
        subject.checkpoint, dtype=target.dtype, device=target.device, kv_cache_dtype=serving.kv_cache_dtype
    )


def _check_memory(checkpoint: Checkpoint, serving: Serving) -> None:
    spec, target = read_spec(checkpoint), serving.target
    kv = kv_format(checkpoint, spec, target, serving.kv_cache_dtype)
    settings = EngineSettings(eager=True)
    plan = plan_memory(
        checkpoint,
        spec,
        target,
        kv,
        fraction=settings.gpu_memory_fraction,
        max_num_batched_tokens=serving.step_tokens,
        max_num_seqs=LOGITS_ELEMENTS // spec.vocab_size,
        reserved=reserved_bytes(spec, target, kv, settings, serving.length),
    )
    try:
        plan.check(max(serving.step_tokens, serving.length))
    except MemoryPlanError as error:
        raise MemoryPlanError(
            f"{checkpoint.path} in {serving.dtype_name} on {serving.device_name}: {error.problem}",
            fix="evaluate with --device cpu, with a smaller --length, or end what else uses the GPU",
        ) from None
