# SPDX-License-Identifier: Apache-2.0
"""The part of SVG that the plots of a report need: a canvas and logarithmic axes. Colours are classes of style.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vitkern.commands.texts import in_html


def number(value: float) -> str:
    """A number as short as a tick or a label can be: 0.5, 12, 3.4k."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Log:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, margin: float = 1.25) -> Log:
        found = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
        return cls(min(found) / margin, max(found) * margin, start, end)

    def __call__(self, value: float) -> float:
        share = math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers, from the finest series that leaves room for labels."""
        tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for series in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**ten for ten in tens for step in series]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        return found[:: math.ceil(len(found) / most)]


@dataclass
class Canvas:
    """A picture of a size in pixels, drawn in order."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, words: str, look: str = "", anchor: str = "start", turned: float = 0.0
    ) -> None:
        """Adds a text. `turned`: degrees clockwise round its start."""
        turn = f' transform="rotate({turned:.1f} {x:.1f} {y:.1f})"' if turned else ""
        self.parts.append(
            f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{in_html(words)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], look: str, says: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add("polyline", f'class="{look}" points="{path}"', says)

    def bar(self, x: float, y: float, width: float, height: float, look: str, says: str = "") -> None:
        corners = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}" rx="2"'
        self._add("rect", f'class="{look}" {corners}', says)

    def mark(self, shape: str, x: float, y: float, look: str, says: str = "", size: float = 4.5) -> None:
        if shape == "circle":
            self._add("circle", f'class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"', says)
            return
        corners = [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
        path = " ".join(f"{x + size * across:.1f},{y + size * down:.1f}" for across, down in corners)
        self._add("polygon", f'class="{look}" points="{path}"', says)

    def _add(self, kind: str, attributes: str, says: str) -> None:
        tip = f"<title>{in_html(says)}</title>" if says else ""
        self.parts.append(f"<{kind} {attributes}>{tip}</{kind}>")

    def axes(self, x: Log, y: Log, x_name: str, y_name: str) -> None:
        """Adds grid and labels of a plot that fills the rectangle between the two axes."""
        for value in x.ticks(5):
            self.line([(x(value), y.start), (x(value), y.end)], "grid")
            self.text(x(value), y.start + 15, number(value), "tick", "middle")
        for value in y.ticks(6):
            self.line([(x.start, y(value)), (x.end, y(value))], "grid")
            self.text(x.start - 6, y(value) + 4, number(value), "tick", "end")
        self.text((x.start + x.end) / 2, y.start + 32, x_name, "tick", "middle")
        self.text(4, y.end - 10, y_name, "tick")

    def markup(self, style: str = "") -> str:
        """The picture; with `style` it can stand alone."""
        alone = f' xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}"'
        inside = f"<style>{style}</style>" if style else ""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img"{alone if style else ""}>'
            f"<title>{in_html(self.title)}</title>{inside}{''.join(self.parts)}</svg>"
        )
