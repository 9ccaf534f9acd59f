"""The plan of a device's memory, against the model that is built, and what it says where it does not fit."""

import dataclasses

import pytest
import torch
from torch import Tensor

from quantkit.errors import MemoryPlanError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime import memory_plan
from quantkit.runtime.load import kv_format, load_model
from quantkit.runtime.memory_plan import MemoryPlan, plan_memory, weight_bytes, workspace_bytes
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.target import Target
from tests.product_schemes import SCHEMES
from tests.tiny_models import quantize_tiny, save_tiny

GB = 10**9
CPU = torch.device("cpu")
PLAN = MemoryPlan(
    total=80 * GB, used=GB, fraction=0.9, weights=16 * GB, workspace=2 * GB, reserved=GB, token=131072
)


def held_bytes(model):
    """Of every tensor that a model's layers hold, in whatever they hold it, once."""
    found = {}

    def collect(value):
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for one in value:
                collect(one)
        elif type(value).__module__.startswith(
            ("quantkit.runtime.layers", "quantkit.runtime.models.decoder")
        ):
            collect(list(vars(value).values()))

    collect(model.decoder)
    return sum(found.values())


@pytest.mark.parametrize(
    "name", ["llama-wide", "qwen2-tied", "gemma3", "phi3-partial", "smollm3", "qwen3-moe"]
)
@pytest.mark.parametrize("scheme", [None, "int8-channel-sym", "fp8-channel-token", "int4-g32-sym"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_what_was_planned(name, scheme, dtype, tmp_path):
    folder = save_tiny(name, tmp_path / "source", dtype=torch.bfloat16)
    if scheme is not None:
        folder = quantize_tiny(folder, tmp_path / "quantized", SCHEMES[scheme])
    checkpoint = open_checkpoint(folder)
    planned = weight_bytes(checkpoint, read_spec(checkpoint), Target(CPU, dtype))
    held = held_bytes(load_model(folder, dtype=dtype))
    layouts = 2 if scheme == "int4-g32-sym" and dtype == torch.bfloat16 else 1.1  # a CPU keeps two of INT4
    assert 0.9 * planned < held < layouts * planned


def test_two_bits_are_planned_as_the_device_keeps_them(tmp_path):
    source = save_tiny("llama-wide", tmp_path / "source", dtype=torch.bfloat16)
    two, four = (
        open_checkpoint(quantize_tiny(source, tmp_path / name, SCHEMES[name]))
        for name in ("int2-g32-sym", "int4-g32-sym")
    )
    spec = read_spec(two)
    on_gpu = Target(torch.device("cuda"), torch.bfloat16)
    assert weight_bytes(two, spec, on_gpu) == weight_bytes(four, spec, on_gpu)
    plain = Target(CPU, torch.bfloat16)
    assert (
        weight_bytes(two, spec, plain) < weight_bytes(four, spec, plain) == weight_bytes(four, spec, on_gpu)
    )


def test_a_plan_reads_headers_and_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 80 * GB))
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path))
    spec, target = read_spec(checkpoint), Target(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(type(checkpoint), "read", lambda *_: pytest.fail("tensors are read"))
    kv = kv_format(checkpoint, spec, target, "auto")
    plan = plan_memory(
        checkpoint, spec, target, kv, fraction=0.9, max_num_batched_tokens=512, max_num_seqs=8, reserved=GB
    )
    assert (plan.used, plan.reserved, plan.token) == (10 * GB, GB, kv.token_bytes)
    assert plan.workspace == workspace_bytes(spec, torch.bfloat16, 512, 8)
    assert plan.num_tokens * plan.token <= plan.left < 62 * GB
    assert workspace_bytes(spec, torch.bfloat16, 1024, 8) > plan.workspace
    assert workspace_bytes(spec, torch.bfloat16, 512, 16) > plan.workspace > memory_plan.KERNEL_BYTES


def test_experts_take_room_for_each_that_a_token_goes_to(tmp_path):
    spec = read_spec(open_checkpoint(save_tiny("qwen3-moe", tmp_path)))
    layer = spec.layers[0]
    layers = [
        dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, num_per_token=count))
        for count in (5, 8)
    ]
    five, eight = (
        workspace_bytes(dataclasses.replace(spec, layers=(each,)), torch.bfloat16, 512, 8) for each in layers
    )
    assert eight - five == 512 * 3 * (3 * layer.experts.intermediate_size + spec.hidden_size) * 2


def test_what_is_left_is_for_tokens():
    assert PLAN.left == 72 * GB - 20 * GB
    assert PLAN.num_tokens == 52 * GB // 131072
    PLAN.check(max_model_len=131072)
    text = "\n".join(PLAN.lines())
    assert "72.00 of 80.00 GB, 1.00 in use before" in text
    assert "396,728 tokens of 131,072 bytes" in text


@pytest.mark.parametrize(
    ("change", "problem", "option"),
    [
        ({"weights": 90 * GB}, "weights take 90.00 GB of 80.00", "checkpoint of fewer bits"),
        ({"used": 70 * GB}, "others 70.00", "end what else uses the device"),
        ({"workspace": 60 * GB}, "a step takes 60.00 GB", "max_num_batched_tokens"),
        ({"reserved": 60 * GB}, "graphs 60.00 GB", "max_num_seqs"),
        ({"token": GB}, "52 tokens of the KV cache fit, and one sequence may have 4,096", "max_model_len 52"),
    ],
)
def test_what_does_not_fit_names_the_option_to_change(change, problem, option):
    with pytest.raises(MemoryPlanError) as caught:
        dataclasses.replace(PLAN, **change).check(max_model_len=4096)
    assert problem in caught.value.problem
    assert option in caught.value.fix
