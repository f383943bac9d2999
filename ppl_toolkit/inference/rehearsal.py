"""Tries out parts of a kernel that can be wrong, before a run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ppl_toolkit import positions
from ppl_toolkit.executables import evaluate_once
from ppl_toolkit.inference.involution import judge
from ppl_toolkit.inference.target import Target

__all__ = ["try_out"]

_TRIALS = 32


def try_out(kernel: Any, program: Any) -> None:
    """Try the parts of a kernel that can be wrong, such as involutions, at 32 draws from the prior.

    Args:
        kernel: a spec.
        program: the program that it is for.

    Raises:
        MethodError: an involution is none, or its determinant is another.

    Cost: compiles a program of the parts; nothing for kernels without such parts.
    """
    if not kernel.needs_trial:
        return

    def trials(words: Any, data: Any) -> Any:
        def one(number: Any) -> Any:
            key = random.fold_in(random.wrap_key_data(words), number)
            position = positions.start_position(program, key, data)
            target = Target.of_program(program, data, position, kernel.functions)
            return kernel.trials(target, position, key)

        return jax.vmap(one)(jnp.arange(_TRIALS))

    with program.context():
        found = evaluate_once(trials, np.zeros(2, np.uint32), program.data)
    judge(jax.tree.map(np.asarray, found))
