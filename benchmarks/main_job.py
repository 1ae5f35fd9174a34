"""The main job as a newcomer starts it: `fedlam run` with every default, start-up and channels included."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import Figure, write_result
from fedlam_app.config import defaults


def main() -> int:
    """Run the default job with an empty cache, write ``results/main_job.json``; 0 where every bound holds."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "run"
        command = [str(Path(sys.executable).with_name("fedlam")), "run", "--results", str(results)]
        started = time.monotonic()
        environment = {**os.environ, "FEDLAM_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run([*command, "--run-config", f"data.cache='{folder}/cache'"], env=environment)
        minutes = (time.monotonic() - started) / 60
        whole = (results / "report.html").is_file() and len(list((results / "plots").glob("*.png"))) >= 3
    figures = [
        Figure("foundation", "the default job, wall", minutes, "min", "<= 6"),
        Figure(
            "foundation",
            "it succeeded and left report and plots",
            float(done.returncode == 0 and whole),
            "yes = 1",
            "== 1",
        ),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.2f} {figure.unit} {figure.bound}")
    write_result("main_job", figures, seed=int(defaults()["seed"]))
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
