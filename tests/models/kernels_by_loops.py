"""Kernels of infinitely wide networks as slowly as possible: loops over positions, no closed forms
of diagonals, no blocks, other formulas for the activations. Vectors are images of one position."""

import itertools

import numpy as np

from ppl_toolkit.models.infinite_width import (
    Conv,
    Dense,
    Erf,
    Flatten,
    GlobalAveragePool,
    LayerNorm,
    Rectifier,
    Residual,
    Serial,
)


def kernels_by_loops(network, x):
    """Covariance and tangent kernel, both (n, n), of vectors (n, d) or images (n, h, w, c)."""
    images = x if x.ndim == 4 else x[:, None, None, :]
    places = list(itertools.product(*map(range, images.shape[1:3])))
    s = {
        (p, r): images[:, *p] @ images[:, *r].T / images.shape[-1]
        for p, r in itertools.product(places, places)
    }
    s, t = _through(network, s, {pair: np.zeros_like(one) for pair, one in s.items()})
    ((s,), (t,)) = s.values(), t.values()
    return s, t


def _through(layer, s, t):
    if isinstance(layer, Serial):
        for one in layer.layers:
            s, t = _through(one, s, t)
        return s, t
    if isinstance(layer, Residual):
        s1, t1 = (s, t) if layer.shortcut is None else _through(layer.shortcut, s, t)
        s2, t2 = _through(layer.branch, s, t)
        return {p: s1[p] + s2[p] for p in s1}, {p: t1[p] + t2[p] for p in t1}
    if isinstance(layer, Flatten):
        alone = [pair for pair in s if pair[0] == pair[1]]
        return tuple({_ONLY: sum(u[pair] for pair in alone) / len(alone)} for u in (s, t))
    if isinstance(layer, GlobalAveragePool):
        return tuple({_ONLY: sum(u.values()) / len(u)} for u in (s, t))
    if isinstance(layer, Dense | Conv):
        gather = (lambda u: u) if isinstance(layer, Dense) else _windows(layer)
        s = {pair: layer.weight_std**2 * u + layer.bias_std**2 for pair, u in gather(s).items()}
        return s, {pair: s[pair] + layer.weight_std**2 * u for pair, u in gather(t).items()}
    q = {pair[0]: np.diag(u) for pair, u in s.items() if pair[0] == pair[1]}
    sides = {(p, r): (q[p][:, None], q[r][None, :]) for p, r in s}
    if isinstance(layer, LayerNorm):
        by = {pair: np.sqrt((a + layer.epsilon) * (b + layer.epsilon))
              for pair, (a, b) in sides.items()}  # fmt: skip
        return {pair: s[pair] / by[pair] for pair in s}, {pair: t[pair] / by[pair] for pair in t}
    found = {pair: expectations(layer, s[pair], *sides[pair]) for pair in s}
    return {p: f for p, (f, _) in found.items()}, {p: t[p] * found[p][1] for p in t}


_ONLY = ((0, 0), (0, 0))


def expectations(activation, s, q1, q2):
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)], as their authors wrote them."""
    if isinstance(activation, Erf):  # Williams (1997)
        a, b = activation.amplitude, activation.frequency
        s, q1, q2 = b**2 * s, b**2 * q1, b**2 * q2
        scale = np.sqrt((1 + 2 * q1) * (1 + 2 * q2))
        f = a**2 * 2 / np.pi * np.arcsin(2 * s / scale) + activation.offset**2
        return f, a**2 * b**2 * 4 / np.pi / np.sqrt(scale**2 - 4 * s**2)
    # Cho, Saul (2009), from the halves above and below zero: phi(u) = c u_+ - a u_-.
    assert isinstance(activation, Rectifier)
    a, c = activation.below, activation.above
    scale = np.sqrt(q1 * q2)
    theta = np.arccos(np.clip(s / scale, -1, 1))

    def halves(theta):
        return scale * (np.sin(theta) + (np.pi - theta) * np.cos(theta)) / (2 * np.pi)

    f = (a**2 + c**2) * halves(theta) - 2 * a * c * halves(np.pi - theta)
    return f, ((a**2 + c**2) * (np.pi - theta) + 2 * a * c * theta) / (2 * np.pi)


def _windows(layer):
    """Means over a filter's windows, zero beyond the border: every position in a loop."""

    def gather(u):
        sizes = [1 + max(p[axis] for p, _ in u) for axis in (0, 1)]
        outside = [-(-size // step) for size, step in zip(sizes, layer.strides, strict=True)]
        before = [  # the border that keeps ceil(size / step) positions, the odd row at the end
            max((out - 1) * step + width - size, 0) // 2
            for out, step, width, size in zip(
                outside, layer.strides, layer.window, sizes, strict=True
            )
        ]

        def seen(place, offset):
            return tuple(
                p * step + o - b
                for p, step, o, b in zip(place, layer.strides, offset, before, strict=True)
            )

        offsets = list(itertools.product(*map(range, layer.window)))
        places = list(itertools.product(*map(range, outside)))
        nothing = np.zeros_like(u[_ONLY])
        return {
            (p, r): sum(u.get((seen(p, o), seen(r, o)), nothing) for o in offsets) / len(offsets)
            for p, r in itertools.product(places, places)
        }

    return gather
