"""Does a kernel leave the posterior of a finite model invariant? Exactly, by enumeration."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from ppl_toolkit import positions
from ppl_toolkit.diagnostics.transitions import transition_matrix
from ppl_toolkit.inference.target import Target
from ppl_toolkit.program import Program

__all__ = ["LARGEST_ERROR", "Exactness", "configurations", "exactness", "is_finite", "log_masses"]

_MOST_STATES = 10_000
LARGEST_ERROR = 1e-10  # of pi P = pi, relative, that rounding explains


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
        return max(self.errors.values()) > LARGEST_ERROR

    @property
    def errors(self) -> dict[str, float]:
        """The three errors by name."""
        return {
            "invariance": self.invariance,
            "sums of rows": self.rows,
            "detailed balance": self.asymmetry,
        }

    def __str__(self) -> str:
        if not self.failed:
            return (
                f"exact, {self.states:,} states: the posterior is invariant to a relative "
                f"{self.invariance:.1g}."
            )
        return (
            f"exact, {self.states:,} states: one step changes posterior probabilities by up to "
            f"{self.invariance:.2g} of themselves (rows sum to one within {self.rows:.1g}, "
            f"detailed balance within {self.asymmetry:.1g})."
        )


def is_finite(program: Program) -> bool:
    """Whether all joint values of the latent sites can be listed: at most 10^4."""
    return not program.continuous and 0 < program.configurations <= _MOST_STATES


def configurations(program: Program) -> Any:
    """All positions of a finite program, arrays (state, ...) by site."""
    with program.context():
        numbers = np.arange(program.configurations)
        return jax.vmap(lambda i: program.decode(i, program.data))(numbers)


def log_masses(program: Program, states: Any) -> np.ndarray:
    """Log joint densities with the program's data, (state,): the evidence is their sum."""

    def log_density(position: Any) -> Any:
        return sum(positions.log_parts(program, position, program.data))

    with program.context():
        return np.asarray(jax.jit(jax.vmap(log_density))(states))


def exactness(program: Program, spec: Any) -> Exactness:
    """The errors of a kernel's exact transition matrix on a finite program with its data.

    Raises:
        MethodError: the kernel draws real numbers, or there are too many paths.

    Complexity: states times paths through the kernel's choices.
    """
    states = configurations(program)
    log_pi = log_masses(program, states)
    with program.context():
        first = jax.tree.map(lambda x: x[0], states)
        kernel = spec.bind(Target.of_program(program, program.data, first, spec.functions))

        def step(key: Any, position: Any) -> Any:
            state = kernel.init(position, jax.random.key(0))
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
