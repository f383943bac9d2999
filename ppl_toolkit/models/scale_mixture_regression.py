"""Regression with an infinitely wide network whose readout has a random scale, as a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpyro
from numpyro import distributions as dist

from ppl_toolkit.errors import OptionError
from ppl_toolkit.models.infinite_width import Layer
from ppl_toolkit.models.kernel_sites import (
    check_priors,
    checked_network,
    kernel_priors,
    network_with,
)
from ppl_toolkit.models.network_process import NetworkProcess
from ppl_toolkit.models.scale_quadrature import checked_law

__all__ = ["ScaleMixtureRegression", "scale_mixture_regression"]

_ALPHA = "alpha"


def scale_mixture_regression(
    network: Callable[..., Layer] | Layer | None = None,
    *,
    law: dist.Distribution | Callable[[], dist.Distribution] | None = None,
    priors: Mapping[str, dist.Distribution] | None = None,
) -> ScaleMixtureRegression:
    """A program ``model(X, y=None, X_new=None)``: y = f(X) + noise, f an infinitely wide network.

    Given sigma^2, y ~ N(0, sigma^2 (K + noise I)); sigma^2 is integrated out exactly, so that a
    sampler sees the kernel's parameters alone. The targets are expected to be centred, with a
    standard deviation near 1.

        model = scale_mixture_regression()
        posterior = ppl.infer(model, X, y)                      # NUTS
        ppl.loo(posterior, model, X, y)                         # exact p(y_i | y_-i) for every draw
        ppl.predict(posterior, model, X, y, X_new=X_new)        # sites y_new, f_new, sigma2

    Sites, with their priors: ``weight_std`` ~ LogNormal(log 1.4, 0.3), ``bias_std`` ~
    HalfNormal(0.5), ``noise`` ~ LogNormal(-3, 1.5), the variance of the noise in units of sigma^2;
    and ``alpha`` - 1/2 ~ Gamma(2, 1/2) if no law is given, which is then InverseGamma(alpha,
    alpha): Student-t processes with 2 alpha degrees of freedom. The data tell little of alpha.

    Args:
        network: called with ``weight_std`` and ``bias_std``, gives a network with a readout of
            weight 1 and without bias; three ReLU layers if None. A network as it is has its
            parameters fixed.
        law: of sigma^2, or a function with sample sites that gives it.
        priors: other priors of the sites named above.

    Complexity: of a gradient, 3 n^3 operations; meant for n up to some 1000 with NUTS.
    """
    network = checked_network(network)
    if law is not None and not callable(law):
        raise OptionError(
            f"law must be a distribution of sigma^2, or a function that gives one; got {law!r:.60}."
        )
    if isinstance(law, dist.Distribution):
        checked_law(law)
    made = ScaleMixtureRegression(network, law, dict(priors or {}))
    check_priors(made.defaults(), made.given)
    return made


class ScaleMixtureRegression:
    """The program that `scale_mixture_regression` makes.

    Attributes:
        without_maximum: sites along which the evidence rises for ever: as alpha grows the process
            becomes a Gaussian one whose scale is the best for the data, and no law of sigma^2 has
            a larger evidence than a point at the maximum.
    """

    def __init__(self, network: Any, law: Any, given: Mapping[str, dist.Distribution]) -> None:
        self.network, self.law, self.given = network, law, given
        self.without_maximum = () if isinstance(law, dist.Distribution) else (_ALPHA,)

    def __call__(self, X: Any, y: Any = None, X_new: Any = None) -> None:  # noqa: N803
        """Targets y (n,) at inputs X (n, d); with ``X_new`` (m, d), predictions given y."""
        sites = {name: numpyro.sample(name, prior) for name, prior in self.priors.items()}
        network = network_with(self.network, sites)
        process = NetworkProcess(self._law(sites), network, X, sites["noise"])
        numpyro.sample("y", process, obs=y)
        if X_new is not None:
            predictive = process.conditioned(y)
            later = {"predicted": True}
            numpyro.sample("sigma2", predictive.scale, infer=later)
            numpyro.sample("f_new", predictive.joint(X_new, "f"), infer=later)
            numpyro.sample("y_new", predictive.joint(X_new, "y"), infer=later)

    @property
    def priors(self) -> dict[str, dist.Distribution]:
        """The prior of every site, in the precision of the run."""
        return self.defaults() | dict(self.given)

    def defaults(self) -> dict[str, dist.Distribution]:
        """The priors of sites for which none was given."""
        known: dict[str, dist.Distribution] = {"noise": dist.LogNormal(-3.0, 1.5)}
        known |= kernel_priors(self.network)
        if self.law is None:
            above = dist.transforms.AffineTransform(0.5, 1.0, domain=dist.constraints.positive)
            known[_ALPHA] = dist.TransformedDistribution(dist.Gamma(2.0, 0.5), above)
        return known

    def _law(self, sites: Mapping[str, Any]) -> dist.Distribution:
        if self.law is None:
            return dist.InverseGamma(sites[_ALPHA], sites[_ALPHA])
        return self.law if isinstance(self.law, dist.Distribution) else self.law()
