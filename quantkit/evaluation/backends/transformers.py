"""Models run by transformers: architectures and formats that our runtime has not. Code of a checkpoint is never run.

What transformers passes over with a warning (a format that it does not know, weights that are missing) is refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from quantkit.arch import already_quantized, place_of
from quantkit.arch.skeleton import build_language_model
from quantkit.errors import EvaluationError, QuantkitError, SchemeError, SourceError, first_line
from quantkit.evaluation.serving import Serving
from quantkit.evaluation.subjects import Subject
from quantkit.formats.quiet_transformers import quiet_transformers
from quantkit.runtime.model import LOGITS_ELEMENTS


class TransformersModel:
    """A causal language model of transformers, `model`, on its device."""

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self._name = name

    def predictions(self, texts: Sequence[Tensor], *, step_tokens: int) -> Iterator[Iterator[Tensor]]:
        """Next-token logits of windows, int64 [T] each: for each in turn, its [T, V] in the model's dtype.

        Whole windows at a time, as many as step_tokens and 2^26 logits allow. Raises EvaluationError.
        """
        vocab_size = self.model.config.get_text_config().vocab_size
        most_tokens = min(step_tokens, LOGITS_ELEMENTS // vocab_size)
        together = max(1, most_tokens // len(texts[0]))
        for first in range(0, len(texts), together):
            for logits_TV in self._logits(torch.stack(list(texts[first : first + together]))):
                yield iter((logits_TV,))

    def greedy(self, text_T: Tensor, num_tokens: int) -> list[int]:
        """The likeliest next tokens, one after another."""
        cache, token_ids_BT = None, text_T[None]
        written: list[int] = []
        for _ in range(num_tokens):
            output = self._run(token_ids_BT, past_key_values=cache, use_cache=True)
            written.append(int(output.logits[0, -1].argmax()))
            cache, token_ids_BT = output.past_key_values, torch.tensor([written[-1:]])
        return written

    def _logits(self, token_ids_BT: Tensor) -> Tensor:
        logits: Tensor = self._run(token_ids_BT, use_cache=False).logits
        return logits

    @torch.inference_mode()
    def _run(self, token_ids_BT: Tensor, **options: Any) -> Any:
        try:
            return self.model(input_ids=token_ids_BT.to(self.model.device), **options)
        except Exception as error:  # whatever a model or its quantization may raise
            raise _failure(self._name, error) from error


def check_transformers(subject: Subject, serving: Serving) -> tuple[str, ...]:
    """A note if it will be dequantized.

    Raises UnsupportedModelError, SourceError or SchemeError for what transformers would not run as it is meant.
    """
    if serving.kv_cache_dtype != "auto":
        raise SchemeError(
            f"{subject.name} runs through {subject.backend}, which has no KV cache in {serving.kv_cache_dtype}",
            fix="leave out --kv-cache-dtype, or this candidate",
        )
    build_language_model(subject.checkpoint)
    method = already_quantized(subject.checkpoint.config)
    if method is None:
        return ()
    try:
        with quiet_transformers():
            section = AutoConfig.from_pretrained(subject.checkpoint.path, **_LOCAL).quantization_config
            quantizer = AutoHfQuantizer.from_config(section, pre_quantized=True)
            quantizer.validate_environment(device_map={"": serving.target.device})
            is_dequantized = quantizer.quantization_config.to_dict().get("dequantize") is True
    except Exception as error:  # ImportError of a missing package, ValueError of an unknown method
        raise SourceError(
            f"{subject.name} is quantized with {method}, which transformers cannot run here ({first_line(error)})",
            fix="install what it names, or evaluate a version of this model in another format",
        ) from error
    note = f"{subject.name}: transformers dequantizes {method} on this device, so inputs are not quantized either"
    return (note,) if is_dequantized else ()


def load_transformers(subject: Subject, serving: Serving, **options: Any) -> TransformersModel:
    """Load a checkpoint. options: of from_pretrained.

    Raises EvaluationError for whatever transformers raises, SourceError if anything would be made up or lost.
    """
    target = serving.target
    try:
        with quiet_transformers(), torch.inference_mode():
            model, loading = AutoModelForCausalLM.from_pretrained(
                subject.checkpoint.path,
                dtype=target.dtype,
                device_map={"": target.device},
                use_safetensors=True,
                output_loading_info=True,
                **_LOCAL,
                **options,
            )
            _check_complete(subject, loading)
            for parameter in model.parameters():
                # in which it leaves what it dequantizes, whatever was asked for
                if parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.to(target.dtype)
            # what is unpacked at its first use is so now, while nobody sees the bars
            model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=target.device), use_cache=False)
    except QuantkitError:
        raise
    except Exception as error:  # as above
        raise _failure(subject.name, error) from error
    return TransformersModel(model, subject.name)


def _failure(name: str, error: Exception) -> EvaluationError:
    return EvaluationError(
        f"{name} cannot be run by transformers: {type(error).__name__}, {first_line(error)}",
        fix="check the checkpoint; evaluate with another --length, --dtype or --device, or another version of it",
    )


def _check_complete(subject: Subject, loading: dict[str, Any]) -> None:
    """Missing tensors would be random numbers; unknown ones of a layer, a part of the model that is left out."""
    missing = sorted(loading["missing_keys"])
    unknown = sorted(name for name in loading["unexpected_keys"] if place_of(name))
    if missing:
        raise subject.checkpoint.mismatch(f"transformers does not find {missing[0]}")
    if unknown:
        raise subject.checkpoint.mismatch(f"transformers has no place for {unknown[0]}")


_LOCAL = {"local_files_only": True, "trust_remote_code": False}
