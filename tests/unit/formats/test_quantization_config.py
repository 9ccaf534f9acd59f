"""quantization_config: read back as written, valid to the package, matching modules as it does."""

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules, match_targets

from quantkit.errors import SourceError
from quantkit.formats.compressed_tensors import format_name
from quantkit.formats.quantization_config import QuantizedModules, read_quantization, write_quantization
from quantkit.schemes import KVScheme
from tests.product_schemes import KV_SCHEMES, SCHEMES

MLP = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn.o_proj"
W4, W8, FP8 = SCHEMES["int4-g128-sym"], SCHEMES["int8-channel-sym"], SCHEMES["fp8-channel-token"]


def through_json(section):
    return read_quantization({"quantization_config": json.loads(json.dumps(section))})


@pytest.mark.parametrize("kv", [None, *KV_SCHEMES.values()], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_read_back_and_valid_to_the_package(name, kv):
    section = write_quantization({MLP: SCHEMES[name], ATTENTION: None}, kv, extra_ignore=["lm_head"])
    read = through_json(section)
    assert read.scheme_of(MLP) == SCHEMES[name]
    assert read.scheme_of(ATTENTION) is None and read.scheme_of("lm_head") is None
    assert read.kv == (kv if kv is not None and kv.dtype == "fp8" else None)
    theirs = QuantizationConfig.model_validate(section)
    assert theirs.format == format_name(SCHEMES[name])
    assert theirs.quantization_status == "compressed"
    assert section["ignore"] == [ATTENTION, "lm_head"]


@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_writes_back_what_we_wrote(name):
    """Its own serialization of our config reads as the same scheme: nothing rests on a default."""
    section = write_quantization({MLP: SCHEMES[name]}, KVScheme(dtype="fp8", granularity="head"))
    theirs = QuantizationConfig.model_validate(section).model_dump(mode="json")
    assert through_json(theirs) == through_json(section)
    ours = section["config_groups"]["group_0"]
    assert {key: theirs["config_groups"]["group_0"][key] for key in ours} == ours


def test_several_schemes_name_their_modules():
    other = "model.layers.1.mlp.down_proj"
    section = write_quantization({MLP: W4, ATTENTION: FP8, other: W4}, None)
    assert section["format"] == "mixed-precision"
    assert [group["targets"] for group in section["config_groups"].values()] == [[MLP, other], [ATTENTION]]
    assert [group["format"] for group in section["config_groups"].values()] == [
        "pack-quantized",
        "float-quantized",
    ]
    read = through_json(section)
    assert (read.scheme_of(MLP), read.scheme_of(ATTENTION), read.scheme_of(other)) == (W4, FP8, W4)
    assert read.scheme_of("lm_head") is None
    QuantizationConfig.model_validate(section)


def test_two_schemes_of_one_format_are_not_of_mixed_format():
    assert write_quantization({MLP: W4, ATTENTION: W8}, None)["format"] == "pack-quantized"


def test_a_quantized_cache_alone_is_dense():
    section = write_quantization({MLP: None}, KVScheme(dtype="fp8", granularity="tensor"))
    assert section["format"] == "dense" and section["config_groups"] == {}
    read = through_json(section)
    assert read.scheme_of(MLP) is None and read.kv == KVScheme(dtype="fp8", granularity="tensor")
    QuantizationConfig.model_validate(section)


def test_no_section_means_nothing_is_quantized():
    for config in ({}, {"text_config": None}, {"text_config": {}}, {"quantization_config": None}):
        assert read_quantization(config) == QuantizedModules()
        assert read_quantization(config).scheme_of(MLP) is None


def test_the_section_of_a_multimodal_model_may_be_nested():
    section = write_quantization({MLP: W4}, None)
    assert read_quantization({"text_config": {"quantization_config": section}}).scheme_of(MLP) == W4


TABLE = [
    ([["Linear"]], []),
    ([["Linear"]], ["lm_head"]),
    ([["Linear"]], ["re:.*self_attn.*"]),
    ([["Linear"]], ["re:self_attn"]),  # anchored at the start: matches nothing
    ([["Linear"]], ["re:model.layers.0"]),  # not anchored at the end
    ([["Linear"]], ["layers.0.mlp.down_proj"]),  # no suffix matching
    ([["Linear"]], ["Linear"]),
    ([["Module"]], ["lm_head"]),
    ([["re:.*down_proj$"]], []),
    ([["re:.*mlp.*", MLP]], [ATTENTION]),
    ([[MLP], ["Linear"]], []),
    ([["Linear"], [MLP]], []),
    ([["Linear"], ["re:.*mlp.*"]], []),
    ([["re:.*mlp.*"], [MLP]], []),
    ([["re:model.*"], ["re:.*mlp.*"]], []),  # two patterns match: alphabetical order decides
    ([["re:.*mlp.*"], ["re:model.*"]], []),
    ([["Linear"], ["Linear"]], []),  # named twice: the last group has it
    ([[MLP], [MLP]], []),
    ([["re:.*mlp.*"], ["re:.*mlp.*"]], []),
    ([[MLP]], [MLP]),
    ([[MLP], ["re:.*"]], ["re:.*o_proj"]),
    ([["LlamaAttention"]], []),
    ([["re:.*experts.[0-9]+.w1$"], ["Linear"]], ["re:.*gate$"]),
]
NAMES = [
    "lm_head",
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 10) for name in ("q_proj", "o_proj")),
    *(f"model.layers.{layer}.mlp.{name}" for layer in (0, 1, 10) for name in ("gate_proj", "down_proj")),
    "model.layers.0.block_sparse_moe.gate",
    "model.layers.0.block_sparse_moe.experts.12.w1",
    "model.layers.0.block_sparse_moe.experts.12.w2",
]


def model_of(names):
    root = torch.nn.Module()
    for name in names:
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.add_module(leaf, torch.nn.Linear(1, 1))
    return root


def their_schemes(names, groups, ignore):
    """Module -> number of its group, as `apply_quantization_config` of the package finds it."""
    numbers = {target: number for number, targets in enumerate(groups) for target in targets}
    matched = match_named_modules(model_of(names), numbers, ignore)
    return {
        name: numbers[match_targets(name, module, numbers)[0]]
        for name, module in matched
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize("groups, ignore", TABLE, ids=str)
def test_modules_are_matched_as_the_package_matches_them(groups, ignore):
    schemes = [W4, W8]
    ours = QuantizedModules(
        groups=tuple((tuple(targets), scheme) for targets, scheme in zip(groups, schemes, strict=False)),
        ignore=tuple(ignore),
    )
    theirs = their_schemes(NAMES, groups, ignore)
    for name in NAMES:
        expected = schemes[theirs[name]] if name in theirs else None
        assert ours.scheme_of(name) == expected, name


def edited(change):
    section = write_quantization({MLP: W4, ATTENTION: FP8}, KVScheme(dtype="fp8", granularity="tensor"))
    change(section)
    return {"quantization_config": section}


def group(section, number=0):
    return section["config_groups"][f"group_{number}"]


@pytest.mark.parametrize(
    "change, finding",
    [
        (lambda s: s.update(quant_method="gptq"), "quant_method 'gptq'"),
        (lambda s: s.pop("quant_method"), "quant_method None"),
        (lambda s: s.pop("quantization_status"), "quantization_status None"),
        (lambda s: s.update(quantization_status="frozen"), "quantization_status 'frozen'"),
        (lambda s: s.update(sparsity_config={"format": "sparse-24-bitmask"}), "a non-empty sparsity_config"),
        (lambda s: s.update(transform_config={"config_groups": {"u": {}}}), "a non-empty transform_config"),
        (lambda s: s.update(config_groups={"W4A16": ["Linear"]}), "W4A16: ['Linear']"),
        (lambda s: s.update(config_groups=[1]), "config_groups [1]"),
        (lambda s: s.update(ignore="lm_head"), "ignore 'lm_head'"),
        (lambda s: group(s).update(targets="Linear"), "targets 'Linear' in group_0"),
        (lambda s: group(s).update(targets=["re:("]), "the target 're:('"),
        (lambda s: group(s).update(targets=["Embedding"]), "quantized embeddings"),
        (lambda s: group(s).update(surprise=1), "the key 'surprise' in group_0"),
        (lambda s: group(s).update(weights=None), "attention activations in group_0"),
        (lambda s: group(s).update(output_activations={}), "output_activations in group_0"),
        (lambda s: group(s).update(format="marlin-24"), "format 'marlin-24' in group_0"),
        (lambda s: group(s).update(format="int-quantized"), "format 'int-quantized' in group_0"),
        (lambda s: group(s)["weights"].update(surprise=1), "the key 'surprise' in group_0.weights"),
        (lambda s: group(s)["weights"].update(num_bits=3), "in group_0 INT3 weights"),
        (lambda s: group(s)["weights"].update(num_bits="4"), "num_bits '4'"),
        (lambda s: group(s)["weights"].update(group_size=0), "strategy 'group' with group_size 0"),
        (lambda s: group(s)["weights"].update(group_size=48), "in group_0 group_size 48"),
        (lambda s: group(s)["weights"].update(strategy=None), "strategy None"),
        (lambda s: group(s)["weights"].update(strategy="tensor_group"), "strategy 'tensor_group'"),
        (lambda s: group(s)["weights"].update(type="float"), "floating-point numbers of 4 bits"),
        (lambda s: group(s)["weights"].update(actorder="group"), "actorder 'group'"),
        (lambda s: group(s)["weights"].update(dynamic=True), "dynamic True in group_0.weights"),
        (lambda s: group(s, 1)["weights"].update(symmetric=False), "asymmetric FP8"),
        (lambda s: group(s, 1)["input_activations"].update(dynamic="local"), "dynamic 'local'"),
        (
            lambda s: group(s, 1)["input_activations"].update(dynamic=False),
            "strategy 'token' with dynamic False",
        ),
        (lambda s: group(s, 1).update(input_activations=7), "input_activations 7"),
        (lambda s: s["kv_cache_scheme"].update(type="int"), "kv_cache_scheme"),
        (lambda s: s["kv_cache_scheme"].update(dynamic=True), "kv_cache_scheme"),
        (lambda s: s["kv_cache_scheme"].update(strategy="token"), "kv_cache_scheme"),
        (lambda s: s["kv_cache_scheme"].update(strategy=["tensor"]), "kv_cache_scheme"),
    ],
)
def test_what_we_do_not_implement_is_refused_by_name(change, finding):
    with pytest.raises(SourceError) as error:
        read_quantization(edited(change))
    assert finding in error.value.problem
    assert error.value.fix


def test_history_and_unknown_top_level_keys_do_not_stop_a_load():
    def change(section):
        section["quantkit"] = {"anything": 1}
        group(section)["weights"] |= {"observer": "mse", "observer_kwargs": {}, "actorder": "static"}

    assert read_quantization(edited(change)).scheme_of(MLP) == W4


def test_the_older_name_of_the_section_is_refused():
    with pytest.raises(SourceError, match="compression_config"):
        read_quantization({"compression_config": write_quantization({MLP: W4}, None)})


def test_matching_is_fast_for_tens_of_thousands_of_experts():
    schemes = {
        f"model.layers.{n // 128}.mlp.experts.{n % 128}.up_proj": (W4, W8)[n % 2] for n in range(20_000)
    }
    read = through_json(write_quantization(schemes, None))
    assert all(read.scheme_of(name) == scheme for name, scheme in schemes.items())
