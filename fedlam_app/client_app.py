"""The ClientApp: decode an order, work through its devices, encode the report.

A SuperNode is a worker. In a simulation it serves many devices; in a real federation it is one
device, through the same code.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.adapter import Worker
from fedlam_app.base.records import (
    EvaluateOrder,
    EvaluateReport,
    TrainOrder,
    TrainReport,
    decode,
    refuse,
    reply,
)
from fedlam_app.base.registry import pick
from fedlam_app.config import Scalar, parse
from fedlam_app.tasks import TASKS

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the devices of a ``TrainOrder``, one after the other."""
    return _answer(message, context, _train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the (model, chunk) pairs of an ``EvaluateOrder``."""
    return _answer(message, context, _evaluate)


def _train(message: Message, base: str) -> TrainReport:
    order = decode(message.content, TrainOrder)
    worker = _worker(base, order.cell)
    started = time.process_time()
    results = [
        worker.train(order.vectors[row], device, order.round)
        for device, row in zip(order.devices, order.rows, strict=True)
    ]
    return TrainReport(
        devices=order.devices,
        weights=[float(worker.task.examples(device)) for device in order.devices],
        losses=[loss for _, loss in results],
        cpu_s=time.process_time() - started,
        peak_rss_bytes=peak_rss_bytes(),
        vectors=np.stack([vector for vector, _ in results]),
    )


def _evaluate(message: Message, base: str) -> EvaluateReport:
    order = decode(message.content, EvaluateOrder)
    worker = _worker(base, order.cell)
    started = time.process_time()
    tables = [
        worker.evaluate(order.vectors[row], chunk, order.antennas)
        for row, chunk in zip(order.rows, order.chunks, strict=True)
    ]
    return EvaluateReport(
        rows=order.rows,
        chunks=order.chunks,
        users=[len(table) for table in tables],
        cpu_s=time.process_time() - started,
        peak_rss_bytes=peak_rss_bytes(),
        table=np.concatenate(tables),
    )


# One process serves every message of a run, and experiments alternate: keep a few resident.
@functools.lru_cache(maxsize=4)
def _worker(base: str, cell: str) -> Worker:
    """Build the task and model of an experiment: the run's configuration and the cell's overrides (JSON)."""
    import torch

    torch.set_num_threads(1)  # results must not depend on how many cores an actor was given
    config = parse({**json.loads(base), **json.loads(cell)})
    return Worker(config, pick(TASKS, config.task, "task")(config))


def peak_rss_bytes() -> int:
    """Return this process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _answer(
    message: Message, context: Context, work: Callable[[Message, str], TrainReport | EvaluateReport]
) -> Message:
    """Do the work; a failure travels back as one sentence that names the place, not as silence."""
    run_config: dict[str, Scalar] = dict(context.run_config)
    try:
        return reply(work(message, json.dumps(run_config, sort_keys=True)), message)
    except Exception as error:
        traceback.print_exc()
        where = message.content.config_records["config"]
        items = where.get("devices", where.get("chunks"))
        place = f"{message.metadata.message_type} of {items!r}"
        return refuse(f"{place}: {type(error).__name__}: {error}", message)
