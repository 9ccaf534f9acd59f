"""Bad inputs through the command line: exit code 2, one line of problem, one of fix, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest
import torch

from quantkit.cli.main import run
from tests import broken
from tests.gguf_files import write_gguf
from tests.tiny_llama import tiny_tensors, write_tiny_llama

QUANTIZE = ("quantize", "{}/model", "-r", "int4", "--set", "algorithm=rtn", "-o", "{}/out")
EVAL = ("eval", "{}/model", "{}/model", "--windows", "2", "--length", "16", "--data", "{}/text.txt")
GENERATE = ("generate", "{}/model")
INSPECT = ("inspect", "{}/model")
OVERRIDE = "weights: int4\noverrides:\n- match: '*.gate_proj'\n  weights: int8\n"
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
RUN = ("quantize", "{}/model", "-r", "int8-weight", "-o", "{}/out")
ORIGINAL = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
YARN = ORIGINAL | {"rope_type": "yarn"}
LLAMA3 = ORIGINAL | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CALIBRATE = ("quantize", "{}/model", "-r", "int4", "--calib", "{}/text.txt", "-o", "{}/out",
             "--set", "calibration.samples=2", "--set", "calibration.length=16")  # fmt: skip
PROMPT = "a quick brown fox " * 100


class Bad(NamedTuple):
    """One bad input. command: {} stands for the test's folder; problem, fix: what the two lines have to contain."""

    name: str
    damage: Callable[[Path], object]
    command: tuple[str, ...]
    problem: str
    fix: str


def recipe(text: str) -> Callable[[Path], None]:
    return broken.text("recipe.yaml", text)


def unfinished(folder: Path) -> None:
    """An interrupted run of another recipe is in `out`: its journal says so."""
    broken.text("out/.quantkit-progress.jsonl", '{"key":"of another plan"}\n')(folder)


def finished(folder: Path) -> None:
    """A finished run of another recipe is in `out`."""
    assert run([part.replace("{}", str(folder)) for part in RUN]) == 0


def with_candidate(vocab_size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = tiny_tensors()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:vocab_size].clone()
        write_tiny_llama(folder / "other", tensors, vocab_size=vocab_size)

    return apply


def renumbered(folder: Path) -> None:
    """A candidate whose tokenizer gives two tokens each other's number."""
    shutil.copytree(folder / "model", folder / "other")
    file = folder / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def foreign_tokenizer(folder: Path) -> None:
    """A tokenizer that knows more tokens than the model."""
    tensors = tiny_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:60].clone()
    write_tiny_llama(folder / "model", tensors, vocab_size=60)


def pickled(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def gguf(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = write_gguf(folder / "model.gguf")
        file.write_bytes(damage(file.read_bytes()))

    return apply


FROM_GGUF = ("quantize", "{}/model.gguf", "-r", "int4-rtn", "-o", "{}/out")
WITH = ("quantize", "{}/model", "-r", "{}/recipe.yaml", "-o", "{}/out")


def setting(*settings: str) -> tuple[str, ...]:
    return (*QUANTIZE, *(part for one in settings for part in ("--set", one)))


# fmt: off
# A table: a row per line.
SOURCES = (
    Bad("no such source", broken.nothing, ("inspect", "{}/nowhere"), "nowhere: no such file or folder", "hub id"),
    Bad("empty folder", lambda f: (f / "e").mkdir(), ("inspect", "{}/e"), "no config.json", "the folder that holds"),
    Bad("a file of the folder", broken.nothing, ("inspect", "{}/model/config.json"), "no checkpoint", "/model"),
    Bad("config missing", broken.removed("model/config.json"), QUANTIZE, "no config.json", "config.json"),
    Bad("config not JSON", broken.text("model/config.json", "{'a': 1}"), QUANTIZE, "not valid JSON", "fetch"),
    Bad("config too deep", broken.text("model/config.json", "[" * 100_000), QUANTIZE, "not valid JSON", "fetch"),
    Bad("config not UTF-8", broken.text("model/config.json", b"\xff\xfe{}"), QUANTIZE, "not valid JSON", "fetch"),
    Bad("config a list", broken.text("model/config.json", "[1]"), QUANTIZE, "not a JSON object", "fetch config"),
    Bad("layers not a number", broken.config(num_hidden_layers="2"), QUANTIZE, "num_hidden_layers", "fetch"),
    Bad("a billion layers", broken.config(num_hidden_layers=10**9), QUANTIZE, "layers.2.", "incomplete"),
    Bad("a billion layers of an unknown family",
        broken.config(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"], num_hidden_layers=10**9), QUANTIZE,
        "counts 1000000000 layers", "fetch"),
    Bad("a billion experts", broken.experts(num_experts=10**9), QUANTIZE, "experts.4.", "incomplete"),
    Bad("layers miscounted", broken.config(num_hidden_layers=3), QUANTIZE, "layers.2.", "incomplete"),
    Bad("no model_type", broken.config(model_type=None), QUANTIZE, "model_type", "decoder-only"),
    Bad("unknown architecture", broken.config(model_type="nonesuch", architectures=["NonesuchForCausalLM"]), QUANTIZE,
        "does not know nonesuch", "transformers"),
    Bad("remote code only", broken.config(model_type="x", architectures=None, auto_map={"AutoModel": "x.Y"}), QUANTIZE,
        "its own code, which is never run", "transformers"),
    Bad(
        "encoder-decoder",
        broken.config(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True),
        QUANTIZE,
        "encoder-decoder",
        "decoder-only",
    ),
    Bad("an encoder", broken.config(architectures=["BertModel"]), QUANTIZE, "BertModel", "decoder-only"),
    Bad("gptq", broken.quantized({"quant_method": "gptq", "bits": 4}), QUANTIZE, "quantized with gptq", "original"),
    Bad("awq", broken.quantized({"quant_method": "awq"}), QUANTIZE, "quantized with awq", "original"),
    Bad("bitsandbytes", broken.quantized({"load_in_4bit": True}), QUANTIZE, "with bitsandbytes", "original"),
    Bad("compressed-tensors", broken.quantized(CT), QUANTIZE, "with compressed-tensors", "original"),
    Bad("no weights", broken.removed("model/model.safetensors"), QUANTIZE, "no safetensors", "download"),
    Bad("pickled weights", pickled, QUANTIZE, "only pickled weights", "safetensors"),
    Bad("shard missing", broken.shards(broken.missing_shard), QUANTIZE, "1 of 2 shards missing", "download"),
    Bad("shard cut short", broken.shards(broken.cut_shard), QUANTIZE, "truncated", "download"),
    Bad("shard outside", broken.shards(broken.outside), QUANTIZE, "not a file of this folder", "index"),
    Bad("tensor not in its shard", broken.shards(broken.moved), QUANTIZE, "does not hold it", "index"),
    Bad("tensor in two shards", broken.shards(broken.doubled), QUANTIZE, "in two shards", "remove"),
    Bad(
        "index without map",
        lambda f: (
            broken.removed("model/model.safetensors")(f),
            broken.text(f"model/{broken.INDEX}", "[]")(f),
        ),
        QUANTIZE,
        "no weight_map",
        "index",
    ),
    Bad("truncated", broken.cut("model/model.safetensors", 1), QUANTIZE, "truncated", "damaged"),
    Bad("empty file", broken.text("model/model.safetensors", b""), QUANTIZE, "too short", "damaged"),
    Bad("endless header", broken.text("model/model.safetensors", b"\xff" * 99), QUANTIZE, "announces", "damaged"),
    Bad("header not JSON", broken.header(lambda h: b"{" * 64), QUANTIZE, "not valid JSON", "damaged"),
    Bad("header a list", broken.header(lambda h: b"[[1]]"), QUANTIZE, "not a JSON object", "damaged"),
    Bad("header of another shape", broken.entry(shape=[64, 33]), QUANTIZE, "takes another number", "damaged"),
    Bad("negative extent", broken.entry(shape=[-64, -32]), QUANTIZE, "is not safetensors", "damaged"),
    Bad("dtype a list", broken.entry(dtype=["BF16"]), QUANTIZE, "is not safetensors", "damaged"),
    Bad("unsupported dtype", broken.entry(dtype="F8_E8M0"), QUANTIZE, "F8_E8M0", "convert"),
    Bad("overlapping tensors", broken.entry(data_offsets=[0, 4096]), QUANTIZE, "overlap", "damaged"),
    Bad("no tensors", broken.text("model/model.safetensors", b"\x02" + b"\0" * 7 + b"{}"), QUANTIZE,
        "no tensor", "fetch"),
    Bad("a linear missing", broken.tensor(broken.UP, lambda w: None), QUANTIZE, "mlp.up_proj is missing", "fetch"),
    Bad("two dtypes", broken.tensor(broken.UP, torch.Tensor.float), QUANTIZE, "several dtypes", "convert"),
    Bad("NaN", broken.with_value(broken.UP, float("nan")), QUANTIZE, "up_proj.weight has NaN weights", "ignore"),
    Bad("infinity", broken.with_value(broken.UP, float("-inf")), QUANTIZE, "has infinite weights", "ignore"),
    Bad("already FP8", broken.tensor(broken.UP, lambda w: w.to(torch.float8_e4m3fn)), QUANTIZE,
        "up_proj.weight is stored as F8", "original"),
    Bad("not on the hub", broken.nothing, ("inspect", "nobody/nothing"),
        "not completely in the local cache", "network"),
    Bad("revision of a folder", broken.nothing, (*INSPECT, "--revision", "v1"), "not on the hub", "--revision"),
    Bad("not a GGUF", gguf(lambda raw: b"GGML" + raw[4:]), FROM_GGUF, "not a GGUF file", "download"),
    Bad("GGUF cut short", gguf(lambda raw: raw[:-5000]), FROM_GGUF, "truncated", "download"),
    Bad("GGUF cut in its header", gguf(lambda raw: raw[:300]), FROM_GGUF, "ends inside its header", "download"),
    Bad("GGUF corrupted", gguf(lambda raw: raw[:100] + b"\xff" * 200 + raw[300:]), FROM_GGUF,
        "unknown type", "download"),
    Bad("GGUF empty", broken.text("model.gguf", b""), FROM_GGUF, "not a GGUF file", "download"),
)

RECIPES = (
    Bad("no such recipe", broken.nothing, (*QUANTIZE[:3], "int5", *QUANTIZE[4:]), "int5: neither", "did you mean `int"),
    Bad("unknown key", recipe("weights: int4\ngrop_size: 64\n"), WITH,
        "recipe.yaml:2: unknown key grop_size", "group_size"),
    Bad("wrong type", recipe("weights: int4\nsymmetric: 'yes'\n"), WITH,
        "recipe.yaml:2: symmetric is 'yes'", "correct"),
    Bad("no weights key", recipe("group_size: 64\n"), WITH, "`weights` is missing", "keys are"),
    Bad("not YAML", recipe("weights: [int4\n"), WITH, "recipe.yaml:2: not valid YAML", "correct"),
    Bad("a list", recipe("- weights: int4\n"), WITH, "not a list of `key: value`", "quantkit recipes"),
    Bad("empty recipe", recipe(""), WITH, "not a list of `key: value`", "quantkit recipes"),
    Bad("binary recipe", broken.text("recipe.yaml", b"\xff\xfe\x00"), WITH, "not valid YAML", "correct"),
    Bad("duplicate key", recipe("weights: int4\nweights: int8\n"), WITH,
        "recipe.yaml:2: weights is given twice", "remove"),
    Bad("alias bomb", recipe("a: &a [*a]\n"), WITH, "alias", "write the value out"),
    Bad("3 bits", recipe("weights: int3\n"), WITH, "recipe.yaml:1: weights is 'int3'", "correct"),
    Bad("FP8 with INT8", broken.nothing, setting("weights=fp8", "activations=int8"),
        "FP8 weights with INT8", "fp8 activations"),
    Bad("group does not divide", broken.nothing, setting("group_size=64"), "does not divide the 32", "32"),
    Bad("group 96", broken.nothing, setting("group_size=96"), "group_size 96: no kernel", "32, 64 or 128"),
    Bad("group 16", broken.nothing, setting("group_size=16"), "group_size 16: no kernel", "32, 64 or 128"),
    Bad("group 0", broken.nothing, setting("group_size=0"), "--set group_size=0: group_size is 0", "correct"),
    Bad("group -1", broken.nothing, setting("group_size=-1"), "group_size is -1", "correct"),
    Bad("group in words", broken.nothing, setting("group_size=big"), "group_size is 'big'", "correct"),
    Bad("--set without value", broken.nothing, setting("group_size"), "--set group_size: not KEY=VALUE", "--set"),
    Bad("--set of nothing", broken.nothing, setting("=64"), "not KEY=VALUE", "--set"),
    Bad("--set not YAML", broken.nothing, setting("ignore=[a"), "the value is not valid YAML", "quote"),
    Bad("--set of no date", broken.nothing, setting("group_size=2020-13-99"), "not valid YAML (month", "quote"),
    Bad("--set too deep", broken.nothing, setting("ignore=" + "[" * 5000), "not valid YAML", "quote"),
    Bad("--set of unknown key", broken.nothing, setting("colour=red"), "unknown key colour", "keys are"),
    Bad("--set below nothing", broken.nothing, setting("overrides.0.keep=true"), "no overrides", "keys are"),
    Bad("ignored name unknown", broken.nothing, setting("ignore=[lm_heed]"), "'lm_heed' matches no linear", "inspect"),
    Bad("bad regex", broken.nothing, setting("ignore=['re:(']"), "not a regular expression", "correct"),
    Bad("override without match", broken.nothing, setting("overrides=[{match: nobody, keep: true}]"),
        "'nobody' matches no linear", "inspect"),
    Bad("fused linears split", recipe(OVERRIDE), WITH, "treated differently", "one pattern"),
    Bad("empty override", recipe("weights: int4\noverrides:\n- match: '*'\n"), WITH, "recipe.yaml:3", "correct"),
    Bad("nothing to do", broken.nothing, setting("ignore=['*']"), "leaves every linear", "inspect"),
    Bad("FP8 zero points", broken.nothing, setting("weights=fp8", "symmetric=false"),
        "FP8 has no zero point", "remove"),
    Bad("asymmetric, quantized inputs", broken.nothing, setting("activations=int8", "symmetric=false"),
        "asymmetric weights", "symmetric: true"),
    Bad("granularity against size", broken.nothing, setting("granularity=channel", "group_size=32"),
        "no effect", "remove"),
    Bad("INT4 blocks", broken.nothing, setting("granularity=block"), "128x128 block", "groups"),
    Bad("KV granularity alone", broken.nothing, setting("kv_granularity=head"), "no effect", "remove"),
    Bad("KV FP8 per token", broken.nothing, setting("kv_cache=fp8", "kv_granularity=token"), "FP8 KV cache", "kv_"),
    Bad("KV INT8 per tensor", broken.nothing, setting("kv_cache=int8", "kv_granularity=tensor"), "no loader", "token"),
    Bad("static, 16 bits", broken.nothing, setting("activation_scales=static"), "no effect", "correct"),
    Bad("two roundings", broken.nothing, setting("algorithm=[rtn,gptq]"), "exclude each other", "correct"),
    Bad("out of order", broken.nothing, setting("algorithm=[gptq,awq]"), "the order", "correct"),
    Bad("refine alone", broken.nothing, setting("algorithm=refine"), "gptq", "correct"),
    Bad("budget alone", broken.nothing, setting("budget_minutes=5"), "no effect", "correct"),
    Bad("endless budget", broken.nothing, setting("algorithm=[gptq,tune]", "budget_minutes=.inf"),
        "budget_minutes is inf", "correct"),
    Bad("windows beyond the positions", broken.nothing, (*CALIBRATE[:-1], "calibration.length=129"),
        "has 128 positions", "calibration.length=128"),
    Bad("calibrating with a foreign tokenizer", foreign_tokenizer, CALIBRATE, "vocabulary is 60", "copy the tokenizer"),
    Bad("dtype a number", broken.config(dtype=3), CALIBRATE, "cannot build", "decoder-only"),
    Bad("no samples", broken.nothing, setting("calibration.samples=0"), "calibration.samples", "correct"),
    Bad("no such device", broken.nothing, (*QUANTIZE, "--device", "tpu"), "not a device", "--device cpu"),
    Bad("no such text", broken.nothing, (*QUANTIZE, "--calib", "nowhere.txt"), "no such file", "give a"),
)

OUTPUTS = (
    Bad("foreign output", broken.text("out/thesis.txt", "mine"), QUANTIZE, "not empty, and not a run", "a folder"),
    Bad("foreign output, --overwrite", broken.text("out/a", ""), (*QUANTIZE, "--overwrite"), "not empty", "a folder"),
    Bad("output is a file", broken.text("out", "mine"), QUANTIZE, "out: is a file", "a folder"),
    Bad("output below a file", broken.text("out", "mine"), (*QUANTIZE[:-1], "{}/out/x"), "Not a directory", "a path"),
    Bad("output name too long", broken.nothing, (*QUANTIZE[:-1], "{}/" + "x" * 300), "File name too long", "a path"),
    Bad("output a link to nothing", lambda f: (f / "out").symlink_to(f / "nowhere"), QUANTIZE,
        "nowhere, which does not exist", "remove the link"),
    Bad("output a link to itself", lambda f: (f / "out").symlink_to(f / "out"), QUANTIZE, "itself", "remove the link"),
    Bad("foreign output of a plan", broken.text("out/a", ""), (*QUANTIZE, "--dry-run"), "not empty", "a folder"),
    Bad("plan for the source", broken.nothing, (*QUANTIZE[:-1], "{}/model", "--dry-run"), "the same folder", "beside"),
    Bad("plan for no device", broken.nothing, (*QUANTIZE, "--dry-run", "--device", "tpu"), "not a device", "cpu"),
    Bad("output is the source", broken.nothing, (*QUANTIZE[:-1], "{}/model"), "the same folder", "beside"),
    Bad("output in the source", broken.nothing, (*QUANTIZE[:-1], "{}/model/out"), "inside the other", "beside"),
    Bad("source in the output", broken.nothing, (*QUANTIZE[:-1], "{}", "--overwrite"), "inside the other", "beside"),
    Bad("unfinished other run", unfinished, QUANTIZE, "unfinished run of another plan", "--overwrite"),
    Bad("finished other run", finished, QUANTIZE, "finished run of another plan", "--overwrite"),
)

TEXTS = (
    Bad("no such text", broken.removed("text.txt"), EVAL, "text.txt: no such file", "docs"),
    Bad("text of nobody", broken.nothing, (*EVAL[:-1], "~nobody-of-that-name/a.txt"), "no such user", "docs"),
    Bad("text without a name", broken.nothing, (*EVAL[:-1], ""), "is empty", "docs"),
    Bad("empty text", broken.text("text.txt", ""), EVAL, "text.txt: holds no text", "not empty"),
    Bad("blank text", broken.text("text.txt", " \n\n\t\n"), EVAL, "holds no text", "not empty"),
    Bad("binary text", broken.text("text.txt", b"\x00\xff\xfe" * 99), EVAL, "not UTF-8", "iconv"),
    Bad("text too short", broken.text("text.txt", "a few words"), EVAL, "tokens, and 2 windows", "more text"),
    Bad("text of another kind", broken.text("a.pdf", "%PDF"), (*EVAL[:-1], "{}/a.pdf"), "of kind .pdf", ".txt"),
    Bad("jsonl not JSON", broken.text("a.jsonl", "{\n"), (*EVAL[:-1], "{}/a.jsonl"),
        "a.jsonl:1: not valid JSON", "line"),
    Bad("jsonl without text", broken.text("a.jsonl", '{"a": 1}'), (*EVAL[:-1], "{}/a.jsonl"),
        "neither text", "messages"),
    Bad("parquet damaged", broken.text("a.parquet", "PAR1"), (*EVAL[:-1], "{}/a.parquet"), "parquet", "again"),
    Bad("folder without text", lambda f: (f / "e").mkdir(), (*EVAL[:-1], "{}/e"), "no .txt", ".txt"),
    Bad("no windows", broken.nothing, (*EVAL, "--windows", "0"), "--windows 0", "24"),
    Bad("windows too long", broken.nothing, (*EVAL, "--length", "500"), "128 positions", "128"),
    Bad("windows too short", broken.nothing, (*EVAL, "--length", "1"), "--length 1", "512"),
    Bad("gate not a number", broken.nothing, (*EVAL, "--max-ppl-increase", "much"), "much", "%"),
)

MODELS = (
    Bad("another vocabulary", with_candidate(300), (*EVAL[:2], "{}/other", *EVAL[3:]),
        "vocabulary of 320", "made from"),
    Bad("other token numbers", renumbered, (*EVAL[:2], "{}/other", *EVAL[3:]), "tokenizers", "made from"),
    Bad("no tokenizer", broken.removed("model/tokenizer.json"), EVAL, "no tokenizer", "copy the tokenizer"),
    Bad("no candidate", broken.nothing, ("eval", "{}/model"), "candidates", "--help"),
    Bad("candidate missing", broken.nothing, (*EVAL[:2], "{}/x", *EVAL[3:]), "x: no such file", "hub id"),
    Bad("tokenizer damaged", broken.text("model/tokenizer.json", "{"), (*GENERATE, "hi"), "tokenizer cannot", "fetch"),
    Bad("vocabulary in words", broken.config(vocab_size="320"), (*GENERATE, "hi"), "vocab_size is '320'", "fetch"),
    Bad("no heads", broken.config(num_attention_heads=0), (*GENERATE, "hi"), "num_attention_heads is 0", "fetch"),
    Bad("dtype an object", broken.config(dtype={}), EVAL, "dtype {}", "add dtype"),
    Bad("template computes nonsense", broken.text("model/chat_template.jinja", "{{ 1 // 0 }}"), (*GENERATE, "hi"),
        "chat template fails", "--raw"),
    Bad("template adds up apples", broken.text("model/chat_template.jinja", "{{ 1 + 'a' }}"), (*GENERATE, "hi"),
        "chat template fails", "--raw"),
    Bad("generation config a list", broken.text("model/generation_config.json", "[1]"), (*GENERATE, "hi"),
        "not a JSON object", "fetch"),
    Bad("an end that is no token", broken.text("model/generation_config.json", '{"eos_token_id": "</s>"}'),
        (*GENERATE, "hi"), "eos_token_id '</s>'", "fetch"),
    Bad("prompt of other bytes", broken.nothing, (*GENERATE, "caf\udce9"), "not UTF-8", "UTF-8"),
    Bad("no rope", broken.config(rope_parameters=None), (*GENERATE, "hi"), "no rope_theta", "fetch"),
    Bad("rope of no kind", broken.config(rope_parameters={"rope_type": "x", "rope_theta": 1e4}), (*GENERATE, "hi"),
        "rope_type 'x'", "supported: default"),
    Bad("rope of theta 1", broken.config(rope_parameters=YARN | {"rope_theta": 1.0}), (*GENERATE, "hi"),
        "rope_theta is 1.0", "fetch"),
    Bad("rope without a band", broken.config(rope_parameters=LLAMA3 | {"high_freq_factor": 1.0}), (*GENERATE, "hi"),
        "high_freq_factor is 1.0", "fetch"),
    Bad("no hidden size", broken.config(hidden_size=None), (*GENERATE, "hi"), "no hidden_size", "fetch"),
    Bad("unknown activation", broken.config(hidden_act="sinus"), (*GENERATE, "hi"), "hidden_act 'sinus'", "supported"),
    Bad("not for the runtime", broken.config(model_type="granite"), (*GENERATE, "hi"), "model_type 'granite'", "llama"),
    Bad("a billion layers to run", broken.config(num_hidden_layers=10**9), (*GENERATE, "hi"), "possible with", "fetch"),
    Bad("weights of another size", broken.config(intermediate_size=96), (*GENERATE, "hi"),
        "gate_proj.weight has shape", "fetch"),
    Bad("quantized, but not compressed", broken.quantized(CT), (*GENERATE, "hi"),
        "quantization_status", "quantkit wrote"),
    Bad("empty prompt", broken.nothing, (*GENERATE, ""), "the prompt has no tokens", "not empty"),
    Bad("prompt too long", broken.nothing, (*GENERATE, PROMPT), "takes 128", "shorten"),
    Bad("prompt that looks like an option", broken.nothing, (*GENERATE, "-5 + 3 ="), "No such option", "behind `--`"),
    Bad("no tokens wanted", broken.nothing, (*GENERATE, "hi", "--max-tokens", "0"), "max_tokens 0", "from 1"),
    Bad("fewer than none", broken.nothing, (*GENERATE, "hi", "--max-tokens", "-3"), "max_tokens -3", "from 1"),
    Bad("cold", broken.nothing, (*GENERATE, "hi", "--temperature", "-1"), "temperature -1", "from 0"),
    Bad("temperature NaN", broken.nothing, (*GENERATE, "hi", "--temperature", "nan"), "temperature nan", "from 0"),
    Bad("top-p 0", broken.nothing, (*GENERATE, "hi", "--top-p", "0"), "top_p 0", "up to 1"),
    Bad("top-p 2", broken.nothing, (*GENERATE, "hi", "--top-p", "2"), "top_p 2", "up to 1"),
    Bad("no such dtype", broken.nothing, (*GENERATE, "hi", "--dtype", "int8"), "int8", "--help"),
)

VERBS = (
    Bad("unknown verb", broken.nothing, ("quantise", "{}/model"), "No such command 'quantise'", "--help"),
    Bad("unknown option", broken.nothing, (*QUANTIZE, "--fast"), "No such option: --fast", "--help"),
    Bad("no recipe", broken.nothing, ("quantize", "{}/model", "-o", "{}/out"), "--recipe", "--help"),
    Bad("no output", broken.nothing, ("quantize", "{}/model", "-r", "int4"), "--output", "--help"),
    Bad("not a number", broken.nothing, (*EVAL, "--windows", "many"), "--windows", "--help"),
    Bad("schema of one recipe", broken.nothing, ("recipes", "int4", "--schema"), "of all recipes", "recipes int4"),
    Bad("no such recipe to print", broken.nothing, ("recipes", "best"), "best: neither", "quantkit recipes"),
    Bad("verify nothing", broken.nothing, ("verify", "{}/nowhere"), "no such folder", "folder"),
    Bad("verify a file", broken.nothing, ("verify", "{}/text.txt"), "no such folder", "folder"),
    Bad("verify without weights", broken.removed("model/model.safetensors"), ("verify", "{}/model"),
        "no safetensors", "download"),
    Bad("verify a foreign format", broken.quantized({"quant_method": "awq"}), ("verify", "{}/model"),
        "quant_method 'awq'", "quantkit wrote"),
)
# fmt: on

TABLE = (*SOURCES, *RECIPES, *OUTPUTS, *TEXTS, *MODELS, *VERBS)


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good model and a good text, offline, with a cache beside it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    shutil.copytree(good_model, work / "model")
    (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return work


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below, with the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_the_good_inputs_are_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate = (*CALIBRATE[:7], "{}/calibrated", *CALIBRATE[8:])
    for command in (
        QUANTIZE,
        calibrate,
        EVAL,
        (*GENERATE, "hi", "--max-tokens", "2"),
        INSPECT,
        ("verify", "{}/out"),
    ):
        assert run([part.replace("{}", str(folder)) for part in command]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("bad", TABLE, ids=[bad.name for bad in TABLE])
def test_bad_input(bad: Bad, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad.damage(folder)
    before = contents(folder)
    capsys.readouterr()

    code = run([part.replace("{}", str(folder)) for part in bad.command])

    out, err = capsys.readouterr()
    *_, problem, fix = err.splitlines()
    assert code == 2, err
    assert problem.startswith("error: ") and bad.problem in problem, err
    assert fix.startswith("  fix: ") and bad.fix in fix, err
    assert err.count("error:") == err.count("fix:") == 1 and "Traceback" not in err, err
    assert out == ""
    assert contents(folder) == before, "something was left behind, or changed"
    cache = folder.parent / "cache"
    left = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not left, "something half-made is in the cache"


@pytest.mark.parametrize("value", [0.0, -0.0], ids=["zero", "minus zero"])
def test_rows_of_zeros_are_no_bad_input(folder: Path, value: float) -> None:
    def zeroed(weight: torch.Tensor) -> torch.Tensor:
        weight[3:9] = value
        return weight

    broken.tensor(broken.UP, zeroed)(folder)
    for name in ("int4", "int8", "fp8-all", "int4-rtn"):
        command = ["quantize", f"{folder}/model", "-r", name, "-o", f"{folder}/{name}"]
        assert run(command) == 0
        assert run(["verify", f"{folder}/{name}"]) == 0


def test_names_are_no_markup(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in the names of files and tensors are printed as they are."""
    text = folder / "t[" / "b]" / "[red]x.txt"
    text.parent.mkdir(parents=True)
    (folder / "text.txt").rename(text)
    broken.tensor("model.norm.weight", lambda w: w)(folder)
    broken.header(lambda content: content.update({"extra[/b].weight": content.pop("lm_head.weight")}))(folder)
    broken.config(tie_word_embeddings=True)(folder)
    little = ("--set", "calibration.samples=2", "--set", "calibration.length=16")
    command = [
        "quantize",
        f"{folder}/model",
        "-r",
        "int4",
        *little,
        "--calib",
        str(text),
        "-o",
        f"{folder}/out",
    ]
    assert run([*command, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "extra[/b].weight" in out and str(text) in out + err
    assert run(command) == 0
    assert f"of {text}" in capsys.readouterr().err


def test_a_name_in_other_bytes_than_utf8(folder: Path) -> None:
    source = folder / "mod\udce9le"
    (folder / "model").rename(source)
    assert run(["quantize", str(source), "-r", "int4-rtn", "-o", f"{folder}/out\udce9"]) == 0
    assert run(["verify", f"{folder}/out\udce9"]) == 0
    card = (folder / "out\udce9" / "README.md").read_text(encoding="utf-8")
    assert "mod?le" in card


def test_what_a_recipe_says_in_vain_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [part.replace("{}", str(folder)) for part in (*RUN, "--set", "calibration.samples=5")]
    for options in ("--dry-run",), ():
        assert run([*command, *options]) == 0
        assert "`calibration` changes nothing here" in capsys.readouterr().err


def test_windows_are_no_longer_than_the_model_has_positions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [part.replace("{}", str(folder)) for part in CALIBRATE[:-2]]
    assert run(command) == 0
    assert "calibrating on 1 x 128 tokens" in capsys.readouterr().err
