"""The distributions of a real-valued or quantised sample: log-probabilities, and samples by inversion.

    bernoulli    parameters (..., 1): the logit of 1 against 0
    categorical  parameters (..., classes): logits
    logistic     parameters (..., 3M): [logits | means | log scales] of M logistics, discretised to `levels` values
    gaussian     parameters (..., 3M) likewise, or (..., 2) for one component: [mean | log scale], a density

Values of the mixtures lie in [-1, 1]. Source of the discretised logistic: Salimans et al., "PixelCNN++" (2017).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("categorical", "logistic", "gaussian")


def output_channels(kind: str, classes: int, mixtures: int) -> int:
    """How many parameters one sample's distribution has."""
    if kind == "categorical":
        return classes
    return 2 if kind == "gaussian" and mixtures == 1 else 3 * mixtures


def _split(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., 3M) or (..., 2) -> log weights, means, log scales, each (..., M)."""
    if parameters.shape[-1] == 2:
        mean, log_scale = parameters.split(1, -1)
        return torch.zeros_like(mean), mean, log_scale
    logits, means, log_scales = parameters.chunk(3, -1)
    return F.log_softmax(logits, -1), means, log_scales


def log_prob(kind: str, parameters: Tensor, x: Tensor, *, levels: int = 256, log_scale_min: float = -7.0) -> Tensor:
    """Log-probability of x (...) in nats under parameters (..., O); a log-density for "gaussian"."""
    if kind == "bernoulli":
        return -F.binary_cross_entropy_with_logits(parameters[..., 0], x.to(parameters.dtype), reduction="none")
    if kind == "categorical":
        return -F.cross_entropy(parameters.movedim(-1, 1), x, reduction="none")
    dtype = torch.promote_types(parameters.dtype, torch.float32)
    log_weights, means, log_scales = _split(parameters.to(dtype))
    log_scales = log_scales.clamp(min=log_scale_min)
    x = x.to(dtype)[..., None]
    if kind == "gaussian":
        normed = (x - means) * torch.exp(-log_scales)
        log_p = -0.5 * normed**2 - log_scales - 0.5 * math.log(2 * math.pi)
        return torch.logsumexp(log_weights + log_p, -1)
    inverse = torch.exp(-log_scales)
    half = 1.0 / (levels - 1)
    upper = inverse * (x - means + half)
    lower = inverse * (x - means - half)
    # log(sigmoid(upper) - sigmoid(lower)), stable in both tails; the outermost bins reach to infinity
    log_inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-2 * half * inverse))
    log_p = torch.where(x < -1 + half, F.logsigmoid(upper), torch.where(x > 1 - half, F.logsigmoid(-lower), log_inside))
    return torch.logsumexp(log_weights + log_p, -1)


def categorical_from_uniform(logits: Tensor, u: Tensor) -> Tensor:
    """The number of classes whose cumulative probability is <= u: logits (..., classes), u (...) -> int64 (...)."""
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    # of the last sum, which may round to less than 1: a class of probability 0 is not drawn
    threshold = u[..., None] * cumulative[..., -1:]
    return (cumulative <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)


def most_probable(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (..., classes) with -inf for what is not drawn: of the `top_k` most probable classes the fewest whose
    probabilities reach `top_p` of theirs are kept, and whatever is as probable as the last of them."""
    top_k, top_p = truncation(top_k, top_p, logits.shape[-1])
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -math.inf)
    if top_p < 1:
        ranked = logits.sort(-1, descending=True).values
        p = torch.softmax(ranked, -1)
        least = ranked.masked_fill(p.cumsum(-1) - p >= top_p, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def truncation(top_k: int | None, top_p: float | None, classes: int) -> tuple[int, float]:
    """What the kernels are told of `most_probable`: 0 classes and a sum of 1 are all."""
    least = torch.finfo(torch.float32).tiny  # or it would become 0
    return 0 if top_k is None or top_k >= classes else top_k, 1.0 if top_p is None else max(top_p, least)


def sample(
    kind: str, parameters: Tensor, uniforms: Tensor, temperature: float = 1.0, log_scale_min: float = -7.0,
    *, top_k: int | None = None, top_p: float | None = None,
) -> Tensor:  # fmt: skip
    """Samples by inversion: parameters (..., O), uniforms (...) or, for mixtures, (..., 2).

    A mixture's value is not rounded to the levels of the discretised logistic; it is clamped to [-1, 1].
    `top_k` and `top_p`, of "categorical": see `most_probable`.
    """
    if kind == "categorical":
        return categorical_from_uniform(most_probable(parameters / temperature, top_k, top_p), uniforms)
    logits, means, log_scales = _split(parameters)
    index = categorical_from_uniform(logits / temperature, uniforms[..., 0])[..., None]
    mean = means.gather(-1, index)[..., 0].double()
    scale = temperature * log_scales.gather(-1, index)[..., 0].double().clamp(min=log_scale_min).exp()
    p = uniforms[..., 1].double().clamp(1e-7, 1 - 1e-7)
    unit = torch.special.ndtri(p) if kind == "gaussian" else torch.log(p) - torch.log1p(-p)
    return (mean + scale * unit).clamp(-1.0, 1.0).to(parameters.dtype)


def sample_levels(
    kind: str, parameters: Tensor, uniforms: Tensor, levels: int, temperature: float = 1.0, log_scale_min: float = -7.0,
    *, top_k: int | None = None, top_p: float | None = None,
) -> Tensor:  # fmt: skip
    """The number of levels whose cumulative probability is <= u: parameters (..., O), uniforms (...) -> int64 (...).

    "bernoulli" has one parameter, the logit of level 1; "logistic" is the discretised mixture that `log_prob` gives.
    `top_k` and `top_p`, of "categorical": see `most_probable`.
    """
    if kind == "bernoulli":
        parameters, kind = F.pad(parameters, (1, 0)), "categorical"
    if kind == "categorical":
        return categorical_from_uniform(most_probable(parameters / temperature, top_k, top_p), uniforms)
    logits, means, log_scales = (p.double()[..., None, :] for p in parameters.chunk(3, -1))  # (..., 1, M)
    edges = (2 * torch.arange(levels - 1, dtype=torch.float64, device=parameters.device) + 1) / (levels - 1) - 1
    scale = temperature * log_scales.clamp(min=log_scale_min).exp()
    below = torch.sigmoid((edges[:, None] - means) / scale)  # (..., levels - 1, M)
    cumulative = (torch.softmax(logits / temperature, -1) * below).sum(-1)
    return (cumulative <= uniforms[..., None]).sum(-1)
