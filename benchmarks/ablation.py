"""What the large model contributes: pretrained, random or no backbone; LoRA or layer norms.

Ten servers of 15 users, the default recipe, three seeds. The table is printed whatever it says.
"""

from __future__ import annotations

import statistics
import sys

from benchmarks.cells import run_cells
from benchmarks.record import Figure, write_result
from fedlam_app.config import Scalar

SEEDS = (2025, 2026, 2027)
VARIANTS: dict[str, dict[str, Scalar]] = {
    "pretrained MiniLM, LoRA": {"model.backbone": "minilm", "model.tuning": "lora"},
    "pretrained MiniLM, LN": {"model.backbone": "minilm", "model.tuning": "ln"},
    "random MiniLM, LoRA": {"model.backbone": "random", "model.tuning": "lora"},
    "random MiniLM, LN": {"model.backbone": "random", "model.tuning": "ln"},
    "no backbone": {"model.backbone": "none", "model.tuning": "ln"},
}


def main() -> int:
    """Train every variant, print the table, write ``results/ablation.json``."""
    from rich.console import Console
    from rich.table import Table

    jobs = [
        {**keys, "seed": seed, "train.evaluate-every": 20} for keys in VARIANTS.values() for seed in SEEDS
    ]
    finals = [records[-1] for records in run_cells(jobs)]
    table = Table("backbone", "clean NMSE [dB]", "s.d.", "global loss [dB]", "trains [%]", "CPU [s]")
    figures = []
    for i, name in enumerate(VARIANTS):
        rows = finals[i * len(SEEDS) : (i + 1) * len(SEEDS)]
        column = {
            key: [float(str(row[key])) for row in rows]
            for key in ("nmse_clean_db", "train_loss_db", "trainable_share", "cpu_s")
        }
        mean = {key: statistics.mean(values) for key, values in column.items()}
        spread = statistics.stdev(column["nmse_clean_db"])
        table.add_row(
            name,
            f"{mean['nmse_clean_db']:.2f}",
            f"{spread:.2f}",
            f"{mean['train_loss_db']:.2f}",
            f"{100 * mean['trainable_share']:.1f}",
            f"{mean['cpu_s']:.0f}",
        )
        figures.append(Figure("foundation", f"ablation, {name}: clean NMSE", mean["nmse_clean_db"], "dB"))
    Console().print(table)
    write_result("ablation", figures, seed=SEEDS[0], extra={"seeds": SEEDS})
    return 0


if __name__ == "__main__":
    sys.exit(main())
