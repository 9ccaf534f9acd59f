"""Seconds from page cache to a model on a GPU, of Llama-3.1-8B's shape in one scheme, and its memory at the peak.

    PYTHONPATH=.:kernels python tests/gpu/bench_load.py int4-g128-sym [bf16 …]

Writes a checkpoint of random codes to a temporary folder, reads all of it once, then loads it, twice.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.compressed_tensors import linear_layout
from quantkit.formats.quantization_config import write_quantization
from quantkit.formats.safetensors_file import as_bytes, encode_header
from quantkit.runtime.device_checkpoint import DeviceCheckpoint
from quantkit.runtime.load import load_model
from quantkit.runtime.memory_plan import weight_bytes
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.step import Row, build_step
from quantkit.runtime.target import Target
from quantkit.schemes import Scheme
from tests.product_schemes import SCHEMES

GPU = torch.device("cuda")
HIDDEN, INNER, KEYS, LAYERS, VOCAB = 4096, 14336, 1024, 32, 128256
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def layouts(schemes: dict[str, Scheme | None]) -> Iterator[Layout]:
    """The tensors of each file: what is outside of layers, then a layer at a time. schemes: of each of LINEARS."""
    bf16 = torch.bfloat16
    yield {
        "model.embed_tokens.weight": (bf16, (VOCAB, HIDDEN)),
        "model.norm.weight": (bf16, (HIDDEN,)),
        "lm_head.weight": (bf16, (VOCAB, HIDDEN)),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors: Layout = {
            f"{prefix}.{name}_layernorm.weight": (bf16, (HIDDEN,)) for name in ("input", "post_attention")
        }
        for name, shape in LINEARS.items():
            scheme = schemes[name]
            parts = {"weight": (bf16, shape)} if scheme is None else linear_layout(scheme, *shape, bf16)
            tensors |= {f"{prefix}.{name}.{suffix}": part for suffix, part in parts.items()}
        yield tensors


def write(folder: Path, scheme: Scheme | None, *, is_attention_16_bit: bool = False) -> Path:
    """A folder of as many files as layers. Codes are random bits, all scales and norms small."""
    schemes = {
        name: None if is_attention_16_bit and name.startswith("self_attn") else scheme for name in LINEARS
    }
    noise = torch.randint(0, 2**31 - 1, (1 << 26,), dtype=torch.int32)
    noise &= (
        0x3C7F3C7F if is_attention_16_bit or scheme is None else 0x7E7E7E7E
    )  # small in bf16; finite in e4m3
    weight_map = {}
    for number, tensors in enumerate(layouts(schemes)):
        file = f"model-{number:05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        with (folder / file).open("wb") as out:
            out.write(encode_header(tensors))
            for name, (dtype, shape) in tensors.items():
                out.write(as_bytes(values(name, dtype, shape, noise)))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    modules = {f"model.layers.{layer}.{name}": schemes[name] for layer in range(LAYERS) for name in LINEARS}
    quantization = write_quantization({**modules, "lm_head": None}, None)
    config = CONFIG if scheme is None else {**CONFIG, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def values(name: str, dtype: torch.dtype, shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    """One tensor's content."""
    if name.endswith("weight_shape"):
        return torch.tensor(LINEARS[name.split(".", 3)[3].removesuffix(".weight_shape")])
    if name.endswith(("scale", "norm.weight")):
        return torch.full(shape, 0.01, dtype=dtype)
    count = torch.Size(shape).numel() * dtype.itemsize // 4
    words = noise if count <= len(noise) else noise.repeat(-(-count // len(noise)))
    return words[:count].view(dtype).reshape(shape)


def main() -> None:
    """A line per measurement."""
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder))


def measure(name: str, folder: Path) -> None:
    """One scheme."""
    started = time.perf_counter()
    checkpoint = open_checkpoint(write(folder, None if name == "bf16" else SCHEMES[name]))
    say(name, "written", started)
    torch.zeros(1, device=GPU)
    started = time.perf_counter()
    arriving = DeviceCheckpoint(checkpoint, GPU)
    for tensor in checkpoint.tensors:
        arriving.expect([tensor])
    for tensor in checkpoint.tensors:
        arriving.read(tensor)
    arriving.close()
    torch.cuda.synchronize()
    say(name, f"{checkpoint.num_bytes / 1e9:.2f} GB read and copied alone", started)
    del arriving
    planned = weight_bytes(checkpoint, read_spec(checkpoint), Target(GPU, torch.bfloat16))
    for _ in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model = load_model(checkpoint, device=GPU)
        torch.cuda.synchronize()
        say(name, "loaded", started)
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        print(f"  planned {planned / 1e9:.2f} GB, held {held / 1e9:.2f}, peak {peak / 1e9:.2f}", flush=True)
        decode(model)
        del model


def decode(model) -> None:
    """Launches of one decode step from Python, without a graph: how long the host takes, and the device."""
    pools = model.kv.create_pools(4, GPU)
    step = build_step([Row([1], 20, [1, 2])], block_size=16, device=GPU)
    with torch.inference_mode():
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.decoder.logits(model.decoder(step, pools))
            launched = time.perf_counter() - started
            torch.cuda.synchronize()
            finished = time.perf_counter() - started
    print(f"  a decode step: launched in {launched * 1e3:.2f} ms, done in {finished * 1e3:.2f}", flush=True)


def say(name: str, what: str, started: float) -> None:
    """A line with its seconds."""
    print(f"{name}: {what} in {time.perf_counter() - started:.2f} s", flush=True)


if __name__ == "__main__":
    main()
