"""GGUF conversion: the same model as transformers reads, the same tokenizer, and refusals by name."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.gguf import convert_gguf
from quantkit.formats.gguf_header import read_gguf_header
from tests.gguf_files import HEAD_DIM, HEADS, KV_HEADS, TOKENS, weights, write_gguf

TEXTS = (
    "hello world, it is 2024 o'clock!\n\n\tTabs  and   spaces",
    "Größe 日本語 🙂 ﬁ",
    "<|im_start|>user\nhi<|im_end|>",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(the GGUF file, its converted folder)."""
    file = write_gguf(tmp_path_factory.mktemp("source") / "tiny.gguf")
    folder = tmp_path_factory.mktemp("converted")
    convert_gguf(file, folder)
    return file, folder


def test_logits_are_those_of_the_gguf_model_rounded_to_bf16(converted):
    file, folder = converted
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        original = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, original(tokens).logits)


def llama_cpp_order(w_NK: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp stores them: the two halves of each head interleaved."""
    halves = w_NK.reshape(num_heads, 2, w_NK.shape[0] // num_heads // 2, *w_NK.shape[1:])
    return halves.swapaxes(1, 2).reshape(w_NK.shape)


def test_weights_are_those_that_went_into_the_file(tmp_path):
    wanted = weights()
    stored = dict(wanted)
    for layer in (0, 1):
        for part, heads in (("q", HEADS), ("k", KV_HEADS)):
            name = f"blk.{layer}.attn_{part}.weight"
            stored[name] = llama_cpp_order(wanted[name], heads)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", stored, quantized=False), folder)
    checkpoint = open_checkpoint(folder)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj"}
    for layer in (0, 1):
        for theirs, ours in names.items():
            expected = torch.from_numpy(wanted[f"blk.{layer}.{theirs}.weight"]).bfloat16()
            assert torch.equal(checkpoint.read(f"model.layers.{layer}.{ours}.weight"), expected), ours
    assert torch.equal(
        checkpoint.read("model.embed_tokens.weight"), torch.from_numpy(wanted["token_embd.weight"]).bfloat16()
    )


def test_everything_is_bf16_and_the_tied_head_is_not_doubled(converted):
    checkpoint = open_checkpoint(converted[1])
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.config["tie_word_embeddings"] is True


def test_a_head_of_its_own_is_kept(tmp_path):
    head = np.random.default_rng(1).normal(size=(len(TOKENS), 64)).astype(np.float32)
    file = write_gguf(tmp_path / "tiny.gguf", weights() | {"output.weight": head})
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(file, folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.info("lm_head.weight").shape == (len(TOKENS), 64)


def test_config_is_complete_and_says_nothing_of_gguf(converted):
    config = json.loads((converted[1] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 512
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["head_dim"] == HEAD_DIM
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()


def test_tokenizer_and_chat_template_are_those_of_the_file(converted):
    file, folder = converted
    original = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert TOKENS.index("hello") in ours.encode("hello")
    messages = [{"role": "user", "content": "hello"}]
    rendered = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    notes = json.loads((folder / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & notes.keys()


def test_generation_ends_with_the_text_and_with_the_turn(converted):
    generation = json.loads((converted[1] / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [TOKENS.index("<|endoftext|>"), TOKENS.index("<|im_end|>")]
    assert generation["bos_token_id"] == TOKENS.index("<|im_start|>")


@pytest.mark.parametrize("head_dim", [16, 32])
def test_a_head_size_that_the_reader_does_not_carry_over_is_kept(tmp_path, head_dim):
    keys = {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    file = write_gguf(
        tmp_path / "tiny.gguf",
        weights("qwen3", head_dim),
        architecture="qwen3",
        settings=keys,
        quantized=False,
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(file, folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["head_dim"] == head_dim
    assert checkpoint.info("model.layers.0.self_attn.q_proj.weight").shape == (HEADS * head_dim, 64)


def test_nothing_is_printed(tmp_path, capfd):
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf"), folder)
    assert capfd.readouterr() == ("", "")


REFUSED = {
    "rope scaling": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        "rope.scaling.type is 'yarn'",
    ),
    "experts in a dense class": ({"expert_count": 8}, "llama.expert_count is 8"),
    "a setting nobody knows": ({"attention.new_trick": 1.5}, "llama.attention.new_trick is 1.5"),
    "heads that differ by layer": ({"attention.head_count_kv": [2, 1]}, "differs by layer|cannot be read"),
    "partial rope": ({"rope.dimension_count": 8}, "q_proj|k_proj|rope.dimension_count"),
    "another width": ({"feed_forward_length": 256}, r"as \[64, 128\], not \[64, 256\]"),
    "a layer too many": ({"block_count": 3}, "lacks model.layers.2"),
    "a layer too few": ({"block_count": 1}, "weights, but LlamaForCausalLM has"),
    "a billion layers": ({"block_count": 10**9}, "counts 1000000000 layers, but holds 20 tensors"),
    "no room at all": ({"context_length": 0}, "llama.context_length 0, not a positive number"),
    "a width in words": (
        {"embedding_length": "wide"},
        "llama.embedding_length 'wide', not a positive number",
    ),
    "rope of nothing": ({"rope.freq_base": 0.0}, "llama.rope.freq_base 0.0, not a positive number"),
    "no heads": ({"attention.head_count": None}, "does not say llama.attention.head_count"),
}


@pytest.mark.parametrize(("changes", "finding"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_conversion_would_lose_is_refused(tmp_path, changes, finding):
    file = write_gguf(tmp_path / "tiny.gguf", settings=changes)
    with pytest.raises(SourceError, match=finding) as caught:
        convert_gguf(file, tmp_path)
    assert str(file) in caught.value.problem
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize(
    ("architecture", "extra", "finding"),
    [
        ("nosuch", {}, "nosuch is not supported"),
        ("gpt2", {}, "does not know how a config of gpt2 is written"),
        ("bloom", {}, "does not know how a config of bloom is written"),
        ("llama", {"rope_freqs.weight": np.ones(8, np.float32)}, "rope_freqs.weight scales its rope"),
        ("llama", {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "weights, but LlamaForCausalLM has"),
    ],
)
def test_architectures_and_tensors_without_a_place_are_refused(tmp_path, architecture, extra, finding):
    file = write_gguf(tmp_path / "tiny.gguf", weights() | extra, architecture=architecture)
    with pytest.raises(SourceError, match=finding):
        convert_gguf(file, tmp_path)


def test_a_missing_tensor_is_refused(tmp_path):
    tensors = weights()
    del tensors["blk.1.ffn_down.weight"]
    with pytest.raises(SourceError, match=r"lacks model\.layers\.1\.mlp\.down_proj\.weight"):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", tensors), tmp_path)


def test_one_part_of_several_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(SourceError, match="one part of several"):
        convert_gguf(tmp_path / "part.gguf", tmp_path)


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda raw: b"", "is not a GGUF file"),
        (lambda raw: b"PK\3\4" + raw[4:], "is not a GGUF file"),
        (lambda raw: raw[:100], "ends inside its header"),
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[: len(raw) // 2], "truncated|ends inside"),
        (lambda raw: raw[:4] + (1).to_bytes(4, "little") + raw[8:], "is GGUF version 1"),
        (lambda raw: raw[:4] + (3).to_bytes(4, "big") + raw[8:], "is GGUF version"),
        (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "ends inside|dimensions|is not UTF-8"),
        (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "ends inside|unknown type|twice|is not UTF-8"),
        (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "ends inside its header"),
    ],
)
def test_damage_is_named(tmp_path, damage, finding):
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SourceError, match=finding) as caught:
        convert_gguf(file, tmp_path)
    assert str(file) in caught.value.problem


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """(bytes of a valid file, where its header ends, a path to write to)."""
    file = write_gguf(tmp_path_factory.mktemp("fuzz") / "tiny.gguf")
    return file.read_bytes(), min(tensor.begin for tensor in read_gguf_header(file).tensors), file


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_header_is_read_or_refused(valid, data):
    raw, header_bytes, file = valid
    mutated = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, header_bytes - 1))
        mutated[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    file.write_bytes(mutated[:cut])
    try:
        header = read_gguf_header(file)
    except SourceError as error:
        assert str(file) in error.problem
    else:
        assert all(0 <= tensor.begin <= tensor.end <= cut for tensor in header.tensors)


def test_the_header_agrees_with_the_gguf_package(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    header, reader = read_gguf_header(file), gguf.GGUFReader(file)
    assert header.metadata["llama.context_length"] == 512
    assert header.metadata["tokenizer.ggml.tokens"].length == len(TOKENS)
    assert header.metadata["tokenizer.ggml.model"] == "gpt2"
    assert [(t.name, t.num_elements, t.begin, t.end - t.begin) for t in header.tensors] == [
        (t.name, t.n_elements, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    shutil.rmtree(tmp_path)
