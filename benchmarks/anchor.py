"""Anchored on AR(10): never worse than it, and how much better, on QuaDRiGa and on Sionna channels.

30 users a server, 1 to 10 servers, 500 training and 100 test users. The QuaDRiGa file is for
non-commercial research and not part of the project: FEDLAM_SHARED_DATA names its folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.cells import run_cells
from benchmarks.record import Figure, write_result
from fedlam_app.config import Scalar

SEED = 31  # a split of the QuaDRiGa users that no design choice has seen
SERVERS = (1, 2, 5, 10)
SPLIT: dict[str, Scalar] = {"data.users": 500, "data.test-users": 100, "data.share": 0.06}


def sources() -> dict[str, dict[str, Scalar]]:
    """Return the data of each comparison, by name."""
    folder = Path(
        os.environ.get("FEDLAM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    )
    measured = folder / "quadriga_uma_nlos_train.npz"
    files: dict[str, dict[str, Scalar]] = {"Sionna UMa NLOS": {}}
    if measured.exists():
        files["QuaDRiGa UMa NLOS"] = {"data.source": str(measured.resolve())}
    else:
        print(f"no {measured}: the QuaDRiGa figures are left out")
    return files


def main() -> int:
    """Train, compare, write ``results/anchor.json``; 0 where every bound holds."""
    figures = []
    for name, source in sources().items():
        base: dict[str, Scalar] = {"seed": SEED, **SPLIT, **source}
        jobs = [{**base, "model.anchor": "ar", "train.devices": k} for k in reversed(SERVERS)]
        study: dict[str, Scalar] = {
            "job": "case-study",
            "case-study.seeds": str(SEED),
            "case-study.servers": "1",
            "case-study.competitors": "ar,wiener-ar",
            "train.rounds": 1,
            "model.backbone": "random",
            "model.blocks": 1,
        }
        *anchored, classical = run_cells([*jobs, {**base, **study}])
        nmse = {str(r["cell"]): float(str(r["nmse_clean_db"])) for r in classical if r.get("kind") == "final"}
        finals = {
            k: float(str(records[-1]["nmse_clean_db"]))
            for k, records in zip(reversed(SERVERS), anchored, strict=True)
        }
        worst = max(finals.values()) - nmse["ar"]
        figures += [
            Figure(
                "foundation", f"{name}: anchored minus AR(10), worst of 1..10 servers", worst, "dB", "<= 0.05"
            ),
            Figure(
                "foundation",
                f"{name}: AR(10) minus anchored federated, 10 servers",
                nmse["ar"] - finals[10],
                "dB",
                ">= 0.3",
            ),
            Figure("foundation", f"{name}: AR(10), clean NMSE", nmse["ar"], "dB"),
            Figure("foundation", f"{name}: Wiener denoising + AR, clean NMSE", nmse["wiener-ar"], "dB"),
            *(
                Figure("foundation", f"{name}: anchored, {k} servers, clean NMSE", value, "dB")
                for k, value in sorted(finals.items())
            ),
        ]
    write_result("anchor", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
