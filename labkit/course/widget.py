"""Something to drag: sliders over a function that takes plain arguments and returns a figure or a table.

The widget is a thin skin. Without a front end, and in the stored notebook, the same function's result for the default
values is what one sees.
"""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import traitlets
from IPython.display import display

from labkit.course import plot  # noqa: F401  the house style, also for figures made without its helpers

DEBOUNCE = 0.05  # seconds of rest before a figure is drawn again
COSTLY = 0.15  # seconds for one call, above which it is drawn only when the slider is let go
CACHE = 64  # results kept, so that dragging back costs nothing


def explore(function: Callable[..., Any], **controls: Any) -> None:
    """Show ``function`` with one control for each keyword.

    ``function(**values)`` returns a Plotly figure, a string (shown in fixed width) or an object with ``_repr_html_``.
    A control is what the argument may be, its first value the one to start with unless it is given as
    ``(start, choices)``:

    - ``range(2, 9)``: a slider over whole numbers
    - ``(low, high, step)`` of floats, or ``(low, high, step, start)``: a slider over real numbers
    - a list or a dict of name to value: a choice
    - ``True`` or ``False``: a box to tick
    - a string of 0 and 1: as many bits to flip; the function gets a string of the same length
    - ``(start, range(...))`` or ``(start, [...])``: the same, starting elsewhere

    Labels are the argument's names with blanks for underscores. Drawing waits until the slider rests; a
    costly function is drawn when it is let go.
    """
    Explorer(function, controls).show()


class Explorer:
    """The state behind one ``explore`` call; ``box`` is the widget, ``result`` what is shown now."""

    def __init__(self, function: Callable[..., Any], controls: dict[str, Any]) -> None:
        if not controls:
            raise TypeError("explore() needs at least one control, for example bits=range(2, 9)")
        self.function = function
        self.controls = {name: _control(name, spec) for name, spec in controls.items()}
        self._cache: dict[tuple[Any, ...], Any] = {}
        self._waiting: asyncio.TimerHandle | None = None
        started = time.perf_counter()
        self.result = self.call()
        self.costly = time.perf_counter() - started > COSTLY
        self.status = widgets.HTML()
        self.view = self._view(self.result)
        for control in self.controls.values():
            if self.costly and hasattr(control, "continuous_update"):
                control.continuous_update = False
            control.observe(self._moved, names="value")
        self.box = widgets.VBox([*self.controls.values(), self.view, self.status])

    @property
    def values(self) -> dict[str, Any]:
        """The value that each control has now."""
        return {name: control.value for name, control in self.controls.items()}

    def call(self) -> Any:
        """The function's result for the controls' values, from the cache where it was drawn before."""
        key = tuple(repr(v) for v in self.values.values())
        if key not in self._cache:
            if len(self._cache) >= CACHE:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self.function(**self.values)
        return self._cache[key]

    def show(self) -> None:
        """Display the widget and, in the same output, what a reader without widgets sees."""
        text = ", ".join(f"{name} = {value}" for name, value in self.values.items())
        bundle: dict[str, Any] = {"text/plain": f"{_name(self.function)}: {text}"}
        if isinstance(self.result, go.Figure):
            bundle |= {"application/vnd.plotly.v1+json": self.result.to_plotly_json()}
        else:
            bundle["text/plain"] += f"\n{self.result}"
            bundle["text/html"] = _html(self.result)
        view = self.box._repr_mimebundle_() or {}
        bundle |= {k: v for k, v in view.items() if k != "text/plain"}
        display(_jsonable(bundle), raw=True)

    def redraw(self) -> None:
        """Draw for the values of now; a failing function is told in the place of the figure's caption."""
        self._waiting = None
        try:
            self.result = self.call()
        except Exception as error:
            self.status.value = f"<p role='alert'>{html.escape(f'{type(error).__name__}: {error}')}</p>"
            return
        self.status.value = ""
        if isinstance(self.view, go.FigureWidget):
            _replace(self.view, self.result)
        else:
            self.view.value = _html(self.result)

    def _moved(self, _: Any) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop, so nobody drags: draw at once
            self.redraw()
            return
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = loop.call_later(DEBOUNCE, self.redraw)

    @staticmethod
    def _view(result: Any) -> Any:
        if isinstance(result, go.Figure):
            return go.FigureWidget(result)
        return widgets.HTML(_html(result))


class Bits(widgets.HBox):
    """A row of buttons, one a bit; ``value`` is their string."""

    value = traitlets.Unicode()

    def __init__(self, start: str, description: str) -> None:
        self.buttons = [
            widgets.ToggleButton(
                bit == "1",
                description=bit,
                tooltip=f"bit {len(start) - 1 - i}",
                layout=widgets.Layout(width="2.2em", padding="0", margin="1px"),
            )
            for i, bit in enumerate(start)
        ]
        for button in self.buttons:
            button.observe(self._flipped, names="value")
        label = widgets.Layout(
            width="12em", display="flex", justify_content="flex-end", margin="2px 8px 2px 2px"
        )
        super().__init__([widgets.Label(description, layout=label), *self.buttons])
        self.value = start

    def _flipped(self, change: Any) -> None:
        change["owner"].description = str(int(change["new"]))
        self.value = "".join(button.description for button in self.buttons)


def _control(name: str, spec: Any) -> widgets.Widget:
    label = name.replace("_", " ")
    common: dict[str, Any] = {
        "description": label,
        "tooltip": label,
        "style": {"description_width": "12em"},
        "layout": widgets.Layout(width="38em"),
    }
    start = None
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], range | list | dict):
        start, spec = spec
    if isinstance(spec, str) and spec and set(spec) <= {"0", "1"}:
        return Bits(spec, label)
    if isinstance(spec, bool):
        return widgets.Checkbox(value=spec, indent=True, **common)
    if isinstance(spec, range):
        if not len(spec):
            raise ValueError(f"the control {name!r} is an empty range")
        value = spec[0] if start is None else start
        return widgets.IntSlider(value, min=spec[0], max=spec[-1], step=spec.step, **common)
    if isinstance(spec, tuple) and len(spec) in (3, 4) and all(isinstance(v, int | float) for v in spec):
        low, high, step, *rest = spec
        value = rest[0] if rest else low
        digits = max(0, len(f"{step:g}".partition(".")[2]))
        common["readout_format"] = f".{digits}f"
        return widgets.FloatSlider(value, min=low, max=high, step=step, **common)
    if isinstance(spec, list | dict) and spec:
        options = list(spec.items()) if isinstance(spec, dict) else [(str(v), v) for v in spec]
        return widgets.Dropdown(options=options, value=options[0][1] if start is None else start, **common)
    raise TypeError(
        f"the control {name!r} is {spec!r}; expected a range, (low, high, step), a list, a dict, a bool or "
        "a string of 0 and 1, or (start, one of these)"
    )


def _replace(view: go.FigureWidget, result: go.Figure) -> None:
    """Make ``view`` show ``result``: in place where the traces are of the same kinds, so that nothing flickers."""
    with view.batch_update():
        if [t.type for t in view.data] == [t.type for t in result.data]:
            for shown, new in zip(view.data, result.data, strict=True):
                shown.update(new.to_plotly_json(), overwrite=True)
        else:
            view.data = ()
            view.add_traces(result.data)
        view.layout.update(result.layout.to_plotly_json(), overwrite=True)


def _html(result: Any) -> str:
    if hasattr(result, "_repr_html_"):
        return str(result._repr_html_())
    return f"<pre>{html.escape(str(result))}</pre>"


def _jsonable(bundle: dict[str, Any]) -> dict[str, Any]:
    import json

    from plotly.utils import PlotlyJSONEncoder

    return dict(json.loads(json.dumps(bundle, cls=PlotlyJSONEncoder)))


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__).replace("_", " ")
