"""A model bound to its data: sites, scores, transforms, predictions.

A `Program` is what every inference method sees. It flattens the continuous latent sites of a
NumPyro model into one unconstrained vector and offers the model's densities as pure functions of
that vector and of the data arrays, so that a compiled method takes new data without compiling.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import biject_to

from ppl_toolkit import minibatches, positions
from ppl_toolkit.arguments import Arguments
from ppl_toolkit.errors import (
    DataBakedWarning,
    DataError,
    MethodError,
    ModelError,
    PPLError,
    SiteError,
)
from ppl_toolkit.executables import kept
from ppl_toolkit.fingerprint import fingerprint
from ppl_toolkit.fused import total
from ppl_toolkit.imputation import read_imputed
from ppl_toolkit.layout import Layout, active_elements, mark_of, read_layout
from ppl_toolkit.logarithms import without_logs_of_exps
from ppl_toolkit.replay import (
    alone,
    at_unconstrained,
    filled,
    is_auxiliary,
    log_prob,
    redrawn,
    require_no_outer_handlers,
    traced_run,
    unmasked_elements,
    widened,
    with_improper_sites,
)
from ppl_toolkit.sites import (
    Site,
    check_labels,
    check_observed_values,
    finite_support,
    first_index,
    read_site,
    variable_name,
)
from ppl_toolkit.tracing import (
    CONCRETE_VALUE_ERRORS,
    Traced,
    as_numpy,
    closed_over_arrays,
    dependents,
    digest,
    label,
    user_line,
)

__all__ = ["Program"]


class Program:
    """A NumPyro model with its arguments.

    Args:
        model: a NumPyro model function (or any callable with `numpyro.sample` inside).
        args, kwargs: the model's arguments; arrays become arguments of compiled programs.
        precision: "float64" or "float32".
        dims: names for event dimensions, ``{site: [name, ...]}``.

    Attributes:
        sites: all sites in the order of the model, by name.
        size: length D of the flat unconstrained vector.
        data: the array arguments (followed by fixed subsample indices).
        baked: True when data had to be constants of the compiled program.
        parameters: numpyro.param sites, which stay at their initial values.
        layout: the masked plates and cases, whose elements are there only sometimes.
        resting: the latent sites with elements that are not there, or not used: those of the
            layout, and those of missing observations (``obs_mask=``), ``imputed``.

    Raises:
        ModelError: the model fails or has no sites.
        DataError: observed data are empty, non-finite or outside the support.

    Tracing runs the model function a few times on abstract values: milliseconds, no compilation.
    """

    def __init__(
        self,
        model: Callable,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        precision: str = "float64",
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not callable(model):
            raise ModelError(
                f"the model must be a function with numpyro.sample inside; got "
                f"{type(model).__name__}. Write infer(model, *data), with the model first."
            )
        self.model = model
        self.precision = precision
        self.arguments = Arguments.of(model, args, kwargs or {}, precision)
        self.data: tuple[np.ndarray, ...] = self.arguments.arrays
        self.baked = False
        self._plate_dims = 0
        self._traced: dict[Any, Traced] = {}
        self._subsamples: dict[str, int] = {}
        self.user_dims = {k: list(v) for k, v in (dims or {}).items()}
        require_no_outer_handlers()
        with self.context():
            try:
                self.sites = self._discover()
            except CONCRETE_VALUE_ERRORS as error:
                self.baked = True
                self.sites = self._discover()
                self._warn_baked(f"the model needs concrete values at {user_line(error)}")
        for name in self.arguments.opaque:
            self._warn_baked(f"argument {name!r} is a data frame")
        unknown = set(self.user_dims) - set(self.sites)
        if unknown:
            raise SiteError(
                f"dims= names unknown sites {sorted(unknown)}; the model has {list(self.sites)}."
            )
        if not any(site.kind != "deterministic" for site in self.sites.values()):
            raise ModelError(
                f"{label(model)} has no numpyro.sample site. Give infer a NumPyro model, or a "
                "log density together with init=."
            )
        self._warn_closures()

    # -- contexts and arguments ------------------------------------------------------------

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The settings of JAX every call must be made under (they are local to a thread)."""
        with (
            jax.enable_x64(self.precision == "float64"),
            jax.disable_jit(False),
            jax.default_prng_impl("threefry2x32"),
        ):
            yield

    def _warn_baked(self, what: str) -> None:
        warnings.warn(
            f"{label(self.model)}: {what}. The values are taken as constants: results are right, "
            "but new data may compile anew. Pass arrays as arguments and compute with jax.numpy, "
            "or compute such values before and pass them as Python ints.",
            DataBakedWarning,
            stacklevel=4,
        )

    def _warn_closures(self) -> None:
        for name, line, shape in closed_over_arrays(self.model):
            self._warn_baked(f"line {line} uses array {name!r} of shape {shape} from outside")

    def run(self, data: Sequence[Any], key: Any, model: Callable | None = None) -> None:
        """Run the (handled) model on ``data``; ``key`` seeds whatever no handler fixes."""
        count = len(self.arguments.arrays)
        arrays = self.arguments.arrays if self.baked else [jnp.asarray(x) for x in data[:count]]
        args, kwargs = self.arguments.rebuild(arrays)
        indices = dict(zip(self._subsamples, map(jnp.asarray, data[count:]), strict=True))
        handled = handlers.seed(model or self.model, key)
        if indices:
            handled = handlers.substitute(handled, data=indices)
        handled(*args, **kwargs)

    def trace(
        self, data: Sequence[Any], *wrappers: Callable, key: Any | None = None
    ) -> dict[str, Any]:
        """The messages of all sites of one run of the model inside handlers."""
        model = self.model
        for wrapper in wrappers:
            model = wrapper(model)
        key = _fixed_key() if key is None else key
        return traced_run(lambda: self.run(data, key, model))

    # -- discovery -------------------------------------------------------------------------

    def _discover(self) -> dict[str, Site]:
        sites: dict[str, Site] = {}
        subsamples: dict[str, tuple[int, int]] = {}
        parameters: list[str] = []
        layouts: list[tuple[Layout, tuple[str, ...]]] = []

        def run(data: tuple) -> None:
            trace = self.trace(data, with_improper_sites)
            offset = 0
            for name, message in trace.items():
                if message["type"] == "plate":
                    size, subsample = message["args"]
                    if subsample is not None and subsample != size:
                        subsamples[name] = (size, subsample)
                if message["initial"]:
                    parameters.append(name)
                for frame in message.get("cond_indep_stack") or ():
                    self._plate_dims = max(self._plate_dims, -frame.dim)
                site = read_site(message, data, offset, self.user_dims.get(name, ()))
                if site is not None:
                    sites[name] = site
                    offset += site.unconstrained_size if site.offset >= 0 else 0
            layouts.append((read_layout(trace), read_imputed(trace)))

        try:
            jax.eval_shape(run, self.data)
        except PPLError:
            raise
        except CONCRETE_VALUE_ERRORS as error:
            if not self.baked:
                raise
            raise ModelError(
                f"{label(self.model)} needs the concrete value of a latent site at "
                f"{user_line(error)}, but samplers evaluate it on abstract values. Use jax.numpy "
                "instead of numpy or math, and jnp.where or jax.lax.cond instead of if."
            ) from None
        except Exception as error:
            kind = type(error).__name__
            seen = f"{label(self.model)} raised {kind} at {user_line(error)}: {error}"
            arguments = zip(self.arguments.names, self.data, strict=True)
            if empty := [name for name, array in arguments if not array.size]:
                raise DataError(f"arguments {empty} are empty: there is no data. {seen}") from None
            raise ModelError(seen) from None
        check_labels(sites)
        self.layout, self.imputed = layouts[-1]
        self.resting = tuple(dict.fromkeys((*self.layout.sites, *self.imputed)))
        # LocScaleReparam's own parameter: any value leaves the posterior as it is.
        centring = {f"{name.removesuffix('_decentered')}_centered" for name in sites}
        self.parameters = tuple(name for name in parameters if name not in centring)
        self._subsamples = {name: size for name, (size, _) in subsamples.items()}
        rng = np.random.default_rng(0)
        self.data = self.arguments.arrays + tuple(
            np.sort(rng.choice(size, count, replace=False)) for size, count in subsamples.values()
        )
        for site in sites.values():
            if site.kind == "observed" and math.prod(site.shape) == 0:
                raise DataError(f"site {site.name!r} observes no data: its shape is {site.shape}.")
        self._check_data(sites, range(len(self.arguments.arrays)))
        return sites

    def _check_data(self, sites: dict[str, Site], which: Collection[int]) -> None:
        """Refuse values that cannot be, among the arguments with the numbers ``which``."""
        masked = any(s.masked and s.name not in self.layout.sites for s in sites.values())
        for i in () if masked else which:
            name, array = self.arguments.names[i], self.arguments.arrays[i]
            if array.dtype.kind == "f" and np.isnan(array).any():
                flags = np.isnan(array)
                raise DataError(
                    f"argument {name!r} has {int(flags.sum())} NaN of {array.size} values (first "
                    f"at index {first_index(flags)}). Drop those rows, hide them with "
                    "numpyro.handlers.mask, or have missing observations imputed: "
                    "numpyro.sample(..., obs=y, obs_mask=seen)."
                )
        for site in sites.values():
            if site.kind == "observed" and site.argument in which and not site.masked:
                array = self.data[site.argument]
                check_observed_values(site, array, self.arguments.names[site.argument])

    def on(self, arrays: Sequence[np.ndarray]) -> Program:
        """This model on other data of the same shapes and types; nothing is traced again.

        Args:
            arrays: in the places of ``arguments.arrays``; those that are the same objects are not
                looked at again.

        Raises:
            DataError: observed values are not finite or outside the support, others are NaN.
        """
        new = copy.copy(self)
        for name in ("_found_from_data", "computed_observations", "data_hash", "whole"):
            new.__dict__.pop(name, None)
        before = self.arguments.arrays
        new.arguments = self.arguments._replace(arrays=tuple(arrays))
        new.data = new.arguments.arrays + self.data[len(before) :]
        pairs = enumerate(zip(arrays, before, strict=True))
        new._check_data(self.sites, [i for i, (own, old) in pairs if own is not old])
        return new

    # -- the flat vector -------------------------------------------------------------------

    @functools.cached_property
    def continuous(self) -> tuple[Site, ...]:
        """The latent sites that make up the flat vector, in order."""
        return tuple(s for s in self.sites.values() if s.kind == "latent" and s.offset >= 0)

    @functools.cached_property
    def discrete(self) -> tuple[Site, ...]:
        """The discrete latent sites."""
        return tuple(s for s in self.sites.values() if s.kind == "latent" and s.discrete)

    @property
    def latent(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites.values() if s.kind == "latent")

    @property
    def observed(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites.values() if s.kind == "observed")

    @property
    def dimensions(self) -> dict[str, int]:
        """Length of every named dimension of the sites."""
        return {
            dim: size
            for site in self.sites.values()
            for dim, size in zip(site.dims, site.shape, strict=True)
        }

    @property
    def subsampled(self) -> dict[str, tuple[int, np.ndarray]]:
        """Plates that see a random subset of the data: their full size, the indices they see."""
        indices = self.data[len(self.arguments.arrays) :]
        sizes = self._subsamples.items()
        return {name: (size, index) for (name, size), index in zip(sizes, indices, strict=True)}

    @functools.cached_property
    def whole(self) -> Program:
        """The program whose subsampled plates see all their rows.

        Raises:
            ModelError: the model does not run so, for a batch size that is written into it, say.
        """
        if not self.subsampled:
            return self
        args, kwargs = self.arguments.rebuild(self.arguments.arrays)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataBakedWarning)  # was given for this program
            return Program(
                widened(self.model), args, kwargs, precision=self.precision, dims=self.user_dims
            )

    @functools.cached_property
    def computed_observations(self) -> dict[str, np.ndarray]:
        """Values of observed sites that the model computes from its data alone.

        Compiles a small program for models that have such sites, or masked ones.

        Raises:
            DataError: a value is not finite, or outside the support of its site.
        """
        found = self._found_from_data["value"]
        for name, value in found.items():
            if not self.sites[name].masked:
                check_observed_values(self.sites[name], value, f"value computed for {name}")
        return found

    @property
    def observed_elements(self) -> dict[str, np.ndarray]:
        """Which elements of masked observed sites count, where the data alone say so."""
        return self._found_from_data["mask"]

    @functools.cached_property
    def _found_from_data(self) -> dict[str, dict[str, np.ndarray]]:
        found: dict[str, dict[str, np.ndarray]] = {"value": {}, "mask": {}}
        if self._functions_of_data is not None:
            with self.context():
                for (kind, name), array in self._functions_of_data(self.data).items():
                    found[kind][name] = np.array(array)
        return found

    @functools.cached_property
    def _functions_of_data(self) -> Callable[[Sequence[Any]], dict[tuple[str, str], Any]] | None:
        """The compiled values and masks of observed sites that follow from the data, if any."""
        names = [("value", site.name) for site in self.observed if site.argument < 0]
        names += [("mask", site.name) for site in self.observed if site.masked]
        if not names:
            return None

        def found(key: Any, data: Sequence[Any]) -> list[Any]:
            trace = self.trace(data, with_improper_sites, key=key)
            return [
                trace[name]["value"] if kind == "value" else unmasked_elements(trace[name])
                for kind, name in names
            ]

        with self.context():
            traced = Traced.of(found, jax.eval_shape(_fixed_key), self.data)
            random = dependents(traced.jaxpr, 1)  # by way of latent sites
            fixed = [name for name, flag in zip(names, random, strict=True) if not flag]

            def of_data(data: Sequence[Any]) -> dict[tuple[str, str], Any]:
                every = dict(zip(names, found(_fixed_key(), data), strict=True))
                return {name: every[name] for name in fixed}

            return kept(of_data, self.data) if fixed else None

    @functools.cached_property
    def size(self) -> int:
        return sum(site.unconstrained_size for site in self.continuous)

    @property
    def coordinates(self) -> tuple[str, ...]:
        """A name for every coordinate of the flat vector."""
        return tuple(
            site.name + (f"[{', '.join(map(str, index))}]" if index else "")
            for site in self.continuous
            for index in np.ndindex(*site.unconstrained_shape)
        )

    def unravel(self, position: Any) -> dict[str, Any]:
        """The flat vector (D,) as unconstrained arrays by site."""
        position = jnp.asarray(position)
        return {
            site.name: position[site.offset : site.offset + site.unconstrained_size].reshape(
                site.unconstrained_shape
            )
            for site in self.continuous
        }

    def ravel(self, unconstrained: Mapping[str, Any]) -> Any:
        """Unconstrained arrays by site as the flat vector (D,)."""
        parts = [jnp.ravel(unconstrained[site.name]) for site in self.continuous]
        return jnp.concatenate(parts) if parts else jnp.zeros(0, self.precision)

    # -- scores ----------------------------------------------------------------------------

    def scores(
        self, data: Sequence[Any], *wrappers: Callable
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Elementwise log probability of every sample site, and the trace they come from."""
        trace = self.trace(data, *wrappers)
        scores = {
            name: log_prob(message)
            for name, message in trace.items()
            if message["type"] == "sample"
        }
        return scores, trace

    def at(self, position: Any) -> Callable:
        """A handler that puts the latent sites at a flat unconstrained vector."""
        return at_unconstrained(self.unravel(position))

    def log_density(self, position: Any, data: Sequence[Any]) -> Any:
        """Log joint density of the unconstrained vector, Jacobian of the transforms included.

        Args:
            position: flat unconstrained vector, shape (D,).
            data: the arrays of `Program.data`, or others of the same shapes.

        Returns:
            A scalar, equal to minus NumPyro's `potential_energy`, but for unused elements of sites
            of missing observations, which rest (`ppl_toolkit.resting`).
        """
        if self.marginalised:
            log_density = self._marginal_log_density(position, data)
            trace = self.trace(data, self.at(position)) if self.imputed else {}
        else:
            self._require_continuous()
            trace = self.trace(data, self.at(position))
            log_density = total(trace)
        if self.imputed:
            log_density += positions.log_law_of_rest(self, self.unravel(position), trace)
        return log_density

    def _marginal_log_density(self, position: Any, data: Sequence[Any]) -> Any:
        """The same with the finite discrete sites summed out by variable elimination (funsor)."""
        from numpyro.contrib.funsor import config_enumerate, enum, log_density

        def model() -> None:
            self.run(data, _fixed_key(), self.at(position)(config_enumerate(self.model)))

        enumerated = enum(model, first_available_dim=-self._plate_dims - 1)
        with alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return log_density(enumerated, (), {}, {})[0]

    def log_prior(self, position: Any, data: Sequence[Any]) -> dict[str, Any]:
        """Elementwise log prior density of every latent site, on the constrained space."""
        self._require_continuous()
        scores, _ = self.scores(data, self.at(position))
        return {s.name: scores[s.name] for s in self.latent}

    def log_likelihood(self, position: Any, data: Sequence[Any]) -> dict[str, Any]:
        """Pointwise log likelihood by observed site (plate scales and masks applied)."""
        self._require_continuous()
        scores, _ = self.scores(data, self.at(position))
        return {s.name: scores[s.name] for s in self.observed}

    def log_joint(self, values: Mapping[str, Any], data: Sequence[Any]) -> Any:
        """Log joint density at constrained ``values`` of all latent sites (no Jacobian)."""
        return total(self.trace(data, functools.partial(handlers.substitute, data=dict(values))))

    def log_terms(self, values: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
        """Elementwise log probability by site at constrained ``values`` of the latent sites."""
        wrapper = functools.partial(handlers.substitute, data=dict(values))
        scores, _ = self.scores(data, wrapper, filled)
        return {name: scores[name] for name, site in self.sites.items() if name in scores}

    def pointwise(self, values: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
        """What every single observation says of ``values``, by observed site.

        Elementwise log probabilities; of a site whose elements depend on each other the log
        densities of every element given all others, where its law knows them. Leaving an
        observation out of the posterior needs these (Buerkner, Gabry, Vehtari 2021); their sum is
        not the log likelihood of the site.
        """
        wrapper = functools.partial(handlers.substitute, data=dict(values))
        scores, trace = self.scores(data, wrapper, filled)
        return {
            site.name: trace[site.name]["fn"].left_out_log_densities(trace[site.name]["value"])
            if site.dependent
            else scores[site.name]
            for site in self.observed
        }

    @property
    def marginalised(self) -> bool:
        """Whether discrete sites are summed out of `log_density`: finite ones beside continuous."""
        finite = all(site.cardinality for site in self.discrete)
        return bool(self.discrete) and bool(self.continuous) and finite

    def _require_continuous(self, method: str = "a gradient-based method") -> None:
        if self.discrete:
            names = [site.name for site in self.discrete]
            raise MethodError(
                f"{method} cannot serve this model: sites {names} are discrete and have no "
                "gradient. Use method='enumeration' if "
                "all latent sites are discrete and few, or sum them out in the model (for "
                "mixtures: numpyro.distributions.MixtureSameFamily)."
            )

    # -- values ----------------------------------------------------------------------------

    def constrain(self, position: Any, data: Sequence[Any]) -> dict[str, Any]:
        """Latent and deterministic sites at a flat unconstrained vector."""
        trace = self.trace(data, self.at(position))
        values = self.site_values(trace)
        if not self.marginalised:
            return values
        summed_out = {site.name for site in self.discrete} | set(self._functions_of_discrete)
        return {name: value for name, value in values.items() if name not in summed_out}

    @functools.cached_property
    def _functions_of_discrete(self) -> tuple[str, ...]:
        """Deterministic sites that depend on discrete latent sites: without a value once summed."""

        def complete(discrete: Any, continuous: Any, data: Any) -> Any:
            return self.complete({**discrete, **continuous}, data)

        shapes = {s.name: jax.ShapeDtypeStruct(s.shape, s.dtype) for s in self.latent}
        discrete = {s.name: shapes[s.name] for s in self.discrete}
        rest = {s.name: shapes[s.name] for s in self.continuous}
        with self.context():
            closed, out = jax.make_jaxpr(complete, return_shape=True)(discrete, rest, self.data)
        touched = dependents(closed.jaxpr, len(jax.tree.leaves(discrete)))
        return tuple(name for name, flag in zip(sorted(out), touched, strict=True) if flag)

    def complete(self, values: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
        """Latent and deterministic sites at constrained ``values`` of the latent sites."""
        wrapper = functools.partial(handlers.substitute, data=dict(values))
        return self.site_values(self.trace(data, wrapper, filled))

    def unconstrain(self, values: Mapping[str, Any], data: Sequence[Any]) -> Any:
        """The flat unconstrained vector (D,) of constrained ``values``.

        Raises:
            SiteError: a continuous latent site has no value.
        """
        missing = [site.name for site in self.continuous if site.name not in values]
        if missing:
            raise SiteError(f"no value for sites {missing}; they need one each.")
        fixed = {site.name: values[site.name] for site in self.latent if site.name in values}
        trace = self.trace(data, functools.partial(handlers.substitute, data=fixed), filled)
        return self.ravel(
            {
                site.name: biject_to(trace[site.name]["fn"].support).inv(values[site.name])
                for site in self.continuous
            }
        )

    def prior(self, key: Any, data: Sequence[Any]) -> dict[str, Any]:
        """One draw of latent and deterministic sites from the prior."""
        if self.imputed:
            return positions.values_at(self, positions.prior_position(self, key, data), data)
        self.require_proper()
        return self.site_values(self.trace(data, key=key))

    def predict(
        self,
        key: Any,
        values: Mapping[str, Any],
        data: Sequence[Any],
        *,
        conditional: bool = True,
    ) -> dict[str, Any]:
        """Draw every observed or new site given the latent ``values`` (site -> array).

        Sites that the model observes are drawn anew from their distribution. Discrete sites that
        were summed out, and so have no value, are drawn first: from their law given ``values`` and
        what is observed if ``conditional``, else from the model. A series of a scan that is longer
        here than in ``values`` is continued.
        """
        key, key_discrete = jax.random.split(key)
        fixed = {name: values[name] for name in values if name in self.sites}
        summed_out = self.marginalised and any(s.name not in fixed for s in self.discrete)
        if summed_out and conditional:
            fixed |= self._draw_discrete(key_discrete, fixed, data)
        trace = self.trace(
            data, redrawn, functools.partial(handlers.substitute, data=fixed), filled, key=key
        )
        return {
            name: message["value"]
            for name, message in trace.items()
            if message["type"] == "deterministic"
            or (message["type"] == "sample" and not is_auxiliary(message))
            if name not in values or np.shape(values[name]) != np.shape(message["value"])
        }

    def _draw_discrete(
        self, key: Any, fixed: Mapping[str, Any], data: Sequence[Any]
    ) -> dict[str, Any]:
        """One draw of the summed-out sites given the others, by funsor's backward sampling."""
        from numpyro.contrib.funsor import config_enumerate, infer_discrete

        known = config_enumerate(handlers.substitute(self.model, data=dict(fixed)))
        model = infer_discrete(known, -self._plate_dims - 1, temperature=1, rng_key=key)
        with alone(), warnings.catch_warnings(), handlers.trace() as trace:
            warnings.simplefilter("ignore", FutureWarning)
            self.run(data, key, model)
        return {site.name: trace[site.name]["value"] for site in self.discrete}

    def site_values(self, trace: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the latent and deterministic sites of a trace; NaN where nothing is there."""
        return {
            name: self._where_active(trace[name])
            for name, site in self.sites.items()
            if site.kind in ("latent", "deterministic")
        }

    def _where_active(self, message: Mapping[str, Any]) -> Any:
        value = jnp.asarray(message["value"])
        if mark_of(message) is None:
            return value
        return jnp.where(active_elements(message, value), value.astype(self.precision), jnp.nan)

    # -- finite programs -------------------------------------------------------------------

    @property
    def configurations(self) -> int:
        """Number of joint values of the discrete latent sites."""
        return math.prod(s.cardinality ** math.prod(s.shape) for s in self.discrete)

    def decode(self, index: Any, data: Sequence[Any]) -> dict[str, Any]:
        """Configuration number ``index`` as values by site (mixed radix, first site fastest)."""
        trace = self.trace(data)
        values: dict[str, Any] = {}
        for site in self.discrete:
            levels = finite_support(trace[site.name]["fn"])
            count = math.prod(site.shape)
            powers = np.asarray(site.cardinality) ** np.arange(count)
            digits = (index // powers) % site.cardinality
            values[site.name] = levels[digits].reshape(site.shape)
            index = index // site.cardinality**count
        return values

    def log_configuration(self, index: Any, data: Sequence[Any]) -> Any:
        """Log joint density of configuration number ``index``."""
        values = self.decode(index, data)
        log_joint = self.log_joint(values, data)
        if self.imputed:
            log_joint += positions.log_law_of_rest(self, values, self.trace(data))
        return log_joint

    def configuration(self, index: Any, data: Sequence[Any]) -> dict[str, Any]:
        """Latent and deterministic sites of configuration number ``index``."""
        return self.complete(self.decode(index, data), data)

    # -- requirements of methods -----------------------------------------------------------

    def require_gradients(self, method: str) -> None:
        """Refuse programs that a gradient-based method cannot serve."""
        if self.layout:
            numbers = {plate.number for plate in self.layout.plates}
            numbers |= {cases.number for cases in self.layout.cases}
            remedy = (
                "Compose it with moves that change them: "
                "MCMC(cycle([BirthDeath(plate), block(NUTS(), [continuous sites])]))."
            )
            if not numbers & {site.name for site in self.latent}:
                remedy = "They are given here, so that MCMC(NUTS()) or SMC() will do."
            raise MethodError(
                f"{method} cannot serve this model alone: how many parameters it has depends on "
                f"{sorted(numbers)}. {remedy}"
            )
        if self.marginalised:
            self._require_summable(method)
        else:
            self._require_continuous(method)
        if not self.size:
            raise MethodError(
                f"{label(self.model)} has no latent site to infer: every sample site is "
                "observed. Remove obs= from what you want to learn."
            )

    def require_minibatches(self, method: str, whole: bool) -> None:
        """Refuse programs whose subsampled plates cannot see other rows at every step.

        Args:
            method: how messages call what needs it.
            whole: whether the program must also run on all rows.
        """
        plates = {variable_name(plate) for plate in self.subsampled}
        if inside := [site.name for site in self.latent if plates & set(site.dims)]:
            raise MethodError(
                f"{method} draws the rows of subsampled plates anew at every step, but sites "
                f"{inside} are latent inside such a plate: their values would belong to other "
                "rows each time. Draw them in a plate of full size, outside of it, and take rows "
                "of them: z[rows]."
            )
        if not whole:
            return
        try:
            _ = self.whole
        except PPLError as error:
            raise MethodError(
                f"{method} needs all the data at times, for control variates or for the kernels "
                f"beside it, but the model does not run on all rows of {sorted(self.subsampled)}: "
                f"{error} Take the rows that the plate gives (with numpyro.plate(...) as rows), or "
                "numpyro.subsample, and write no batch size elsewhere."
            ) from None

    def _require_summable(self, method: str) -> None:
        """Refuse models whose discrete sites funsor cannot sum out, such as chains in a scan."""
        try:
            with self.context():
                self.traced("log_density")
        except Exception as error:
            names = [site.name for site in self.discrete]
            raise MethodError(
                f"{method} cannot serve this model: NumPyro and funsor cannot sum out the discrete "
                f"sites {names} ({type(error).__name__}: {error}). Every batch dimension must be a "
                "plate's, or part of the event (.expand([n]).to_event(1)). Otherwise sum them out "
                "in the model, as numpyro.distributions.MixtureSameFamily does for mixtures."
            ) from None

    def require_proper(self) -> None:
        """Refuse programs whose prior cannot be drawn from."""
        flat = [site.name for site in self.latent if not site.proper]
        if flat:
            raise MethodError(
                f"sites {flat} have flat (improper) priors, which cannot be drawn from. Give "
                "them proper priors to use the prior."
            )

    # -- identity --------------------------------------------------------------------------

    def traced(self, name: Any) -> Traced:
        """One of this program's functions of (something, data), traced for compiling.

        Args:
            name: "log_density", "constrain", "prior", "log_configuration", "configuration", or
                a function of `ppl_toolkit.positions` or `ppl_toolkit.minibatches`; or an object of
                a kernel's: a function of (program, something, data) with an ``example`` of this.
        """
        if name in self._traced:
            return self._traced[name]
        if not isinstance(name, str):
            with self.context():
                own = functools.partial(name, self)
                self._traced[name] = Traced.of(own, name.example(self), self.data)
        else:
            function = getattr(self, name, None)
            if function is None:
                room = minibatches if name in minibatches.__all__ else positions
                function = functools.partial(getattr(room, name), self)
            with self.context():
                example: Any
                if name in ("prior", "prior_position", "start_position", "rows"):
                    example = jax.eval_shape(_fixed_key)
                elif name == "own_draws":
                    example = (jax.eval_shape(_fixed_key), positions.shapes(self))
                elif name == "log_parts_of_rows":
                    indices = {plate: index for plate, (_, index) in self.subsampled.items()}
                    example = (positions.shapes(self), indices)
                elif name == "relaxed_log_parts":
                    example = positions.relaxed_shapes(self)
                elif name in (*positions.__all__, "whole_log_parts"):
                    example = positions.shapes(self)
                elif name in ("log_configuration", "configuration"):
                    example = np.asarray(0)
                else:
                    example = np.zeros(self.size, self.precision)
                traced = Traced.of(function, example, self.data)
                if name == "log_density":
                    traced = without_logs_of_exps(traced, example, self.data)
                self._traced[name] = traced
                if name == "prior":
                    self._require_randomness(self._traced[name])
        return self._traced[name]

    def _require_randomness(self, traced: Traced) -> None:
        if self.latent and not any(dependents(traced.jaxpr, 1)):
            raise ModelError(
                f"{label(self.model)} draws the same values whatever the seed: it carries a "
                "numpyro.handlers.seed of its own. Pass the model without it."
            )

    @functools.cached_property
    def _score(self) -> Traced:
        """What tells models apart: a log density that every process traces alike."""
        if self.continuous and not self.discrete:
            return self.traced("log_density")
        values = {s.name: jax.ShapeDtypeStruct(s.shape, s.dtype) for s in self.latent}
        with self.context():
            return Traced.of(self.log_joint, values, self.data)

    @functools.cached_property
    def model_hash(self) -> str:
        """SHA-256 of what the model computes: its sites and its scores, not its data."""
        sha = hashlib.sha256()
        for site in self.sites.values():
            sha.update(repr((site.name, site.kind, site.shape, str(site.dtype))).encode())
        sha.update(fingerprint(self._score.jaxpr).encode())
        return sha.hexdigest()

    @functools.cached_property
    def data_hash(self) -> str:
        """SHA-256 of the data: the arguments, and arrays the model takes from elsewhere."""
        return self.hash_of_data(map(digest, self.arguments.arrays))

    def hash_of_data(self, digests: Iterable[str]) -> str:
        """`data_hash` of arguments whose arrays have these digests."""
        arguments = hashlib.sha256("".join(digests).encode()).hexdigest()
        return hashlib.sha256("".join([arguments, *self._elsewhere]).encode()).hexdigest()

    @functools.cached_property
    def _elsewhere(self) -> list[str]:
        """Digests of the arrays that the model closes over."""
        return sorted(digest(as_numpy(const)) for const in self._score.consts)

    def __repr__(self) -> str:
        kinds = {
            kind: [s.name for s in self.sites.values() if s.kind == kind]
            for kind in ("latent", "observed", "deterministic", "factor")
        }
        parts = ", ".join(f"{kind}={names}" for kind, names in kinds.items() if names)
        return f"Program({label(self.model)}, D={self.size}, {parts})"


def _fixed_key() -> Any:
    return jax.random.key(0)
