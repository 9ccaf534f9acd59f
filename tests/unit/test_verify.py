"""verify: every scheme passes, and every way to break a folder is found and named."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.kv_cache import SIDECAR_NAME
from quantkit.schemes import KVScheme
from quantkit.verify import verify_checkpoint
from tests.product_schemes import KV_SCHEMES, SCHEMES
from tests.quantized_folders import LINEARS, write_quantized

DOWN = "model.layers.1.mlp.down_proj"
W4, W4_ASYM, W8A8, FP8 = (
    SCHEMES[name] for name in ("int4-g64-sym", "int4-channel-asym", "int8-w8a8-dynamic", "fp8-channel-token")
)
W4A8, FP8_STATIC, FP8_BLOCK = (SCHEMES[name] for name in ("w4a8-int8-g32", "fp8-tensor-static", "fp8-block"))
KV_HEAD, KV_INT8 = KV_SCHEMES["kv-fp8-head"], KV_SCHEMES["kv-int8-head"]


def places(report):
    return [finding.place for finding in report.findings]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_of_the_product_passes(tmp_path, name, dtype):
    report = verify_checkpoint(write_quantized(tmp_path, SCHEMES[name], scale_dtype=dtype).path)
    assert report.findings == ()
    assert report.num_quantized == report.num_compared == len(LINEARS)
    assert list(report.schemes.values()) == [len(LINEARS)]


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_every_cache_of_the_product_passes(tmp_path, name):
    report = verify_checkpoint(write_quantized(tmp_path, None, kv=KV_SCHEMES[name], with_plan=False).path)
    if name == "kv-int8-head":  # named scales in a second file, and no index that would keep loaders off it
        assert places(report) == [SIDECAR_NAME]
    else:
        assert report.findings == ()
    assert report.kv_cache is not None and report.num_quantized == 0


def test_an_unquantized_folder_passes(tmp_path):
    report = verify_checkpoint(write_quantized(tmp_path, None).path)
    assert report.is_ok and report.schemes == {"16 bits": len(LINEARS)}
    assert {verdict.loader: verdict.loads for verdict in report.loaders} == dict.fromkeys(
        ("transformers", "vLLM", "SGLang"), "yes"
    )


def test_a_mixed_folder_passes_and_reports_progress(tmp_path):
    steps = []
    folder = write_quantized(
        tmp_path, lambda name: W4 if "mlp" in name else FP8 if "o_proj" in name else None
    )
    report = verify_checkpoint(folder.path, on_linear=lambda done, total: steps.append((done, total)))
    assert report.is_ok and steps == [(number, 8) for number in range(1, 9)]
    assert report.schemes == {"16 bits": 6, "FP8 channel, inputs FP8 token": 2, "INT4 group 64": 6}
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True


def test_large_linears_are_compared_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.formats.linear_checks.CHUNK_ELEMENTS", 1)
    for number, scheme in enumerate((W4_ASYM, FP8_BLOCK, FP8_STATIC, W8A8, SCHEMES["int2-g32-asym"])):
        report = verify_checkpoint(write_quantized(tmp_path / str(number), scheme).path)
        assert report.is_ok and report.num_compared == len(LINEARS)


def edit(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(folder, file, change):
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def put(suffix, index, value):
    def change(tensors):
        tensors[f"{DOWN}.{suffix}"].view(-1)[index] = value

    return change


def replace(suffix, tensor):
    return lambda tensors: tensors.update({f"{DOWN}.{suffix}": tensor})


def drop(suffix):
    return lambda tensors: tensors.pop(f"{DOWN}.{suffix}")


def set_high_bits(suffix):
    def change(tensors):
        tensors[f"{DOWN}.{suffix}"][-1, -1] |= 1 << 30

    return change


BROKEN_LINEARS = [
    (W4, put("weight_scale", 3, float("nan")), "weight_scale", "1 of 512 scales are impossible, first nan"),
    (W4, put("weight_scale", 3, float("inf")), "weight_scale", "first inf"),
    (W4, put("weight_scale", 3, 0), "weight_scale", "first 0.0"),
    (W4_ASYM, put("weight_scale", 3, -1), "weight_scale", "first -1.0"),
    (FP8, put("weight_scale", 3, -1), "weight_scale", "first -1.0"),
    (FP8_STATIC, put("input_scale", 0, float("nan")), "input_scale", "1 of 1 scales are impossible"),
    (FP8_STATIC, drop("input_scale"), "input_scale", "missing"),
    (W4, drop("weight_packed"), "weight_packed", "missing"),
    (W4, drop("weight_shape"), "weight_shape", "missing"),
    (W4_ASYM, drop("weight_zero_point"), "weight_zero_point", "missing"),
    (W8A8, drop("weight_scale"), "weight_scale", "missing"),
    (W8A8, drop("weight"), "weight", "missing"),
    (W4, replace("weight_scale", torch.ones(128, 2)), "weight_scale", "float32 [128, 2]"),
    (W4, replace("weight_scale", torch.ones(128, 4).int()), "weight_scale", "int32 [128, 4]"),
    (W4, replace("weight_packed", torch.ones(128, 32)), "weight_packed", "float32 [128, 32]"),
    (W4, replace("weight_packed", torch.ones(128 * 32).int()), "weight_packed", "int32 [4096]"),
    (W4, replace("weight_shape", torch.tensor([128, 128])), "weight_shape", "[128, 128]"),
    (W4, replace("weight_shape", torch.tensor([128, 0, 0])), "weight_shape", "int64 [3]"),
    (
        SCHEMES["int4-channel-sym"],
        replace("weight_shape", torch.tensor([128, -7])),
        "weight_shape",
        "[128, -7]",
    ),
    (W4, replace("weight", torch.ones(128, 256)), "weight", "float32 [128, 256]"),
    (W4, replace("weight_zero_point", torch.zeros(16, 4).int()), "weight_zero_point", "int32 [16, 4]"),
    (W8A8, replace("input_scale", torch.ones(1)), "input_scale", "float32 [1]"),
    (W8A8, replace("weight_packed", torch.ones(1, 1).int()), "weight_packed", "int32 [1, 1]"),
    (W4A8, put("weight", 7, 8), "weight", "codes from -8 to 8"),
    (FP8, put("weight", 7, float("nan")), "weight", "1 codes are NaN"),
    (FP8_BLOCK, replace("weight_scale", torch.ones(2, 2)), "weight_scale", "float32 [2, 2]"),
]


@pytest.mark.parametrize("scheme, change, suffix, found", BROKEN_LINEARS)
def test_a_broken_linear_is_found_and_named(tmp_path, scheme, change, suffix, found):
    folder = write_quantized(tmp_path, scheme).path
    edit(folder, change)
    report = verify_checkpoint(folder)
    assert [finding.place for finding in report.findings if finding.place.startswith("model.")] == [
        f"{DOWN}.{suffix}"
    ]
    finding = next(one for one in report.findings if one.place == f"{DOWN}.{suffix}")
    assert found in finding.found and finding.expected
    assert report.num_compared == len(LINEARS) - 1


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_zero_point"])
def test_bits_beyond_the_last_code_are_found(tmp_path, monkeypatch, suffix):
    ragged = {
        name: (shape[0] - 3, shape[1] - 5) if name == DOWN else shape for name, shape in LINEARS.items()
    }
    monkeypatch.setattr("tests.quantized_folders.LINEARS", ragged)
    folder = write_quantized(tmp_path, W4_ASYM, with_plan=False).path
    assert verify_checkpoint(folder).findings == ()
    edit(folder, set_high_bits(suffix))
    (finding,) = verify_checkpoint(folder).findings
    assert finding.place == f"{DOWN}.{suffix}" and "bits set beyond" in finding.found


def test_a_negative_scale_of_symmetric_integers_is_legal(tmp_path):
    folder = write_quantized(tmp_path, W4).path
    edit(folder, put("weight_scale", 3, -0.01))
    assert verify_checkpoint(folder).is_ok


def test_all_findings_are_listed_not_only_the_first(tmp_path):
    folder = write_quantized(tmp_path, W4).path
    for change in (
        put("weight_scale", 0, 0),
        lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale"),
    ):
        edit(folder, change)
    (folder / "tokenizer.json").unlink()
    assert set(places(verify_checkpoint(folder))) == {
        "tokenizer.json",
        f"{DOWN}.weight_scale",
        "model.layers.0.mlp.up_proj.weight_scale",
    }


def weights(section):
    return section["quantization_config"]["config_groups"]["group_0"]["weights"]


def ignored(config, name):
    config["quantization_config"]["ignore"].append(name)


@pytest.mark.parametrize(
    "file, change, place, found",
    [
        (
            "config.json",
            lambda c: weights(c).update(group_size=32),
            f"{DOWN}.weight_scale",
            "float32 [128, 4]",
        ),
        ("config.json", lambda c: weights(c).update(symmetric=False), f"{DOWN}.weight_zero_point", "missing"),
        ("config.json", lambda c: ignored(c, DOWN), DOWN, "quantized tensors"),
        (
            "config.json",
            lambda c: ignored(c, "model.layers.7.mlp.up_proj"),
            "config.json: ignore",
            "layers.7",
        ),
        (
            "config.json",
            lambda c: c["quantization_config"]["ignore"].remove("lm_head"),
            "lm_head.weight",
            "16-bit",
        ),
        (
            "config.json",
            lambda c: c["quantization_config"].update(format=5),
            "config.json: quantization_config",
            "format",
        ),
        ("config.json", lambda c: c.update(num_hidden_layers=3), "", "layer"),
        ("config.json", lambda c: c.update(tie_word_embeddings=True), "lm_head.weight", "a head of its own"),
        (
            "quantkit.json",
            lambda p: p["linears"][DOWN].update(scheme="INT8 channel"),
            "quantkit.json",
            "INT8 channel",
        ),
        ("quantkit.json", lambda p: p["linears"][DOWN].update(scheme=4), "quantkit.json", "4"),
        ("quantkit.json", lambda p: p["linears"][DOWN].update(shape=[1, 2]), "quantkit.json", "shape [1, 2]"),
        ("quantkit.json", lambda p: p["linears"].pop(DOWN), f"quantkit.json: {DOWN}", "missing"),
        ("quantkit.json", lambda p: p["linears"].update(x={}), "quantkit.json: x", "no such linear"),
        (
            "quantkit.json",
            lambda p: p.update(kv_cache="FP8 tensor"),
            "quantkit.json",
            "kv_cache 'FP8 tensor'",
        ),
        ("quantkit.json", lambda p: p.pop("linears"), "quantkit.json", "no object of linears"),
    ],
)
def test_files_that_disagree_are_found_and_named(tmp_path, file, change, place, found):
    folder = write_quantized(tmp_path, W4).path
    edit_json(folder, file, change)
    report = verify_checkpoint(folder)
    assert any(place in one.place and found in one.found for one in report.findings), report.findings


def test_a_section_that_the_package_chokes_on_is_found(tmp_path):
    folder = write_quantized(tmp_path, W8A8).path
    edit_json(folder, "config.json", lambda c: weights(c).update(group_size=[]))
    assert "config.json: quantization_config" in places(verify_checkpoint(folder))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.gate_proj"])
def test_a_module_that_is_missing_altogether_is_found(tmp_path, name):
    folder = write_quantized(tmp_path, W4, with_plan=False).path
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)])
    report = verify_checkpoint(folder)
    assert any(name in one.place + one.found for one in report.findings), report.findings


def test_a_linear_left_unquantized_is_found(tmp_path):
    folder = write_quantized(tmp_path, lambda name: None if name == DOWN else W4, with_plan=False).path
    edit_json(folder, "config.json", lambda c: c["quantization_config"]["ignore"].remove(DOWN))
    (finding,) = verify_checkpoint(folder).findings
    assert finding == (
        f"{DOWN}.weight",
        "a 16-bit weight",
        "INT4 group 64, as config.json says, or the module under ignore",
    )


def test_a_target_by_name_has_to_exist(tmp_path):
    folder = write_quantized(tmp_path, lambda name: W4 if "mlp" in name else FP8).path
    gone = "model.layers.9.mlp.up_proj"
    groups = ("quantization_config", "config_groups", "group_0", "targets")

    def change(config):
        for key in groups[:-1]:
            config = config[key]
        config["targets"].append(gone)

    edit_json(folder, "config.json", change)
    (finding,) = verify_checkpoint(folder).findings
    assert finding.place == "config.json: targets" and finding.found == gone


def with_index(folder, change=lambda weight_map: None):
    names = list(load_file(folder / "model.safetensors"))
    weight_map = dict.fromkeys(names, "model.safetensors")
    change(weight_map)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_a_tensor_that_the_index_does_not_name_is_found(tmp_path):
    folder = write_quantized(tmp_path, W4).path
    with_index(folder, lambda weight_map: weight_map.pop(f"{DOWN}.weight_scale"))
    (finding,) = verify_checkpoint(folder).findings
    assert finding.place == f"{DOWN}.weight_scale" and "not in model.safetensors.index.json" in finding.found


def test_a_stray_shard_is_found(tmp_path):
    folder = write_quantized(tmp_path, W4).path
    with_index(folder)
    save_file({"old": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    assert places(verify_checkpoint(folder)) == ["model-00001-of-00002.safetensors"]


def test_a_damaged_sidecar_is_a_finding(tmp_path):
    folder = write_quantized(tmp_path, None)
    (folder.path / SIDECAR_NAME).write_bytes(b"junk")
    with pytest.raises(SourceError, match=f"{SIDECAR_NAME} is 4 bytes long"):
        verify_checkpoint(folder.path)


def test_an_index_keeps_loaders_off_the_sidecar(tmp_path):
    folder = write_quantized(tmp_path, W4, kv=KV_INT8).path
    with_index(folder)
    report = verify_checkpoint(folder)
    assert report.is_ok and report.kv_cache == "INT8 head"


def test_an_unfinished_run_is_found(tmp_path):
    folder = write_quantized(tmp_path, W4).path
    (folder / ".quantkit-progress.jsonl").write_text("")
    assert places(verify_checkpoint(folder)) == [".quantkit-progress.jsonl"]


def test_kv_scales_that_are_wrong_or_left_over_are_found(tmp_path):
    folder = write_quantized(tmp_path, W4, kv=KV_HEAD).path
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_scale"))
    assert "layer 1 has no k_scale" in verify_checkpoint(folder).findings[0].found
    edit_json(folder, "config.json", lambda c: c["quantization_config"].update(kv_cache_scheme=None))
    assert "model.layers.0.self_attn.k_scale" in places(verify_checkpoint(folder))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def promise(folder):
    with_index(folder, lambda weight_map: weight_map.update({"model.extra.weight": "model.safetensors"}))


def lie(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[:8] = struct.pack("<Q", 1 << 40)
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, problem",
    [
        (truncate, "model.safetensors should be"),
        (lie, "model.safetensors announces a header"),
        (promise, "says that 'model.extra.weight' is in model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: edit_json(f, "config.json", lambda c: weights(c).update(num_bits=3)), "INT3 weights"),
        (
            lambda f: edit_json(
                f, "config.json", lambda c: c["quantization_config"].pop("quantization_status")
            ),
            "status",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, damage, problem):
    folder = write_quantized(tmp_path, W4).path
    damage(folder)
    with pytest.raises(SourceError, match=problem):
        verify_checkpoint(folder)


def test_an_encoder_is_refused(tmp_path):
    folder = write_quantized(tmp_path, None).path
    edit_json(folder, "config.json", lambda c: c.update(architectures=["BertModel"]))
    with pytest.raises(UnsupportedModelError):
        verify_checkpoint(folder)


def test_a_disagreement_with_the_package_is_found(tmp_path, monkeypatch):
    folder = write_quantized(tmp_path, W4).path
    monkeypatch.setattr(
        "quantkit.formats.linear_checks.dequantize_weight", lambda codes, *rest: torch.zeros(codes.shape)
    )
    report = verify_checkpoint(folder)
    assert len(report.findings) == len(LINEARS) and "weights differ" in report.findings[0].found
    assert report.num_compared == 0


def test_weights_and_cache_of_one_folder_are_both_checked(tmp_path):
    report = verify_checkpoint(
        write_quantized(tmp_path, FP8, kv=KVScheme(dtype="fp8", granularity="tensor")).path
    )
    assert report.is_ok and report.kv_cache == "FP8 tensor"
