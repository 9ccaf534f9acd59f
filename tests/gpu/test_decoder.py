"""Whole decoders on a GPU, tiny and random, against the same checkpoint on the CPU in float32, which is transformers'.

A tolerance is what the CPU loses by computing in the same 16 bits: the kernels round no more often than it does.
"""

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from quantkit.errors import SchemeError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime import device_checkpoint
from quantkit.runtime.device_checkpoint import DeviceCheckpoint
from quantkit.runtime.layers import gpu_linear
from quantkit.runtime.load import load_model
from quantkit.runtime.step import Row, build_step
from quantkit_kernels.paged_kv import BLOCK_SIZE
from tests import tiny_models
from tests.product_schemes import SCHEMES
from tests.tiny_models import quantize_tiny, save_tiny, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = {
    "vocab_size": tiny_models.VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "gpu-llama": LlamaConfig(**SIZES, attention_bias=True),
    "gpu-qwen3": Qwen3Config(**SIZES),
    "gpu-gemma3": Gemma3TextConfig(
        **SIZES,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=3.0,
    ),
}
TRIED = {
    "bf16": None,
    "int4": SCHEMES["int4-g128-sym"],
    "int4-g32": SCHEMES["int4-g32-sym"],
    "int4-asym": SCHEMES["int4-g64-asym"],
    "int8-weight": SCHEMES["int8-channel-sym"],
    "int2": SCHEMES["int2-g32-sym"],
    "fp8-weight": SCHEMES["fp8-channel-weight"],
    "fp8": SCHEMES["fp8-channel-token"],
    "fp8-block": SCHEMES["fp8-block"],
    "fp8-static": SCHEMES["fp8-tensor-static"],
    "int8": SCHEMES["int8-w8a8-dynamic"],
    "int8-static": SCHEMES["int8-w8a8-static-asym"],
    "w4a8-int8": SCHEMES["w4a8-int8-g128"],
    "w4a8-fp8": SCHEMES["w4a8-fp8-g64"],
}
CASES = [("gpu-llama", scheme) for scheme in TRIED]
CASES += [(family, scheme) for family in ("gpu-qwen3", "gpu-gemma3") for scheme in ("bf16", "int4", "fp8")]
LENGTH = 75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint of a family in a scheme, written once."""
    root = tmp_path_factory.mktemp("models")

    def write(family, scheme):
        target = root / f"{family}-{scheme}"
        source = root / family
        if not source.is_dir():
            tiny_models.CONFIGS[family] = FAMILIES[family]
            save_tiny(family, source, dtype=torch.bfloat16)
        if not target.is_dir():
            quantize_tiny(source, target, TRIED[scheme])
        return target

    return write


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def in_parts(model, ids, sizes):
    """Logits after each part of a sequence."""
    cache = model.new_cache(len(ids))
    return torch.stack([model.forward(part, cache) for part in ids.split(sizes)])


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_logits_are_as_near_to_float32_as_the_cpus(family, scheme, folder):
    path, ids = folder(family, scheme), tokens(LENGTH)
    exact = load_model(path, dtype=torch.float32).logits(ids)
    bound = 1.5 * relative(load_model(path, dtype=torch.bfloat16).logits(ids), exact)
    model = load_model(path, dtype=torch.bfloat16, device=GPU)
    assert relative(model.logits(ids), exact) < bound
    chunks = [30, 40, 5]
    assert (
        relative(in_parts(model, ids, chunks), exact[[29, 69, 74]]) < 1.5 * bound
    )  # three rows scatter more
    one_by_one = in_parts(model, ids, [20] + [1] * 55)
    assert relative(one_by_one, exact[19:]) < bound


@pytest.mark.parametrize("scheme", ["bf16", "int4-asym", "fp8-weight", "fp8", "int8-static"])
def test_float32_on_a_gpu_is_the_reference(scheme, folder):
    """But for codes of inputs that lie between two: a sum in another order moves a few by a whole step."""
    path, ids = folder("gpu-llama", scheme), tokens(LENGTH)
    exact = load_model(path, dtype=torch.float32).logits(ids)
    bound = 2e-5
    if scheme in ("fp8", "int8-static"):
        bound = relative(load_model(path, dtype=torch.bfloat16).logits(ids), exact)
    assert relative(load_model(path, dtype=torch.float32, device=GPU).logits(ids), exact) < bound


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8"])
def test_what_nobody_has_written_is_never_read(kv_cache_dtype, folder):
    model = load_model(folder("gpu-llama", "bf16"), device=GPU, kv_cache_dtype=kv_cache_dtype)
    ids = tokens(40).tolist()
    rows = [
        Row(ids[:1], 0, [3]),
        Row(ids[:1], 18, [5, 2]),  # 18 tokens, then one more
        Row(ids[:33], 0, [7, 1, 9]),
    ]
    before = Row(ids[:18], 0, [5, 2])
    outputs = []
    for poison in (0.0, torch.nan):
        pools = model.kv.create_pools(12, GPU)
        for pool in pools:
            for part in pool:
                if part is not None and part.itemsize > 1:
                    part[1:] = poison
                elif part is not None:
                    part.view(torch.int8)[1:] = 0x7F if poison else 0
        with torch.inference_mode():
            model.decoder(build_step([before], block_size=BLOCK_SIZE, device=GPU), pools)
            outputs += [
                model.decoder(build_step(rows, block_size=BLOCK_SIZE, device=GPU), pools),
                model.decoder(build_step(rows[:2], block_size=BLOCK_SIZE, device=GPU, num_padding=3), pools),
            ]
    whole, padded, whole_poisoned, padded_poisoned = outputs
    assert whole.isfinite().all() and padded.isfinite().all()
    assert torch.equal(whole, whole_poisoned)
    assert torch.equal(padded, padded_poisoned)


@pytest.mark.parametrize("scheme", ["bf16", "int4", "fp8", "fp8-block", "int8-static", "w4a8-int8"])
def test_a_batch_changes_no_bit_where_it_must_not(scheme, folder):
    model = load_model(folder("gpu-llama", scheme), dtype=torch.bfloat16, device=GPU, batch_invariant=True)
    lengths = [3, 17, 64, 90, 5]
    sequences = [tokens(length + 1, seed).tolist() for seed, length in enumerate(lengths)]
    together = next_tokens(model, sequences)
    for number, sequence in enumerate(sequences):
        assert torch.equal(next_tokens(model, [sequence])[0], together[number]), number


def next_tokens(model, sequences):
    """Hidden states of the last token of each, computed one at a time after all before it at once."""
    blocks = [list(range(1 + 8 * number, 9 + 8 * number)) for number in range(len(sequences))]
    pools = model.kv.create_pools(1 + 8 * len(sequences), GPU)
    prompts = [Row(ids[:-1], 0, of) for ids, of in zip(sequences, blocks, strict=True)]
    last = [Row(ids[-1:], len(ids) - 1, of) for ids, of in zip(sequences, blocks, strict=True)]
    with torch.inference_mode():
        model.decoder(build_step(prompts, block_size=BLOCK_SIZE, device=GPU), pools)
        return model.decoder(build_step(last, block_size=BLOCK_SIZE, device=GPU), pools)


def test_a_mixed_step_is_its_rows(folder):
    model = load_model(folder("gpu-qwen3", "bf16"), device=GPU)
    first, second = tokens(41, 1), tokens(60, 2)
    exact = load_model(folder("gpu-qwen3", "bf16"), dtype=torch.float32)
    expected = torch.cat((exact.logits(first)[-1:], exact.logits(second)))
    with torch.inference_mode():
        pools = model.kv.create_pools(12, GPU)
        model.decoder(build_step([Row(first[:40].tolist(), 0, [1, 2, 3])], block_size=16, device=GPU), pools)
        rows = [Row(first[40:].tolist(), 40, [1, 2, 3]), Row(second.tolist(), 0, [6, 5, 4, 7])]
        got = model.decoder.logits(model.decoder(build_step(rows, block_size=16, device=GPU), pools))
    cpu = load_model(folder("gpu-qwen3", "bf16"))
    bound = relative(torch.cat((cpu.logits(first)[-1:], cpu.logits(second))), expected)
    assert relative(got.cpu(), expected) < 1.5 * bound


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8"])
def test_a_quantized_cache_is_that_of_the_cpu(kv_cache_dtype, folder):
    path, ids = folder("gpu-llama", "bf16"), tokens(LENGTH)
    exact = load_model(path, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype).logits(ids)
    bound = 1.5 * relative(load_model(path, kv_cache_dtype=kv_cache_dtype).logits(ids), exact)
    model = load_model(path, device=GPU, kv_cache_dtype=kv_cache_dtype)
    assert relative(model.logits(ids), exact) < bound
    assert relative(in_parts(model, ids, [20] + [1] * 55), exact[19:]) < bound


def test_tensors_arrive_as_they_are_on_disk(folder, monkeypatch):
    monkeypatch.setattr(device_checkpoint, "BUFFER_BYTES", 1000)
    checkpoint = open_checkpoint(folder("gpu-llama", "fp8"))
    arriving = DeviceCheckpoint(checkpoint, GPU)
    arriving.expect(list(checkpoint.tensors)[:20])
    for name in checkpoint.tensors:
        tensor, expected = arriving.read(name), checkpoint.read(name)
        assert tensor.is_cuda and tensor.dtype == expected.dtype
        assert torch.equal(tensor.cpu().view(torch.uint8), expected.view(torch.uint8)), name
    arriving.close()


def test_a_scheme_without_a_kernel_is_named(folder, tmp_path, monkeypatch):
    source = folder("gpu-llama", "bf16").parent / "gpu-llama"
    path = quantize_tiny(source, tmp_path / "coarse", SCHEMES["int8-channel-sym"])
    monkeypatch.setattr(gpu_linear, "capability", lambda _: (7, 5))
    with pytest.raises(SchemeError, match="_proj in INT8 channel on NVIDIA") as caught:
        load_model(path, dtype=torch.bfloat16, device=GPU)
    assert "w8a16" in caught.value.problem
