"""A DLRM's dense half in float64, with a bound of what float32 may be off by.

A sum of n products, in any order, is off by less than 4 sqrt(n) units of the sum of magnitudes, but for a
few cases in a thousand (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); in practice by far less. Errors that
terms bring with them add up as their squares do; twice that, for those that have a cause in common.
"""

import torch
from torch import nn

from mprec import reference
from mprec.names import MODES
from mprec.nn import LowRankEmbeddingBagCollection

UNIT = 2.0**-24  # float32's unit roundoff


class Bounded:
    """Numbers in float64 and how far a float32 computation may be from each."""

    def __init__(self, value, error=None):
        self.value = value.double()
        self.error = torch.zeros_like(self.value) if error is None else error


def _sum(terms: int, magnitude: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The error of a sum: of its terms' magnitudes and of the squares of their own errors."""
    return 2 * squares.sqrt() + 4 * (terms + 2) ** 0.5 * UNIT * magnitude


def linear(x: Bounded, layer: nn.Linear, precision: str = "float32") -> Bounded:
    """In bfloat16 each weight and each input is off by up to half of 2**-7 of itself, evenly: six standard
    deviations of that. In int8 by up to half a step, a 127th of an output's largest weight and of the range
    of a sample's inputs and 0."""
    weight = layer.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach().double()
    magnitude = x.value.abs() @ weight.abs().T + bias.abs()
    squares = x.error.square() @ weight.square().T
    if precision == "bfloat16" and layer.out_features > 1:
        squares = squares + 9 * 2 * 2.0**-14 / 12 * (x.value.square() @ weight.square().T)
    if precision == "int8" and layer.out_features > 1 and layer.in_features >= 32:
        step = weight.abs().amax(1) / 127
        high, low = (x.value + x.error).amax(1).clamp(min=0), (x.value - x.error).amin(1).clamp(max=0)
        own = ((high - low) / 127).square()[:, None] * weight.square().sum(1)
        squares = squares + 9 / 12 * (own + x.value.square().sum(1)[:, None] * step.square())
    return Bounded(x.value @ weight.T + bias, _sum(layer.in_features, magnitude, squares))


def mlp(x: Bounded, layers: nn.Sequential, precision: str = "float32") -> Bounded:
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            x = Bounded(x.value.relu(), x.error)
        elif isinstance(layer, nn.Sigmoid):
            x = sigmoid(x)
        else:
            x = linear(x, layer, precision)
    return x


def sigmoid(x: Bounded) -> Bounded:
    """Its slope is at most 1/4; the function itself is good to a few units."""
    return Bounded(x.value.sigmoid(), x.error / 4 + 8 * UNIT)


def scores(model, dense, embedded, embedded_error=0.0, precision="float32") -> Bounded:
    """Click probabilities of ``model`` from its collection's output [B, P * D]."""
    dim = model.embedding_dim
    parts = embedded.double().unflatten(1, (-1, dim))
    parts = Bounded(parts, torch.full_like(parts, embedded_error))
    if model._mixing is not None:
        mixing = model._mixing.double()
        magnitude = torch.einsum("vp,bpd->bvd", mixing.abs(), parts.value.abs())
        error = torch.einsum("vp,bpd->bvd", mixing.abs(), parts.error) + 4 * UNIT * magnitude
        parts = Bounded(torch.einsum("vp,bpd->bvd", mixing, parts.value), error)
    if model.bottom is None:
        first = Bounded(model.constant.detach().expand(len(embedded), -1))
    else:
        first = mlp(Bounded(dense), model.bottom, precision)
    vectors = torch.cat([first.value[:, None], parts.value], dim=1)
    errors = torch.cat([first.error[:, None], parts.error], dim=1)
    if model.interaction == "cat":
        out = sigmoid(mlp(Bounded(vectors.flatten(1), errors.flatten(1)), model.top, precision))
        return Bounded(out.value[:, 0], out.error[:, 0])
    rows, columns = torch.tril_indices(vectors.shape[1], vectors.shape[1], offset=-1)
    a, b, ea, eb = vectors[:, rows], vectors[:, columns], errors[:, rows], errors[:, columns]
    squares = ((a * eb).square() + (b * ea).square()).sum(2)
    error = _sum(dim, (a * b).abs().sum(2), squares)
    products = Bounded((a * b).sum(2), error)
    x = Bounded(torch.cat([first.value, products.value], 1), torch.cat([first.error, products.error], 1))
    out = sigmoid(mlp(x, model.top, precision))
    return Bounded(out.value[:, 0], out.error[:, 0])


def vectors(part: str, module, ids: torch.Tensor) -> torch.Tensor:
    """Of each ID, by what the module of one part holds: rows, a decoder, a projection; hot rows over them."""
    if part == "tables":
        rows = module.weight if hasattr(module, "weight") else module.dequantize()
        return rows.detach().double()[ids]
    if part == "low_rank":
        return vectors("tables", module.rows, ids) @ module.projection.weight.detach().double().T
    if part == "dhe":
        c = module.config
        stack = [[w.detach() for w in weights] for weights in module.stack()[1:]]
        return reference.dhe(ids, module.coefficients, *stack, c.family, c.activation, c.last_activation)
    out = vectors(part.removeprefix("hot_"), module.rest, ids)
    for row, own in enumerate(module.ids.tolist()):
        out[ids == own] = vectors("tables", module.hot, torch.tensor([row]))
    return out


def embedded(collection, indices, offsets) -> torch.Tensor:
    """A collection's output [B, P * D], from its weights alone."""
    samples, out = (len(offsets) - 1) // len(collection.features), []
    for i, feature in enumerate(collection.features):
        own = offsets[i * samples : (i + 1) * samples + 1].long()
        ids = indices[own[0] : own[-1]].long()
        for part in feature.parts:
            rows = vectors(part.container, collection._members(part)[feature.name], ids)
            out.append(reference.pool(rows, own - own[0], MODES[feature.mode], include_last_offset=True))
    return torch.cat(out, dim=1)


def check_weights(model, got, dense, indices, offsets, precision="float32") -> None:
    """As :func:`check`, with vectors in float64 as well: each is the sum of some products of the order of the
    largest, so that float32 is off by some units of that."""
    want = embedded(model.embeddings, indices, offsets)
    largest = float(want.abs().max()) if want.numel() else 0.0
    _hold(scores(model, dense, want, 64 * UNIT * largest, precision), got, dense)


def check(model, got, dense, indices, offsets, precision="float32") -> None:
    """Holds scores against float64, within the bound. Decoders and projections add in another order for other
    numbers of IDs, so that vectors may differ by some units."""
    with torch.no_grad():
        embedded = model.embeddings(indices, offsets)
    rows_alone = type(model.embeddings) is not LowRankEmbeddingBagCollection and all(
        f.representation == "table" for f in model.embeddings.features
    )
    largest = 0.0 if rows_alone or not embedded.numel() else float(embedded.abs().max())
    _hold(scores(model, dense, embedded, 32 * UNIT * largest, precision), got, dense)


def _hold(want: Bounded, got: torch.Tensor, dense: torch.Tensor) -> None:
    assert got.shape == (len(dense),)
    assert got.dtype == torch.float32
    over = (got.double() - want.value).abs() / want.error
    assert not len(got) or float(over.max()) <= 1, f"{float(over.max())} times the bound"
