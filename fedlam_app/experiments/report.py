"""``report.html``: one file that needs no network, rebuilt at any time from the run's folder.

Headline sentences, the final table with the strongest classical row marked and what loses to it (or a
sweep's table by its axes), what is promised of privacy, the plots (inline PNG), the resolved configuration,
versions and machine.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlam_app.base.store import atomic_file
from fedlam_app.config import defaults
from fedlam_app.experiments import fleet_table, track, views
from fedlam_app.experiments.fleet_plots import fleet_figures
from fedlam_app.experiments.plots import save, write_plots
from fedlam_app.experiments.promises import promised
from fedlam_app.experiments.summary import (
    Row,
    cells_of_row,
    columns_of,
    final_table,
    headlines,
    loses,
    rows_of,
    strongest_classical,
)
from fedlam_app.experiments.sweep_plots import sweep_figures
from fedlam_app.experiments.sweep_table import is_sweep, sentences, sweep_html
from fedlam_app.experiments.track import RunFolder
from fedlam_app.experiments.views import View

__all__ = ["Run", "final_table", "page", "read_run", "write_report"]

PLOTS = "plots"
CAPTIONS = {
    "loss": "Loss and {noun} against the round. Bands are the range over seeds; dashed levels do not train.",
    "uplink": "Held-out {noun} against what all devices have sent up by then. Dashed levels: the last {noun}"
    " of what is not federated.",
    "seconds": "Held-out {noun} against the virtual time of the devices' clock. Dashed levels: the last"
    " {noun} of what runs without that clock.",
    "sweep": "Final held-out {noun} at every point of the sweep, and how well an attack by loss tells members"
    " from others. Bars: the standard deviation over seeds.",
    "servers": "Final held-out NMSE against the number of edge servers, each with its own shard.",
    "speed": "Final held-out NMSE against the users' speed.",
    "horizon": "Final held-out NMSE of each predicted slot.",
    "time-to-accuracy": "Held-out {noun} against virtual time. Seeds are averaged at the same time, as far as"
    " all of them go; bands are their range. Dashed levels: the last {noun} of what runs without a fleet.",
    "fairness-energy": "Jain's index of how often each device took part (1: all as often); energy, mean over"
    " all devices, chosen or not; and energy spent for each update that arrived.",
    "chosen": "Which share of the updates came from which share of the devices, mean over seeds: the"
    " nearer to the diagonal, the fairer. Dashed: what a uniform draw is expected to give, could every device"
    " be reached always.",
    "map": "Where the devices of the first run stood at its end, and how often each had taken part.",
}
_FLEET_NOTE = (
    "Chosen = arrived + lost + late; trained = arrived + lost. Times to 90 % are seen at evaluations only."
    " Jain: 1 where every device took part as often."
)
_TITLES = {"compare": "strategies compared", "sweep": "a sweep"}
_ON_ITS_WAY = "No cell has finished yet: what follows is a run on its way."


@dataclass(frozen=True)
class Run:
    """What a run's folder says."""

    path: Path
    about: Mapping[str, Any]  # config.json
    records: Sequence[Mapping[str, Any]]


def read_run(folder: Path) -> Run:
    """Return a run folder's contents; ``ValueError`` where it is none or holds no record yet."""
    if not (folder / track.CONFIG).is_file():
        raise ValueError(f"{folder} holds no run (no {track.CONFIG}); it must be a results folder")
    records = track.read_metrics(folder)
    if not records:
        raise ValueError(f"{folder} holds no measurement yet (no record in {track.METRICS})")
    return Run(folder, json.loads((folder / track.CONFIG).read_text(encoding="utf-8")), records)


def write_report(folder: Path) -> Path:
    """Redraw the plots, write ``report.html`` atomically, and return its path."""
    run = read_run(folder)
    plots = write_plots(run.records, folder / PLOTS)
    on_air = RunFolder(folder), run.about.get("config", {}), run.records
    plots += save(lambda: fleet_figures(*on_air), folder / PLOTS)
    plots = save(lambda: sweep_figures(run.records), folder / PLOTS) + plots
    path = folder / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(page(run, plots), encoding="utf-8")
    return path


def page(run: Run, plots: Iterable[Path]) -> str:
    """Return the report as one self-contained HTML document."""
    rows = rows_of(run.records)
    view = views.of_records(run.records)
    config = run.about.get("config", {})
    title = _title(config, view)
    none = f"No cell has a held-out {view.noun}." if rows else _ON_ITS_WAY
    sweep = is_sweep(run.records)
    said = (sentences(run.records) if sweep else headlines(rows)) or [none]
    results = sweep_html(run.records) if sweep else _results(rows)
    figures = "".join(_figure(path, view) for path in plots)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_(title)}</title><style>{_CSS}</style></head><body><main>
<header><h1>{_(title)}</h1><p class="sub">{_(_subtitle(config, view))}</p></header>
<section><ul class="said">{"".join(f"<li>{_(line)}</li>" for line in said)}</ul></section>
<section><h2>Final results, {_(view.held_out.lower())}</h2>{results}</section>
{promised(run.path)}{_fleet(run.records)}<section><h2>Figures</h2>{figures}</section>
<section><h2>Configuration</h2>{_configuration(config)}</section>
<section><h2>Versions and machine</h2>{_about(run.about)}</section>
</main></body></html>
"""


def _title(config: Mapping[str, Any], view: View) -> str:
    if (job := str(config.get("job"))) in _TITLES:
        return f"{view.title}: {_TITLES[job]}"
    if view is not views.CHANNELS:
        return view.title
    study = config.get("job") == "case-study"
    return "Federated LLM4CP: the case study" if study else f"{config.get('model.name', 'Run')}"


def _subtitle(config: Mapping[str, Any], view: View) -> str:
    get, (data, source) = config.get, view.source
    table, over = {"case-study": "case-study.seeds", "compare": "compare.seeds"}, get("sweep.over")
    parts = [
        f"{get('data.scenario')} ({get('data.duplex')})" if get(source) == "sionna" else "",
        f"{data}: {get(source)}",
        f"backbone: {get('model.backbone')}, {get('model.tuning')}" if view.backbone else "",
        f"{get('train.devices')} devices" if get("job") == "compare" else "",
        f"{get('train.rounds')} rounds of {get('train.local-steps')} steps",
        f"seeds: {get(table.get(str(get('job')), 'seed'))}" if get("job") != "sweep" else f"over {over}",
    ]
    return " · ".join(part for part in parts if part)


def _results(rows: Sequence[Row]) -> str:
    if not rows:
        return "<p>None yet.</p>"
    classical, columns = strongest_classical(rows), columns_of(rows)
    head = "".join(f"<th>{column.name}<small>{column.unit}</small></th>" for column in columns)
    body = []
    for row in rows:
        mark, kind = "", ""
        if classical is not None and row is classical:
            mark, kind = ' <span class="tag best">strongest classical</span>', ' class="classical"'
        elif loses(row, classical):
            mark, kind = ' <span class="tag loss">behind it</span>', ' class="behind"'
        figures = "".join(f"<td>{_(text)}</td>" for text in cells_of_row(row, columns))
        body.append(f"<tr{kind}><th>{_(row.label)}{mark}</th>{figures}</tr>")
    table = f"<table class='results'><tr><th></th>{head}</tr>{''.join(body)}</table>"
    return f"<div class='wide'>{table}</div><p class='note'>{_(_verdict(rows, classical))}</p>"


def _fleet(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of a wireless fleet; nothing for a run without one."""
    rows = fleet_table.fleet_rows(records)
    if not rows:
        return ""
    columns = fleet_table.columns_of(rows)
    head = "".join(f"<th>{column.name}<small>{column.unit}</small></th>" for column in columns)
    body = "".join(
        f"<tr><th>{_(row.label)}</th>"
        + "".join(f"<td>{_(column.show(row.means[column.key]))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    return (
        "<section><h2>Wireless fleet</h2>"
        f"<div class='wide'><table class='results'><tr><th></th>{head}</tr>{body}</table></div>"
        f"<p class='note'>{_FLEET_NOTE}</p></section>"
    )


def _verdict(rows: Sequence[Row], classical: Row | None) -> str:
    spread = "± is half the range over seeds. " if any(row.seeds > 1 for row in rows) else ""
    if classical is None:
        return f"{spread}No classical {rows[0].view.learner} was run."
    behind = [row.label for row in rows if loses(row, classical)]
    if not behind:
        ahead = all(row.error < classical.error for row in rows if not row.classical)
        who = f"learned {classical.view.learner} is"
        verdict = f"Every {who} ahead of" if ahead else f"No {who} behind"
        return f"{spread}{verdict} {classical.label}."
    return f"{spread}Behind {classical.label}: {', '.join(behind)}."


def _figure(path: Path, view: View) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = _(CAPTIONS[path.stem].format(noun=view.noun))
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _configuration(config: Mapping[str, Any]) -> str:
    usual = defaults()
    rows = []
    for key, value in config.items():
        changed = ' class="changed"' if key in usual and usual[key] != value else ""
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        rows.append(f"<tr{changed}><th>{_(key)}</th><td>{_(shown)}</td></tr>")
    return f"<p class='note'>Bold differs from the default.</p><table class='keys'>{''.join(rows)}</table>"


def _about(about: Mapping[str, Any]) -> str:
    commit = {"commit": about.get("commit") or "none"}
    pairs = {**about.get("versions", {}), **about.get("machine", {}), **commit}
    rows = [f"<tr><th>{_(str(key))}</th><td>{_(str(value))}</td></tr>" for key, value in pairs.items()]
    return f"<table class='keys'>{''.join(rows)}</table>"


def _(text: str) -> str:
    return html.escape(text)


_CSS = """
:root{--ink:#22272e;--soft:#5b6570;--line:#dfe3e8;--blue:#0b4a7a;--paper:#fff}
*{box-sizing:border-box}
body{margin:0;background:#f5f7f9;color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:2.5rem 2rem 4rem;background:var(--paper)}
h1{margin:0;font-size:1.9rem;line-height:1.2;color:var(--blue)} .sub{margin:.4rem 0 0;color:var(--soft)}
h2{margin:2.6rem 0 .8rem;font-size:1.2rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
.said{margin:1.6rem 0 0;padding:1rem 1.2rem 1rem 2.2rem;background:#eef4f9;border-left:4px solid var(--blue)}
.said li:first-child{font-weight:650;font-size:1.08rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.results{width:100%;font-size:.92rem}
.results th,.results td{padding:.42rem .6rem;border-bottom:1px solid var(--line)}
.results td{text-align:right;white-space:nowrap}
.results th{text-align:left;font-weight:500}
.results tr:first-child th{text-align:right;color:var(--soft)}
.results small{display:block;font-weight:400}
.classical{background:#e9f6f1} .behind td{color:var(--soft)}
.tag{font-size:.74rem;padding:.08rem .45rem;border-radius:.6rem;white-space:nowrap}
.best{background:#009E73;color:#fff} .loss{background:#f1e3da;color:#a04400}
.note{color:var(--soft);font-size:.92rem}
figure{margin:1.6rem 0} img{max-width:100%;height:auto} figcaption{color:var(--soft);font-size:.9rem}
.keys{font-size:.86rem}
.keys th{text-align:left;font-weight:400;padding:.12rem 1.4rem .12rem 0;color:var(--soft)}
.keys td{font-family:ui-monospace,monospace} .changed th,.changed td{font-weight:700;color:var(--ink)}
@media print{body{background:#fff}main{padding:0}}
""".strip()
