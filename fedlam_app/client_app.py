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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.adapter import Worker
from clients.faults import vanishes
from clients.secure import serve
from clients.split import Answer, SplitDevice
from fedlam_app.base import packing
from fedlam_app.base.packing import gathered
from fedlam_app.base.records import (
    EvaluateOrder,
    EvaluateReport,
    MaskedOrder,
    ModulesOrder,
    ModulesReport,
    Report,
    SecureOrder,
    SecureReport,
    SiteReport,
    SplitOrder,
    SplitReport,
    TrainOrder,
    TrainReport,
    decode,
    join,
    kind_of,
    refuse,
    reply,
)
from fedlam_app.base.registry import pick
from fedlam_app.config import Scalar, parse
from fedlam_app.privacy.accounting import BudgetSpent
from fedlam_app.tasks import TASKS

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do what an order asks of its devices, one after the other."""
    return _answer(message, context, ORDERS)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the (model, chunk) pairs of an ``EvaluateOrder``."""
    return _answer(message, context, {"EvaluateOrder": _evaluate})


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer a ``SiteOrder``: which device this SuperNode is, as its operator says."""
    device = context.node_config.get("partition-id")
    if not isinstance(device, int):
        return refuse(f"'partition-id' = {device!r} in this site's --node-config is no device", message)
    return reply(SiteReport(device=device), message)


def _train(content: RecordDict, base: str) -> TrainReport:
    order = decode(content, TrainOrder)
    worker = _worker(base, order.cell)
    started = time.process_time()
    here = [p for p, k in enumerate(order.devices) if not vanishes(worker.config, k, order.round)]
    refused: list[int] = []
    report = gathered(order, (a for place in here if (a := _allowed(worker, order, place, refused))))
    ledgers = _books(worker, report.devices)
    report = replace(report, refused=refused, ledgers=ledgers)
    return replace(report, cpu_s=time.process_time() - started, peak_rss_bytes=peak_rss_bytes())


def _split(content: RecordDict, base: str) -> SplitReport:
    order = decode(content, SplitOrder)
    device = _device(base, order.cell)
    started = time.process_time()
    found: list[Answer | None] = []
    refused: list[int] = []
    for place, number in enumerate(order.devices):
        try:
            found.append(device.answer(order, place))
        except BudgetSpent:
            refused.append(number)
    answers = [answer for answer in found if answer is not None]
    payload, sizes = join([answer.payload for answer in answers], np.uint8)
    return SplitReport(
        devices=[answer.device for answer in answers],
        weights=[answer.weight for answer in answers],
        losses=[answer.loss for answer in answers],
        refused=refused,
        ledgers=_books(device.worker, [answer.device for answer in answers]),
        cpu_s=time.process_time() - started,
        peak_rss_bytes=peak_rss_bytes(),
        payload=payload,
        sizes=sizes,
    )


def _allowed(worker: Worker, order: TrainOrder, place: int, refused: list[int]) -> packing.Answer | None:
    """Return a device's answer; a device whose budget is spent is added to ``refused``."""
    try:
        return worker.obey(order, place)
    except BudgetSpent:
        refused.append(order.devices[place])
        return None


def _books(worker: Worker, devices: list[int]) -> list[str]:
    """Return the devices' privacy ledgers; nothing without privacy."""
    if not worker.config.privacy.on:
        return []
    books = worker.ledgers.snapshot(devices)
    return [books.get(str(k), "") for k in devices]


def _modules(content: RecordDict, base: str) -> ModulesReport:
    order = decode(content, ModulesOrder)
    device = _device(base, order.cell)
    started = time.process_time()
    vectors = device.hand_in(order)
    return ModulesReport(
        devices=order.devices,
        cpu_s=time.process_time() - started,
        peak_rss_bytes=peak_rss_bytes(),
        vectors=vectors,
    )


def _secure(content: RecordDict, base: str, kind: type[SecureOrder] | type[MaskedOrder]) -> SecureReport:
    order = decode(content, kind)
    worker = _worker(base, order.cell)
    started = time.process_time()
    report = serve(worker, order)
    return replace(report, cpu_s=time.process_time() - started, peak_rss_bytes=peak_rss_bytes())


def _evaluate(content: RecordDict, base: str) -> EvaluateReport:
    order = decode(content, EvaluateOrder)
    worker = _worker(base, order.cell)
    started = time.process_time()
    tables = [worker.score(order, place) for place in range(len(order.rows))]
    return EvaluateReport(
        rows=order.rows,
        chunks=order.chunks,
        users=[table.shape[1] for table in tables],
        cpu_s=time.process_time() - started,
        peak_rss_bytes=peak_rss_bytes(),
        table=np.concatenate(tables, axis=1),
    )


ORDERS: dict[str, Callable[[RecordDict, str], Report]] = {
    "TrainOrder": _train,
    "SplitOrder": _split,
    "ModulesOrder": _modules,
    "SecureOrder": functools.partial(_secure, kind=SecureOrder),
    "MaskedOrder": functools.partial(_secure, kind=MaskedOrder),
}


# One process serves every message of a run, and experiments alternate: keep a few resident.
@functools.lru_cache(maxsize=4)
def _worker(base: str, cell: str) -> Worker:
    """Build the task and model of an experiment: the run's configuration and the cell's overrides (JSON)."""
    import torch

    torch.set_num_threads(1)  # results must not depend on how many cores an actor was given
    config = parse({**json.loads(base), **json.loads(cell)})
    return Worker(config, pick(TASKS, config.task, "task")(config))


@functools.lru_cache(maxsize=4)
def _device(base: str, cell: str) -> SplitDevice:
    """Return the device side of a split experiment, around its worker."""
    return SplitDevice(_worker(base, cell))


def peak_rss_bytes() -> int:
    """Return this process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _keep_to_its_own(message: Message, context: Context) -> None:
    """Refuse work for other devices where a SuperNode is a site: it may have restarted as another device."""
    own, asked = context.node_config.get("partition-id"), message.content.config_records["config"]
    if context.run_config.get("federation.placement") == "sites" and asked.get("devices", [own]) != [own]:
        raise ValueError(f"this site is device {own}")


@contextmanager
def _books_kept(content: RecordDict, base: str, context: Context) -> Iterator[None]:
    """Bring the devices' privacy ledgers out of this SuperNode's state, and leave them there."""
    asked = content.config_records["config"]
    cell, devices = str(asked["cell"]), asked.get("devices", [])
    worker = _worker(base, cell)
    if not worker.config.privacy.on or not isinstance(devices, list):
        yield
        return
    name = f"ledgers {cell}"
    kept = {k: str(text) for k, text in context.state.config_records.get(name, {}).items()}
    worker.ledgers.restore(kept)
    yield
    kept |= worker.ledgers.snapshot([int(k) for k in devices])
    context.state.config_records[name] = ConfigRecord(dict(kept))


def _answer(
    message: Message, context: Context, known: Mapping[str, Callable[[RecordDict, str], Report]]
) -> Message:
    """Do the work; a failure travels back as one sentence that names the place, not as silence."""
    run_config: dict[str, Scalar] = dict(context.run_config)
    try:
        _keep_to_its_own(message, context)
        work = pick(known, kind_of(message.content), "order")
        base = json.dumps(run_config, sort_keys=True)
        with _books_kept(message.content, base, context):
            return reply(work(message.content, base), message)
    except Exception as error:
        traceback.print_exc()
        where = message.content.config_records["config"]
        items = where.get("devices", where.get("chunks"))
        place = f"{message.metadata.message_type} of {items!r}"
        return refuse(f"{place}: {type(error).__name__}: {error}", message)
