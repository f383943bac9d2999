"""Is this sampler right, on this model? Exactly where possible, by simulation where not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import random

from ppl_toolkit import positions, results
from ppl_toolkit.arguments import with_data
from ppl_toolkit.diagnostics.calibration import Calibration, calibrate
from ppl_toolkit.diagnostics.invariance import Invariance, invariance
from ppl_toolkit.diagnostics.simulation import holm
from ppl_toolkit.diagnostics.transitions import transition_matrix
from ppl_toolkit.errors import OptionError
from ppl_toolkit.inference import as_method
from ppl_toolkit.inference.kernel import Spec, labels
from ppl_toolkit.inference.target import Target
from ppl_toolkit.program import Program

__all__ = ["Exactness", "Validity", "check"]

_MOST_STATES = 10_000
_EXACT = 1e-10  # relative error of pi P = pi that rounding explains
_LEVEL = 1e-4
_MOST_SHOWN = 5


class Exactness(NamedTuple):
    """Errors of the exact transition matrix P of a kernel on a finite space with law pi.

    Attributes:
        states: number of states.
        invariance: largest relative difference between pi P and pi.
        rows: largest difference of a row's sum from one.
        asymmetry: largest difference between diag(pi) P and its transpose, relative to the
            largest entry; only where the kernel claims to be reversible, else 0.
    """

    states: int
    invariance: float
    rows: float
    asymmetry: float

    @property
    def failed(self) -> bool:
        """Whether an error is more than rounding."""
        return max(self.invariance, self.rows, self.asymmetry) > _EXACT


@dataclasses.dataclass(frozen=True, repr=False)
class Validity:
    """What the checks of a sampler found. Print it.

    Attributes:
        method: the sampler.
        level: probability of a wrong alarm, each of the two tests by simulation.
        exact: of the transition matrices of the kernel and of its parts, by label, where the model
            is finite.
        invariant: of the tests of invariance of the kernel and of its parts, by label.
        calibrated: of simulation-based calibration, where it was made; else None.
    """

    method: str
    level: float
    exact: Mapping[str, Exactness] = dataclasses.field(default_factory=dict)
    invariant: Mapping[str, Invariance] = dataclasses.field(default_factory=dict)
    calibrated: Calibration | None = None

    def rejected(self, label: str) -> list[str]:
        """The quantities that a kernel changes, the clearest first.

        Holm's correction over its quantities, Bonferroni's over the kernels.
        """
        found = self.invariant[label]
        adjusted = holm(found.p_values)
        wrong = (n for n in adjusted if adjusted[n] < self.level / len(self.invariant))
        return sorted(wrong, key=found.p_values.__getitem__)

    @property
    def failed(self) -> list[str]:
        """Labels of the kernels that fail, and "calibration"."""
        found = [label for label, exact in self.exact.items() if exact.failed]
        found += [label for label in self.invariant if self.rejected(label)]
        wrong = self.calibrated is not None and bool(self.calibrated.failed)
        return found + (["calibration"] if wrong else [])

    @property
    def guilty(self) -> list[str]:
        """The parts of a composed kernel that fail by themselves, or the kernel if none does."""
        whole = next(iter((*self.exact, *self.invariant)), "")
        parts = [label for label in self.failed if label not in (whole, "calibration")]
        return parts or [label for label in self.failed if label == whole]

    def __bool__(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        lines = [
            f"{self.method}: "
            + ("nothing wrong was found." if self else "this sampler is wrong on this model.")
        ]
        lines += [f"- {label}: {_exact_text(exact)}" for label, exact in self.exact.items()]
        for label in self.invariant:
            lines += self._invariance_text(label)
        if self.calibrated is not None:
            lines.append(f"- {self.calibrated}")
        if self.guilty and len({*self.exact, *self.invariant}) > 1:
            lines.append(f"What fails by itself: {', '.join(self.guilty)}.")
        return "\n".join(lines)

    __repr__ = __str__

    def _invariance_text(self, label: str) -> list[str]:
        found, wrong = self.invariant[label], self.rejected(label)
        head = (
            f"- {label}: {found.replications:,} replications of {found.steps} steps, of which "
            f"{found.moved:.0%} moved; "
        )
        if not wrong:
            return [f"{head}{len(found.p_values)} tests agree."]
        return [
            f"{head}these change, in standard errors:",
            *(f"    {name}: {found.shift[name]:+.1f}" for name in wrong[:_MOST_SHOWN]),
        ]


def _exact_text(exact: Exactness) -> str:
    if not exact.failed:
        return (
            f"exact, {exact.states:,} states: the posterior is invariant to a relative "
            f"{exact.invariance:.1g}."
        )
    return (
        f"exact, {exact.states:,} states: one step changes posterior probabilities by up to "
        f"{exact.invariance:.2g} of themselves (rows sum to one within {exact.rows:.1g}, detailed "
        f"balance within {exact.asymmetry:.1g})."
    )


def check(
    model: Callable,
    *args: Any,
    method: Any = "nuts",
    replications: int = 4000,
    steps: int = 3,
    calibration: bool | None = None,
    seed: int = 0,
    level: float = _LEVEL,
    progress: bool | str = "auto",
    data: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Validity:
    """Check that a method samples the posterior of a model, composed by hand or not.

    - Finite models (at most 10^4 states): the exact transition matrix of the kernel, from the code
      that samples, against the exact posterior of the data.
    - Kernels (`HMC`, `NUTS`, `MCMC`): parameters from the prior with data drawn given them are
      exact draws from posteriors, and must still be after some steps (`invariance`).
    - Simulation-based calibration (`calibrate`) where neither applies, or if asked for; it also
      sees whether chains get where they should.

    Of a composed kernel every smallest part is tested by itself as well: each must leave the
    posterior invariant, and its mistakes show more clearly there.

    Args:
        model, *args, **kwargs: the model and its arguments. Observed arrays give the shapes of the
            data that are simulated.
        method: a name or a method object, as in `infer`; or a kernel, such as ``cycle([...])`` or
            a part of one: a kernel may leave sites alone here.
        replications: joint draws for the test of invariance.
        steps: of the kernel on each.
        calibration: whether to calibrate; only where nothing else applies if None.
        seed: of everything.
        level: probability of a wrong alarm, for each of the two tests by simulation (Holm's
            correction over their quantities).
        progress, data: as in `infer`.

    Returns:
        A `Validity`, true if nothing wrong was found.

    Raises:
        OptionError: a number is out of range.
        MethodError: the method cannot serve the model, or the prior is improper.
        DataError: the model observes nothing, or computes what it observes.

    Cost: about ``replications * steps`` steps of the kernel in one program of all replications,
    compiled once for the kernel and once for each of its parts.
    """
    for name, value, least in (("replications", replications, 100), ("steps", steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} must be an integer >= {least}; got {value!r}.")
    if not 0 < level < 1:
        raise OptionError(f"level must lie between 0 and 1; got {level}.")
    seed = results.checked_seed(seed)
    chosen = _as_method(method)
    spec = _kernel_of(chosen)
    program = Program(model, args, with_data(model, kwargs, data))
    if isinstance(method, Spec) and chosen is not method:
        chosen.check_kernel(program)  # a part may leave sites alone
    else:
        chosen.check(program)
    finite = not program.continuous and 0 < program.configurations <= _MOST_STATES

    found = Validity(repr(chosen), level)
    kernels = {} if spec is None else _with_parts(spec)
    if finite:
        exact = {label: exactness(program, kernel) for label, kernel in kernels.items()}
        found = dataclasses.replace(found, exact=exact)
    else:
        invariant = {
            label: invariance(program, kernel, replications, steps, seed)
            for label, kernel in kernels.items()
        }
        found = dataclasses.replace(found, invariant=invariant)
    if calibration or (calibration is None and spec is None):
        extra = {**kwargs, **({} if data is None else {"data": data})}
        calibrated = calibrate(
            model, *args, method=chosen, seed=seed, level=level, progress=progress, **extra
        )
        found = dataclasses.replace(found, calibrated=calibrated)
    return found


def _as_method(method: Any) -> Any:
    from ppl_toolkit.inference.mcmc import MCMC

    if isinstance(method, Spec) and not hasattr(method, "statics"):
        return MCMC(method)
    return as_method(method)


def _kernel_of(method: Any) -> Any:
    """The kernel of a method whose posterior can be the start of a chain, or None."""
    spec = method if isinstance(method, Spec) else getattr(method, "kernel", None)
    lonely = spec is not None and _keeps_an_estimate(spec)
    return None if lonely or not isinstance(spec, Spec) or not hasattr(method, "failed") else spec


def _keeps_an_estimate(spec: Any) -> bool:
    """Such a kernel has no exact start: its estimate has a law of its own."""
    return spec.alone or any(map(_keeps_an_estimate, spec.parts))


def _with_parts(spec: Any) -> dict[str, Any]:
    """A kernel and its smallest parts, by label."""
    leaves = list(_leaves(spec))
    if len(leaves) < 2:
        return {spec.label: spec}
    names = labels([spec, *leaves])
    return dict(zip(names, [spec, *leaves], strict=True))


def _leaves(spec: Any) -> Iterator[Any]:
    parts = spec.alternatives()
    if not parts:
        yield spec
    for part in parts:
        yield from _leaves(part)


def exactness(program: Program, spec: Any) -> Exactness:
    """The errors of a kernel's exact transition matrix on a finite program with its data.

    Raises:
        MethodError: the kernel draws real numbers, or there are too many paths.

    Complexity: states times paths through the kernel's choices.
    """
    with program.context():
        data = program.data
        numbers = np.arange(program.configurations)
        states = jax.vmap(lambda i: program.decode(i, data))(numbers)

        def log_density(position: Any) -> Any:
            return sum(positions.log_parts(program, position, data))

        log_pi = np.asarray(jax.jit(jax.vmap(log_density))(states))
        first = jax.tree.map(lambda x: x[0], states)
        kernel = spec.bind(Target.of_program(program, data, first))

        def step(key: Any, position: Any) -> Any:
            state = kernel.init(position, random.key(0))
            return kernel.step(key, state)[0].position

        matrix = transition_matrix(step, states)
    pi = np.exp(log_pi - log_pi.max())
    pi /= pi.sum()
    there = pi > 0
    flow = pi[:, None] * matrix
    asymmetry = np.abs(flow - flow.T).max() / flow.max() if spec.reversible else 0.0
    return Exactness(
        len(pi),
        float(np.max(np.abs(pi @ matrix - pi)[there] / pi[there])),
        float(np.max(np.abs(matrix[there].sum(axis=1) - 1.0))),
        float(asymmetry),
    )
