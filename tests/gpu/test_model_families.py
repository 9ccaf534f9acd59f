"""Families with parts of their own on a GPU, against float32 on the CPU, which equals transformers."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from quantkit import quantize
from quantkit.errors import SchemeError
from quantkit.runtime.load import load_model
from quantkit.runtime.step import Row, build_step
from quantkit_kernels.paged_kv import BLOCK_SIZE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda")
SIZES = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
PARTIAL = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
PARTIAL |= {"short_factor": [1.0] * 24, "long_factor": [1.0 + pair for pair in range(24)]}
DENSE = {
    "gemma2": Gemma2Config(**SIZES, head_dim=64, sliding_window=9, query_pre_attn_scalar=48),
    "phi3": Phi3Config(**SIZES, rope_parameters=PARTIAL, original_max_position_embeddings=8),
    "olmo2": Olmo2Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
}
SPARSE = {
    "mixtral": MixtralConfig(**{**SIZES, **MOE}, num_local_experts=8),
    "qwen3_moe": Qwen3MoeConfig(**{**SIZES, **MOE}, head_dim=64, moe_intermediate_size=128, num_experts=16),
    "qwen2_moe": Qwen2MoeConfig(
        **{**SIZES, **MOE}, moe_intermediate_size=128, shared_expert_intermediate_size=256, num_experts=16
    ),
    "olmoe": OlmoeConfig(**{**SIZES, **MOE}, num_experts=16),
}
CONFIGS = {**DENSE, **SPARSE}
RECIPES = {
    "int4": ("int4-rtn", ("attention=same", "group_size=64")),
    "fp8": ("fp8-all", ()),
    "fp8-block": ("fp8-block", ("attention=same",)),
}
LENGTH = 45


def saved(name, folder, recipe=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder / "bf16")
    if recipe is None:
        return folder / "bf16"
    shipped, settings = RECIPES[recipe]
    quantize(folder / "bf16", shipped, folder / "quantized", settings=settings)
    return folder / "quantized"


def tokens():
    return torch.randint(3, 128, (LENGTH,), generator=torch.Generator().manual_seed(1))


def error(logits, exact):
    """Of the token in the middle: where one of two nearly equal experts is chosen, a token may go far away."""
    return float(((logits - exact).norm(dim=1) / exact.norm(dim=1)).median())


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_as_near_to_float32_as_on_the_cpu(name, recipe, tmp_path):
    folder = saved(name, tmp_path, recipe)
    ids = tokens()
    exact = load_model(folder, dtype=torch.float32).logits(ids)
    on_cpu = load_model(folder, dtype=torch.bfloat16).logits(ids)
    model = load_model(folder, dtype=torch.bfloat16, device=CUDA)
    logits = model.logits(ids)
    assert error(logits, exact) < 1.5 * error(on_cpu, exact)
    cache = model.new_cache(LENGTH)
    steps = [ids[:20], *ids[20:].split(1)]
    last = torch.stack([model.forward(step, cache) for step in steps])
    assert error(last, exact[19:]) < 1.5 * error(on_cpu[19:], exact[19:])


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_on_a_gpu(name, tmp_path):
    folder = saved(name, tmp_path)
    exact = load_model(folder, dtype=torch.float32).logits(tokens())
    assert error(load_model(folder, dtype=torch.float32, device=CUDA).logits(tokens()), exact) < 2e-5


@pytest.mark.parametrize("recipe", [None, "int4", "fp8"])
@pytest.mark.parametrize("name", SPARSE)
def test_a_graph_holds_a_step_whatever_experts_its_tokens_go_to(name, recipe, tmp_path):
    model = load_model(saved(name, tmp_path, recipe), dtype=torch.bfloat16, device=CUDA)
    pools = model.kv.create_pools(9, CUDA)
    step = build_step([Row((5,), 0, (row,)) for row in range(1, 9)], block_size=BLOCK_SIZE, device=CUDA)
    with torch.inference_mode():
        model.decoder(step, pools)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = model.decoder(step, pools)
        for seed in range(3):
            step.token_ids_T.copy_(torch.randint(3, 128, (8,), generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            replayed = hidden.clone()
            assert torch.equal(replayed, model.decoder(step, pools))


def test_no_batch_changes_the_bits_of_a_row(tmp_path):
    folder = saved("qwen3_moe", tmp_path, "int4")
    model = load_model(folder, dtype=torch.bfloat16, device=CUDA, batch_invariant=True)
    rows = [Row(tokens()[: 3 + 5 * number].tolist(), 0, (number + 1,)) for number in range(3)]

    def hidden(batch):
        step = build_step(batch, block_size=64, device=CUDA)
        with torch.inference_mode():
            return model.decoder(step, model.kv.create_pools(5, CUDA, block_size=64))

    together = hidden(rows).split([len(row.token_ids) for row in rows])
    for row, mine in zip(rows, together, strict=True):
        assert torch.equal(hidden([row]), mine)


def test_a_format_without_a_kernel_for_experts_is_refused_before_anything_is_read(tmp_path):
    quantize(saved("mixtral", tmp_path), "int8", tmp_path / "int8")
    with pytest.raises(
        SchemeError, match=r"block_sparse_moe.experts.0.w1 in INT8 channel, inputs INT8 token"
    ) as caught:
        load_model(tmp_path / "int8", device=CUDA)
    assert "FP8" in caught.value.fix
