"""Exact leave-one-out densities: refits without an observation, one compiled program for all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpyro.primitives import Messenger
from scipy.special import logsumexp

from ppl_toolkit import convergence
from ppl_toolkit.diagnostics.findings import findings
from ppl_toolkit.diagnostics.pointwise import PointwiseLikelihood, listed, observation_label
from ppl_toolkit.errors import (
    DataBakedWarning,
    InferenceWarning,
    InitializationError,
    SamplingError,
)
from ppl_toolkit.front_door import infer
from ppl_toolkit.inference import method_named
from ppl_toolkit.program import Program
from ppl_toolkit.progress import progress_for

if TYPE_CHECKING:
    import xarray

__all__ = ["LeavingOut", "exact_densities", "refit_without"]

_LARGE_ERROR = 0.3  # of a density estimated from the draws, relative


def exact_densities(
    tree: xarray.DataTree,
    source: PointwiseLikelihood,
    like: xarray.DataArray,
    indices: Sequence[int],
    progress: bool | str = "auto",
) -> tuple[dict[int, float], list[str]]:
    """Log p(y_i | all others) of some observations, each by a refit.

    Args:
        tree: a result.
        source: the log likelihood of the observed site, without anything left out.
        like: an array (chain, draw, ...) of its log likelihood, for shape and labels.
        indices: numbers of the observations in the flattened array.
        progress: how their number is shown, as in `infer`.

    Returns:
        (Log of the mean density over the refit's draws by number; what to know about the refits).
        Observations whose refit failed, or was not begun when Ctrl-C came, are not among them.
    """
    exact: dict[int, float] = {}
    if not indices:
        return exact, []
    notes, troubled, noisy = [], [], []
    with progress_for(progress, "leaving out", 0, 0, len(indices), "refits") as shown:
        for count, index in enumerate(indices, start=1):
            label = observation_label(like, index)
            try:
                new = refit_without(tree, source.program, source.site, like.shape[2:], index)
            except (InitializationError, SamplingError) as error:
                notes.append(f"the refit without {label} failed: {error}")
            except KeyboardInterrupt:
                notes.append(f"interrupted after {len(exact)} of {len(indices)} refits.")
                break
            else:
                ll = source.one(source.draws_of(new), index)
                exact[index] = float(logsumexp(ll) - np.log(ll.size))
                if _is_noisy(ll.reshape(new["posterior"].sizes["chain"], -1)):
                    noisy.append(label)
                if kinds := sorted({finding.kind for finding in findings(new)}):
                    troubled.append(f"{label} ({', '.join(kinds)})")
            shown.update(count, {})
    if troubled:
        notes.append(
            f"{len(troubled)} of {len(exact)} refits had findings: {listed(troubled)}. Draw more, "
            "or reparametrise the model, and run loo again."
        )
    if noisy:
        notes.append(
            f"the densities of {listed(noisy)} have a Monte Carlo error above {_LARGE_ERROR:.0%} "
            "in their refits: the others make them all but impossible. Draw more, or consider a "
            "model with heavier tails."
        )
    return exact, notes


def _is_noisy(ll: np.ndarray) -> bool:
    """Whether a mean density has a large error; ``ll`` holds its logs by chain and draw.

    An observation far from what the others predict has its density from a few draws only.
    """
    density = np.exp(ll - ll.max())
    return bool(convergence.mcse(density) > _LARGE_ERROR * density.mean())


def refit_without(
    tree: xarray.DataTree, program: Program, site: str, shape: tuple[int, ...], index: int
) -> xarray.DataTree:
    """The posterior given all observations of a site but one.

    All shapes stay: a mask, which is data, switches the observation off. So the first refit
    compiles, and those without other observations do not (unless the model needs concrete values,
    so that its data are constants). The run has the method and the numbers of draws and chains of
    ``tree``, and starts from its sampler state with a short warm-up.

    Args:
        tree: a result of the program's model and data.
        program: the model and its data.
        site: name of the observed site.
        shape: shape of its log probability.
        index: number of the observation in the flattened array of that shape.

    Returns:
        A result. Its findings are recorded in it, but not warned about.

    Raises:
        KeyboardInterrupt: the run was interrupted (`infer` would return a part of it).
    """
    attrs: dict[str, Any] = {str(k): v for k, v in tree.attrs.items()}
    sizes = tree["posterior"].sizes
    state = tree["sampler_state"].sizes if "sampler_state" in tree.children else {}
    kept = np.ones(shape, bool)
    kept[np.unravel_index(index, shape)] = False
    args, kwargs = program.arguments.rebuild(program.arguments.arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferenceWarning)
        warnings.simplefilter("ignore", DataBakedWarning)
        new = infer(
            LeavingOut(program.model, site),
            kept,
            args,
            kwargs,
            method=method_named(attrs["method"])(**json.loads(attrs["method_options"])),
            draws=sizes["draw"],
            chains=sizes["chain"],
            lanes=int(attrs["lanes"]),
            seed=(int(attrs["seed"]) + 1 + index) % 2**64,
            init=tree if state.get("chain") == sizes["chain"] else None,
            precision=program.precision,
            dims=program.user_dims,
            progress=False,
        )
    if new.attrs["interrupted"]:
        raise KeyboardInterrupt
    return new


class LeavingOut:
    """A model with one more argument: which observations of a site count.

    The other arguments come as a tuple and a dictionary, whose names cannot clash with it.
    """

    def __init__(self, model: Callable, site: str) -> None:
        self.model, self.site = model, site
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    def __call__(self, kept: Any, args: tuple, kwargs: dict) -> None:
        with _Kept(self.site, kept):
            self.model(*args, **kwargs)


class _Kept(Messenger):
    """Switches off the elements of one observed site that are not kept."""

    def __init__(self, site: str, kept: Any) -> None:
        super().__init__()
        self.site, self.kept = site, kept

    def process_message(self, message: dict) -> None:
        # It is outside the model, so plates have given the distribution its full shape already.
        if message["type"] == "sample" and message["name"] == self.site and message["is_observed"]:
            message["fn"] = message["fn"].mask(self.kept)
