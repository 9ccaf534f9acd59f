"""Multiple choice in our engine and in lm-eval's own model of transformers, of Llama-3.1-8B's shape. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_eval.py           random weights; lm_eval has to be there, no data

QUESTIONS of CONTEXT random tokens with CHOICES answers each: items per second of bf16 and int4 in the engine, and of
bf16 in transformers. Each is timed twice: the first run compiles, the second finds nothing in the prefix cache.
"""

import gc
import tempfile
import time
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import LLM
from quantkit.evaluation.tasks.engine_lm import EngineLM
from quantkit.evaluation.tasks.hf_lm import QuietHFLM, transformers_lm
from tests.gpu.bench_load import VOCAB, write
from tests.gpu.bench_server import add_tokenizer
from tests.product_schemes import SCHEMES

QUESTIONS, CONTEXT, CHOICES, ANSWER = 100, 512, 4, 5
BATCH = 16  # requests that transformers computes at once


def requests(seed: int) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Tokens of contexts and answers, with texts that nobody reads."""
    random = Random(seed)
    found = []
    for question in range(QUESTIONS):
        context = [random.randrange(VOCAB) for _ in range(CONTEXT)]
        for choice in range(CHOICES):
            answer = [random.randrange(VOCAB) for _ in range(ANSWER)]
            found.append(((f"{question}", f"{choice}"), context, answer))
    return found


def measure(name: str, lm: EngineLM | QuietHFLM) -> list[float]:
    """Items per second, and the log probabilities."""
    for seed in (0, 1):
        started = time.perf_counter()
        answers = lm._loglikelihood_tokens(requests(seed))
        seconds = time.perf_counter() - started
    print(f"{name}: {QUESTIONS / seconds:.1f} items/s, {seconds:.2f} s", flush=True)
    return [logprob for logprob, _ in answers]


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def in_engine(name: str, folder: Path) -> list[float]:
    """A model through the engine."""
    return measure(f"engine, {name}", EngineLM(LLM(folder, max_model_len=2048, gpu_memory_fraction=0.6)))


def main() -> None:
    """A line for each way."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), SCHEMES["int4-g128-sym"])
        add_tokenizer(Path(folder))
        in_engine("int4", Path(folder))
    free()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), None)
        add_tokenizer(Path(folder))
        ours = in_engine("bf16", Path(folder))
        free()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
        theirs = measure(
            "transformers, bf16",
            transformers_lm(model, AutoTokenizer.from_pretrained(folder), batch_size=BATCH),
        )
    largest = max(abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True))
    print(
        f"log probabilities in bf16 differ by at most {largest:.1%}; {time.perf_counter() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
