"""A directed graph in layers, as a picture: who depends on whom.

The method of Sugiyama, Tagawa and Toda (1981), IEEE Transactions on Systems, Man, and Cybernetics
11: every node below its parents, edges that cross layers by way of points in between, an order
within layers that follows the neighbours.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

__all__ = ["Node", "graph", "layers"]

_LETTER = 6.9
_HEIGHT, _RISE = 36.0, 40.0  # of a node, between layers
_GAP, _LANE = 16.0, 10.0  # between nodes, the width of an edge's way through a layer
_SWEEPS = 8
_LONGEST = 24


class Node(NamedTuple):
    """One node: its name, a second line of text, and the style of its frame."""

    name: str
    text: str = ""
    css: str = "node"


class _Place(NamedTuple):
    x: float
    y: float


def layers(names: Sequence[str], parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The layer of every node, 0 at the top: below all parents, and as close to them as may be.

    Args:
        names: nodes; a parent that does not come before its child counts for nothing here, so
            that graphs with cycles have layers too.
        parents: the parents of nodes.
    """
    order = {name: i for i, name in enumerate(names)}
    before = {n: [p for p in parents.get(n, ()) if order.get(p, len(order)) < order[n]]
              for n in names}  # fmt: skip
    layer: dict[str, int] = {}
    for name in names:
        layer[name] = 1 + max((layer[p] for p in before[name]), default=-1)
    # Roots move down to their first child: short edges are easier to follow.
    for name in reversed(names):
        below = [layer[n] for n in names if name in before[n]]
        if below:
            layer[name] = min(below) - 1
    return layer


def graph(nodes: Sequence[Node], parents: Mapping[str, Sequence[str]], label: str) -> str:
    """A graph as one SVG element of its natural size.

    Args:
        nodes: nodes, parents before their children.
        parents: names of the parents of nodes, by name.
        label: what the picture shows, for those who do not see it.
    """
    names = [node.name for node in nodes]
    layer = layers(names, parents)
    edges = [
        (p, n) for n in names for p in parents.get(n, ()) if p in layer and layer[p] < layer[n]
    ]
    ways = {edge: [edge[0], *_between(edge, layer), edge[1]] for edge in edges}
    widths = {node.name: _width(node) for node in nodes}
    rows = _rows(names, layer, ways)
    places = _places(rows, ways, widths)
    wide = max(places[k].x + widths.get(k, _LANE) / 2 for k in places) + 1
    high = len(rows) * (_HEIGHT + _RISE) - _RISE + 2
    marks = [_edge([places[step] for step in way]) for way in ways.values()]
    marks += [_node(node, places[node.name], widths[node.name]) for node in nodes]
    return (
        f'<svg class="graph" viewBox="0 0 {wide:.0f} {high:.0f}" width="{wide:.0f}" '
        f'height="{high:.0f}" role="img" aria-label="{html.escape(label)}">{"".join(marks)}</svg>'
    )


def _between(edge: tuple[str, str], layer: Mapping[str, int]) -> list[str]:
    """The points at which an edge passes the layers between its ends."""
    first, last = edge
    return [f"{first}\n{last}\n{i}" for i in range(layer[first] + 1, layer[last])]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _width(node: Node) -> float:
    return 20 + _LETTER * max(len(_cut(node.name)), len(_cut(node.text)))


_Ways = Mapping[tuple[str, str], Sequence[str]]


def _rows(names: Sequence[str], layer: Mapping[str, int], ways: _Ways) -> list[list[str]]:
    """Nodes and points by layer, ordered by the mean places of their neighbours."""
    rows: list[list[str]] = [[] for _ in range(1 + max(layer.values()))]
    for name in names:
        rows[layer[name]].append(name)
    for (first, _), way in ways.items():
        for i, point in enumerate(way[1:-1], start=1):
            rows[layer[first] + i].append(point)
    near = _neighbours(ways)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for i in range(len(rows)) if down else reversed(range(len(rows))):
            beside = i - 1 if down else i + 1
            if not 0 <= beside < len(rows):
                continue
            at = {key: j / len(rows[beside]) for j, key in enumerate(rows[beside])}
            own = {key: j / len(rows[i]) for j, key in enumerate(rows[i])}
            middle = {
                key: np.mean([at[n] for n in near[key] if n in at] or [own[key]])
                for key in rows[i]
            }  # fmt: skip
            rows[i].sort(key=lambda key: (middle[key], own[key]))
    return rows


def _neighbours(ways: _Ways) -> dict[str, list[str]]:
    near: dict[str, list[str]] = _Lists()
    for way in ways.values():
        for one, other in itertools.pairwise(way):
            near[one].append(other)
            near[other].append(one)
    return near


class _Lists(dict[str, list[str]]):
    def __missing__(self, key: str) -> list[str]:
        return self.setdefault(key, [])


def _places(
    rows: Sequence[Sequence[str]], ways: _Ways, widths: Mapping[str, float]
) -> dict[str, _Place]:
    """Middles of nodes and points: near their neighbours, in order, without overlap.

    The least squares distance from the neighbours' mean under the gaps that the order asks for is
    an isotonic regression.
    """
    near = _neighbours(ways)
    half = {key: widths.get(key, _LANE) / 2 for row in rows for key in row}
    gaps = [
        np.cumsum([0.0, *(half[a] + half[b] + _GAP for a, b in itertools.pairwise(row))])
        for row in rows
    ]
    x = {k: float(g) - float(gap[-1]) / 2 for row, gap in zip(rows, gaps, strict=True)
         for k, g in zip(row, gap, strict=True)}  # fmt: skip
    for _ in range(_SWEEPS):
        for row, gap in zip(rows, gaps, strict=True):
            wanted = np.array([np.mean([x[n] for n in near[key]] or [x[key]]) for key in row])
            placed = isotonic_regression(wanted - gap).x + gap
            x.update(zip(row, placed.tolist(), strict=True))
    left = min(x[key] - half[key] for key in x)
    return {
        key: _Place(x[key] - left + 1, 1 + _HEIGHT / 2 + i * (_HEIGHT + _RISE))
        for i, row in enumerate(rows)
        for key in row
    }


def _edge(way: Sequence[_Place]) -> str:
    """A smooth line through the points of an edge, with a head at its end."""
    x, y = way[0].x, way[0].y + _HEIGHT / 2
    steps = [f"M{x:.1f} {y:.1f}"]
    for i, place in enumerate(way[1:], start=1):
        last = i == len(way) - 1
        top = place.y - _HEIGHT / 2
        end = top - 6 if last else top
        bend = (y + end) / 2
        steps.append(f"C{x:.1f} {bend:.1f} {place.x:.1f} {bend:.1f} {place.x:.1f} {end:.1f}")
        x, y = place.x, end
        if not last:
            y = place.y + _HEIGHT / 2
            steps.append(f"V{y:.1f}")
    head = f"M{x:.1f} {y + 6:.1f}l-3.5-7h7z"
    return f'<path class="line mute-line" d="{"".join(steps)}"/><path class="head" d="{head}"/>'


def _node(node: Node, place: _Place, width: float) -> str:
    left, top = place.x - width / 2, place.y - _HEIGHT / 2
    middle = place.y + 4 if not node.text else place.y - 3
    second = (
        f'<text x="{place.x:.1f}" y="{place.y + 12:.1f}">{html.escape(_cut(node.text))}</text>'
        if node.text
        else ""
    )
    return (
        f'<rect class="{node.css}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{_HEIGHT:g}" rx="9"/><text class="name" x="{place.x:.1f}" y="{middle:.1f}">'
        f"{html.escape(_cut(node.name))}</text>{second}"
    )
