"""Sparse variational inference for classifiers made of scale mixtures of Gaussian processes.

The approximating law and the parts of the bound are in `sparse_posterior`, what a program must
offer in `sparse_program`; here they become a method of `infer`.

Sources: Hensman, Matthews, Ghahramani (2015), AISTATS, for minibatches; Lee, Yun, Yang, Lee (2022),
Scale mixtures of neural network Gaussian processes, ICLR.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import distributions as dist

from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference.ascent import Adam, Average, ascended, finite, require_optimizer
from ppl_toolkit.inference.sparse_posterior import (
    Coefficients,
    InverseGammaScale,
    Moments,
    PointScale,
    drawn,
    expected_log_softmax,
    moments,
    natural_step,
)
from ppl_toolkit.inference.sparse_program import (
    PiecesOf,
    Sites,
    SparseProgram,
    Start,
    sparse_model,
)
from ppl_toolkit.inference.step_sizes import PolynomialDecay, require_count, require_step_size
from ppl_toolkit.minibatches import subset
from ppl_toolkit.program import Program
from ppl_toolkit.tracing import label

__all__ = ["SVTP"]

_SPREAD = 0.1  # of the kernel's parameters at the beginning, on the unconstrained space
_EVERY = 20  # draws, from one estimate of the bound to the next


class Free(NamedTuple):
    """What goes along ordinary gradients.

    Attributes:
        scale: q(sigma^2); None if sigma^2 is known.
        location, log_spread: of the kernel's parameters, independent normal on the unconstrained
            space, (H,).
    """

    scale: InverseGammaScale | None
    location: Any
    log_spread: Any

    def draw(self, key: Any) -> Any:
        """Unconstrained parameters of the kernel."""
        noise = random.normal(key, self.location.shape, self.location.dtype)
        return self.location + jnp.exp(self.log_spread) * noise


class Fit(NamedTuple):
    """The state of a chain.

    Attributes:
        free, q: the approximating law.
        optimizer: the state of the optimiser of ``free``.
        average: of ``free``, m, k and S^-1, over the second half of the warm-up.
        elbo: the mean of the estimates after warm-up.
        last: the last estimate of the bound.
        taken, skipped: steps of learning, and those that were not finite.
        epochs: how often all data were seen.
        started: whether the kernel could be factored at the start.
    """

    free: Free
    q: Coefficients
    optimizer: Any
    average: Average
    elbo: Average
    last: Any
    taken: Any
    skipped: Any
    epochs: Any
    started: Any


class Draw(NamedTuple):
    """Unconstrained parameters of the kernel, sigma^2 (None if it is known), and w."""

    parameters: Any
    sigma2: Any
    w: Any


class Seen(NamedTuple):
    """What one look at the data says.

    Attributes:
        elbo: an unbiased estimate of the bound.
        gradient: of it, by `Free`.
        basis: A at the kernel's parameters drawn, (B, M).
        by_moments: derivatives of the expected log likelihood, scaled up to all data, (B, C).
        scale: q(sigma^2).
    """

    elbo: Any
    gradient: Free
    basis: Any
    by_moments: Moments
    scale: Any


@dataclasses.dataclass(frozen=True)
class SVTP:
    """Sparse variational inference for classification with scale mixtures of Gaussian processes.

    Serves `models.scale_mixture_classification`, and programs that offer what that one does
    (`SparseProgram`). The joint law of sigma^2 and the coefficients w of the inducing inputs is
    approximated by q(sigma^2) = InverseGamma(a, b), q(sigma w_c | sigma^2) = N(m_c + sigma k_c,
    sigma^2 S_c), with full S_c; the kernel's parameters by independent normal laws on the
    unconstrained space. With ``law=dist.Delta(...)`` these are Gaussian processes, and this is
    SVGP.

    Warm-up learns q: m, k and S along natural gradients of the bound on the evidence (ELBO), which
    need no tuning however many inducing inputs there are, the rest by ``optimizer``. At its end q
    becomes the mean of the iterates of its second half. The draws are independent draws of q: R-hat
    says whether the independent fits of the chains agree, not whether q is right. Variational laws
    are often too narrow. The group ``variational`` has the ``elbo`` by chain, and a and b as
    ``scale_shape`` and ``scale_rate``.

    Args:
        batch: rows seen at a step, drawn anew without replacement; all if None.
        samples: pairs of draws (z, -z) behind the expected log likelihood, with one sigma^2 each.
        rate: rho of the natural gradients, in (0, 1]: a number, or a function of the number of the
            step. Falls from 0.5 to 0.03 after 1000 steps by default.
        optimizer: of a, b and the kernel's parameters: `Adam(step_size)`, or one of optax's (made
            once and passed again, since they cannot be compared: a new one compiles anew).
        warmup: default number of steps of learning.

    Raises:
        OptionError: an option out of its range.

    Cost: of a step, with M inducing inputs, B rows, C classes, O(B C M^2 + C M^3) operations and
    C M^2 numbers. Statistics: ``elbo``, an unbiased estimate that is renewed at every 20th draw.

    Source: Lee, Yun, Yang, Lee (2022), Scale mixtures of neural network Gaussian processes, ICLR,
    who have k = 0, diagonal S, point estimates of the kernel's parameters, and Adam for all.
    """

    batch: int | None = None
    samples: int = 16
    rate: Any = dataclasses.field(default_factory=lambda: PolynomialDecay(2.0, 10.0, 0.6))
    optimizer: Any = dataclasses.field(default_factory=Adam)
    warmup: int = 1000
    sizes: tuple[int, int] = dataclasses.field(default=(0, 0), init=False, repr=False)

    refit_warmup: ClassVar[int] = 300
    takes_start: ClassVar[bool] = False
    brief_start: ClassVar[bool] = True
    failure: ClassVar[str] = (
        "the kernel of the inducing inputs is not positive definite at a draw of its parameters. "
        "Leave out inducing inputs that are nearly the same, or give its parameters other priors."
    )

    def __post_init__(self) -> None:
        if self.batch is not None:
            require_count("batch", self.batch)
        require_count("samples", self.samples)
        require_step_size("SVTP", self.rate, "Begin with 0.5.")
        first = float(self._rate(np.int32(0)))
        if first > 1.0:
            raise OptionError(f"rate must lie in (0, 1]; it begins with {first:.3g}.")
        require_optimizer(self.optimizer)

    # -- what is refused, what is compiled ---------------------------------------------------------

    def check(self, program: Program) -> None:
        """Refuse programs without the protocol, without labels, or with another law."""
        model: Any = program.model
        if not isinstance(model, SparseProgram):
            raise MethodError(
                "SVTP serves models.scale_mixture_classification(classes=...) and programs that "
                f"offer what it does (inference.sparse_program.SparseProgram); {label(model)} does "
                "not. Use NUTS."
            )
        if not program.observed:
            raise MethodError(
                "SVTP learns from labels, and there are none: infer(model, X, y, inducing=Z)."
            )
        if not isinstance(model.law, dist.Delta | dist.InverseGamma):
            raise MethodError(
                f"SVTP needs an inverse gamma law of sigma^2, and it is "
                f"{type(model.law).__name__}. Say law=InverseGamma(2.0, 2.0), or Delta(1.0) for "
                "Gaussian processes; for other laws use NUTS, with few inducing inputs."
            )
        args, kwargs = program.arguments.rebuild(program.arguments.arrays)
        model.check_values(*args, **kwargs)
        rows = program.observed[0].shape[0]
        if self.batch is not None and self.batch > rows:
            raise OptionError(f"batch={self.batch} is more than the {rows} rows of the data.")

    def on(self, program: Program) -> SVTP:
        method = copy.copy(self)  # ``sizes``, of rows and classes, is no option
        sizes = program.observed[0].shape[0], sparse_model(program).classes
        object.__setattr__(method, "sizes", sizes)
        return method

    @property
    def _count(self) -> int:
        return self.batch or self.sizes[0]

    @property
    def needs(self) -> tuple[Any, ...]:
        return Start(), Sites(), PiecesOf(self._count)

    def statics(self) -> tuple:
        return self.batch, self.sizes, self.samples, self.rate, self.optimizer

    def settings(self, program: Program, warmup: int) -> Any:
        return np.int32(warmup)

    def attributes(self) -> dict[str, str]:
        rows = "all rows" if self.batch is None else f"minibatches of {self.batch} rows"
        return {"approximation": f"Approximate: a variational law, learned from {rows}."}

    # -- learning ----------------------------------------------------------------------------------

    def init(self, key: Any, start: Any, target: Any, settings: Any) -> Fit:
        """The kernel's parameters near a draw from their priors; the prior of everything else."""
        u = target.functions[Start()](key)
        rows = jnp.arange(self._count, dtype=np.int32)
        basis, _, _ = target.functions[PiecesOf(self._count)]((u, rows))
        _, log_prior, scale = target.functions[Sites()](u)
        known = isinstance(scale, PointScale)
        free = Free(None if known else scale, u, jnp.full_like(u, math.log(_SPREAD)))
        classes, m = self.sizes[1], basis.shape[1]
        zero = jnp.zeros((classes, m), basis.dtype)
        precision = jnp.broadcast_to(jnp.eye(m, dtype=basis.dtype), (classes, m, m))
        q = Coefficients(zero, zero, precision, precision)
        return self._begun(free, q, finite((basis, log_prior)))

    def refresh(self, state: Fit, target: Any, settings: Any) -> Fit:
        """From the law that an earlier run ended with; steps are large again."""
        return self._begun(state.free, state.q, state.started)

    def _begun(self, free: Free, q: Coefficients, started: Any) -> Fit:
        none, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), q.fixed.dtype)
        average = Average.of((free, *q[:3]))
        return Fit(
            free, q, self.optimizer.init(free), average, Average.of(nothing), nothing, none, none,
            nothing, started,
        )  # fmt: skip

    def step(
        self, key: Any, index: Any, state: Fit, target: Any, settings: Any
    ) -> tuple[Fit, Draw, dict[str, Any]]:
        """A step of learning in warm-up; a draw of q, and at times a look at the bound, after."""
        key_look, key_u, key_w = random.split(key, 3)
        learning, since = index < settings, index - settings
        look = functools.partial(self._seen, key_look, state, target)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(look))
        looks = learning | (since % _EVERY == 0)
        seen = lax.cond(looks, look, lambda: nothing)
        state = lax.cond(
            learning,
            lambda: self._learned(state, seen, index, settings),
            lambda: state._replace(
                elbo=_where(looks, state.elbo.update(seen.elbo, True), state.elbo)
            ),
        )
        state = state._replace(last=jnp.where(looks, seen.elbo, state.last))
        u = state.free.draw(key_u)
        scale = state.free.scale or target.functions[Sites()](u)[2]
        sigma2, w = drawn(key_w, scale, state.q)
        draw = Draw(u, None if state.free.scale is None else sigma2, w)
        return state, draw, {"elbo": state.last}

    def _seen(self, key: Any, state: Fit, target: Any) -> Seen:
        def bound(free: Free) -> tuple[Any, tuple[Any, Moments, Any]]:
            return self.bound(key, free, state.q, target)

        (elbo, parts), gradient = jax.value_and_grad(bound, has_aux=True)(state.free)
        return Seen(elbo, gradient, *parts)

    def bound(
        self, key: Any, free: Free, q: Coefficients, target: Any
    ) -> tuple[Any, tuple[Any, Moments, Any]]:
        """An unbiased estimate of the bound, with an unbiased gradient by ``free``.

        Returns:
            The estimate; A, the derivatives by the moments, q(sigma^2): see `Seen`.
        """
        key_u, key_rows, key_scale, key_noise = random.split(key, 4)
        u = free.draw(key_u)
        _, log_prior, prior = target.functions[Sites()](u)
        rows = jnp.arange(self._count, dtype=np.int32)
        if self.batch is not None:
            rows = subset(key_rows, self.sizes[0], self.batch).astype(np.int32)
        pieces = target.functions[PiecesOf(self._count)]((u, rows))
        scale = free.scale or prior
        known, sigma2 = moments(q, pieces), scale.draw(key_scale, self.samples)
        noise = random.normal(key_noise, (self.samples, *known.fixed.shape), sigma2.dtype)
        # A draw of sigma^2 serves z and -z: its derivative is the sum of both.
        both = jnp.concatenate([sigma2, sigma2])
        expected = lax.stop_gradient(
            expected_log_softmax(known, pieces.labels, both, jnp.concatenate([noise, -noise]))
        )
        times = self.sizes[0] / self._count
        expected = jax.tree.map(lambda x: times * x, expected)
        entropy = (free.log_spread + 0.5 * math.log(2.0 * math.pi * math.e)).sum()
        divergence = scale.divergence(prior) + q.divergence(scale)
        elbo = expected.linear(known, both) + log_prior + entropy - divergence
        return elbo, lax.stop_gradient((pieces.basis, expected.by_moments, scale))

    def _learned(self, state: Fit, seen: Seen, index: Any, warmup: Any) -> Fit:
        q = natural_step(state.q, seen.basis, seen.by_moments, seen.scale, self._rate(state.taken))
        free, optimizer, fine = ascended(self.optimizer, seen.gradient, state.optimizer, state.free)
        fine &= finite((seen.elbo, q))
        old = state.free, state.optimizer, state.q
        free, optimizer, q = _where(fine, (free, optimizer, q), old)
        average = state.average.update((free, *q[:3]), index >= warmup // 2)
        free, q = lax.cond(
            index == warmup - 1,
            lambda: (average.mean[0], Coefficients.of(*average.mean[1:])),
            lambda: (free, q),
        )
        return state._replace(
            free=free,
            q=q,
            optimizer=optimizer,
            average=average,
            taken=state.taken + 1,
            skipped=state.skipped + (~fine).astype(jnp.int32),
            epochs=state.epochs + self._count / self.sizes[0],
        )

    def _rate(self, taken: Any) -> Any:
        return self.rate(taken) if callable(self.rate) else self.rate

    # -- what is said of it ------------------------------------------------------------------------

    def values(self, draw: Draw, target: Any) -> dict[str, Any]:
        values, _, _ = target.functions[Sites()](draw.parameters)
        scale = {} if draw.sigma2 is None else {"sigma2": draw.sigma2}
        return {**values, **scale, "w": draw.w}

    def failed(self, state: Fit) -> Any:
        return ~np.asarray(state.started)

    def problem(self, state: Fit) -> str:
        """Said if most steps were not finite."""
        skipped, taken = np.asarray(state.skipped), np.asarray(state.taken)
        if not np.any(bad := 2 * skipped > taken):
            return ""
        return (
            f"chains {np.flatnonzero(bad).tolist()}: most steps were not finite. Leave out "
            "inducing inputs that are nearly the same, take smaller steps, or "
            "precision='float64'."
        )

    def groups(self, state: Fit) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
        """What was learned, by chain."""
        found = {"elbo": np.asarray(state.elbo.mean)}
        if (scale := state.free.scale) is not None:
            shape, ratio = (np.exp(np.asarray(x)) for x in scale)
            found |= {"scale_shape": shape, "scale_rate": shape * ratio}
        entries: dict[str, Any] = {name: (("chain",), x) for name, x in found.items()}
        entries["epochs"] = (), float(np.min(state.epochs))
        return {"variational": entries}


def _where(condition: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
