"""Calls of the operators that ``libmprec_ops.so`` has, for test_torch_stable.py: the name and the arguments.

``add_`` in place of an operator: the tensor is changed, between two calls.
"""

import itertools

import torch

from mprec.hashing import coefficients
from mprec.names import ACTIVATIONS, FAMILIES
from mprec.row_formats import ROW_FORMATS

NAMES = "universal", "relu", "none"
#: The last ones of :func:`bad`, of which some are not bad.
OF_ANY_KIND = 300


def ids(rows, count, seed=0):
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(seed))


def offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def decoder(widths, family="universal", seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    weights = [(torch.randn(out, into, generator=g) / into**0.5).to(dtype) for into, out in pairs]
    biases = [torch.randn(out, generator=g).to(dtype) for _, out in pairs]
    return coefficients(widths[0], family, seed), weights, biases


def one_decoder(*widths, family="universal", activation="relu", last="sigmoid", **options):
    return *decoder(widths, family, **options), family, activation, last


def several(*stacks, options=NAMES):
    return (
        [hashes for hashes, _, _ in stacks],
        [weight for _, weights, _ in stacks for weight in weights],
        [bias for _, _, biases in stacks for bias in biases],
        [len(weights) for _, weights, _ in stacks],
        *options,
    )


TABLES = [torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), torch.arange(60.0).view(20, 3)]
IDS = torch.cat([ids(9, 5), ids(20, 4)])  # of two features of three bags each
ENDS = offsets(2, 0, 3, 1, 1, 2)
PSW = torch.linspace(-1, 1, 9)
STACKS = decoder([16, 5, 8]), decoder([8, 3], seed=1)
MLP = decoder([6, 33, 2], seed=2)[1:]


def good():
    """Calls that both have kernels for."""
    for dtype, mode in itertools.product([torch.float32, torch.float16, torch.bfloat16], range(3)):
        tables = [t.to(dtype) for t in TABLES]
        yield "embedding_bag", tables[0], ids(9, 7).int(), offsets(3, 0, 4).int(), mode, None, True
        yield "embedding_bag", tables[0], ids(9, 7), offsets(3, 0, 4)[:-1], mode, None, False, 3
        yield "embedding_bag_multi", tables, IDS, ENDS, mode
        if mode < 2:
            psw = torch.rand(7).to(dtype)
            yield "embedding_bag", tables[0], ids(9, 7), offsets(3, 0, 4), mode, psw, True, 0
            for weights in (PSW, PSW.to(dtype)):
                yield "embedding_bag_multi", tables, IDS, ENDS, mode, weights
    yield "embedding_bag_multi", [*TABLES, TABLES[1]], IDS, ENDS, 1, PSW, [0, 1, 1], 2
    yield "embedding_bag_multi", [TABLES[1]], IDS.int(), ENDS, 0, None, [1], 2
    yield "embedding_bag_multi", [torch.randn(9, 4).expand(9, 4)[::2]] * 2, IDS % 5, ENDS
    yield "embedding_bag_multi", TABLES, IDS.repeat_interleave(2)[::2], ENDS.repeat_interleave(2)[::2], 0, PSW
    yield "embedding_bag", TABLES[0], ids(9, 0), torch.tensor([0]), 0, None, True
    yield "embedding_bag", TABLES[0], ids(9, 0), torch.tensor([0, 0, 0]), 2
    rows = {name: f.encode(torch.randn(20, 8)) for name, f in ROW_FORMATS.items()}
    codes = [ROW_FORMATS[name].code for name in rows]
    batch = ids(20, 18), torch.arange(19)
    for mode in range(3):
        yield "quantized_embedding_bag_multi", list(rows.values()), codes, *batch, mode
    yield "quantized_embedding_bag_multi", list(rows.values()), codes, *batch, 1, torch.rand(18)
    yield "quantized_embedding_bag_multi", [rows["int4"]] * 3, [4] * 3, *batch, 0, None, [5, 0, 2], 6
    for family, activation in itertools.product(FAMILIES, ACTIVATIONS):
        stack = one_decoder(24, 12, 5, family=family, activation=activation, last=activation)
        yield "dhe_bag", ids(2**40, 7), offsets(3, 0, 4), *stack, 1, torch.rand(7), True
    for mode in range(3):
        yield "dhe_bag", ids(5, 40), offsets(3, 0, 37)[:-1], *one_decoder(16, 8), mode, None, False, 2
        yield "dhe_bag_multi", IDS, ENDS, *several(*STACKS), mode
    yield "dhe_bag_multi", IDS.int(), ENDS.int(), *several(*STACKS, STACKS[0]), 1, PSW, [1, 0, 1], 2
    for precision in ("float32", "float16", "bfloat16", "int8", "lut"):
        family = "sign" if precision == "lut" else "u7"
        stacks = decoder([64, 16, 4], family), decoder([32, 4], family)
        stacks = several(*stacks, options=(family, "relu", "none"))
        yield "packed_dhe_bag_multi", IDS, ENDS, *stacks, [precision, "float32"], 0
    transposed = [weight.t().contiguous().t() for weight in STACKS[0][1]]
    yield "dhe_bag", IDS, ENDS, STACKS[0][0], transposed, STACKS[0][2], *NAMES, 0, None, True
    for size in (0, 1, 3, 300):
        yield "mlp", torch.randn(size, 6), *MLP, "mish", "sigmoid"
        yield "dot_interaction", torch.randn(size, 5, 7)
        yield "dot_interaction", torch.randn(size, 5, 7), True
        yield "dot_interaction", torch.randn(size, 5, 7), False, torch.randn(size, 7)
    yield "mlp", torch.randn(4, 6), [torch.randn(1, 6)], [torch.randn(1)], "none", "none"
    yield "mlp", torch.randn(6, 4).t(), *MLP, "relu", "none"
    # Weights that change in place are seen at once. A decoder that is no longer kept is packed again.
    changed = decoder([16, 5, 8], seed=3)
    call = "dhe_bag", IDS, ENDS, *changed, *NAMES, 0, None, True
    for tensor in (changed[1][1], changed[2][0]):
        yield call
        yield "add_", tensor, 1
    yield call
    for seed in range(300):
        yield "dhe_bag", IDS, ENDS, *one_decoder(8, 2, seed=seed), 0, None, True
    yield call


def bad():
    """What both refuse in the same words."""
    one, many = (TABLES[0], IDS, ENDS), (TABLES, IDS, ENDS)
    for name, arguments in (("embedding_bag", one), ("embedding_bag_multi", many)):
        first, indices, ends = arguments
        falls, negative = torch.tensor([0, 3, 2, 3, 3, 3, 9]), torch.tensor([0, -1, 2, 3, 4, 5, 9])
        for wrong in (falls, negative, ENDS + 1, ENDS[:-1]):
            yield name, first, indices, wrong, 0, None, *((True,) if name == "embedding_bag" else ())
        for wrong in (indices - 20, indices + 20, indices * 0 - 1, indices.float(), indices.view(3, 3)):
            yield name, first, wrong, ends
        for wrong in (PSW[1:], PSW.double(), PSW.view(3, 3), PSW.half()):
            yield name, first, indices, ends, 0, wrong
        yield name, first, indices, ends, 3
        yield name, first, indices, ends, -1
        yield name, first, indices, ends, 2, PSW
        yield name, first, indices, ends[:0], 0, None, *((True,) if name == "embedding_bag" else ())
        yield name, first, indices, ends.double()
    yield "embedding_bag", TABLES[0][0], IDS, ENDS
    yield "embedding_bag", TABLES[0].long(), IDS, ENDS
    yield "embedding_bag_multi", [TABLES[0], TABLES[1].half()], IDS, ENDS
    yield "embedding_bag_multi", [TABLES[0], TABLES[1][0]], IDS, ENDS
    yield "embedding_bag_multi", [], IDS, ENDS
    for features, count in (([0], 2), ([0, 2], 2), ([0, -1], 2), ([0, 1], 0), (None, 3), (None, -1)):
        yield "embedding_bag_multi", TABLES, IDS, ENDS, 0, None, features, count
        yield "dhe_bag_multi", IDS, ENDS, *several(*STACKS), 0, None, features, count
    yield "embedding_bag_multi", TABLES, IDS + 20, ENDS, 0, None, [1, 1], 2
    yield "dhe_bag_multi", IDS - 20, ENDS, *several(*STACKS), 0, None, [1, 1], 2
    for rows, bits in (
        ([], []),
        ([TABLES[0]], [8, 8]),
        ([TABLES[0].byte(), TABLES[1]], [3, 0]),
        ([TABLES[0], TABLES[1].byte()], [0, 8]),
        ([TABLES[0], TABLES[1].long()], [0, 0]),
        ([TABLES[0], TABLES[1].double()], [0, 0]),
        ([TABLES[0][0], TABLES[1]], [0, 0]),
    ):
        yield "quantized_embedding_bag_multi", rows, bits, IDS, ENDS
    yield "quantized_embedding_bag_multi", TABLES, [0, 0], IDS + 20, ENDS
    yield "quantized_embedding_bag_multi", [t.half() for t in TABLES], [0, 0], IDS, ENDS, 0, PSW.half()
    hashes, weights, biases = decoder([8, 3, 2])
    for stack in (
        (hashes, weights, biases, "universe", "relu", "none"),
        (hashes, weights, biases, "universal", "elu", "none"),
        (hashes, weights, biases, "universal", "relu", "elu"),
        (hashes.long(), weights, biases, *NAMES),
        (hashes[:2], weights, biases, *NAMES),
        (hashes[:, :0], weights, biases, *NAMES),
        (hashes[0], weights, biases, *NAMES),
        (hashes - 2**30, weights, biases, *NAMES),
        (hashes, weights[:1], biases, *NAMES),
        (hashes, [], [], *NAMES),
        (hashes, [weights[0], weights[0]], biases, *NAMES),
        (hashes, weights, biases[::-1], *NAMES),
        (hashes, [weights[0], weights[1][0]], biases, *NAMES),
        (hashes, [weights[0], weights[1].half()], biases, *NAMES),
        (hashes, weights, [biases[0], biases[1].half()], *NAMES),
        (hashes, [weights[0].int(), weights[1]], biases, *NAMES),
    ):
        yield "dhe_bag", IDS, ENDS, *stack, 0, None, True
        lists, options = stack[1:3], stack[3:]
        both = [*weights, *lists[0]], [*biases, *lists[1]]
        yield "dhe_bag_multi", IDS, ENDS, [hashes, stack[0]], *both, [2, len(both[0]) - 2], *options
    for wrong in (ENDS + 1, ENDS[:-1], ENDS[:0]):
        yield "dhe_bag", IDS, wrong, hashes, weights, biases, *NAMES, 0, None, True
    for layers in ([], [2], [2, 1], [4, -1], [2**62, 2**62]):
        yield "dhe_bag_multi", IDS, ENDS, [hashes] * 2, weights * 2, biases * 2, layers, *NAMES
    for precision in ("half", "int8", "lut"):
        stacks = several(*STACKS, options=("artifact" if precision == "lut" else "sign", "relu", "none"))
        hashes_of = [coefficients(h.shape[1], stacks[4]) for h in stacks[0]]
        yield "packed_dhe_bag_multi", IDS, ENDS, hashes_of, *stacks[1:], [precision] * 2
    x = torch.randn(3, 6)
    for call in (
        (x[0], *MLP, "relu", "none"),
        (x.int(), *MLP, "relu", "none"),
        (x[:, :5], *MLP, "relu", "none"),
        (x, MLP[0], MLP[1][:1], "relu", "none"),
        (x, [], [], "relu", "none"),
        (x.double(), *MLP, "relu", "none"),
        (x, MLP[0], MLP[1][::-1], "relu", "none"),
        (x, *MLP, "gelu", "none"),
        (x, *MLP, "relu", "gelu"),
    ):
        yield "mlp", *call
    yield "dot_interaction", x
    yield "dot_interaction", x.int()[None]
    yield "dot_interaction", x[None], False, x[:1, 1:]
    # Offsets and IDs of any kind: an error or the same result, and never memory of others.
    g = torch.Generator().manual_seed(0)
    for _ in range(OF_ANY_KIND // 3):
        ends = torch.randint(-2, 13, (int(torch.randint(0, 9, (), generator=g)),), generator=g)
        if torch.rand((), generator=g) < 0.5:
            ends = ends.sort().values
        indices = torch.randint(-1, 12, (int(torch.randint(0, 12, (), generator=g)),), generator=g)
        yield "embedding_bag_multi", TABLES, indices, ends
        yield "dhe_bag_multi", indices, ends, *several(*STACKS)
        yield "embedding_bag", TABLES[0], indices, ends


def only_in_python():
    """What Python serves by plain torch, and what this library says to it."""
    yield r"weight: .*only float32, float16 and bfloat16", "embedding_bag", TABLES[0].double(), IDS, ENDS
    yield r"indices: .*only int64 and int32.*torch.int16", "embedding_bag", TABLES[0], IDS.short(), ENDS
    tables = [TABLES[0], TABLES[0].t()]
    yield r"weights\[1\]: expected rows of adjacent", "embedding_bag_multi", tables, IDS % 8, ENDS
    wide = one_decoder(8, 3, dtype=torch.float64)
    yield r"weights\[0\]: .*only float32.*torch.float64", "dhe_bag", IDS, ENDS, *wide, 0, None, True
    mlp = [[t.double() for t in tensors] for tensors in MLP]
    x = torch.randn(3, 6).double()
    yield r"weights\[0\]: .*only float32.*torch.float64", "mlp", x, *mlp, "relu", "none"
    yield r"vectors: .*only float32.*torch.float64", "dot_interaction", torch.randn(2, 3, 4).double()
    yield r"vectors: .*1 to 4096 vectors", "dot_interaction", torch.randn(2, 0, 4)
