"""What a method is: a small frozen dataclass with these functions.

`infer` runs any object of this shape; adding a method touches one file. All functions but
`check`, `statics`, `settings` and `failed` are traced into the compiled program, where `target`
offers the program's functions named in `needs` (their data are arguments of the program).
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

__all__ = ["Method"]


@runtime_checkable
class Method(Protocol):
    """One inference method.

    Attributes:
        needs: names of the `Program` functions it uses, e.g. ``("log_density", "constrain")``.
        warmup: default number of warm-up iterations.
        refit_warmup: warm-up iterations when a run starts from an earlier result.

    Optional: ``draws``, ``chains`` and ``superchains``, default numbers of these; ``one_law =
    False`` for methods whose draws are not of one law, so that more of them do not mean more
    precision; ``takes_start = False`` for methods that do not start from a position; ``failure``,
    what is said of chains that failed; ``on(program)``, the method for a program;
    ``attributes()``, ``groups(state)`` and ``problem(state)`` for what else a result says.

    ``together = True``: the chains of a run are one ensemble. `init`, `refresh` and `step` get all
    of them at once, with a leading axis of chains on keys, starts and every leaf of the states;
    what they share is there once for every chain. `values` gets one draw of one chain.
    """

    needs: ClassVar[tuple[str, ...]]
    refit_warmup: ClassVar[int]
    warmup: int

    def check(self, program: Any) -> None:
        """Raise a `MethodError` that says why, if the method cannot serve this program."""

    def statics(self) -> tuple:
        """Options that are part of the compiled program (hashable)."""

    def settings(self, program: Any, warmup: int) -> Any:
        """Options that are arguments of it: a pytree of NumPy arrays."""

    def init(self, key: Any, start: Any, target: Any, settings: Any) -> Any:
        """The first state of a chain; ``start`` is (flat position, whether it is given)."""

    def refresh(self, state: Any, target: Any, settings: Any) -> Any:
        """A state of an earlier run made valid for new data."""

    def step(
        self, key: Any, index: Any, state: Any, target: Any, settings: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Iteration ``index`` (from 0, warm-up included): new state, draw, statistics."""

    def values(self, draw: Any, target: Any) -> dict[str, Any]:
        """The sites of one draw, by name."""

    def failed(self, state: Any) -> Any:
        """Which chains (array of bools) found no starting point."""
