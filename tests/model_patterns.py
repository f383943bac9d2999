"""Small NumPyro models, one for each way people write them, with two sets of data apiece.

A test takes every entry of `PATTERNS` and compares our log density with NumPyro's. The second set
of data has the shapes and static arguments of the first and other values, so that a data set
baked into a compiled function as a constant shows.

`ENUMERATED` holds models with discrete latents, which NumPyro sums out with funsor, each beside the
same model summed out by hand.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints, transforms
from numpyro.infer.reparam import (
    CircularReparam,
    ExplicitReparam,
    LocScaleReparam,
    ProjectedNormalReparam,
    TransformReparam,
)

__all__ = ["ENUMERATED", "PATTERNS", "Enumerated", "Pattern"]


class Pattern(NamedTuple):
    """A model and two sets of its data.

    Attributes:
        name: The name of the model function.
        model: The NumPyro model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        new_args: Other positional arguments, of the same structure, shapes and static values.
        new_kwargs: Other keyword arguments, likewise.
        needs_key: Whether the density depends on a random key (a random minibatch), so that it
            must be scored under `numpyro.handlers.seed`.
    """

    name: str
    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    new_args: tuple
    new_kwargs: dict[str, Any]
    needs_key: bool = False


class Enumerated(NamedTuple):
    """A model with discrete latents, and the same model with these summed out by hand.

    Attributes:
        name: The name of the model function.
        model: The NumPyro model; its discrete sites are marked for parallel enumeration.
        marginal: The model over the continuous sites alone, same names and log density.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        new_args: Other positional arguments, as in `Pattern`.
        new_kwargs: Other keyword arguments, likewise.
    """

    name: str
    model: Callable
    marginal: Callable
    args: tuple
    kwargs: dict[str, Any]
    new_args: tuple
    new_kwargs: dict[str, Any]


class _Call(NamedTuple):
    args: tuple
    kwargs: dict[str, Any]


_MakeData = Callable[[np.random.Generator], _Call]
_patterns: list[Pattern] = []
_enumerated: list[Enumerated] = []


def _call(*args, **kwargs) -> _Call:
    return _Call(args, kwargs)


def _two_calls(make_data: _MakeData) -> tuple[_Call, _Call]:
    return make_data(np.random.default_rng(0)), make_data(np.random.default_rng(1))


def _pattern(make_data: _MakeData, needs_key: bool = False) -> Callable[[Callable], Callable]:
    """Files the decorated model under its name, with data from two seeds."""

    def register(model: Callable) -> Callable:
        call, new_call = _two_calls(make_data)
        _patterns.append(Pattern(model.__name__, model, *call, *new_call, needs_key))
        return model

    return register


def _enumerated_pattern(make_data: _MakeData, marginal: Callable) -> Callable[[Callable], Callable]:
    """Files the decorated model under its name, beside its marginal."""

    def register(model: Callable) -> Callable:
        call, new_call = _two_calls(make_data)
        _enumerated.append(Enumerated(model.__name__, model, marginal, *call, *new_call))
        return model

    return register


def _xy(rng: np.random.Generator, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=n)
    return x, 0.5 + 2.0 * x + rng.normal(size=n)


def _mask(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.permutation(np.arange(np.prod(shape)) % 3 > 0).reshape(shape)


# Arguments in every form


@_pattern(lambda rng: _call(rng.normal(1.0, 2.0, size=20)))
def plain_normal(y):
    """Observations without a plate."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(5.0))
    numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


@_pattern(lambda rng: _call(*_xy(rng)))
def linear_regression(x, y):
    """Several scalar sites and a plate sized by the data."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 5.0))
    sigma = numpyro.sample("sigma", dist.Exponential(1.0))
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Normal(intercept + slope * x, sigma), obs=y)


@_pattern(lambda rng: _call(8, rng.uniform(5.0, 15.0, size=8), y=rng.normal(8.0, 10.0, size=8)))
def plate_of_int_argument(num_schools, sigma, y=None):
    """A plate whose size is an int argument, and y by keyword."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", num_schools):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


@_pattern(lambda rng: _call(rng.uniform(0.5, 1.5, size=6), y=None))
def no_observations(scale, y=None):
    """y=None: the site y is a latent, and the density is the prior's."""
    mu = numpyro.sample("mu", dist.Normal(0.0, scale.mean()))
    with numpyro.plate("n", scale.shape[0]):
        numpyro.sample("y", dist.Normal(mu, scale), obs=y)


@_pattern(
    lambda rng: _call(
        {"x": rng.normal(size=(12, 2)), "group": rng.permutation(np.arange(12) % 3)},
        targets=[rng.normal(size=12), rng.poisson(3.0, size=12)],
    )
)
def pytree_data(features, targets):
    """Data in a dictionary and a list, two observed sites."""
    effect = numpyro.sample("effect", dist.Normal(0.0, 1.0).expand([3]))
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    predictor = features["x"] @ beta + effect[features["group"]]
    with numpyro.plate("n", features["x"].shape[0]):
        numpyro.sample("real", dist.Normal(predictor, 1.0), obs=targets[0])
        numpyro.sample("count", dist.Poisson(jnp.exp(0.3 * predictor)), obs=targets[1])


@_pattern(lambda rng: _call(*_xy(rng), "student", robust=True, extra=None))
def static_arguments(x, y, family, robust=False, extra=None):
    """Strings, bools and None that choose the branch taken."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = slope * x
    if extra is not None:
        mean = mean + extra
    if robust:
        sigma = numpyro.sample("sigma", dist.HalfCauchy(1.0))
    else:
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    family = dist.StudentT(4.0, mean, sigma) if family == "student" else dist.Normal(mean, sigma)
    numpyro.sample("y", family, obs=y)


@_pattern(lambda rng: _call(float(rng.normal()), 2.0 + float(rng.uniform()), rng.normal(size=5)))
def float_arguments(prior_mean, prior_sd, y):
    """Hyperparameters given as Python floats."""
    mu = numpyro.sample("mu", dist.Normal(prior_mean, prior_sd))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@_pattern(lambda rng: _call(rng.normal(1.0, 2.0, size=(4, 5)), 3))
def sites_in_a_loop(y, depth):
    """Python loops that make one site per pass."""
    mean = 0.0
    for k in range(depth):
        mean = mean + numpyro.sample(f"component_{k}", dist.Normal(0.0, 1.0 / (k + 1)))
    for row in range(y.shape[0]):
        numpyro.sample(f"y_{row}", dist.Normal(mean, 2.0), obs=y[row])


# Plates


@_pattern(lambda rng: _call(rng.normal(size=(6, 4))))
def nested_plates(y):
    """A plate within a plate, latents at each level."""
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("group", y.shape[1]):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("member", y.shape[0]):
            theta = numpyro.sample("theta", dist.Normal(mu, 0.5))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(5, 7))))
def crossed_plates_with_dims(y):
    """Two crossed plates with explicit dims, effects of rows and columns."""
    rows = numpyro.plate("row", y.shape[0], dim=-2)
    columns = numpyro.plate("column", y.shape[1], dim=-1)
    scale = numpyro.sample("scale", dist.HalfNormal(2.0).expand([2]).to_event(1))
    with rows:
        row_effect = numpyro.sample("row_effect", dist.Normal(0.0, scale[0]))
    with columns:
        column_effect = numpyro.sample("column_effect", dist.Normal(0.0, scale[1]))
    with rows, columns:
        numpyro.sample("y", dist.Normal(row_effect + column_effect, 1.0), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(3, 4, 2))))
def plate_stack(y):
    """numpyro.plate_stack and vector events."""
    with numpyro.plate_stack("plates", y.shape[:2]):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(mu, 0.5).to_event(1), obs=y)


@_pattern(lambda rng: _call(*_xy(rng), subsample_size=5), needs_key=True)
def subsampled_plate(x, y, subsample_size):
    """A minibatch drawn at random, its likelihood scaled up by the plate."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", x.shape[0], subsample_size=subsample_size) as index:
        numpyro.sample("y", dist.Normal(slope * x[index], 1.0), obs=y[index])


@_pattern(lambda rng: _call(*_xy(rng), index=rng.permutation(20)[:5]))
def subsampled_plate_given_indices(x, y, index):
    """A minibatch whose indices are data."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with (
        handlers.substitute(data={"n": jnp.asarray(index)}),
        numpyro.plate("n", x.shape[0], subsample_size=index.shape[0]),
    ):
        x_batch = numpyro.subsample(x, event_dim=0)
        y_batch = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(slope * x_batch, 1.0), obs=y_batch)


@_pattern(
    lambda rng: _call(
        rng.permutation(np.arange(24) % 4), rng.normal(size=24), y=rng.normal(size=24)
    )
)
def group_gather(group, x, y=None):
    """Varying intercepts and slopes gathered by an integer index."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with numpyro.plate("group", 4):
        coefficients = numpyro.sample("coefficients", dist.Normal(mu, tau).to_event(1))
    with numpyro.plate("n", group.shape[0]):
        mean = coefficients[group, 0] + coefficients[group, 1] * x
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


# Weights, masks, and other changes of the density


@_pattern(lambda rng: _call(rng.uniform(1.0, 2.0, size=6), rng.normal(size=6)))
def deterministic_sites(scale, y):
    """A non-centred hierarchy written with deterministic sites."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    with numpyro.plate("n", y.shape[0]):
        raw = numpyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * raw)
        numpyro.sample("y", dist.Normal(theta, scale), obs=y)
    numpyro.deterministic("range", theta.max() - theta.min())


@_pattern(lambda rng: _call(rng.normal(size=15)))
def factors(y):
    """Likelihood and prior given by numpyro.factor, one of them inside a plate."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    numpyro.factor("cauchy_prior", -jnp.log1p(mu**2))
    with numpyro.plate("n", y.shape[0]):
        numpyro.factor("likelihood", -jnp.abs(y - mu))


@_pattern(lambda rng: _call(rng.normal(size=(6, 3)), _mask(rng, 6, 3)))
def mask_handler(y, observed):
    """Missing values hidden by handlers.mask."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with handlers.mask(mask=observed):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(6, 3)), _mask(rng, 6, 3)))
def masked_distribution(y, observed):
    """Missing values hidden by Distribution.mask, in plates."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("column", y.shape[1]), numpyro.plate("row", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, 1.0).mask(observed), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=10), _mask(rng, 10)))
def imputed_observations(y, observed):
    """Missing values imputed: obs_mask makes them latents."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("n", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y, obs_mask=observed)


@_pattern(lambda rng: _call(rng.normal(size=10), rng.uniform(0.2, 3.0, size=10)))
def scale_handler(y, weight):
    """A tempered prior and weighted observations."""
    with handlers.scale(scale=0.5):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", y.shape[0]), handlers.scale(scale=weight):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@_pattern(lambda rng: _call(*_xy(rng)))
def scoped_components(x, y):
    """One component used twice under different names, plates and deterministics included."""

    def smooth(inputs):
        frequency = numpyro.sample("frequency", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("feature", 2):
            weight = numpyro.sample("weight", dist.Normal(0.0, 1.0))
        phase = frequency * inputs
        return numpyro.deterministic(
            "value", weight[0] * jnp.sin(phase) + weight[1] * jnp.cos(phase)
        )

    with handlers.scope(prefix="trend"):
        trend = smooth(x)
    season = handlers.scope(smooth, prefix="season", divider=".")(3.0 * x)
    numpyro.sample("y", dist.Normal(trend + season, 1.0), obs=y)


@_pattern(lambda rng: _call(*_xy(rng), known_slope=rng.normal()))
def conditioned_submodel(x, y, known_slope):
    """A submodel conditioned on data within the model: its site counts as observed."""

    def line():
        intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
        return intercept + slope * x

    mean = handlers.condition(line, data={"slope": jnp.asarray(known_slope)})()
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@_pattern(lambda rng: _call(*_xy(rng), known_slope=rng.normal()))
def substituted_submodel(x, y, known_slope):
    """A submodel with a latent fixed by substitute, from data."""

    def line():
        intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
        return intercept + slope * x

    with handlers.block(hide=["slope"]):
        mean = handlers.substitute(line, data={"slope": jnp.asarray(known_slope)})()
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@_pattern(lambda rng: _call(*_xy(rng), do_slope=rng.normal()))
def intervened_submodel(x, y, do_slope):
    """handlers.do: the latent keeps its prior, what follows uses the intervention."""

    def line():
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
        return slope * x + numpyro.sample("intercept", dist.Normal(slope, 1.0))

    mean = handlers.do(line, data={"slope": jnp.asarray(do_slope)})()
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@_pattern(lambda rng: _call(*_xy(rng)))
def lifted_parameters(x, y):
    """Parameters turned into latents by handlers.lift."""

    def line():
        return numpyro.param("intercept", 0.0) + numpyro.param("slope", 1.0) * x

    prior = {"intercept": dist.Normal(0.0, 1.0), "slope": dist.Normal(0.0, 1.0)}
    mean = handlers.lift(line, prior=prior)()
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


# Reparameterisation within the model


@_pattern(lambda rng: _call(rng.uniform(1.0, 2.0, size=6), rng.normal(size=6)))
def noncentered_by_reparam(scale, y):
    """LocScaleReparam(0)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    with numpyro.plate("n", y.shape[0]), handlers.reparam(config={"theta": LocScaleReparam(0)}):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    numpyro.sample("y", dist.Normal(theta, scale), obs=y)


@_pattern(lambda rng: _call(rng.uniform(size=6), rng.normal(size=6)))
def centered_as_given(centered, y):
    """LocScaleReparam with a degree of centering per group, from data; heavy tails."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    reparameterised = LocScaleReparam(jnp.asarray(centered), shape_params=("df",))
    with handlers.reparam(config={"theta": reparameterised}), numpyro.plate("n", y.shape[0]):
        theta = numpyro.sample("theta", dist.StudentT(5.0, mu * jnp.ones(y.shape[0]), tau))
    numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=6)))
def learned_centering(y):
    """LocScaleReparam(): the degree of centering is a numpyro.param."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("n", y.shape[0]), handlers.reparam(config={"theta": LocScaleReparam()}):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(6, 2))))
def transform_reparam(y):
    """TransformReparam of a scaled latent and of a log-normal."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    config = {"theta": TransformReparam(), "sigma": TransformReparam()}
    with handlers.reparam(config=config):
        sigma = numpyro.sample(
            "sigma", dist.TransformedDistribution(dist.Normal(mu, 1.0), transforms.ExpTransform())
        )
        affine = transforms.AffineTransform(mu, sigma)
        with numpyro.plate("n", y.shape[0]):
            theta = numpyro.sample(
                "theta", dist.TransformedDistribution(dist.Normal(0.0, 1.0), affine)
            )
    mean = jnp.broadcast_to(theta[:, None], y.shape)
    numpyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=12)))
def explicit_reparam(y):
    """ExplicitReparam: the latent is the logarithm of the site."""
    config = {"sigma": ExplicitReparam(transforms.ExpTransform().inv)}
    with handlers.reparam(config=config):
        sigma = numpyro.sample("sigma", dist.Gamma(2.0, 2.0))
    numpyro.sample("y", dist.Normal(0.0, sigma), obs=y)


# Supports


@_pattern(lambda rng: _call(rng.normal(size=(10, 3))))
def correlated_by_lkj_cholesky(y):
    """An LKJ prior on a Cholesky factor, scales apart."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0).expand([3]).to_event(1))
    factor = numpyro.sample("factor", dist.LKJCholesky(3, concentration=2.0))
    scale_tril = scale[:, None] * factor
    with numpyro.plate("n", y.shape[0]):
        numpyro.sample("y", dist.MultivariateNormal(0.0, scale_tril=scale_tril), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(10, 3))))
def correlated_by_lkj(y):
    """An LKJ prior on a correlation matrix."""
    correlation = numpyro.sample("correlation", dist.LKJ(3, concentration=1.5))
    with numpyro.plate("n", y.shape[0]):
        numpyro.sample("y", dist.MultivariateNormal(0.0, covariance_matrix=correlation), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(10, 2))))
def wishart_precision(y):
    """A positive definite latent."""
    precision = numpyro.sample("precision", dist.Wishart(4.0, jnp.eye(2)))
    with numpyro.plate("n", y.shape[0]):
        numpyro.sample("y", dist.MultivariateNormal(0.0, precision_matrix=precision), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(5, 3)), np.cov(rng.normal(size=(3, 9)))))
def multivariate_normal(y, covariance):
    """Vector latents in a plate, a known covariance given by its Cholesky factor."""
    cholesky = jnp.linalg.cholesky(covariance)
    with numpyro.plate("n", y.shape[0]):
        theta = numpyro.sample("theta", dist.MultivariateNormal(jnp.ones(3), scale_tril=cholesky))
        numpyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=y)


@_pattern(lambda rng: _call(rng.normal(0.0, 3.0, size=20)))
def ordered_means(y):
    """An ordered vector made by OrderedTransform."""
    mu = numpyro.sample(
        "mu",
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0).expand([3]).to_event(1), transforms.OrderedTransform()
        ),
    )
    mixing = dist.Categorical(probs=jnp.full(3, 1.0 / 3.0))
    numpyro.sample("y", dist.MixtureSameFamily(mixing, dist.Normal(mu, 1.0)), obs=y)


@_pattern(lambda rng: _call(rng.gamma(2.0, 2.0, size=20)))
def positive_ordered(y):
    """Positive ordered rates, flat but for a factor."""
    support = constraints.positive_ordered_vector
    rate = numpyro.sample("rate", dist.ImproperUniform(support, (), (2,)))
    numpyro.factor("rate_prior", dist.Gamma(2.0, 1.0).log_prob(rate).sum())
    mixing = dist.Categorical(probs=jnp.array([0.3, 0.7]))
    numpyro.sample("y", dist.MixtureSameFamily(mixing, dist.Exponential(rate)), obs=y)


@_pattern(lambda rng: _call(rng.normal(0.0, 2.0, size=12)))
def simplex_weights(y):
    """Mixture weights on the simplex and component means in a plate."""
    weight = numpyro.sample("weight", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    with numpyro.plate("component", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("n", y.shape[0]):
        mixing = dist.Categorical(probs=weight)
        numpyro.sample("y", dist.MixtureSameFamily(mixing, dist.Normal(mu, 1.0)), obs=y)


@_pattern(lambda rng: _call(rng.multinomial(10, [0.2, 0.3, 0.5], size=4)))
def simplexes_in_plate(counts):
    """A batch of simplexes, and multinomial counts."""
    concentration = numpyro.sample("concentration", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("row", counts.shape[0]):
        probs = numpyro.sample("probs", dist.Dirichlet(concentration))
        numpyro.sample("counts", dist.Multinomial(10, probs=probs), obs=counts)


@_pattern(lambda rng: _call(rng.normal(size=(12, 3)), rng.normal(size=12)))
def improper_uniform(x, y):
    """Flat priors: a real vector, a positive scalar, and a batch in a plate."""
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with numpyro.plate("half", 2):
        offset = numpyro.sample("offset", dist.ImproperUniform(constraints.real, (), ()))
    mean = x @ beta + jnp.repeat(offset, 6)
    numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


@_pattern(lambda rng: _call(rng.uniform(1.0, 2.0, size=8), y=rng.normal(size=8)))
def half_cauchy_hierarchy(scale, y):
    """A horseshoe: global and local half-Cauchy scales."""
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    with numpyro.plate("n", y.shape[0]):
        local = numpyro.sample("local", dist.HalfCauchy(1.0))
        theta = numpyro.sample("theta", dist.Normal(0.0, tau * local))
        numpyro.sample("y", dist.Normal(theta, scale), obs=y)


@_pattern(lambda rng: _call(0.4 * rng.uniform(size=8)))
def dynamic_support(y):
    """A bound that is itself a latent, on a latent."""
    upper = numpyro.sample("upper", dist.LogNormal(1.0, 0.5))
    lower = numpyro.sample("lower", dist.Uniform(-1.0, upper))
    middle = numpyro.sample("middle", dist.Uniform(lower, upper))
    numpyro.sample("y", dist.Normal(middle, 1.0), obs=y)


@_pattern(lambda rng: _call(rng.uniform(0.5, 1.0), rng.uniform(size=8)))
def bounds_from_data(limit, y):
    """A support that depends on the data."""
    mu = numpyro.sample("mu", dist.Uniform(-limit, 2.0 * limit))
    sigma = numpyro.sample("sigma", dist.TruncatedNormal(1.0, 1.0, low=limit, high=3.0))
    numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


@_pattern(lambda rng: _call(rng.integers(0, 2, size=(9, 4))))
def unit_interval(y):
    """A beta-binomial hierarchy, observations of integer type."""
    mean = numpyro.sample("mean", dist.Beta(2.0, 2.0))
    concentration = numpyro.sample("concentration", dist.Pareto(1.0, 1.5))
    with numpyro.plate("coin", y.shape[1]):
        p = numpyro.sample("p", dist.Beta(mean * concentration, (1.0 - mean) * concentration))
        with numpyro.plate("toss", y.shape[0]):
            numpyro.sample("y", dist.Bernoulli(probs=p), obs=y)


@_pattern(lambda rng: _call(rng.vonmises(0.5, 2.0, size=12)))
def circular(y):
    """An angle with a von Mises prior."""
    loc = numpyro.sample("loc", dist.VonMises(0.0, 1.0))
    concentration = numpyro.sample("concentration", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.VonMises(loc, concentration), obs=y)


@_pattern(lambda rng: _call(rng.vonmises(0.5, 2.0, size=12)))
def circular_reparam(y):
    """An angle freed of its seam by CircularReparam."""
    with handlers.reparam(config={"loc": CircularReparam()}):
        loc = numpyro.sample("loc", dist.VonMises(0.0, 1.0))
    numpyro.sample("y", dist.VonMises(loc, 2.0), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(6, 3))))
def direction_on_sphere(y):
    """A unit vector by ProjectedNormalReparam."""
    with handlers.reparam(config={"direction": ProjectedNormalReparam()}):
        direction = numpyro.sample("direction", dist.ProjectedNormal(jnp.ones(3)))
    numpyro.sample("y", dist.Normal(direction, 1.0).to_event(1), obs=y)


@_pattern(lambda rng: _call(rng.permutation(np.arange(20) % 4), rng.normal(size=20)))
def zero_sum_normal(group, y):
    """Effects that sum to zero."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    effect = numpyro.sample("effect", dist.ZeroSumNormal(scale, event_shape=(4,)))
    numpyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(5, 6))))
def expanded_events(y):
    """Expand and to_event: a matrix latent without plates."""
    matrix = numpyro.sample("matrix", dist.Normal(0.0, 1.0).expand([5, 2]).to_event(2))
    weights = numpyro.sample("weights", dist.Laplace(jnp.zeros((2, 6)), 1.0).to_event(2))
    numpyro.sample("y", dist.Normal(matrix @ weights, 1.0).to_event(2), obs=y)


# Observation models


@_pattern(lambda rng: _call(rng.normal(size=(20, 2)), rng.integers(0, 2, size=20)))
def logistic_regression(x, y):
    """Bernoulli logits, matrix of features."""
    intercept = numpyro.sample("intercept", dist.StudentT(3.0, 0.0, 2.5))
    beta = numpyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)


@_pattern(
    lambda rng: _call(rng.normal(size=20), rng.uniform(1.0, 4.0, size=20), rng.poisson(3.0, 20))
)
def poisson_regression(x, exposure, y):
    """Counts with an exposure."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    rate = exposure * jnp.exp(beta[0] + beta[1] * x)
    numpyro.sample("y", dist.Poisson(rate), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=20), rng.negative_binomial(2, 0.3, size=20)))
def negative_binomial_regression(x, y):
    """Overdispersed counts."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    phi = numpyro.sample("phi", dist.InverseGamma(2.0, 1.0))
    numpyro.sample("y", dist.NegativeBinomial2(jnp.exp(beta[0] + beta[1] * x), phi), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(20, 2)), rng.integers(0, 3, size=20), 3))
def softmax_regression(x, y, num_classes):
    """Categorical outcomes, one class pinned."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([2, num_classes - 1]).to_event(2))
    logits = jnp.concatenate([x @ beta, jnp.zeros((x.shape[0], 1))], axis=1)
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Categorical(logits=logits), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=20), rng.integers(0, 4, size=20)))
def ordered_logistic(x, y):
    """Graded outcomes with ordered cut points."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    cutpoints = numpyro.sample(
        "cutpoints",
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0).expand([3]).to_event(1), transforms.OrderedTransform()
        ),
    )
    numpyro.sample("y", dist.OrderedLogistic(slope * x, cutpoints), obs=y)


@_pattern(lambda rng: _call(rng.multinomial(12, [0.1, 0.3, 0.6], size=5), 12))
def dirichlet_multinomial(counts, total):
    """Overdispersed compositions."""
    concentration = numpyro.sample("concentration", dist.Exponential(0.5).expand([3]).to_event(1))
    with numpyro.plate("n", counts.shape[0]):
        numpyro.sample(
            "counts", dist.DirichletMultinomial(concentration, total_count=total), obs=counts
        )


@_pattern(lambda rng: _call(rng.poisson(2.0, size=30) * rng.integers(0, 2, size=30)))
def zero_inflated(y):
    """Counts with too many zeros."""
    gate = numpyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.ZeroInflatedPoisson(gate, rate=rate), obs=y)


@_pattern(lambda rng: _call(rng.standard_t(3.0, size=20)))
def robust_mixture(y):
    """A mixture of unlike components, weights by stick breaking."""
    stick = numpyro.sample("stick", dist.Beta(1.0, 2.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    mixing = dist.Categorical(probs=jnp.stack([stick, 1.0 - stick]))
    components = [dist.Normal(0.0, scale), dist.Cauchy(0.0, 2.0)]
    numpyro.sample("y", dist.MixtureGeneral(mixing, components), obs=y)


@_pattern(lambda rng: _call(rng.standard_t(3.0, size=20)))
def student_t(y):
    """Heavy tails with unknown degrees of freedom."""
    nu = numpyro.sample("nu", dist.Gamma(2.0, 0.1))
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    variance = numpyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    numpyro.sample("y", dist.StudentT(nu, mu, jnp.sqrt(variance)), obs=y)


@_pattern(lambda rng: _call(rng.exponential(2.0, size=20), _mask(rng, 20)))
def censored_survival(time, event_seen):
    """Right-censored times: density or survival by a mask."""
    shape = numpyro.sample("shape", dist.Gamma(4.0, 4.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    hazard = (time / scale) ** shape
    density = dist.Weibull(scale, shape).log_prob(time)
    with numpyro.plate("n", time.shape[0]):
        numpyro.factor("survival", jnp.where(event_seen, density, -hazard))


# Processes


@_pattern(lambda rng: _call(rng.normal(size=15).cumsum()))
def state_space_scan(y):
    """A local level model: NumPyro's scan with a latent and an observation per step."""
    drift = numpyro.sample("drift", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def transition(level, y_t):
        level = numpyro.sample("level", dist.Normal(level + drift, scale))
        numpyro.sample("y", dist.Normal(level, 0.5), obs=y_t)
        return level, level

    scan(transition, 0.0, y)


@_pattern(lambda rng: _call(rng.normal(size=(10, 3)).cumsum(axis=0), rng.normal(size=(10, 3))))
def panel_scan(y, control):
    """NumPyro's scan over a plate of series, non-centred within, with an initial latent."""
    persistence = numpyro.sample("persistence", dist.Uniform(-1.0, 1.0))
    with numpyro.plate("series", y.shape[1]):
        start = numpyro.sample("start", dist.Normal(0.0, 1.0))

    def transition(state, step):
        y_t, control_t = step
        with numpyro.plate("series", y.shape[1]):
            with handlers.reparam(config={"state": LocScaleReparam(0)}):
                state = numpyro.sample("state", dist.Normal(persistence * state + control_t, 0.7))
            numpyro.sample("y", dist.Normal(state, 1.0), obs=y_t)
        return state, None

    scan(transition, start, (y, control))


@_pattern(lambda rng: _call(rng.normal(size=12).cumsum(), 4))
def conditioned_scan(y, horizon):
    """NumPyro's scan of given length, observed by condition from outside; then a forecast."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def transition(level, _):
        level = numpyro.sample("level", dist.Normal(level, scale))
        numpyro.sample("y", dist.Normal(level, 1.0))
        return level, None

    with handlers.condition(data={"y": jnp.asarray(y)}):
        level, _ = scan(transition, 0.0, None, length=y.shape[0])
    with numpyro.plate("horizon", horizon):
        increment = numpyro.sample("increment", dist.Normal(0.0, scale))
    numpyro.deterministic("forecast", level + jnp.cumsum(increment))


@_pattern(lambda rng: _call(rng.normal(size=15).cumsum()))
def lax_scan_inside(y):
    """A recursion by lax.scan whose result is observed at once."""
    decay = numpyro.sample("decay", dist.Uniform(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def smooth(level, y_t):
        return decay * level + (1.0 - decay) * y_t, level

    _, predicted = lax.scan(smooth, jnp.zeros_like(y[0]), y)
    with numpyro.plate("time", y.shape[0]):
        numpyro.sample("y", dist.Normal(predicted, scale), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=12).cumsum()))
def gaussian_random_walk(y):
    """A random walk as one distribution."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    walk = numpyro.sample("walk", dist.GaussianRandomWalk(scale, num_steps=y.shape[0]))
    numpyro.sample("y", dist.Normal(walk, 1.0).to_event(1), obs=y)


@_pattern(lambda rng: _call(np.sort(rng.normal(size=10)), rng.normal(size=10)))
def gaussian_process(x, y):
    """Gaussian-process regression with the function integrated out."""
    length = numpyro.sample("length", dist.InverseGamma(3.0, 2.0))
    amplitude = numpyro.sample("amplitude", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    distance = (x[:, None] - x[None, :]) / length
    kernel = amplitude**2 * jnp.exp(-0.5 * distance**2)
    covariance = kernel + (noise**2 + 1e-6) * jnp.eye(x.shape[0])
    numpyro.sample("y", dist.MultivariateNormal(0.0, covariance_matrix=covariance), obs=y)


@_pattern(lambda rng: _call(np.linspace(0.0, 3.0, 8) + rng.uniform(size=8), rng.poisson(2.0, 8)))
def gaussian_process_latent(x, y):
    """A whitened Gaussian process behind counts."""
    length = numpyro.sample("length", dist.InverseGamma(3.0, 2.0))
    distance = jnp.abs(x[:, None] - x[None, :]) / length
    cholesky = jnp.linalg.cholesky(jnp.exp(-distance) + 1e-6 * jnp.eye(x.shape[0]))
    white = numpyro.sample("white", dist.Normal(0.0, 1.0).expand([x.shape[0]]).to_event(1))
    f = numpyro.deterministic("f", cholesky @ white)
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Poisson(jnp.exp(f)), obs=y)


@_pattern(lambda rng: _call(rng.normal(size=(12, 3)), rng.normal(size=12), width=4))
def bayesian_neural_network(x, y, width):
    """Layers of weights in a loop."""
    hidden = x
    for layer, size in enumerate((width, 1)):
        shape = (hidden.shape[1], size)
        weight = numpyro.sample(f"weight_{layer}", dist.Normal(0.0, 1.0).expand(shape).to_event(2))
        bias = numpyro.sample(f"bias_{layer}", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        hidden = (jnp.tanh(hidden) if layer else hidden) @ weight + bias
    sigma = numpyro.sample("sigma", dist.Gamma(2.0, 2.0))
    with numpyro.plate("n", x.shape[0]):
        numpyro.sample("y", dist.Normal(hidden[:, 0], sigma), obs=y)


# Discrete latents, and the same summed out by hand. NumPyro writes to the `infer` dictionary of a
# site, so that each site is given its own.


def _mixture_prior():
    weight = numpyro.sample("weight", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    return weight, mu


def _mixture_marginal(y):
    weight, mu = _mixture_prior()
    mixture = dist.MixtureSameFamily(dist.Categorical(probs=weight), dist.Normal(mu, 1.0))
    with numpyro.plate("n", y.shape[0]):
        numpyro.sample("y", mixture, obs=y)


@_enumerated_pattern(lambda rng: _call(rng.normal(0.0, 3.0, size=12)), _mixture_marginal)
def enumerated_mixture(y):
    """A mixture with one label per observation."""
    weight, mu = _mixture_prior()
    with numpyro.plate("n", y.shape[0]):
        z = numpyro.sample("z", dist.Categorical(probs=weight), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def _grouped_marginal(y):
    weight, mu = _mixture_prior()
    by_class = dist.Normal(mu, 1.0).log_prob(y[..., None]).sum(axis=0)
    numpyro.factor("y", jax.nn.logsumexp(by_class + jnp.log(weight), axis=-1).sum())


@_enumerated_pattern(lambda rng: _call(rng.normal(0.0, 2.0, size=(5, 4))), _grouped_marginal)
def enumerated_groups(y):
    """One label per group, shared by the observations of a nested plate."""
    weight, mu = _mixture_prior()
    with numpyro.plate("group", y.shape[1]):
        z = numpyro.sample("z", dist.Categorical(probs=weight), infer={"enumerate": "parallel"})
        with numpyro.plate("member", y.shape[0]):
            numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def _occupancy_marginal(y):
    psi = numpyro.sample("psi", dist.Beta(1.0, 1.0))
    p = numpyro.sample("p", dist.Beta(1.0, 1.0))
    present = jnp.log(psi) + dist.Bernoulli(probs=p).log_prob(y).sum(axis=0)
    absent = jnp.where((y == 0).all(axis=0), jnp.log1p(-psi), -jnp.inf)
    numpyro.factor("y", jnp.logaddexp(present, absent).sum())


@_enumerated_pattern(
    lambda rng: _call(rng.integers(0, 2, size=(3, 8)) * (np.arange(8) % 2)), _occupancy_marginal
)
def enumerated_occupancy(y):
    """Presence of a species at each site, with imperfect detection."""
    psi = numpyro.sample("psi", dist.Beta(1.0, 1.0))
    p = numpyro.sample("p", dist.Beta(1.0, 1.0))
    with numpyro.plate("site", y.shape[1]):
        present = numpyro.sample(
            "present", dist.Bernoulli(probs=psi), infer={"enumerate": "parallel"}
        )
        detection = jnp.where(present == 1, p, 1e-30)
        with numpyro.plate("visit", y.shape[0]):
            numpyro.sample("y", dist.Bernoulli(probs=detection), obs=y)


def _annotators_prior(num_annotators):
    prevalence = numpyro.sample("prevalence", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("annotator", num_annotators, dim=-1):
        confusion = numpyro.sample("confusion", dist.Dirichlet(1.0 + 4.0 * jnp.eye(3)).to_event(1))
    return prevalence, confusion


def _annotators_marginal(label):
    prevalence, confusion = _annotators_prior(label.shape[1])
    annotator = jnp.arange(label.shape[1])
    by_class = jnp.log(confusion)[annotator, :, label].sum(axis=1)
    numpyro.factor("label", jax.nn.logsumexp(by_class + jnp.log(prevalence), axis=-1).sum())


@_enumerated_pattern(lambda rng: _call(rng.integers(0, 3, size=(7, 4))), _annotators_marginal)
def enumerated_annotators(label):
    """Dawid and Skene: the true class of each item, crossed with annotators."""
    prevalence, confusion = _annotators_prior(label.shape[1])
    annotator = jnp.arange(label.shape[1])
    with numpyro.plate("item", label.shape[0], dim=-2):
        z = numpyro.sample("z", dist.Categorical(probs=prevalence), infer={"enumerate": "parallel"})
        with numpyro.plate("rater", label.shape[1], dim=-1):
            numpyro.sample("label", dist.Categorical(probs=confusion[annotator, z]), obs=label)


def _hmm_prior():
    transition = numpyro.sample("transition", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    return transition, mu


def _forward(log_transition, log_emission):
    """Log likelihood of a chain that leaves state 0 before its first emission."""

    def step(log_alpha, log_emission_t):
        predicted = jax.nn.logsumexp(log_alpha[:, None] + log_transition, axis=0)
        return predicted + log_emission_t, None

    first = log_transition[0] + log_emission[0]
    log_alpha, _ = lax.scan(step, first, log_emission[1:])
    return jax.nn.logsumexp(log_alpha)


def _hmm_marginal(y):
    transition, mu = _hmm_prior()
    log_emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
    numpyro.factor("y", _forward(jnp.log(transition), log_emission))


@_enumerated_pattern(lambda rng: _call(rng.normal(0.0, 2.0, size=15)), _hmm_marginal)
def enumerated_hmm(y):
    """A hidden Markov model in NumPyro's scan."""
    transition, mu = _hmm_prior()

    def step(z, y_t):
        z = numpyro.sample(
            "z", dist.Categorical(probs=transition[z]), infer={"enumerate": "parallel"}
        )
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y_t)
        return z, None

    scan(step, 0, y)


def _hmm_panel_marginal(y):
    transition, mu = _hmm_prior()
    log_emission = dist.Normal(mu, 1.0).log_prob(y[..., None])
    forward = jax.vmap(_forward, in_axes=(None, 1))
    numpyro.factor("y", forward(jnp.log(transition), log_emission).sum())


@_enumerated_pattern(lambda rng: _call(rng.normal(0.0, 2.0, size=(9, 4))), _hmm_panel_marginal)
def enumerated_hmm_panel(y):
    """A plate of hidden Markov chains in NumPyro's scan."""
    transition, mu = _hmm_prior()

    def step(z, y_t):
        with numpyro.plate("series", y.shape[1], dim=-1):
            z = numpyro.sample(
                "z", dist.Categorical(probs=transition[z]), infer={"enumerate": "parallel"}
            )
            numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y_t)
        return z, None

    scan(step, jnp.zeros(y.shape[1], int), y)


PATTERNS = tuple(_patterns)
ENUMERATED = tuple(_enumerated)
