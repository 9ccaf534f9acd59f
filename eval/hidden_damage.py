"""Damage that perplexity hides: it prefers, of two candidates, the one that has lost a skill.

    python eval/hidden_damage.py demo -o FOLDER
    python eval/hidden_damage.py demo -o FOLDER --bits 3 --heads 2 --limit 60 --windows 8 --length 256

Induction heads look for what followed the last time, and copy it. `heads` rounds the queries and keys of the strongest
of them to a few bits, with a scale for every 64 weights; `mlp` rounds one MLP elsewhere. Both are 16-bit checkpoints
with rounded weights, so that nothing but the rounding differs.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import quantkit
from quantkit.evaluation import EvalReport
from quantkit.formats.source import resolve_source

GROUP = 64
PROBE = "probe_copying"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2, help="KV heads, strongest first")
    parser.add_argument("--mlp", type=int, default=12, help="the layer whose MLP is rounded instead")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    logging.disable_progress_bar()
    source = resolve_source(asked.model)
    heads = strongest_induction_heads(source, asked.heads)
    print("KV heads (layer, head) of the strongest induction heads:", heads)
    mlp = f"model.layers.{asked.mlp}.mlp."
    roundings = {
        "heads": rows_of(source, heads),
        "mlp": {f"{mlp}{name}_proj.weight": [slice(None)] for name in ("gate", "up", "down")},
    }
    for name, rows in roundings.items():
        write_rounded(source, asked.output / name, rows, asked.bits)
    report = quantkit.evaluate(
        asked.model,
        [str(asked.output / name) for name in roundings],
        windows=asked.windows,
        length=asked.length,
        tasks=[PROBE],
        limit=asked.limit,
    )
    show(report)


def strongest_induction_heads(source: Path, count: int, length: int = 48) -> list[tuple[int, int]]:
    """KV heads by how much attention their best query head gives, on random tokens said twice, to the next token."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(1000, model.config.vocab_size, (2, length), generator=generator).repeat(1, 2)
    with torch.no_grad():
        attentions = model(ids_BT, output_attentions=True).attentions
    later = torch.arange(length, 2 * length - 1)
    score_LH = torch.stack(
        [scores_BHTT[:, :, later, later - length + 1].mean((0, 2)) for scores_BHTT in attentions]
    )
    kv_heads = model.config.num_key_value_heads
    score_LK = score_LH.unflatten(1, (kv_heads, -1)).amax(-1)
    return [divmod(int(place), kv_heads) for place in score_LK.flatten().topk(count).indices]


def rows_of(source: Path, heads: list[tuple[int, int]]) -> dict[str, list[slice]]:
    """Rows of q_proj and k_proj that belong to KV heads."""
    config = AutoConfig.from_pretrained(source)
    size, queries = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    rows: dict[str, list[slice]] = {}
    for layer, head in heads:
        for name, height in (("k", size), ("q", size * queries)):
            rows.setdefault(f"model.layers.{layer}.self_attn.{name}_proj.weight", []).append(
                slice(head * height, (head + 1) * height)
            )
    return rows


def write_rounded(source: Path, folder: Path, rows: dict[str, list[slice]], bits: int) -> None:
    """A copy of the checkpoint with these rows rounded."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, parts in rows.items():
        for part in parts:
            tensors[name][part] = rounded(tensors[name][part].float(), bits).to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})


def rounded(weight_NK: Tensor, bits: int) -> Tensor:
    """Symmetric, to the nearest of 2^bits codes, with the scale that the largest weight of a group needs."""
    most = 2 ** (bits - 1)
    groups = weight_NK.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / (most - 0.5)
    return ((groups / scale).round().clamp(-most, most - 1) * scale).flatten(1)


def show(report: EvalReport) -> None:
    print(
        "| | perplexity | KL | top-1 | copying | recovery (95 %) | p |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    (first, *_) = (found for found in report.candidates[0].tasks)
    print(f"| original | {report.reference.ppl:.2f} | | | {first.reference:.2f} | | |")
    for candidate in report.candidates:
        damage, (task, *_) = candidate.damage, candidate.tasks
        assert damage is not None and task.recovery_ci is not None, "rounded weights are finite"
        low, high = task.recovery_ci
        print(
            f"| {Path(candidate.path).name} | {damage.ppl:.2f} ({damage.ppl_increase:+.1f} %) | {damage.kl_mean:.4f} "
            f"| {damage.top1:.3f} | {task.candidate:.2f} | {task.recovery:.0f} % ({low:.0f} … {high:.0f}) "
            f"| {task.p_value:.2g} |"
        )


if __name__ == "__main__":
    main()
