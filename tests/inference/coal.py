"""The coal-mining disasters: a model of their rate, and the exact posterior of its number of steps.

Data: dates of 191 explosions in British coal mines that killed ten men or more, 1851 to 1962.
Jarrett (1979), Biometrika 66, after Maguire, Pearson and Wynn (1952); as in the data set ``coal``
of R's package boot. Model: Green (1995), Biometrika 82, section 4.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import gammaln

from ppl_toolkit.inference import masked_plate

DAYS = 40907.0
MOST = 30  # change points

# Thousandths of the year, by year.
_FRACTIONS = """
1851:203 632 969 975|1852:314 347 358 385 977|1853:196 229 319 500|1854:135|1856:396 506 539 618
1857:138 404 582|1858:091 154 406 945|1860:125 169 591 851 919 971|1861:185 738 836
1862:138 893 937|1863:178 794 939 986|1865:459 971|1866:064 340 452 833 948 951
1867:635 854 862|1868:749 903 988|1869:251 442 554 809 875|1870:124 515 559 633
1871:027 151 167 736 816|1872:123 240 769|1873:136|1874:285 546 888 981|1875:329 925 931 931
1876:966|1877:064 105 190 779 809|1878:184 195 236 433 696|1879:036 172 501
1880:057 539 689 944|1881:105 968|1882:129 296 299 335 852|1883:797 851|1884:073 856
1885:168 464 979|1886:617 693 754 921|1887:134 405|1888:298|1889:051 198 793|1890:102 190
1891:252 665|1892:654|1893:508|1894:477|1895:318|1896:070 284 331|1899:630|1901:393|1902:671
1905:056 188 524|1906:773|1908:136 270 629|1909:127 825|1910:357 970|1912:520|1913:784|1914:409
1916:615|1918:031|1922:529 677|1923:569|1927:162|1928:114|1930:154 748|1931:077 830 884
1932:065 864 875|1933:883|1934:723|1935:643 695|1936:596|1937:500|1938:354|1939:821|1940:218 424
1941:420 522 574|1942:001 129 483|1946:945|1947:025 619 638 687|1951:405|1957:883|1960:489
1962:220
"""
BY_YEAR = """
4 5 4 1 0 4 3 4 0 6 3 3 4 0 2 6 3 3 5 4 5 3 1 4 4 1 5 5 3 4 2 5 2 2 3 4 2 1 3 2 2 1 1 1 1 3 0 0 1
0 1 1 0 0 3 1 0 3 2 2 0 1 1 1 0 1 0 1 0 0 0 2 1 0 0 0 1 1 0 2 3 3 1 1 2 1 1 1 1 2 3 3 0 0 0 1 4 0
0 0 1 0 0 0 0 0 1 0 0 1 0 1
"""


def dates():
    """The 191 dates, in years."""
    years = [entry.split(":") for entry in _FRACTIONS.replace("\n", "|").strip("|").split("|")]
    return np.array([int(y) + int(f) / 1000 for y, fs in years for f in fs.split()])


def days():
    """Days since the beginning of 1851."""
    return np.sort((dates() - 1851) * 365.2425)


# p(k | y), k = 1, ..., 12, by quadrature (see `posterior_of_steps`).
EXACT = {
    "year": [0.056683, 0.245359, 0.290212, 0.229086, 0.115687, 0.044102, 0.013889, 0.003796,
             0.000928, 0.000206, 0.000042, 0.000008],
    "first event": [0.05080, 0.24519, 0.29205, 0.23152, 0.11685, 0.04452, 0.01403, 0.00384,
                    0.00094],
}  # fmt: skip
LOG_EVIDENCE = [-1218.7672, -1188.7097, -1187.6499, -1187.4820, -1187.4308, -1187.6032]  # k = 0..5


def change_points(events, span=DAYS, most=MOST, order="at"):
    """A Poisson process whose rate is a step function with k steps.

    k ~ Poisson(3), at most ``most``; the steps are at the even ones of 2 k + 1 ordered uniforms;
    rates per day ~ Gamma(1, 200).
    """
    sizes = jnp.arange(most + 1.0)
    k = numpyro.sample("k", dist.Categorical(logits=sizes * jnp.log(3.0) - gammaln(sizes + 1)))
    first = numpyro.sample("first_rate", dist.Gamma(1.0, 200.0))
    with masked_plate("step", most, k, order=order):
        at = numpyro.sample("at", dist.Uniform(0.0, span))
        rate = numpyro.sample("rate", dist.Gamma(1.0, 200.0))
    if order is None:
        rank = jnp.argsort(jnp.where(jnp.arange(most) < k, at, span))
        at, rate = at[rank], rate[rank]
    there = jnp.arange(most + 1) <= k
    edges = jnp.concatenate([jnp.zeros(1), jnp.where(there[1:], at, span), jnp.full(1, span)])
    length = jnp.where(there, jnp.diff(edges), 1.0)
    height = jnp.where(there, jnp.concatenate([first[None], rate]), 1.0)
    even = gammaln(2 * k + 2.0) - gammaln(k + 1.0) - (k + 1) * jnp.log(span)
    numpyro.factor("even", even + jnp.sum(jnp.log(length)))
    count = jnp.diff(jnp.searchsorted(events, edges, method="scan_unrolled"))
    each = count * jnp.log(height) - height * length
    numpyro.factor("events", jnp.sum(jnp.where(there, each, 0.0)))


def posterior_of_steps(events, span=DAYS, most=12, q=5, panel=120.0):
    """Log p(y | k) for k = 0, ..., most, and p(k | y), exactly up to quadrature.

    The rates are integrated out of every segment: f(a, b) = (b - a) 200 Gamma(1 + m) /
    (200 + b - a)^(1 + m) with m events in (a, b]. With F_0(b) = f(0, b) and
    F_{k+1}(b) = int_0^b F_k(a) f(a, b) da, p(y | k) = (2 k + 1)! / L^(2 k + 1) F_k(L). F and f are
    smooth between events: Gauss-Legendre nodes on panels cut there, and inside a panel the
    integral of the interpolating polynomial.
    """
    from scipy.special import gammaln as log_gamma
    from scipy.special import logsumexp

    cuts = np.unique(np.concatenate([[0.0, span], events[(events > 0) & (events < span)]]))
    edges = [cuts[:1]]
    for a, b in itertools.pairwise(cuts):
        pieces = max(1, int(np.ceil((b - a) / panel)))
        edges.append(np.linspace(a, b, pieces + 1)[1:])
    edges = np.concatenate(edges)
    width = np.diff(edges)
    x, w = np.polynomial.legendre.leggauss(q)
    nodes = (edges[:-1, None] + 0.5 * (x + 1) * width[:, None]).ravel()
    # inner[i, j]: the integral of the j-th Lagrange polynomial from -1 to node i
    lagrange = np.linalg.inv(np.vander(x, q, increasing=True))
    powers = np.arange(1, q + 1)
    inner = ((x[:, None] ** powers - (-1.0) ** powers) / powers) @ lagrange
    size = len(nodes)
    weights = np.zeros((size + 1, size))  # of node a in the integral up to node b, or up to L
    of_panel = np.repeat(np.arange(len(width)), q)
    full = np.tile(w, len(width)) * 0.5 * width[of_panel]
    weights[:size] = np.where(of_panel[None, :] < of_panel[:, None], full, 0.0)
    for p, h in enumerate(width):
        here = slice(p * q, (p + 1) * q)
        weights[here, here] = 0.5 * h * inner
    weights[size] = full
    ends = np.append(nodes, span)
    seen = np.searchsorted(events, np.concatenate([[0.0], ends]), side="right")
    seen[0] = np.searchsorted(events, 0.0, side="left")

    def log_f(a, b, m):
        gap = np.maximum(b - a, 1e-300)
        return np.log(gap) + np.log(200.0) + log_gamma(1.0 + m) - (1.0 + m) * np.log(200.0 + gap)

    m = seen[1:, None] - seen[None, 1:-1]
    kernel = np.where(ends[:, None] > nodes, log_f(nodes, ends[:, None], np.maximum(m, 0)), -np.inf)
    # inside a panel f(a, b) is used at a > b as well: the polynomial through all its nodes
    same = of_panel[:, None] == of_panel[None, :]
    gap = ends[:size, None] - nodes[None, :]
    near = np.where(same, weights[:size] * gap * 200.0 / (200.0 + gap), 0.0)  # m = 0 inside
    log_far = np.full_like(weights, -np.inf)
    np.log(weights, where=weights > 0, out=log_far)
    log_far[:size][same] = -np.inf
    log_f_k = log_f(0.0, ends, seen[1:] - seen[0])
    log_evidence = [log_f_k[-1] - np.log(span)]
    for k in range(1, most + 1):
        far = logsumexp(log_far + kernel + log_f_k[None, :-1], axis=1)
        scale = np.repeat(log_f_k[:-1].reshape(-1, q).max(axis=1), q)
        sums = (near * np.exp(np.where(same, log_f_k[:-1] - scale[:, None], 0.0))).sum(axis=1)
        log_f_k = far
        log_f_k[:-1] = np.logaddexp(far[:-1], np.log(np.maximum(sums, 1e-300)) + scale)
        log_evidence.append(log_gamma(2 * k + 2) - (2 * k + 1) * np.log(span) + log_f_k[-1])
    log_evidence = np.array(log_evidence)
    k = np.arange(most + 1)
    log_p = log_evidence + k * np.log(3.0) - log_gamma(k + 1)
    return log_evidence, np.exp(log_p - logsumexp(log_p))
