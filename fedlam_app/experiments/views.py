"""How a task's records are read: which number decides, whether more of it is better, columns, curves, words.

A record names its task (``task``; absent in channel prediction), and everything that shows records (table,
plots, report, progress line) asks the task's :class:`View` instead of knowing a metric by name. Records
hold plain units (a share of 1, bytes, nats); what people read (%, MB) is made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlam_app.base.registry import pick
from fedlam_app.config import CLASSICAL

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One figure of the final table."""

    key: str  # of a record
    head: str  # in the terminal
    name: str  # in the report, above its unit
    unit: str
    show: Callable[[float], str]  # what is not finite is shown as nothing
    optional: bool = False  # left out where no row has it


@dataclass(frozen=True)
class Curve:
    """One quantity of the learning curves."""

    key: str
    title: str
    axis: str
    scale: float = 1.0  # from a record's unit to the axis'


@dataclass(frozen=True)
class View:
    """What one kind of task shows."""

    title: str
    held_out: str  # what is held out, for headings
    learner: str  # what a row is called
    source: tuple[str, str]  # what the data are called, and the key that says where they are from
    classical: tuple[str, ...]  # cells that do not learn by gradients, or not at all
    noun: str  # the metric's, for captions
    higher: bool  # whether more of it is better
    result: Callable[[float], str]  # the metric in a sentence
    gap: Callable[[float], str]  # a difference of two
    columns: tuple[Column, ...]  # the metric first
    curves: tuple[Curve, Curve]  # the training loss, then the metric
    costs: tuple[str, ...]  # figures that set the metric against a cost: 'uplink', 'seconds'
    mean_keys: tuple[str, ...]
    line: Callable[[Record], str]
    backbone: bool = True  # whether its models stand around one

    @property
    def metric(self) -> str:
        """The key of the number that decides."""
        return self.columns[0].key

    def error(self, score: float) -> float:
        """Return the metric as something to make small; what was not measured is infinitely bad."""
        return math.inf if math.isnan(score) else -score if self.higher else score


def of_task(task: str) -> View:
    """Return the view of a task by its name; the empty name is channel prediction's."""
    return pick(VIEWS, task or "channel-prediction", "task")


def of_records(records: Sequence[Record]) -> View:
    """Return the view of a run: all of its records are of one task."""
    return of_task(next((str(record["task"]) for record in records if record.get("task")), ""))


def line(task: str, scores: Record) -> str:
    """Return what an evaluation found, for the line that tells of progress; of a fleet its clock, too."""
    seconds = number(scores.get("seconds")) if "jain" in scores else math.nan
    clock = plain(seconds, ",.0f" if seconds >= 100 else ".1f")
    return of_task(task).line(scores) + (f", {clock} s" if clock else "")


def mean_keys(task: str) -> tuple[str, ...]:
    """Return the keys kept one a model too (``<key>_each``) where several models are averaged."""
    return of_task(task).mean_keys


def number(value: object) -> float:
    """Return a JSON number as float; null and what is absent are NaN."""
    return float(value) if isinstance(value, int | float) else math.nan


def decibel(value: float) -> str:
    """Render decibels with two places and a true minus."""
    return plain(value, ".2f").replace("-", "−")


def plain(value: float, form: str) -> str:
    """Render a number, or nothing where there is none."""
    return format(value, form) if math.isfinite(value) else ""


def _fixed(form: str, scale: float = 1.0) -> Callable[[float], str]:
    return lambda value: plain(scale * value, form)


def _cpu(value: float) -> str:
    return plain(value, ".0f" if value >= 1 else ".1f")


def _megabytes(value: float) -> str:
    """A LoRA of rank 1 and a whole model differ by thousands: two digits at least, and zero is nothing."""
    size = value / 1e6
    return "" if size == 0 else plain(size, ".2g" if size < 1 else ".1f" if size < 100 else ",.0f")


def _channel_line(scores: Record) -> str:
    loss, nmse = scores["train_loss_db"], scores["nmse_clean_db"]
    return f"global loss {loss:.2f} dB, held-out NMSE {nmse:.2f} dB (clean)"


def _text_line(scores: Record) -> str:
    """A baseline that does not train has no training loss to tell."""
    loss = plain(number(scores.get("train_loss")), ".3f")
    accuracy = f"held-out accuracy {100 * number(scores.get('accuracy')):.1f} %"
    return f"training loss {loss}, {accuracy}" if loss else accuracy


EPSILON = Column("epsilon", "spent ε", "spent ε", "", _fixed(".2f"), optional=True)  # the largest of a device
CHANNELS = View(
    title="Channel prediction",
    held_out="Held-out users",
    learner="predictor",
    source=("channels", "data.source"),
    classical=CLASSICAL,
    noun="NMSE",
    higher=False,
    result=lambda value: f"held-out NMSE {decibel(value)} dB against the clean channel",
    gap=lambda value: f"{value:.2f} dB",
    columns=(
        Column("nmse_clean_db", "NMSE clean dB", "NMSE clean", "dB", decibel),
        Column("nmse_noisy_db", "noisy dB", "NMSE noisy", "dB", decibel),
        Column("nmse_per_user_db", "per user dB", "NMSE per user", "dB", decibel),
        Column("train_loss_db", "loss dB", "global loss", "dB", decibel),
        EPSILON,
        Column("spectral_efficiency_bps_hz", "SE bit/s/Hz", "spectral eff.", "bit/s/Hz", _fixed(".2f")),
        Column("trainable_share", "trains %", "trains", "%", _fixed(".1f", 100)),
        Column("bytes_up", "up MB", "up", "MB", lambda value: plain(value / 1e6, ".1f") if value else ""),
        Column("cpu_s", "CPU s", "CPU", "s", _cpu),
    ),
    curves=(
        Curve("train_loss_db", "Global training loss (union of all shards)", "loss (dB)"),
        Curve("nmse_clean_db", "Held-out users, against the clean channel", "NMSE (dB)"),
    ),
    costs=(),
    mean_keys=("train_loss_db", "nmse_clean_db"),
    line=_channel_line,
)

TEXT_COLUMNS = (
    Column("accuracy", "accuracy %", "accuracy", "%", _fixed(".1f", 100)),
    Column("loss", "loss", "loss", "nats", _fixed(".3f")),
    EPSILON,
    Column("attack_auc", "attack AUC", "attack AUC", "", _fixed(".3f"), optional=True),
    Column("perplexity", "perplexity", "perplexity", "", _fixed(",.1f"), optional=True),
    Column("trainable_share", "trains %", "trains", "%", _fixed(".2f", 100)),
    Column("bytes_up", "up MB", "up", "MB", _megabytes),
    Column("bytes_down", "down MB", "down", "MB", _megabytes),
    Column("seconds", "virtual s", "virtual", "s", lambda s: plain(s, ".1f") if s else "", optional=True),
    Column("cpu_s", "CPU s device", "CPU, devices", "s", _cpu),
    Column("server_cpu_s", "CPU s server", "CPU, server", "s", lambda s: _cpu(s) if s else "", optional=True),
)


def _classes(title: str, examples: str, source: tuple[str, str], backbone: bool = True) -> View:
    return View(
        title=title,
        held_out=f"Held-out {examples}",
        learner="model",
        source=source,
        classical=("majority", "linear-probe"),
        noun="accuracy",
        higher=True,
        result=lambda value: f"held-out accuracy {100 * value:.1f} %",
        gap=lambda value: f"{100 * value:.1f} points",
        columns=TEXT_COLUMNS,
        curves=(
            Curve("train_loss", "Global training loss (union of all shards)", "cross-entropy (nats)"),
            Curve("accuracy", f"Held-out {examples}", "accuracy (%)", scale=100.0),
        ),
        costs=("uplink", "seconds"),
        mean_keys=("accuracy",),
        line=_text_line,
        backbone=backbone,
    )


_TEXTS = ("texts", "text.source")
VIEWS = {
    "channel-prediction": CHANNELS,
    "text-classification": _classes("Text classification", "texts", _TEXTS),
    "language-modelling": _classes("Language modelling", "texts", _TEXTS),
    "mixture": _classes("Gaussian mixture", "examples", ("Gaussians a class", "mixture.clusters"), False),
}
