"""A loaded model of transformers as a model of lm-eval: its own, but for the progress bars."""

from typing import Any

from lm_eval.models.huggingface import HFLM

from quantkit.evaluation.tasks.quiet import quiet


class QuietHFLM(HFLM):
    """lm-eval's model of transformers; whoever asks is told of answers through `cache_hook`, and sees no bars."""

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=override_bs
        )
        return answers


def transformers_lm(model: Any, tokenizer: Any, *, batch_size: int) -> QuietHFLM:
    """model: a causal one, on its device. tokenizer: transformers' own. batch_size: requests computed at once."""
    with quiet():  # it warns that a model which is loaded already is not loaded as the options say
        return QuietHFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
