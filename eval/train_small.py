"""A Qwen3 of 31M parameters, trained for a minute on a GPU: a second shape to measure on when there is no hub.

    python eval/train_small.py TOKENIZER_FOLDER text.txt OUTPUT_FOLDER

Its linears divide by 128 (hidden size 384, MLP 1024). It is a poor language model; what rounding costs it is measured
against itself.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

LENGTH, BATCH, RATE, WARM_UP = 512, 16, 1e-3, 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    ids = torch.tensor(tokenizer(asked.text.read_text(encoding="utf-8"))["input_ids"], device=asked.device)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config(len(tokenizer))).to(asked.device)
    train(model, ids, asked.steps)
    model.to(torch.bfloat16).save_pretrained(asked.output)
    tokenizer.save_pretrained(asked.output)


def config(vocab_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def train(model: Qwen3ForCausalLM, ids: torch.Tensor, steps: int) -> None:
    """Next-token prediction on random windows of ids [tokens]."""
    generator = torch.Generator(device=ids.device).manual_seed(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    offsets = torch.arange(LENGTH, device=ids.device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=generator, device=ids.device)
        batch = ids[starts[:, None] + offsets]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
