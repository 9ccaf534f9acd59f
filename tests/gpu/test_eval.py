"""Evaluations on a GPU, through its kernels, against the same on the CPU.

A tolerance is what the CPU loses by computing in the same 16 bits: the kernels round no more often than it does.
"""

import math

import pytest
import torch
from transformers import LlamaConfig

from quantkit.errors import MemoryPlanError
from quantkit.evaluation import evaluate
from quantkit.evaluation.cache import TensorCache
from quantkit.evaluation.where import map_linears
from quantkit.formats.awq import open_awq
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.gptq import open_gptq
from quantkit.runtime.device_checkpoint import DeviceCheckpoint
from quantkit.runtime.load import load_model
from tests import tiny_models
from tests.gpu.test_decoder import SIZES, relative
from tests.packers import write_packed_llama
from tests.product_schemes import SCHEMES
from tests.tiny_llama import VOCAB_SIZE, write_tokenizer
from tests.tiny_models import quantize_tiny, save_tiny, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GPU = torch.device("cuda")
TRIED = {"bf16": None, "int4": SCHEMES["int4-g128-sym"], "fp8": SCHEMES["fp8-channel-token"]}
WEIGHTS_ALONE = {"fp8 weights": SCHEMES["fp8-channel-weight"]}
ROUNDED = 2.0  # times what the CPU loses: 1.4 of it in logits


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The same tiny model in each scheme, with a tokenizer, and a text."""
    root = tmp_path_factory.mktemp("models")
    tiny_models.CONFIGS["gpu-eval"] = LlamaConfig(**SIZES | {"vocab_size": VOCAB_SIZE})
    source = save_tiny("gpu-eval", root / "source", dtype=torch.bfloat16)
    write_tokenizer(source)
    for name, scheme in (TRIED | WEIGHTS_ALONE).items():
        write_tokenizer(quantize_tiny(source, root / name, scheme))
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. Why?\n\n" * 100)
    return root


def run(world, name, candidate=None, cache="cache", **options):
    return evaluate(
        world / name,
        [world / (candidate or name)],
        data=str(world / "text.txt"),
        windows=10,
        length=100,
        cache=TensorCache(world / cache, free_bytes=0),
        **options,
    )


@pytest.mark.parametrize(
    ("scheme", "kv_cache_dtype"),
    [("bf16", "auto"), ("int4", "auto"), ("fp8", "auto"), ("bf16", "int8"), ("bf16", "fp8")],
)
def test_the_kernels_lose_what_rounding_costs(scheme, kv_cache_dtype, world):
    """Each model against itself in float32: rounding alone, and what the cache costs in float32 too."""
    asked = {"kv_cache_dtype": kv_cache_dtype}
    of_cache = run(world, scheme, device="cpu", **asked).candidates[0].damage.kl_mean
    rounded = run(world, scheme, device="cpu", dtype="bfloat16", **asked).candidates[0].damage.kl_mean
    report = run(world, scheme, **asked)
    found = report.candidates[0]
    assert (found.dtype, found.kernels) == ("bfloat16", "quantkit_kernels")
    assert report.device == torch.cuda.get_device_name()
    assert of_cache / 2 < found.damage.kl_mean < ROUNDED * rounded
    moved = abs(math.log(found.damage.ppl / report.reference.ppl))
    assert moved < math.sqrt(2 * ROUNDED * rounded)  # of a log-probability, in the mean square


def test_damage_is_that_on_the_cpu(world):
    """The root of a divergence is a distance, so rounding moves it by no more than its own."""
    on_cpu = run(world, "bf16", "int4", device="cpu").candidates[0].damage
    on_gpu = run(world, "bf16", "int4")
    noise = max(on_gpu.reference.kl_noise_floor, run(world, "int4").candidates[0].damage.kl_mean)
    damage = on_gpu.candidates[0].damage
    assert abs(math.sqrt(damage.kl_mean) - math.sqrt(on_cpu.kl_mean)) < math.sqrt(noise)
    assert damage.kl_mean > 100 * noise, "what is compared is more than rounding"


def test_float32_on_a_gpu_is_that_of_the_cpu(world):
    on_cpu, on_gpu = (run(world, "bf16", "int4", device=where, dtype="float32") for where in ("cpu", "cuda"))
    assert on_gpu.candidates[0].kernels == "torch"
    assert on_gpu.reference.ppl == pytest.approx(on_cpu.reference.ppl, rel=1e-4)
    expected = on_cpu.candidates[0].damage.kl_mean
    assert on_gpu.candidates[0].damage.kl_mean == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scheme", TRIED)
def test_several_texts_to_a_step_or_parts_of_one_are_each_text(scheme, world):
    texts = [tokens(100, seed) for seed in range(7)]
    exact_model, rounded_model = (
        load_model(world / scheme, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    exact = torch.stack([exact_model.logits(text) for text in texts])
    bound = 1.5 * relative(torch.stack([rounded_model.logits(text) for text in texts]), exact)
    model = load_model(world / scheme, device=GPU)
    for step_tokens in (8192, 300, 33):
        parts = [torch.cat(list(of_one)) for of_one in model.predictions(texts, step_tokens=step_tokens)]
        assert all(part.is_cuda for part in parts)
        assert relative(torch.stack(parts).cpu(), exact) < bound


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_are_dequantized_on_the_device(method, tmp_path):
    folder = write_packed_llama(tmp_path, method, {})
    source = {"gptq": open_gptq, "awq": open_awq}[method](open_checkpoint(tmp_path))
    on_device = DeviceCheckpoint(source, GPU)
    on_device.expect(source.tensors)
    for name in source.tensors:
        found = on_device.read(name)
        assert found.is_cuda and torch.equal(found.cpu(), source.read(name)), name
    on_device.close()
    assert len(folder.weights) == 13


def test_bitsandbytes_runs_beside_ours(world):
    pytest.importorskip("bitsandbytes")
    report = evaluate(
        world / "source",
        ["bnb:int8", "bnb:nf4", world / "int4"],
        data=str(world / "text.txt"),
        windows=10,
        length=100,
        cache=TensorCache(world / "cache", free_bytes=0),
    )
    int8, nf4, int4 = report.candidates
    assert report.reference.kl_noise_floor < int8.damage.kl_mean < nf4.damage.kl_mean
    assert [row.kernels for row in (int8, nf4, int4)] == ["bitsandbytes", "bitsandbytes", "quantkit_kernels"]


def test_a_gpu_that_is_too_small_is_said_before_anything_is_read(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    with pytest.raises(MemoryPlanError, match="bf16 in float32 on NVIDIA") as caught:
        run(world, "bf16", cache="empty")
    assert "--device cpu" in caught.value.fix


@pytest.mark.parametrize("name", ["int4", "fp8 weights"])  # inputs that are rounded may fall on either side
def test_the_map_is_that_of_the_cpu(world, name):
    windows = list(torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(3)))
    original, candidate = (open_checkpoint(world / each) for each in ("bf16", name))
    expected, found = (
        map_linears(original, candidate, windows, torch.device(device), lambda *_: None)
        for device in ("cpu", "cuda")
    )
    assert len(found) > 8 and [one.linear for one in found] == [one.linear for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.kl_in == pytest.approx(theirs.kl_in, rel=0.02, abs=1e-6)
        assert ours.kl_out == pytest.approx(theirs.kl_out, rel=0.02, abs=1e-5)
