"""What a model is made of, as attributes of its results: sites, who depends on whom, source."""

from __future__ import annotations

import inspect
import textwrap
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppl_toolkit.program import Program
from ppl_toolkit.sites import Site
from ppl_toolkit.tracing import dependents

__all__ = ["model_sites", "model_source"]

_MOST_STEPS = 100_000  # sites times equations of the traced model
_parents: weakref.WeakKeyDictionary[Any, dict[str, dict[str, list[str]]]] = (
    weakref.WeakKeyDictionary()
)


def model_sites(program: Program) -> list[dict[str, Any]]:
    """The sites of a program in the order of the model.

    Returns:
        A dictionary for every site: ``name``, ``kind`` ("latent", "observed", "deterministic" or
        "factor"), ``distribution``, ``support``, ``shape``, ``plates``, ``parents``. Parents are
        the sites that a site's density reads: latent ones, and deterministic ones by the value
        that `numpyro.deterministic` returned. Those of a deterministic site are the latent sites
        that it is a function of. Without ``parents`` where they could not be found.

    The model is traced once or twice more, for the first run of a model function only.
    """
    parents = _known_parents(program)
    names = {name: site.variable for name, site in program.sites.items()}
    return [
        {
            "name": site.variable,
            "kind": site.kind,
            "distribution": site.distribution,
            "support": site.support,
            "shape": list(site.shape),
            "plates": _plates(site, program.user_dims.get(name, ())),
            **({"parents": [names[p] for p in parents.get(name, [])]} if parents else {}),
        }
        for name, site in program.sites.items()
    ]


def _plates(site: Site, event_dims: Any) -> list[str]:
    batch = site.dims[: len(site.shape) - site.event_dim]
    return [
        dim for axis, dim in enumerate(batch)
        if dim != f"{site.variable}_dim_{axis}" and dim not in event_dims
    ]  # fmt: skip


def _known_parents(program: Program) -> dict[str, list[str]]:
    """Parents by site, kept for as long as the model function lives; empty if not to be had."""
    try:
        known = _parents.setdefault(program.model, {})
    except Exception:  # a callable that cannot be hashed, compared or referred to weakly
        known = {}
    if program.model_hash not in known:
        try:
            known[program.model_hash] = _find_parents(program)
        except Exception:  # a picture must never cost the draws
            known[program.model_hash] = {}
    return known[program.model_hash]


def _find_parents(program: Program) -> dict[str, list[str]]:
    """Parents by site, read off the traced densities and functions."""
    sites = program.sites
    inputs = [s.name for s in sites.values() if s.kind in ("latent", "deterministic")]
    shapes = {n: jax.ShapeDtypeStruct(sites[n].shape, sites[n].dtype) for n in inputs}
    latent = {s.name for s in program.latent}

    def outputs(values: list[Any], data: Any) -> dict[str, Any]:
        given = dict(zip(inputs, values, strict=True))
        found = dict(program.log_terms(given, data))
        if len(latent) < len(inputs):
            functions = program.complete({n: given[n] for n in latent}, data)
            found |= {n: functions[n] for n in inputs if n not in latent}
        return {n: jnp.asarray(v) for n, v in found.items()}

    with program.context():
        traced, out = jax.make_jaxpr(outputs, return_shape=True)(
            [shapes[n] for n in inputs], program.data
        )
    jaxpr = traced.jaxpr
    if len(inputs) * len(jaxpr.eqns) > _MOST_STEPS:
        return {}
    found: dict[str, list[str]] = {name: [] for name in sites}
    for i, name in enumerate(inputs):
        first = (jaxpr.invars[i], *jaxpr.invars[:i], *jaxpr.invars[i + 1 :])
        touched = dependents(jaxpr.replace(invars=first), 1)
        for site, flag in zip(sorted(out), touched, strict=True):
            if flag and site != name:
                found[site].append(name)
    return found


def model_source(model: Callable) -> str:
    """The source of a model function; "" if there is none to be had."""
    try:
        function = inspect.unwrap(model)
        while not inspect.isroutine(function):
            inner = getattr(function, "func", None) or getattr(function, "fn", None)
            if inner is None:
                function = type(function)
                break
            function = inspect.unwrap(inner)
        if inspect.isfunction(function) and function.__code__.co_filename == "<string>":
            return ""  # made by eval: Python may take another text of that name for it
        return textwrap.dedent(inspect.getsource(function)).strip()
    except Exception:  # no file, or one that has changed; no text is worth the draws
        return ""
