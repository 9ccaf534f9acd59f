"""What each algorithm of INT4 brings, alone and composed: the table of docs/benchmarks.md.

    python eval/ablation.py demo --calib calibration.txt --data dev.txt --device cuda -o ablation
    python eval/ablation.py demo --calib … --data … -o ablation --rows gptq weight_correction+gptq --group-sizes 64

Every row is one `quantkit quantize` and one `quantkit eval`, printed as such; rows that exist are not made again.
"""

import argparse
import math
import shlex
import time
from pathlib import Path

import quantkit

ALGORITHMS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "gptq+refine": "[gptq, refine]",
    "awq": "[awq]",
    "awq+gptq": "[awq, gptq]",
    "rotate": "[rotate]",
    "rotate+gptq": "[rotate, gptq]",
    "weight_correction": "[weight_correction]",
    "weight_correction+gptq": "[weight_correction, gptq]",
    "weight_correction+gptq+refine": "[weight_correction, gptq, refine]",
    "rotate+weight_correction+gptq": "[rotate, weight_correction, gptq]",
    "tune": "[tune]",
    "gptq+tune": "[gptq, tune]",
    "best": "[weight_correction, gptq, refine, tune]",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--rows", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    for size in asked.group_sizes:
        for row in asked.rows:
            settings = [
                f"group_size={size}",
                f"algorithm={ALGORITHMS[row]}",
                f"calibration.samples={asked.samples}",
            ]
            folder = asked.output / f"g{size}-{row}"
            line = ["quantkit", "quantize", asked.model, "-r", "int4-all", "--calib", asked.calib]
            line += ["--device", asked.device, *(word for one in settings for word in ("--set", one))]
            print(shlex.join([*line, "-o", str(folder)]), flush=True)
            started = time.perf_counter()
            quantkit.quantize(
                asked.model, "int4-all", folder, settings=settings, calib=asked.calib, device=asked.device
            )
            seconds = time.perf_counter() - started
            report = quantkit.evaluate(
                asked.model,
                [str(folder)],
                data=asked.data,
                windows=asked.windows,
                device=asked.device,
                dtype="float32",  # of the algorithm alone
            )
            damage = report.candidates[0].damage
            low, high = damage.kl_ci or (math.nan, math.nan)
            print(
                f"  {size:4} {row:32} KL {damage.kl_mean:.4f} ({low:.4f} … {high:.4f})  "
                f"ppl {damage.ppl:.2f}  top-1 {damage.top1:.3f}  {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
