"""Our engine as a model of lm-eval. Everything asked for at once is in its queue at once."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quantkit.errors import EvaluationError
from quantkit.evaluation.tasks.chat import ChatFormat, Messages
from quantkit.runtime.llm import LLM
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampling_params import MAX_STOP_CHARS, MAX_STOPS, SamplingParams
from quantkit.runtime.sequence import FinishReason

MAX_GEN_TOKENS = 256  # lm-eval's, where a task does not say
PASSED_ON = {"top_p", "top_k", "min_p", "repetition_penalty"}  # to SamplingParams, under the same names

Answer = tuple[float, bool]
Encoded = tuple[Any, list[int], list[int]]  # texts, tokens of context and continuation


class EngineLM(TemplateLM):
    """An `LLM`. Tokens, windows, truncation and stop strings are those of lm-eval's own models.

    Raises EvaluationError for what the model cannot take, and where its logits are no numbers.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self._llm = llm
        self.tokenizer = llm.tokenizer.backend

    @property
    def eot_token_id(self) -> int | None:
        """What ends a text, if the tokenizer says so."""
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos: int | None = self.tokenizer.bos_token_id
        prefix = self.eot_token_id if bos is None else bos
        if prefix is None:
            raise EvaluationError(
                f"{self._llm.tokenizer.path}: its tokenizer has no token that begins a text, and none that ends it",
                fix="name one in tokenizer_config.json: bos_token or eos_token",
            )
        return prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model can see."""
        return self._llm.started.max_model_len

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        return ChatFormat(self.tokenizer)(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. add_special_tokens None: as the tokenizer does, unless the text begins with its first token."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **chosen)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[Answer]:
        """Sum of the continuation's log probabilities, and whether each of its tokens is the likeliest."""
        answers: dict[int, Answer] = {}
        for index, answers[index] in self._scores(requests):
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return [answers[index] for index in range(len(requests))]

    def _scores(self, requests: Sequence[Encoded]) -> Iterator[tuple[int, Answer]]:
        """Answers as they arrive, with their requests' numbers."""
        prompts, starts = [], []
        for _texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise EvaluationError(
                    f"an answer of {len(continuation)} tokens, and the model takes 1 to {self.max_length}",
                    fix="leave out this task, or raise max_model_len",
                )
            prompts.append((context + continuation)[-(self.max_length + 1) :])
            starts.append(len(prompts[-1]) - len(continuation))
        params = [
            SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=start) for start in starts
        ]
        for index, output in self._outputs(prompts, params):
            yield index, _scored(output, starts[index])

    def _outputs(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Outputs as they arrive, with their prompts' numbers. Raises EvaluationError."""
        order = sorted(range(len(prompts)), key=prompts.__getitem__)  # neighbours share what they begin with
        outputs = self._llm.as_completed([prompts[at] for at in order], [params[at] for at in order])
        for place, output in outputs:
            if output.outputs[0].finish_reason is FinishReason.ERROR:
                raise _not_finite()
            yield order[place], output

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: in windows as long as the model, each token once, with as much before it as fits."""
        windows: list[Encoded] = []
        owners: list[int] = []  # of windows: their texts' numbers
        for number, (text,) in enumerate(request.args for request in requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [number] * (len(windows) - len(owners))
        left, totals = Counter(owners), [0.0] * len(requests)
        for index, (logprob, _) in self._scores(windows):
            number = owners[index]
            totals[number] += logprob
            left[number] -= 1
            if not left[number]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, totals[number])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string of the task's, the end of the text, or as many tokens as it allows."""
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        seen: Counter[str] = Counter()
        prompts, params, stops = [], [], []
        for context, settings in (request.args for request in requests):
            chosen = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKENS))
            stops.append(handle_stop_sequences(chosen.pop("until", None), eos=eos))
            params.append(_sampling_params(chosen, stops[-1], f"{context}\0{seen[context]}"))
            seen[context] += 1
            room = self.max_length - params[-1].max_tokens
            if room < 1:
                raise EvaluationError(
                    f"max_gen_toks {params[-1].max_tokens}: the model takes {self.max_length} tokens with the prompt",
                    fix="leave out this task, or raise max_model_len",
                )
            prompts.append(self.tok_encode(context)[-room:])
        texts: dict[int, str] = {}
        for index, output in self._outputs(prompts, params):
            text = self.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
            texts[index] = postprocess_generated_text(text, stop=stops[index], think_end_token=None)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return [texts[index] for index in range(len(requests))]


def _sampling_params(chosen: dict[str, Any], stops: list[str], identity: str) -> SamplingParams:
    """What a task asks of generation; the same request at the same place gets the same answer.

    More or longer stop strings than the engine takes are looked for in the text alone.
    """
    max_tokens, temperature = chosen.pop("max_gen_toks"), chosen.pop("temperature")
    chosen.pop("do_sample", None)  # which is what the temperature says
    unknown = sorted(chosen.keys() - PASSED_ON)
    if unknown:
        raise EvaluationError(
            f"a task asks for generation with {unknown[0]}, which the engine has not",
            fix="leave out this task",
        )
    digest = hashlib.sha256(identity.encode(errors="surrogatepass")).digest()
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        stop=tuple(stop for stop in stops if 0 < len(stop) <= MAX_STOP_CHARS)[:MAX_STOPS],
        seed=int.from_bytes(digest[:7], "little"),
        **chosen,
    )


def _scored(output: RequestOutput, start: int) -> Answer:
    prompt_logprobs = output.prompt_logprobs
    assert prompt_logprobs is not None, "they were asked for"
    scored = [
        each[token] for token, each in zip(output.prompt_token_ids, prompt_logprobs, strict=True) if each
    ]
    assert len(scored) == len(prompt_logprobs) - start, "of every token of the continuation"
    total = math.fsum(one.logprob for one in scored)
    if math.isnan(total):
        raise _not_finite()
    return total, all(one.rank == 1 for one in scored)


def _not_finite() -> EvaluationError:
    return EvaluationError("the model's logits are no numbers", fix="check the checkpoint; it may be damaged")
