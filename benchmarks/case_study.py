"""The paper's case study in full: three seeds, 1, 2, 5 and 10 edge servers, every competitor.

Runs `fedlam run` (real Flower messages through Ray) into a folder that survives, so an interrupted
benchmark goes on where it stopped. About 25 minutes on 2 cores.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.record import Figure, write_result
from fedlam_app.base import machine
from fedlam_app.config import defaults
from fedlam_app.experiments.plots import final_records
from fedlam_app.experiments.track import read_metrics

SEEDS = (2025, 2026, 2027)
COMPETITORS = (
    "llm4cp-local,gru-local,rnn-local,lstm-local,cnn-local,transformer-local,central,central-small,"
    "repeat-last,ar,pad,ridge,wiener-ar"
)
# A folder a commit: what an earlier version measured is not this one's.
FOLDER = Path.home() / "fedlam-runs" / f"benchmark-case-study-{machine.commit(Path(__file__).parent)[:12]}"
SERVERS = (1, 2, 5, 10)


def run(folder: Path) -> None:
    """Run or resume the full preset into ``folder``."""
    overrides = (
        f"case-study.seeds='{','.join(map(str, SEEDS))}' case-study.competitors='{COMPETITORS}'"
        f" case-study.servers='{','.join(map(str, SERVERS))}'"
    )
    command = [str(Path(sys.executable).with_name("fedlam")), "run", "--results", str(folder)]
    resume = ["--resume"] if (folder / "config.json").exists() else []
    subprocess.run([*command, *resume, "--run-config", overrides], check=True)


def figures_of(everything: Sequence[Mapping[str, object]]) -> list[Figure]:
    """Compute the figures from a run's records; every value is a mean over seeds.

    Models trained alone are stopped early by an oracle: each shard's best evaluation on the held-out users
    counts, which no real site could choose. It can only favour them.
    """
    records = [early_stopped(record, everything) for record in final_records(everything)]
    nmse = {cell: _mean(records, cell, "nmse_clean_db") for cell in _cells(records)}
    loss = {cell: _mean(records, cell, "train_loss_db") for cell in _cells(records)}
    fed = f"fed-{SERVERS[-1]}"
    figures = [
        _figure("federated (10) minus pooled central, clean NMSE", nmse[fed] - nmse["central"], "<= 0.5"),
        _figure("federated (10) minus central with 10x the steps", nmse[fed] - nmse["central-small"], ""),
    ]
    for cell, bound in (("llm4cp-local", ">= 1.5"), ("gru-local", ">= 3"), ("rnn-local", ">= 4")):
        figures.append(_figure(f"{cell} minus federated (10), clean NMSE", nmse[cell] - nmse[fed], bound))
    for name, table in (("held-out NMSE", nmse), ("global training loss", loss)):
        curve = [table[f"fed-{k}"] for k in SERVERS]
        rises = [b - a for a, b in itertools.pairwise(curve)]
        figures += [
            _figure(f"largest rise of {name} over 1, 2, 5, 10 servers", max(rises), "<= 0.1"),
            _figure(f"gain of {name} from 1 to 2 minus gain from 5 to 10", rises[2] - rises[0], "> 0"),
        ]
    for cell in ("llm4cp-local", "gru-local", "rnn-local"):
        figures.append(_figure(f"{cell} minus federated (10), global loss", loss[cell] - loss[fed], ">= 1"))
    figures += [_figure(f"clean NMSE of {cell}", value, "") for cell, value in sorted(nmse.items())]
    share = _mean(records, fed, "trainable_share")
    rounds = int(defaults()["train.rounds"])
    per_server = _mean(records, fed, "bytes_up") / rounds / SERVERS[-1] / 1e6
    figures += [
        Figure("foundation", "parameters that travel", 100 * share, "%", "<= 5"),
        Figure("foundation", "uplink per server and round", per_server, "MB", "<= 6.5"),
    ]
    return figures


def early_stopped(
    final: Mapping[str, object], everything: Sequence[Mapping[str, object]]
) -> Mapping[str, object]:
    """Return a local cell's final record with the mean over shards of each one's best evaluation."""
    best = dict(final)
    for key in ("nmse_clean_db", "train_loss_db"):
        each = [r[f"{key}_each"] for r in everything if r["key"] == final["key"] and f"{key}_each" in r]
        if each:
            best[key] = statistics.mean(map(min, zip(*each, strict=True)))
    return best


def main() -> int:
    """Run, compute, write ``results/case_study.json``; 0 where every bound holds."""
    run(FOLDER)
    everything = read_metrics(FOLDER)
    records = final_records(everything)
    figures = figures_of(everything)
    finals = [
        {key: record.get(key) for key in ("cell", "seed", "nmse_clean_db", "nmse_noisy_db", "train_loss_db")}
        for record in records
    ]
    write_result("case_study", figures, seed=SEEDS[0], extra={"seeds": SEEDS, "finals": finals})
    return 0 if all(figure.holds for figure in figures) else 1


def _cells(records: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(str(record["cell"]) for record in records))


def _mean(records: Sequence[Mapping[str, object]], cell: str, key: str) -> float:
    return statistics.mean(float(str(r[key])) for r in records if r["cell"] == cell)


def _figure(name: str, value: float, bound: str) -> Figure:
    return Figure("foundation", name, value, "dB", bound)


if __name__ == "__main__":
    sys.exit(main())
