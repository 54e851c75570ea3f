"""The rows as a page that needs no network: ratios beside their goals, a roofline, and every figure in a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio

from labkit.bench.measure import Row, remedies
from labkit.bench.suite import COLUMNS, cells
from labkit.files import whole_file

SECONDS = {"microseconds": 1e-6, "ms": 1e-3, "s": 1.0}
MET, MISSED, PLAIN, GOAL = (
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#222222",
)  # Okabe and Ito's, told apart by pattern too
PATTERNS = {True: "", False: "/", None: "."}


def write(rows: Sequence[Row], out: Path) -> None:
    """The page at ``out``, which appears whole."""
    figures = [found for found in (ratios(rows), roofline(rows)) if found is not None]
    parts = [pio.to_html(made, full_html=False, include_plotlyjs=i == 0) for i, made in enumerate(figures)]
    head = ""
    if rows:
        first = rows[0]
        head = f"{first.machine}; {first.threads} threads; {first.date}; {first.ours_version}"
    missing = "".join(f"<li>{escape(why)}</li>" for why in remedies(rows))
    table = [(*cells(row), row.peer_version, row.command) for row in rows]
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in table)
    titles = "".join(f"<th>{escape(title)}</th>" for title in (*COLUMNS, "version of the peer", "repeat"))
    with whole_file(out) as part:
        part.write_text(
            '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>labkit bench</title>\n'
            "<style>body{font:14px sans-serif;margin:2em;max-width:1100px}td,th{text-align:left;padding:2px 8px}"
            "</style>\n"
            f"<h1>labkit beside its peers</h1><p>{escape(head)}</p>\n{''.join(parts)}\n"
            f"<table><tr>{titles}</tr>\n{lines}</table>\n"
            + (f"<h2>Not measured</h2><ul>{missing}</ul>\n" if missing else "")
            + "</html>\n",
            encoding="utf-8",
        )


def ratios(rows: Sequence[Row]) -> go.Figure | None:
    """A bar for each ratio, with its quartiles, and a mark where its goal stands; None where nothing was measured."""
    shown = [row for row in rows if row.ratio is not None and row.ratio_quartiles is not None]
    if not shown:
        return None
    names = [f"{row.work}<br>beside {row.peer_name}" for row in shown]
    values = [row.ratio or 0.0 for row in shown]
    spread = [row.ratio_quartiles or (value, value) for row, value in zip(shown, values, strict=True)]
    made = go.Figure()
    made.add_bar(
        x=values, y=names, orientation="h", name="ratio", text=[f"{value:.2f}" for value in values],
        marker={
            "color": [{True: MET, False: MISSED, None: PLAIN}[row.met] for row in shown],
            "pattern": {"shape": [PATTERNS[row.met] for row in shown]},
        },
        error_x={
            "type": "data", "symmetric": False,
            "array": [high - value for (_, high), value in zip(spread, values, strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(spread, values, strict=True)],
        },
    )  # fmt: skip
    aims = [(row.goal, name) for row, name in zip(shown, names, strict=True) if row.goal is not None]
    made.add_scatter(
        x=[aim for aim, _ in aims], y=[name for _, name in aims], mode="markers", name="goal",
        marker={"symbol": "line-ns-open", "size": 22, "color": GOAL, "line": {"width": 3}},
    )  # fmt: skip
    made.add_vline(x=1, line={"color": "#888888", "dash": "dot"})
    made.update_layout(
        title="How many times better than the peer (green: goal met, hatched: not met, dotted: no goal)",
        template="plotly_white", height=230 + 52 * len(shown), margin={"l": 10},
    )  # fmt: skip
    made.update_xaxes(type="log", title="ratio")
    made.update_yaxes(autorange="reversed", automargin=True)
    return made


def roofline(rows: Sequence[Row]) -> go.Figure | None:
    """Arithmetic reached against arithmetic per byte (Williams et al. 2009). The slope is the memory's speed as it was
    measured in the same run, the flat part the most that any product here reached. None without such rows."""
    found = points(rows)
    speed = next((row.peer for row in rows if row.unit == "GB/s" and row.peer is not None), None)
    if not found or speed is None:
        return None
    most = max(reached for _, _, reached, _ in found)
    left, right = min(per for _, per, _, _ in found) / 2, max(per for _, per, _, _ in found) * 2
    made = go.Figure()
    edge = min(max(left, most / speed), right)
    made.add_scatter(
        x=[left, edge, right], y=[left * speed, min(edge * speed, most), most], mode="lines",
        name=f"{speed:.1f} GB/s, {most:.0f} GFLOP/s", line={"color": GOAL},
    )  # fmt: skip
    for name in dict.fromkeys(point[0] for point in found):
        mine = [point for point in found if point[0] == name]
        made.add_scatter(
            x=[per for _, per, _, _ in mine], y=[reached for _, _, reached, _ in mine], mode="markers", name=name,
            marker={"size": 10}, hovertext=[said for _, _, _, said in mine], hoverinfo="text",
        )  # fmt: skip
    made.update_layout(title="Roofline of one weight's products", template="plotly_white", height=480)
    made.update_xaxes(type="log", title="operations per byte of the weight (FLOP/B)")
    made.update_yaxes(type="log", title="arithmetic (GFLOP/s)")
    return made


def points(rows: Sequence[Row]) -> list[tuple[str, float, float, str]]:
    """Of each side of each row that counts its arithmetic: name, FLOP per byte, GFLOP/s, and what to say of it."""
    found = {}
    for row in rows:
        if row.flop is None:
            continue
        for name, size, taken in (
            (row.ours_name, row.ours_bytes, row.ours),
            (row.peer_name, row.peer_bytes, row.peer),
        ):
            if size is not None and taken is not None:
                seconds = taken * SECONDS[row.unit]
                said = f"{name}, {row.work}: {size / seconds / 1e9:.1f} GB/s, {row.flop / seconds / 1e9:.0f} GFLOP/s"
                found[name, row.work] = (name, row.flop / size, row.flop / seconds / 1e9, said)
    return list(found.values())
