"""Classification with an infinitely wide network whose readout has a random scale, as a program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float
from numpyro import distributions as dist

from ppl_toolkit.errors import DataError, ModelError, OptionError
from ppl_toolkit.inference.sparse_posterior import Pieces
from ppl_toolkit.models.blocks import kernel_matrices
from ppl_toolkit.models.evaluation import checked_inputs, in_float64, own_variances
from ppl_toolkit.models.infinite_width import Layer, mlp
from ppl_toolkit.models.kernel_sites import (
    check_priors,
    checked_network,
    kernel_priors,
    network_with,
)
from ppl_toolkit.models.layers import check_order
from ppl_toolkit.models.scale_quadrature import checked_law

__all__ = ["ScaleMixtureClassification", "choose_inducing", "scale_mixture_classification"]


def scale_mixture_classification(
    network: Callable[..., Layer] | Layer | None = None,
    *,
    classes: int,
    law: dist.Distribution | None = None,
    priors: Mapping[str, dist.Distribution] | None = None,
) -> ScaleMixtureClassification:
    """A program ``model(X, y=None, inducing=None)``: labels y by a softmax of C functions of X.

    Given sigma^2 the functions f_c are independent Gaussian processes N(0, sigma^2 K); they share
    one sigma^2, so that together they are an elliptical process (a Student-t process if sigma^2 is
    inverse gamma). With Z the inducing inputs, L L^T = K_ZZ + jitter I and A = (L^-1 K_ZX)^T,

        f = sigma (A w + sqrt(r) e),    r_i = k(x_i, x_i) - |A_i|^2,    w, e ~ N(0, 1):

    what Z says of x_i, and the rest, taken as independent from input to input.

        model = scale_mixture_classification(classes=10)
        Z = choose_inducing(X, 200)
        fit = ppl.infer(model, X, y, inducing=Z, method="svtp")
        ppl.predict(fit, model, X_new, inducing=Z)              # sites p, f, y

    Sites: ``weight_std`` ~ LogNormal(log 1.4, 0.3) and ``bias_std`` ~ HalfNormal(0.5) of the
    kernel, unless ``network`` is one; ``sigma2``; ``w`` (M, C); ``e`` (n, C) if there are labels
    and inducing inputs beside them, ``f`` (n, C) where there are none; ``p`` (n, C), the
    probabilities of the classes. Without ``inducing``, Z = X: the process itself, for `NUTS` and
    some 100 inputs, and its predictions take ``inducing=X``. There w alone is random.

    Args:
        network: called with ``weight_std`` and ``bias_std``, gives a network with a readout of
            weight 1 and without bias; three ReLU layers if None. A network as it is has its
            parameters fixed.
        classes: C, at least 2; labels are 0, ..., C - 1.
        law: of sigma^2; InverseGamma(2, 2) if None. ``dist.Delta(1.0)`` makes it Gaussian
            processes, without a site ``sigma2``.
        priors: other priors of the kernel's sites.

    The jitter is 1e-6 (in float32 1e-4) of the mean of K_ZZ's diagonal. Where Z = X it is part of
    the model: white noise in f, of that share.

    Complexity: of a density M^3 / 3 + n M^2 operations.

    Raises:
        OptionError: ``classes`` is no such number, or ``network`` or ``priors`` cannot be used.
        DataError: ``law`` is not a law of one positive number.

    Source: Lee, Yun, Yang, Lee (2022), Scale mixtures of neural network Gaussian processes, ICLR;
    Titsias (2009), AISTATS, for inducing inputs.
    """
    if isinstance(classes, bool) or not isinstance(classes, int | np.integer) or classes < 2:
        raise OptionError(f"classes must be a number of classes, at least 2; got {classes!r:.40}.")
    network = checked_network(network)
    law = checked_law(dist.InverseGamma(2.0, 2.0) if law is None else law)
    if law.batch_shape or (isinstance(law, dist.Delta) and not law.v > 0):
        raise DataError(f"the law of sigma^2 must be of one positive number; got {law!r:.80}.")
    given = dict(priors or {})
    check_priors(kernel_priors(network), given)
    return ScaleMixtureClassification(network, int(classes), law, given)


class ScaleMixtureClassification:
    """The program that `scale_mixture_classification` makes.

    Attributes:
        classes: C.
        law: of sigma^2.
        given: priors of the kernel's sites other than the usual ones, by name.
    """

    def __init__(
        self, network: Any, classes: int, law: Any, given: Mapping[str, dist.Distribution]
    ) -> None:
        self.network, self.classes, self.law, self.given = network, classes, law, given

    @property
    def priors(self) -> dict[str, dist.Distribution]:
        """The prior of each of the kernel's sites, in the precision of the run."""
        return kernel_priors(self.network) | dict(self.given)

    def __call__(self, X: Any, y: Any = None, inducing: Any = None) -> None:  # noqa: N803
        """Labels y (n,) of inputs X (n, d) or images, given or to be drawn; inputs Z (M, ...)."""
        if y is None and inducing is None:
            raise ModelError(
                "without labels y, say at which inputs the process is known: inducing=X, the "
                "inputs of the labels that the result is of; inducing=Z if it had inducing inputs."
            )
        sites = {name: numpyro.sample(name, prior) for name, prior in self.priors.items()}
        if isinstance(self.law, dist.Delta):  # an array: other values are the same program
            sigma2 = jnp.asarray(np.atleast_1d(self.law.v), float)[0]
        else:
            sigma2 = numpyro.sample("sigma2", self.law)
        sigma = jnp.sqrt(sigma2)
        basis, residual, _ = self.pieces(sites, None, X, y, inducing)
        n, m = basis.shape
        columns = numpyro.plate("class", self.classes, dim=-1)
        normal = dist.Normal(0.0, 1.0)
        with columns, numpyro.plate("inducing_point", m, dim=-2):
            w = numpyro.sample("w", normal)
        f = sigma * (basis @ w)
        spread = (sigma * jnp.sqrt(residual))[:, None]
        with columns, numpyro.plate("row", n, dim=-2):
            if y is None:  # what an earlier result has of other inputs is not of these: named apart
                f = numpyro.sample("f", dist.Normal(f, spread), infer=_LATER)
            elif inducing is not None:
                f = f + spread * numpyro.sample("e", normal, infer=_LATER)
            numpyro.deterministic("p", jax.nn.softmax(f))
        with numpyro.plate("row", n, dim=-1):
            numpyro.sample("y", dist.Categorical(logits=f), obs=y)

    # -- what sparse variational inference needs ---------------------------------------------------

    def pieces(
        self,
        parameters: Mapping[str, Any],
        rows: Any,
        X: Any,  # noqa: N803
        y: Any = None,
        inducing: Any = None,
    ) -> Pieces:
        """`SparseProgram.pieces`: A, r and the labels of the ``rows``, of all if None.

        Raises:
            DataError: the arguments do not fit together.
        """
        self._check_shapes(X, y, inducing)
        dtype = jnp.result_type(X, float)
        network = network_with(self.network, parameters)
        check_order(network)
        x = jnp.asarray(X, dtype)
        z = x if inducing is None else jnp.asarray(inducing, dtype)
        covariance = kernel_matrices(network, z, ntk=False).nngp
        relative = 1e-6 if dtype == jnp.float64 else 1e-4
        jitter = relative * jnp.diagonal(covariance).mean()
        root = lax.linalg.cholesky(covariance + jitter * jnp.eye(len(z), dtype=dtype))
        x, labels, basis = (
            a if a is None or rows is None else jnp.asarray(a)[rows] for a in (x, y, root)
        )
        if inducing is None:  # A A^T = K + jitter I: nothing is left
            return Pieces(basis, jnp.zeros(len(x), dtype), labels)
        across = kernel_matrices(network, z, x, ntk=False).nngp
        basis = solve_triangular(root, across, lower=True).T
        variance = own_variances(network, x)
        least = jnp.finfo(dtype).eps * variance  # a root has no derivative at 0
        return Pieces(basis, jnp.maximum(variance - (basis**2).sum(1), least), labels)

    def check_values(self, X: Any, y: Any = None, inducing: Any = None) -> None:  # noqa: N803
        """`SparseProgram.check_values`.

        Raises:
            DataError: values are not finite.
        """
        checked_inputs(X, "X")
        if inducing is not None:
            checked_inputs(inducing, "inducing")

    def _check_shapes(self, X: Any, y: Any, inducing: Any) -> None:  # noqa: N803
        X = checked_inputs(X, "X")
        if inducing is not None and checked_inputs(inducing, "inducing").shape[1:] != X.shape[1:]:
            raise DataError(
                f"an inducing input has shape {inducing.shape[1:]} and one of X {X.shape[1:]}; "
                "they must have the same features."
            )
        if y is None:
            return
        if jnp.shape(y) != X.shape[:1]:
            raise DataError(
                f"y must be one label for every input, of shape {X.shape[:1]}; it has shape "
                f"{jnp.shape(y)}."
            )
        if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
            raise DataError(
                f"labels must be integers 0, ..., {self.classes - 1}; these are "
                f"{jnp.result_type(y)}. Say y.astype(int)."
            )


_LATER = {"predicted": True}


def choose_inducing(
    X: Any,  # noqa: N803
    count: int,
    network: Layer | None = None,
) -> np.ndarray:
    """Inducing inputs among the data, the most informative first.

    One after the other, the input whose function value is the most uncertain given those at the
    inputs chosen before: pivots of an incomplete Cholesky factor of K. The sum of what then remains
    uncertain bounds what an approximation by them loses. No labels and no draws are needed, and the
    first of M + 1 inputs are those of M.

    Args:
        X: inputs (n, d), or images.
        count: M, at most n. Where inputs are alike, fewer may be all that is to be known.
        network: the kernel; three ReLU layers if None.

    Returns:
        Z, of shape (M, ...).

    Complexity: n M^2 operations, n M entries of K.

    Raises:
        DataError: X cannot be used.
        OptionError: there are not ``count`` different inputs.

    Source: Burt, Rasmussen, van der Wilk (2020), Convergence of sparse variational inference in
    Gaussian processes regression, JMLR 21, section 4.2.2; Fine, Scheinberg (2001), JMLR 2.
    """
    x = np.asarray(checked_inputs(np.asarray(X), "X"))
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or not count > 0:
        raise OptionError(f"count must be a number of inducing inputs; got {count!r:.40}.")
    if count > len(np.unique(x.reshape(len(x), -1), axis=0)):
        raise OptionError(f"there are not count={count} different inputs among {len(x)}.")
    network = mlp(3) if network is None else network
    check_order(network)
    return x[in_float64(functools.partial(_pivots, int(count)), network, x).astype(int)]


def _pivots(count: int, network: Layer, x: Any) -> Float[Array, " M"]:
    """The rows of x where k_ii - |G_i|^2 is largest in turn, G the incomplete factor (n, M)."""

    def choose(number: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        chosen, factor, rest = state
        row = jnp.argmax(rest)
        column = kernel_matrices(network, x, x[row][None], ntk=False).nngp[:, 0]
        least = jnp.finfo(rest.dtype).eps * jnp.abs(column).max()  # where nothing is left to learn
        column = (column - factor @ factor[row]) / jnp.sqrt(jnp.maximum(rest[row], least))
        chosen_before = rest < 0.0
        rest = jnp.where(chosen_before, rest, jnp.maximum(rest - column**2, 0.0)).at[row].set(-1.0)
        return chosen.at[number].set(row), factor.at[:, number].set(column), rest

    start = jnp.zeros(count, int), jnp.zeros((len(x), count)), own_variances(network, x)
    return lax.fori_loop(0, count, choose, start)[0].astype(float)
