"""Particle score ascent: the most likely parameters of any model with a `scan`.

By Fisher's identity the gradient of the log likelihood is an expectation over paths,

    grad log p(y | theta) = E[ grad_theta log p(x_{0:T}, y | theta) | y, theta ],

of the gradient of the ordinary log density. The paths come from conditional sweeps that begin at
the path of the iteration before, whose law hardly differs from the one that is wanted (particle
Gibbs: the bias falls geometrically with the sweeps that are thrown away), or from a new filter. All
derivatives are with respect to the unconstrained parameters u; likelihoods have no Jacobian.

Sources: Cardoso et al. (2023), State and parameter learning with PaRIS particle Gibbs, ICML;
Poyiadjis, Doucet and Singh (2011), Biometrika 98; Louis (1982), JRSS B 44, for the information.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro import handlers

from ppl_toolkit import positions
from ppl_toolkit.capture import captured
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference.ascent import Adam, Average, ascended, require_optimizer
from ppl_toolkit.inference.paris import backward_paths, genealogy
from ppl_toolkit.inference.particle_filter import Filter, follow, require_particles, take
from ppl_toolkit.inference.particle_gibbs import Path, renewed, sweep, usual_particles
from ppl_toolkit.inference.proposals import Bootstrap, Proposal, require_proposal
from ppl_toolkit.inference.state_space import Series, StateSpace, state_space
from ppl_toolkit.inference.step_sizes import require_count, require_radius
from ppl_toolkit.program import Program
from ppl_toolkit.replay import at_unconstrained, log_det_name
from ppl_toolkit.sites import variable_name
from ppl_toolkit.tracing import key_shape

__all__ = ["ScoreAscent", "Smoothing", "filtered_paths", "log_joint", "path_score"]

_TRIES = 20  # starting points drawn before giving up
_LEAST_FILTER, _MOST_FILTER = 128, 1024  # of filters


class PathScore(NamedTuple):
    """Means over paths, at parameters u.

    Attributes:
        log_joint: of log p(x_{0:T}, y | theta).
        gradient: of its gradient with respect to u, by site.
        information: of minus its Hessian minus the gradient's square, (D, D), with the sites' one
            after the other; None if it is not wanted.
    """

    log_joint: Any
    gradient: dict[str, Any]
    information: Any = None


def log_joint(
    program: Program,
    space: StateSpace,
    position: Mapping[str, Any],
    path: Path,
    data: Sequence[Any],
    prior: bool = False,
) -> Any:
    """Log p(x_{0:T}, y | theta), an ordinary log density of the model.

    Args:
        program: the model.
        space: its time axis.
        position: unconstrained values u of the static sites.
        path: the latents on their own spaces.
        data: the arrays of `Program.data`, or others of the same shapes.
        prior: whether log p(theta) is added: as on the parameters' own space, without the Jacobian
            of theta(u).
    """
    latents = functools.partial(handlers.substitute, data={**path.initial, **path.latents})
    scores, _ = program.scores(data, latents, at_unconstrained(position))
    without = {log_det_name(name) for name in space.static}
    without |= set() if prior else set(space.static)
    return sum((jnp.sum(s) for n, s in scores.items() if n not in without), start=jnp.zeros(()))


def path_score(
    density: Callable[[Mapping[str, Any], Path], Any],
    position: Mapping[str, Any],
    paths: Path,
    information: bool = False,
) -> PathScore:
    """The mean score of M paths.

    Args:
        density: (position, path) -> `log_joint`.
        position: unconstrained values u of the static sites.
        paths: arrays (M, ...) and (M, T, ...).
        information: whether the second derivatives are wanted.

    Cost: a gradient of the log density per path; D + 1 of them with the information.
    """
    u, unravel = ravel_pytree(dict(position))

    def one(path: Path) -> PathScore:
        def at(u: Any) -> Any:
            return density(unravel(u), path)

        value, gradient = jax.value_and_grad(at)(u)
        missing = -jax.hessian(at)(u) - jnp.outer(gradient, gradient) if information else None
        return PathScore(value, unravel(gradient), missing)

    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.vmap(one)(paths))


def swept(
    key: Any,
    path: Path,
    drawn: Callable[[Any, Path], Path],
    scored: Callable[[Path], Any],
    sweeps: int,
    dropped: int,
) -> tuple[Path, Any]:
    """The path after k sweeps, and what those after the first k_0 say on average.

    Args:
        drawn: (key, path) -> paths (M, ...) of a conditional sweep from the path.
        scored: paths -> what is averaged.
        sweeps, dropped: k and k_0.
    """

    def once(state: tuple[Path, Any], number: Any) -> tuple[tuple[Path, Any], None]:
        path, total = state
        paths = drawn(random.fold_in(key, number), path)
        total = lax.cond(
            number >= dropped, lambda: jax.tree.map(jnp.add, total, scored(paths)), lambda: total
        )
        return (take(paths, 0), total), None

    like = jax.eval_shape(lambda: scored(drawn(key, path)))
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    (path, total), _ = lax.scan(once, (path, nothing), jnp.arange(sweeps))
    return path, jax.tree.map(lambda x: x / (sweeps - dropped), total)


def filtered_paths(
    key: Any, series: Series, options: Filter, count: int, moves: int = 0, backward: bool = True
) -> tuple[Path, Any]:
    """Paths (M, ...) of the latents from a new filter, and log Z_hat.

    Args:
        count: number of paths M.
        moves: as in `backward_paths`.
        backward: whether they are drawn backwards, and not along the ancestors.
    """
    key_filter, key_paths = random.split(key)
    last, initial, history = follow(key_filter, series, options, lambda _, history, __: history)
    known = (series, initial, history, last.log_weights, count)
    drawn = backward_paths(key_paths, *known, moves) if backward else genealogy(key_paths, *known)
    latents = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), drawn[1])
    return Path(drawn[0], latents), last.log_evidence


# -- functions of a program ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """How paths of the latents are drawn.

    Attributes:
        space: the time axis.
        options: of the filter, conditional or not.
        paths: number M of paths drawn from each sweep or filter.
        moves: see `backward_paths`; for filters.
    """

    space: StateSpace
    options: Filter
    paths: int
    moves: int = 0

    def filtered(self, program: Program, key: Any, position: Any, data: Sequence[Any]) -> Any:
        series = self.space.at(program, position, data)
        backward = self.space.replays == 0
        return filtered_paths(key, series, self.options, self.paths, self.moves, backward)

    def shapes(self, program: Program) -> dict[str, Any]:
        """Of the unconstrained parameters."""
        known = positions.shapes(program)
        return {name: known[name] for name in self.space.static}

    def path_shapes(self, program: Program) -> Path:
        def path(key: Any, position: Any) -> Path:
            return take(self.filtered(program, key, position, program.data)[0], 0)

        with program.context():
            return jax.eval_shape(path, key_shape(), self.shapes(program))


@dataclasses.dataclass(frozen=True)
class _Split:
    """Flat position of all sites -> unconstrained parameters: a function of a program."""

    how: Smoothing

    def example(self, program: Program) -> Any:
        return jax.ShapeDtypeStruct((program.size,), program.precision)

    def __call__(self, program: Program, flat: Any, data: Sequence[Any]) -> dict[str, Any]:
        sites = program.unravel(flat)
        return {name: sites[name] for name in self.how.space.static}


@dataclasses.dataclass(frozen=True)
class _Filtered:
    """(key, parameters) -> paths (M, ...) from a new filter, log Z_hat: of a program."""

    how: Smoothing

    def example(self, program: Program) -> Any:
        return key_shape(), self.how.shapes(program)

    def __call__(self, program: Program, more: Any, data: Sequence[Any]) -> Any:
        key, position = more
        return self.how.filtered(program, key, position, data)


@dataclasses.dataclass(frozen=True)
class _Swept:
    """(key, parameters, path) -> paths (M, ...) from a conditional sweep: of a program."""

    how: Smoothing

    def example(self, program: Program) -> Any:
        return key_shape(), self.how.shapes(program), self.how.path_shapes(program)

    def __call__(self, program: Program, more: Any, data: Sequence[Any]) -> Path:
        key, position, path = more
        how, series = self.how, self.how.space.at(program, position, data)
        new, _ = sweep(key, series, path, how.options, replays=how.space.replays, paths=how.paths)
        return new


@dataclasses.dataclass(frozen=True)
class _Joint:
    """(parameters, path) -> `log_joint`: a function of a program."""

    how: Smoothing
    prior: bool

    def example(self, program: Program) -> Any:
        return self.how.shapes(program), self.how.path_shapes(program)

    def __call__(self, program: Program, more: Any, data: Sequence[Any]) -> Any:
        position, path = more
        return log_joint(program, self.how.space, position, path, data, self.prior)


@dataclasses.dataclass(frozen=True)
class _Parameters:
    """Unconstrained parameters -> their values on their own spaces: a function of a program."""

    how: Smoothing

    def example(self, program: Program) -> Any:
        return self.how.shapes(program)

    def __call__(self, program: Program, position: Any, data: Sequence[Any]) -> dict[str, Any]:
        model = at_unconstrained(position)(program.model)
        _, before = captured(lambda: program.run(data, np.zeros(2, np.uint32), model))
        return {name: before[name]["value"] for name in self.how.space.static}


@dataclasses.dataclass(frozen=True)
class _Draw:
    """(parameters, path) -> latent and deterministic sites: a function of a program."""

    how: Smoothing

    def example(self, program: Program) -> Any:
        return self.how.shapes(program), self.how.path_shapes(program)

    def __call__(self, program: Program, draw: Any, data: Sequence[Any]) -> dict[str, Any]:
        position, path = draw
        latents = functools.partial(handlers.substitute, data={**path.initial, **path.latents})
        return program.site_values(program.trace(data, latents, at_unconstrained(position)))


# -- the method ------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """Arguments of the compiled program."""

    radius: Any
    warmup: Any


class Fit(NamedTuple):
    """What is known of the maximum.

    Attributes:
        average: of the iterates' unconstrained parameters and of their `PathScore`, by iteration.
        values: of the parameters at that average, on their own spaces.
        standard_errors: of these values; None if they are not wanted.
    """

    average: Average
    values: dict[str, Any]
    standard_errors: dict[str, Any] | None


class Climb(NamedTuple):
    """The state of a chain.

    Attributes:
        position: unconstrained parameters.
        optimizer: its state.
        path: of the latents, the last that was drawn.
        fit: the estimate so far.
        taken, skipped: iterations, and those without a step.
        started: whether some particle of the first filter had a positive weight.
    """

    position: dict[str, Any]
    optimizer: Any
    path: Path
    fit: Fit
    taken: Any
    skipped: Any
    started: Any


@dataclasses.dataclass(frozen=True)
class ScoreAscent:
    """The most likely parameters of a model with a `scan`, by stochastic gradient ascent.

    A step goes along an estimate of the gradient of the log likelihood, at the current parameters:
    the mean score of paths of the latents drawn by particles. It is nearly unbiased with few
    particles, since conditional sweeps begin at the path of the iteration before.

    A chain is an independent start. Its draws, in the group ``iterates``, are the iterates after
    warm-up, each with a path of the latents drawn at it; they are no posterior draws. The group
    ``estimate`` has the maximum: by chain the values at the mean of these iterates (on the
    unconstrained space), and ``gradient_norm``, the norm of the mean score, which should be small
    beside that of single iterations. If chains differ, so do local maxima, or more iterations are
    needed: ``ppl.extend(..., method=...)`` adds some. ``ParticleFilter(given=...)`` estimates the
    log likelihood there.

    Args:
        objective: "likelihood": log p(y | theta). "posterior": log p(y | theta) + log p(theta),
            with the density of the prior on the parameters' own space; the maximum is the mode of
            the posterior density as the model is written (another one than that of the density of
            the unconstrained parameters, which has a Jacobian).
        smoother: "ppg": conditional sweeps (particle Gibbs). "ffbs": a new filter at every
            iteration, and paths drawn backwards; its gradients have a bias of order T / N.
        particles: N; if None, T / 2 but at least 16 and at most 256 for "ppg", 4 T but at least 128
            and at most 1024 for "ffbs".
        paths: M, drawn from the particles of every sweep or filter.
        sweeps, dropped: "ppg": k, of which the first k_0 do not count.
        moves: "ffbs": steps of a Metropolis-Hastings chain for every ancestor; 0: exact draws.
        proposal: how particles are moved: `Bootstrap()`, `Guided(...)`, `LaplaceProposal()`,
            `Adapted()`.
        optimizer: `Adam(step_size)`, or one of optax's (made once and passed again, since they
            cannot be compared: a new one compiles anew).
        errors: whether standard errors are estimated, from the observed information (Louis'
            identity, over the draws): entries ``NAME_se`` of the group ``estimate``. With 200 draws
            they are uncertain by about a fifth of their size.
        warmup: default number of iterations before those that are averaged.
        init_radius: starts are uniform in (-radius, radius) on the unconstrained space.

    Raises:
        OptionError: an option is not one of these.

    Fisher's identity needs latents whose support does not depend on the parameters. Series whose
    carry remembers more than one step are served by "ppg" alone, with paths along the ancestors.

    Cost: per iteration O(k N T + k M N T) steps of the model and (k - k_0) M gradients of its log
    density; the latter D + 1 times with ``errors``. Statistics: ``gradient_norm``, ``log_joint``
    (the mean of log p(x, y | theta) over the paths), ``renewed`` (the share of times at which the
    path is a new one) or ``log_evidence``, and ``skipped`` where a gradient was not finite.

    Source: Cardoso et al. (2023), ICML.
    """

    objective: str = "likelihood"
    smoother: str = "ppg"
    particles: int | None = None
    paths: int = 4
    sweeps: int = 4
    dropped: int = 2
    moves: int = 0
    proposal: Proposal = dataclasses.field(default_factory=Bootstrap)
    optimizer: Any = dataclasses.field(default_factory=Adam)
    errors: bool = False
    warmup: int = 200
    init_radius: float = 2.0
    space: StateSpace | None = None

    group: ClassVar[str] = "iterates"
    draws: ClassVar[int] = 200
    one_law: ClassVar[bool] = False
    refit_warmup: ClassVar[int] = 100
    brief_start: ClassVar[bool] = True
    failure: ClassVar[str] = (
        "no particle has a finite weight at the starting point, or at any of those tried: the data "
        "are impossible, or far from all that the model predicts there. Give other starting values "
        "(init={site: value}), take more particles, or a proposal that looks at the data."
    )

    def __post_init__(self) -> None:
        for name, known in (("objective", ("likelihood", "posterior")), ("smoother", _SMOOTHERS)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be one of {known}; got {getattr(self, name)!r}.")
        if self.particles is not None:
            require_particles(self.particles)
        require_count("paths", self.paths)
        require_count("sweeps", self.sweeps)
        for name, most in (("dropped", self.sweeps - 1), ("moves", None), ("warmup", None)):
            _require_whole(name, getattr(self, name), most)
        require_radius(self.init_radius)
        require_proposal(self.proposal)
        require_optimizer(self.optimizer)

    # -- what is refused, what is compiled ---------------------------------------------------------

    def on(self, program: Program) -> ScoreAscent:
        return dataclasses.replace(self, space=state_space(program))

    def check(self, program: Program) -> None:
        """Refuse programs without a scan, without parameters, or with discrete ones."""
        space = state_space(program)
        self.proposal.check(space, program)
        space.require_real_parameters(program, "ScoreAscent needs derivatives")
        if self.smoother == "ffbs":
            space.require_backward("ScoreAscent(smoother='ffbs')")

    @property
    def _conditional(self) -> bool:
        return self.smoother == "ppg"

    @property
    def _how(self) -> Smoothing:
        assert self.space is not None
        steps = self.space.length
        usual = int(np.clip(4 * steps, _LEAST_FILTER, _MOST_FILTER))
        if self._conditional:
            usual = usual_particles(steps)
        options = Filter(self.particles or usual, self.proposal)
        return Smoothing(self.space, options, self.paths, self.moves)

    @property
    def _joint(self) -> _Joint:
        return _Joint(self._how, self.objective == "posterior")

    @property
    def needs(self) -> tuple[Any, ...]:
        parts = (_Split, _Filtered, _Parameters, _Draw, *((_Swept,) if self._conditional else ()))
        return (self._joint, *(part(self._how) for part in parts))

    def statics(self) -> tuple:
        return (self._joint, self.smoother, self.sweeps, self.dropped, self.errors, self.optimizer)

    def settings(self, program: Program, warmup: int) -> Settings:
        return Settings(np.asarray(self.init_radius, program.precision), np.int32(warmup))

    def attributes(self) -> dict[str, str]:
        """What is maximised."""
        return {"objective": f"log {self.objective}, over the parameters on their own spaces"}

    # -- the loop ----------------------------------------------------------------------------------

    def init(self, key: Any, start: Any, target: Any, settings: Settings) -> Climb:
        """The given parameters, or random ones; a path of a filter with a finite weight."""
        flat, given = start

        def draw(number: Any) -> Any:
            key_point, key_path = random.split(random.fold_in(key, number))
            uniform = random.uniform(key_point, flat.shape, flat.dtype, -1.0, 1.0)
            point = jnp.where(given, flat, settings.radius * uniform)
            position = target.functions[_Split(self._how)](point)
            paths, log_z = target.functions[_Filtered(self._how)]((key_path, position))
            return position, take(paths, 0), jnp.isfinite(log_z)

        def again(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return state[0] + 1, draw(state[0])

        zero = jnp.zeros((), jnp.int32)
        like = jax.eval_shape(draw, zero)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
        _, (position, path, started) = lax.while_loop(
            lambda s: (s[0] < _TRIES) & ~s[1][2], again, (zero, nothing)
        )
        return self._begun(position, path, started, target)

    def refresh(self, state: Climb, target: Any, settings: Settings) -> Climb:
        """From where an earlier run ended, its path included; averages begin anew."""
        return self._begun(state.position, state.path, state.started, target)

    def _begun(self, position: Any, path: Path, started: Any, target: Any) -> Climb:
        like = jax.eval_shape(self._score(target, position), _only(path))
        score = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
        zero = jnp.zeros((), jnp.int32)
        return Climb(
            position, self.optimizer.init(position), path,
            self._fitted(Average.of((position, score)), target), zero, zero, started,
        )  # fmt: skip

    def _score(self, target: Any, position: Any) -> Callable[[Path], PathScore]:
        """Paths -> their score at a position."""
        joint = target.functions[self._joint]

        def density(position: Any, path: Path) -> Any:
            return joint((position, path))

        return lambda paths: path_score(density, position, paths, self.errors)

    def _estimated(
        self, key: Any, position: Any, path: Path, target: Any
    ) -> tuple[Path, PathScore, dict[str, Any]]:
        """The next path, an estimate of the score at the position, and statistics."""
        score = self._score(target, position)
        if self._conditional:
            one = target.functions[_Swept(self._how)]

            def drawn(key: Any, path: Path) -> Path:
                return one((key, position, path))

            new, found = swept(key, path, drawn, score, self.sweeps, self.dropped)
            return new, found, {"renewed": renewed(path.latents, new.latents)}
        paths, log_z = target.functions[_Filtered(self._how)]((key, position))
        return take(paths, 0), score(paths), {"log_evidence": log_z}

    def step(
        self, key: Any, index: Any, state: Climb, target: Any, settings: Settings
    ) -> tuple[Climb, Any, dict[str, Any]]:
        """One iteration; the draw is where its gradient was taken, with the last path there."""
        path, score, info = self._estimated(key, state.position, state.path, target)
        new, optimizer, fine = ascended(
            self.optimizer, score.gradient, state.optimizer, state.position
        )
        kept = jax.tree.map(lambda x: jnp.where(fine, x, 0.0), score)  # one NaN spoils no average
        average = state.fit.average.update((state.position, kept), index >= settings.warmup)
        info |= {
            "gradient_norm": _norm(score.gradient),
            "log_joint": score.log_joint,
            "skipped": ~fine,
        }
        skipped = state.skipped + (~fine).astype(jnp.int32)
        after = Climb(
            new, optimizer, path, self._fitted(average, target), state.taken + 1, skipped,
            state.started,
        )  # fmt: skip
        return after, (state.position, path), info

    def _fitted(self, average: Average, target: Any) -> Fit:
        position, score = average.mean
        values_at = target.functions[_Parameters(self._how)]
        errors = None
        if self.errors:
            mean = ravel_pytree(score.gradient)[0]
            information = score.information + jnp.outer(mean, mean)
            errors = standard_errors(values_at, position, information)
        return Fit(average, values_at(position), errors)

    def values(self, draw: Any, target: Any) -> dict[str, Any]:
        return target.functions[_Draw(self._how)](draw)

    # -- what is said of it ------------------------------------------------------------------------

    def failed(self, state: Climb) -> Any:
        return ~np.asarray(state.started)

    def problem(self, state: Climb) -> str:
        """Said if most gradients were not finite."""
        skipped, taken = np.asarray(state.skipped), np.asarray(state.taken)
        if not np.any(bad := 2 * skipped > taken):
            return ""
        return (
            f"chains {np.flatnonzero(bad).tolist()}: most gradients of the log density were not "
            "finite. Start elsewhere (init={site: value}), or take smaller steps."
        )

    def groups(self, state: Climb) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
        """The estimate of every chain."""
        found: dict[str, tuple[tuple[str, ...], Any]] = {}

        def put(name: str, x: Any, of: str) -> None:
            rest = np.ndim(x) - 1
            own = variable_name(of)
            dims = ("chain", *(f"{own}_dim_{i}" for i in range(rest)))
            found[name] = (dims, np.asarray(x))

        fit = state.fit
        for name, x in fit.values.items():
            put(variable_name(name), x, name)
        for name, x in (fit.standard_errors or {}).items():
            put(f"{variable_name(name)}_se", x, name)
        gradient = fit.average.mean[1].gradient
        squares = [np.sum(np.reshape(np.square(x), (len(x), -1)), 1) for x in gradient.values()]
        put("gradient_norm", np.sqrt(sum(squares)), "gradient_norm")
        return {"estimate": {**found, "iterations": ((), int(np.min(fit.average.count)))}}


_SMOOTHERS = ("ppg", "ffbs")


def standard_errors(
    values_at: Callable[[Any], dict[str, Any]], position: Mapping[str, Any], information: Any
) -> dict[str, Any]:
    """Of the parameters on their own spaces: roots of the diagonal of J I^-1 J^T.

    Args:
        values_at: the parameters at an unconstrained position.
        position: u.
        information: I with respect to u, (D, D).

    Returns:
        By site; NaN where the information is not positive definite.
    """
    u, unravel = ravel_pytree(dict(position))
    values, back = ravel_pytree(values_at(unravel(u)))
    jacobian = jax.jacfwd(lambda u: ravel_pytree(values_at(unravel(u)))[0])(u)
    root = jnp.linalg.cholesky(information)
    scaled = jax.scipy.linalg.solve_triangular(root, jacobian.T, lower=True)
    return back(jnp.sqrt(jnp.sum(scaled**2, axis=0)).astype(values.dtype))


def _only(path: Path) -> Path:
    return jax.tree.map(lambda x: x[None], path)


def _norm(gradient: Mapping[str, Any]) -> Any:
    return jnp.linalg.norm(ravel_pytree(dict(gradient))[0])


def _require_whole(name: str, value: Any, most: int | None) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0
    if wrong or (most is not None and value > most):
        bound = "" if most is None else f" and below sweeps={most + 1}"
        raise OptionError(f"{name} must be an integer >= 0{bound}; got {value!r}.")
