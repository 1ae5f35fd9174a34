"""What a run leaves behind when its cells are done: the adapter, the plots, the report, the table."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedlam_app.base.layout import Layout, expand, factors_at
from fedlam_app.base.records import EvaluateOrder, cut
from fedlam_app.base.registry import pick
from fedlam_app.base.vectors import Vector, pack, unpack
from fedlam_app.config import RunConfig, Scalar, parse, to_flat
from fedlam_app.experiments.cells import Cell
from fedlam_app.experiments.federate import federate
from fedlam_app.experiments.report import write_report
from fedlam_app.experiments.summary import final_table
from fedlam_app.experiments.track import RunFolder
from fedlam_app.models.export import Factors, export
from fedlam_app.models.factors import layout_of
from fedlam_app.rules import TEXT_TASKS
from fedlam_app.tasks import TASKS
from strategies.flora import at_most_full_rank


def finish(folder: RunFolder, config: RunConfig, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
    """Export the first cell's model, draw the plots, write the report, and say the table."""
    export_adapter(folder, config, cells[0])
    report = write_report(folder.path)
    for line in _rendered(folder).splitlines():
        say(line)
    say(f"Report: {report}")


def export_adapter(folder: RunFolder, config: RunConfig, cell: Cell) -> None:
    """Write the adapter of a trained cell: the largest federation comes first in a case study.

    What is exported is what an evaluation scores: the first model, and what devices were told to keep.
    """
    own = parse({**to_flat(config), **cell.overrides})
    state = folder.load_state(cell.key)
    if state is None:
        return
    task = pick(TASKS, own.task, "task")(own)
    federation = federate(own, json.dumps(cell.overrides), task, task.build_model())
    federation.load(state[0])
    scored = federation.evaluation_order([0], [], 0)
    # Blocks on the device or on the server: the same parameters in the same order (models/cut.py).
    once: dict[str, Scalar] = {"privacy.mechanism": "none"} if own.privacy.mechanism == "release-once" else {}
    whole = parse({**to_flat(own), "split.device-blocks": 0, **once})
    model = pick(TASKS, own.task, "task")(whole).build_model()
    layout = layout_of(model, own.model.alpha / own.model.rank)
    vector, factors = _joined(scored, layout)
    start = pack(model.trainable().values())
    # Blocks that stood still on the device come first, and are as they started.
    unpack(np.concatenate([start[: len(start) - len(vector)], vector]), model.trainable().values())
    export(
        model,
        folder.path / "adapter",
        backbone=own.model.backbone,
        load=_load(own),
        notes=list(_notes(own, cell, scored, len(federation.algorithm.models()))),
        factors=factors,
        personal=scored.keeps == "modules",
    )


def _joined(scored: EvaluateOrder, layout: Layout) -> tuple[Vector, Factors | None]:
    """Return the model's vector (p,) and, where something was merged, factors that hold that too."""
    vector = scored.vectors[0]
    sizes = [rank * sum(pair.inputs + pair.outputs for pair in layout.pairs) for rank in scored.entry_ranks]
    merged = []
    for kind, rank, entry in zip(scored.kinds, scored.entry_ranks, cut(scored.entries, sizes), strict=True):
        if kind == "merge":
            merged.append(factors_at(layout, entry, rank))
        elif len(vector) != layout.size:
            vector = expand(vector, entry, layout)
    if not merged:
        return vector, None
    every = zip(layout.factors(vector.astype(np.float64)), *merged, strict=True)
    stacked = [
        (np.concatenate([a for a, _ in pair]), np.concatenate([b for _, b in pair], axis=1)) for pair in every
    ]
    names = [pair.name for pair in layout.pairs]
    return vector, dict(zip(names, at_most_full_rank(stacked), strict=True))


def _load(config: RunConfig) -> str:
    """Return the expression that gives the backbone that was trained."""
    model = config.model
    words = [f'"{model.backbone}"', f"blocks={model.blocks}"]
    words += [f'weights="{model.weights}"'] if model.weights else []
    words += [f"seed={config.seed}"] if model.backbone.startswith("random") else []
    words += [f"positions={config.text.max_tokens}"] if config.task in TEXT_TASKS else []
    return f"backbones.load({', '.join(words)})"


def _notes(config: RunConfig, cell: Cell, scored: EvaluateOrder, models: int) -> Iterator[str]:
    """Say what this is, and what of it is somewhere else."""
    yield cell.label
    if models > 1:
        yield f"There are {models} models, one a device; this is the first device's."
    if scored.keeps == "b":
        yield (
            "A is shared, but every device has its own B, which never travels. The B in here is the one from"
            " which all devices started (zero), so that this adapter alone changes nothing."
        )
    if scored.keeps == "modules":
        yield "The devices' own modules (the head, and what trains before the backbone) stay on the devices."
        if blocks := config.split.device_blocks:
            yield f"So do the adapters of the first {blocks} blocks; in here they are as they started."
    if "merge" in scored.kinds:
        yield "What training merged into the frozen weights is part of the factors, which raises their rank."


def _rendered(folder: RunFolder) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=140).print(final_table(folder.read_metrics()))
    return text.getvalue()
