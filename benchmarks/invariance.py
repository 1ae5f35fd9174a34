"""The same seed gives the same bits on any number of Ray actors and SuperNodes, through plain `flwr run`.

Ten devices, real messages: 1 SuperNode, 2 SuperNodes on one actor of all cores, 10 on an actor a core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.record import Figure, write_result
from fedlam_app.base.vectors import Vector
from fedlam_app.launch import NO_INSTALL

ROOT = Path(__file__).resolve().parents[1]
CORES = os.cpu_count() or 1
# (SuperNodes, cores an actor)
LAYOUTS = ((1, 1), (2, CORES), (10, 1))
KEYS = (
    "job='train' data.users=100 data.test-users=20 data.share=0.1 train.rounds=2 train.local-steps=2"
    " train.batch-rows=16 model.blocks=2"
)


def final_vector(supernodes: int, cores_an_actor: int) -> Vector:
    """Run through `flwr run` and return the trained vector (p,)."""
    binaries = Path(sys.executable).parent
    path = os.pathsep.join([str(binaries), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "run"
        command = [str(binaries / "flwr"), "run", str(ROOT), "--stream", "--run-config"]
        command += [f"{KEYS} results='{results}' federation.supernodes={supernodes}", "--federation-config"]
        command += [f"num-supernodes={supernodes} client-resources-num-cpus={cores_an_actor}"]
        subprocess.run(command, check=True, env={**os.environ, NO_INSTALL: "1", "PATH": path})
        (state,) = (results / "state").glob("*.safetensors")
        return load_file(state)["models"][0]


def main() -> int:
    """Compare the layouts, write ``results/invariance.json``; 0 where all are equal."""
    vectors = [final_vector(*layout) for layout in LAYOUTS]
    figures = [
        Figure(
            "foundation",
            f"{nodes} SuperNodes, {cores} cores an actor: equal to {LAYOUTS[0][0]} SuperNode bit for bit",
            float(np.array_equal(vector, vectors[0])),
            "yes = 1",
            "== 1",
        )
        for (nodes, cores), vector in zip(LAYOUTS[1:], vectors[1:], strict=True)
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:g} {figure.bound}")
    write_result("invariance", figures, seed=2025)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
