"""The house style of the course's figures: one template, colours that colour-blind readers can tell apart.

Colours are Okabe and Ito's (2008). Where colour carries meaning, ``DASHES`` or ``SYMBOLS`` carry it too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, YELLOW, BLACK = "#CC79A7", "#56B4E9", "#F0E442", "#000000"
COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
WIDTH, HEIGHT = 700, 400  # pixels

_AXIS: dict[str, Any] = {
    "showline": True,
    "linecolor": "#444444",
    "ticks": "outside",
    "gridcolor": "#E5E5E5",
    "zeroline": False,
    "automargin": True,
}
pio.templates["labkit"] = go.layout.Template(
    layout={
        "colorway": COLORS,
        "colorscale": {"sequential": "Viridis", "diverging": "RdBu"},
        "font": {"family": "DejaVu Sans, Verdana, sans-serif", "size": 13, "color": "#222222"},
        "title": {"x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"bgcolor": "rgba(255,255,255,0.8)"},
        "margin": {"l": 70, "r": 25, "t": 55, "b": 55},
        "bargap": 0.15,
    }
)
pio.templates.default = "labkit"
if "google.colab" not in sys.modules:  # Colab brings a renderer of its own
    pio.renderers.default = "plotly_mimetype"


def figure(
    title: str,
    x: str = "",
    y: str = "",
    *,
    log_x: bool = False,
    log_y: bool = False,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> go.Figure:
    """An empty figure in the house style; ``x`` and ``y`` are axis titles, units in brackets."""
    made = go.Figure()
    made.update_layout(title_text=title, height=height, width=width)
    made.update_xaxes(title_text=x, type="log" if log_x else None)
    made.update_yaxes(title_text=y, type="log" if log_y else None)
    return made


def lines(
    x: Sequence[Any],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
) -> go.Figure:
    """One line for each entry of ``series``, told apart by colour, dash and marker."""
    made = figure(title, x_title, y_title, log_x=log_x, log_y=log_y)
    for i, (name, y) in enumerate(series.items()):
        made.add_scatter(
            x=list(x),
            y=[float(v) for v in y],
            name=name,
            mode="lines+markers" if markers else "lines",
            line={"color": COLORS[i % len(COLORS)], "dash": DASHES[i % len(DASHES)]},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
        )
    return made


def bars(
    values: Mapping[str, float], *, title: str, x_title: str = "", y_title: str = "", digits: int = 3
) -> go.Figure:
    """One bar for each entry of ``values``, its number written on it."""
    made = figure(title, x_title, y_title)
    numbers = [float(v) for v in values.values()]
    made.add_bar(
        x=list(values),
        y=numbers,
        text=[f"{v:.{digits}g}" for v in numbers],
        textposition="outside",
        cliponaxis=False,
        marker_color=[COLORS[i % len(COLORS)] for i in range(len(numbers))],
    )
    return made


def histogram(
    x: Any,
    *,
    title: str,
    x_title: str = "",
    y_title: str = "count",
    bins: int = 120,
    span: tuple[float, float] | None = None,
    log_y: bool = False,
) -> go.Figure:
    """A histogram counted here, so that the figure holds ``bins`` numbers and not the whole tensor."""
    values = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64).ravel()
    counts, edges = np.histogram(values, bins=bins, range=span)
    made = figure(title, x_title, y_title, log_y=log_y)
    centres = np.round((edges[:-1] + edges[1:]) / 2, 8)
    made.add_bar(x=centres.tolist(), y=counts.tolist(), marker_color=SKY, name="values", showlegend=False)
    made.update_layout(bargap=0)
    return made


def heatmap(
    z: Any, *, title: str, x_title: str = "", y_title: str = "", label: str = "", diverging: bool = False
) -> go.Figure:
    """A matrix as colours, row 0 on top; ``diverging`` centres the scale on zero. Thin out large matrices first."""
    values = np.asarray(z.detach().cpu() if hasattr(z, "detach") else z, dtype=np.float64)
    made = figure(title, x_title, y_title)
    made.add_heatmap(
        z=np.float32(values).tolist(),
        colorscale="RdBu" if diverging else "Viridis",
        zmid=0 if diverging else None,
        colorbar={"title": {"text": label}},
    )
    made.update_yaxes(autorange="reversed")
    return made
