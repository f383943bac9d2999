"""Is this sampler right, on this model? Exactly where possible, by simulation where not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import stats

from ppl_toolkit import results
from ppl_toolkit.arguments import with_data
from ppl_toolkit.diagnostics.calibration import Calibration, calibrate
from ppl_toolkit.diagnostics.exactness import Exactness, exactness, is_finite
from ppl_toolkit.diagnostics.invariance import Invariance, invariance
from ppl_toolkit.diagnostics.simulation import holm
from ppl_toolkit.diagnostics.unbiasedness import Unbiasedness, unbiasedness
from ppl_toolkit.errors import MethodError, OptionError
from ppl_toolkit.inference import as_method
from ppl_toolkit.inference.kernel import Spec, labels
from ppl_toolkit.inference.smc import SMC
from ppl_toolkit.program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Validity", "check"]

_LEVEL = 1e-4
_MOST_SHOWN = 5
_TURNS = 4  # of steps and new data
_SMALL = 100  # latent and observed numbers of a model on which the turns cost little


@dataclasses.dataclass(frozen=True, repr=False)
class Validity:
    """What the checks of a sampler found. Print it, `plot` it, or `save` it as a page.

    Attributes:
        method: the sampler.
        level: probability of a wrong alarm of each test by simulation.
        exact: of the transition matrices of the kernel and of its parts, by label, where the model
            is finite.
        invariant: of the tests of invariance of the kernel and of its parts, by label.
        geweke: of Geweke's test of the whole kernel, where it was made; else None.
        calibrated: of simulation-based calibration, where it was made; else None.
        evidence: of the comparison of evidence estimates with the evidence, for samplers that give
            them; else None.
    """

    method: str
    level: float
    exact: Mapping[str, Exactness] = dataclasses.field(default_factory=dict)
    invariant: Mapping[str, Invariance] = dataclasses.field(default_factory=dict)
    geweke: Invariance | None = None
    calibrated: Calibration | None = None
    evidence: Unbiasedness | None = None

    @property
    def tests(self) -> dict[str, tuple[Invariance, float]]:
        """The tests by joint draws, by label ("geweke" is Geweke's), each with its level."""
        own = self.level / max(1, len(self.invariant))
        found = {label: (test, own) for label, test in self.invariant.items()}
        return found | ({} if self.geweke is None else {"geweke": (self.geweke, self.level)})

    def rejected(self, label: str) -> list[str]:
        """The quantities that a kernel changes, the clearest first.

        Holm's correction over its quantities, Bonferroni's over the kernels.

        Args:
            label: of a kernel, or "geweke" for Geweke's test.
        """
        found, level = self.tests[label]
        adjusted = holm(found.p_values)
        wrong = (name for name in adjusted if adjusted[name] < level)
        return sorted(wrong, key=found.p_values.__getitem__)

    @property
    def failed(self) -> list[str]:
        """Labels of the kernels that fail, and "geweke", "calibration", "evidence"."""
        found = [label for label, exact in self.exact.items() if exact.failed]
        found += [label for label in self.tests if self.rejected(label)]
        if self.calibrated is not None and self.calibrated.failed:
            found.append("calibration")
        if self.evidence is not None and self.evidence.p_value < self.level:
            found.append("evidence")
        return found

    @property
    def guilty(self) -> list[str]:
        """The parts of a composed kernel that fail by themselves, or the kernel if none does."""
        whole, *parts = (*self.exact, *self.invariant) or ("",)
        wrong = self.failed
        found = [label for label in parts if label in wrong]
        return found or ([whole] if {whole, "geweke"} & set(wrong) else [])

    def limit(self, label: str) -> float:
        """The shift in standard errors beyond which a quantity is rejected for certain.

        The first step of Holm's correction; those after it are a little lower.

        Args:
            label: as in `rejected`.
        """
        found, level = self.tests[label]
        tests = max(1, len(found.p_values))
        return float(stats.t.isf(level / tests / 2, found.replications - 1))

    def __bool__(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.verdict}"]
        lines += [f"- {label}: {exact}" for label, exact in self.exact.items()]
        for label, (found, _) in self.tests.items():
            name = "Geweke's test" if label == "geweke" else label
            lines += _changes(name, found, self.rejected(label))
        if self.calibrated is not None:
            found_by = str(self.calibrated).removeprefix(f"{self.method}: ")
            lines.append(f"- calibration: {found_by}")
        if self.evidence is not None:
            lines.append(f"- evidence: {self.evidence}")
        if self.guilty and len({*self.exact, *self.invariant}) > 1:
            lines.append(f"What fails by itself: {', '.join(self.guilty)}.")
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def verdict(self) -> str:
        """One sentence."""
        return "nothing wrong was found." if self else "this sampler is wrong on this model."

    def plot(self) -> Figure:
        """A matplotlib figure with a panel for each kind of evidence that was collected."""
        from ppl_toolkit.diagnostics.validity_figure import drawn

        return drawn(self)

    def save(self, path: str | Path) -> None:
        """Write a self-contained HTML page: one file, which loads nothing."""
        from ppl_toolkit.diagnostics.validity_page import page_of

        Path(path).write_text(page_of(self), encoding="utf-8")


def _changes(label: str, found: Invariance, wrong: list[str]) -> list[str]:
    head = f"- {label}: {found}; "
    if not wrong:
        return [f"{head}{len(found.p_values)} tests agree."]
    return [
        f"{head}these change, in standard errors:",
        *(f"    {name}: {found.shift[name]:+.1f}" for name in wrong[:_MOST_SHOWN]),
    ]


def check(
    model: Callable,
    *args: Any,
    method: Any = "nuts",
    replications: int = 4000,
    steps: int = 3,
    calibration: bool | None = None,
    geweke: bool | None = None,
    log_evidence: float | None = None,
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
      exact draws from posteriors, and must still be after some steps (`invariance`). Geweke's
      test goes on with the whole kernel: data anew given the parameters, steps, in four turns.
    - Simulation-based calibration (`calibrate`) for `SMC`, where nothing else applies, or if asked
      for; it also sees whether chains get where they should.
    - Samplers that estimate the evidence (`SMC`): the mean of 500 estimates, with everything that
      adapts frozen, against the evidence of the data given (`unbiasedness`).

    Of a composed kernel every smallest part is tested by itself as well: each must leave the
    posterior invariant, and its mistakes show more clearly there.

    Args:
        model, *args, **kwargs: the model and its arguments. Observed arrays give the shapes of the
            data that are simulated.
        method: a name or a method object, as in `infer`; or a kernel, such as ``cycle([...])`` or
            a part of one: a kernel may leave sites alone here.
        replications: joint draws for the test of invariance.
        steps: of the kernel on each.
        calibration: whether to calibrate; as said above if None.
        geweke: whether to make Geweke's test of a kernel; if None, on models of at most 100 latent
            and observed numbers.
        log_evidence: of the data, if it is known. Else it is enumerated on finite models, and
            estimated by importance sampling on others, or said to be out of reach.
        seed: of everything.
        level: probability of a wrong alarm, for each of the tests by simulation (Holm's correction
            over their quantities).
        progress, data: as in `infer`.

    Returns:
        A `Validity`, true if nothing wrong was found.

    Raises:
        OptionError: a number is out of range, or an evidence is given for a method without.
        MethodError: the method cannot serve the model, the prior is improper, or Geweke's test was
            asked for where there is no kernel to make it with.
        DataError: the model observes nothing, or computes what it observes.

    Cost: about ``replications * steps`` steps of the kernel in one program of all replications,
    compiled once for the kernel and once for each of its parts; Geweke's test takes four times as
    many of the whole. Calibration: 1000 runs of the method; evidence: 500.
    """
    for name, value, least in (("replications", replications, 100), ("steps", steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} must be an integer >= {least}; got {value!r}.")
    if not 0 < level < 1:
        raise OptionError(f"level must lie between 0 and 1; got {level}.")
    seed = results.checked_seed(seed)
    chosen = _as_method(method)
    program = Program(model, args, with_data(model, kwargs, data))
    if isinstance(method, Spec) and chosen is not method:
        chosen.check_kernel(program)  # a part may leave sites alone
    else:
        chosen.check(program)
    spec = _kernel_of(chosen.on(program) if hasattr(chosen, "on") else chosen)
    kernels = {} if spec is None else _with_parts(spec)
    finite = is_finite(program)
    if geweke and (finite or not kernels):
        raise MethodError(
            "Geweke's test needs a kernel that can start at a draw from the posterior, and a model "
            "that is not finite (finite ones are checked exactly). Leave geweke out."
        )
    estimates = isinstance(chosen, SMC)
    if log_evidence is not None and not estimates:
        raise OptionError(
            f"{type(chosen).__name__} does not estimate the evidence: no log_evidence."
        )
    exact: dict[str, Exactness] = {}
    invariant: dict[str, Invariance] = {}
    turns = None
    if finite:
        exact = {label: exactness(program, kernel) for label, kernel in kernels.items()}
    else:
        several = geweke or (geweke is None and _numbers(program) <= _SMALL)
        for number, (label, kernel) in enumerate(kernels.items()):
            own = _TURNS if several and number == 0 else 1
            invariant[label], *more = invariance(program, kernel, replications, steps, seed, own)
            turns = more[0] if more else turns
    calibrated = None
    if calibration or (calibration is None and (estimates or spec is None)):
        extra = {**kwargs, **({} if data is None else {"data": data})}
        calibrated = calibrate(
            model, *args, method=chosen, seed=seed, level=level, progress=progress, **extra
        )
    evidence = unbiasedness(program, chosen, seed, log_evidence) if estimates else None
    return Validity(repr(chosen), level, exact, invariant, turns, calibrated, evidence)


def _numbers(program: Program) -> int:
    """Latent and observed numbers of a program."""
    return sum(math.prod(site.shape) for site in (*program.latent, *program.observed))


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
