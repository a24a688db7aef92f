"""Optimizers on float16 and bfloat16 tables: states and steps in float32, rows rounded once."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import mprec.nn
from mprec import ops, optim
from mprec.bags import Bags
from mprec.testing import isa, runnable_isas

ISAS = runnable_isas()
DTYPES = [torch.float16, torch.bfloat16]
MAKERS = {
    "sgd": lambda p, **o: optim.SGD(p, lr=0.1, **o),
    "adagrad": lambda p, **o: optim.Adagrad(p, lr=0.1, lr_decay=0.01, **o),
    "rowwise_adagrad": lambda p, **o: optim.RowWiseAdagrad(p, lr=0.1, **o),
    "adam": lambda p, **o: optim.Adam(p, lr=0.01, **o),
}
each = pytest.mark.parametrize("name", MAKERS)
in_both = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(torch.int16)


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of ``dtype`` next to float32 numbers, the one nearer to zero first; equal if exact."""
    nearest = x.abs().to(dtype)
    below = torch.where(nearest.double() > x.abs().double(), bits(nearest) - 1, bits(nearest))
    above = torch.where(below.view(dtype).double() < x.abs().double(), below + 1, below)
    return below.view(dtype).copysign(x.to(dtype)), above.view(dtype).copysign(x.to(dtype))


def update(optimizer, rows, grad) -> None:
    """One step of the optimizer's first table, whose rows are those of ``rows`` with gradients ``grad``."""
    weight = optimizer.param_groups[0]["params"][0]
    optimizer.apply_bags([weight], Bags(rows, torch.arange(len(rows) + 1)), grad)


def random_bags(generator, rows, count, longest):
    lengths = torch.randint(0, longest + 1, (count,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = (torch.rand(int(offsets[-1]), generator=generator).square() * rows).long()
    return ids, offsets


def train(weights, optimizer, steps, seed=0):
    """Backward passes over a few tables, by bags of one look-up."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        parts = [random_bags(generator, len(w), 13, 5) for w in weights]
        total, ends = 0, [torch.zeros(1, dtype=torch.int64)]
        for ids, offsets in parts:
            ends.append(offsets[1:] + total)
            total += len(ids)
        out = ops.embedding_bag_multi(weights, torch.cat([ids for ids, _ in parts]), torch.cat(ends))
        out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
        optimizer.step()
        optimizer.zero_grad()


def tables(dtype, dims=(16, 5), rows=40):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(rows, d, generator=generator).to(dtype)) for d in dims]


# ---------------------------------------------------------------------------------------------- to nearest


@in_both
def test_nearest_sgd_is_torchs_cast(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 33, generator=generator).mul(0.1).to(dtype)
    grad = torch.randn(500, 33, generator=generator).mul(1e-3)
    ours = torch.nn.Parameter(weight.clone())
    update(optim.SGD([ours], lr=0.5, rounding="nearest"), torch.arange(500), grad)
    assert torch.equal(bits(ours), bits((weight.float() - 0.5 * grad).to(dtype)))


@each
@in_both
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 60),
    dim=st.integers(1, 70),
    count=st.integers(0, 20),
    longest=st.integers(0, 6),
    isa_name=st.sampled_from(ISAS),
)
def test_rows_are_the_float32_update_rounded(
    name, dtype, weight_decay, seed, rows, dim, count, longest, isa_name
):
    """Against the float32 table with the same numbers: states equal to the bit, rows to their rounding."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, dim, generator=generator).to(dtype)
    ids, offsets = random_bags(generator, rows, count, longest)
    grad = torch.randn(count, dim, generator=generator)
    made = {}
    with isa(isa_name):
        for kind in ("exact", "nearest", "stochastic"):
            weight = torch.nn.Parameter(start.clone().float() if kind == "exact" else start.clone())
            rounding = "nearest" if kind == "exact" else kind
            optimizer = MAKERS[name]([weight], weight_decay=weight_decay, rounding=rounding, seed=seed)
            optimizer.apply_bags([weight], Bags(ids, offsets), grad)
            made[kind] = weight.detach(), optimizer.state[weight]
    exact, state = made["exact"]
    assert torch.equal(bits(made["nearest"][0]), bits(exact.to(dtype)))
    low, high = neighbours(exact, dtype)
    written = bits(made["stochastic"][0])
    assert ((written == bits(low)) | (written == bits(high))).all()
    for kind in ("nearest", "stochastic"):
        for key, value in made[kind][1].items():
            assert torch.equal(value.float(), state[key])
            assert value.dtype == (torch.int64 if key == "step" else torch.float32)


# -------------------------------------------------------------------------------------------- stochastically

#: Magnitudes, from where only the last place of float16 is left to above 1.
SCALES = [2**-26, 2**-24, 2**-22, 2**-15, 2**-14, 2**-13, 1e-2, 1.0, 3.0]


@in_both
@pytest.mark.parametrize("isa_name", ISAS)
def test_the_mean_is_the_float32_number(dtype, isa_name):
    rows, seeds = 256, 40
    generator = torch.Generator().manual_seed(1)
    targets = torch.cat([scale * (1 + torch.rand(6, generator=generator)) for scale in SCALES])
    targets = torch.cat([targets, -targets])
    low, high = neighbours(targets, dtype)
    ups = torch.zeros(len(targets), dtype=torch.float64)
    for seed in range(seeds):
        weight = torch.nn.Parameter(torch.zeros(rows, len(targets), dtype=dtype))
        with isa(isa_name):
            update(optim.SGD([weight], lr=1.0, seed=seed), torch.arange(rows), -targets.expand(rows, -1))
        is_up = bits(weight) == bits(high)
        assert (is_up | (bits(weight) == bits(low))).all()
        ups += is_up.double().sum(0)
    chance = (targets.double() - low.double()) / (high.double() - low.double())
    # Of float16 below 2^-14, to 2^-38: 2^-14 of a last place.
    bias = torch.where(targets.abs() < 2**-14, 2.0**-14, 0.0) if dtype is torch.float16 else 0.0
    bound = 5 * (chance * (1 - chance) / (rows * seeds)).sqrt() + bias
    assert ((ups / (rows * seeds) - chance).abs() <= bound).all()


@in_both
def test_noise_of_rows_columns_steps_and_tables_is_independent(dtype):
    """Halfway between two numbers, up or down is a fair coin; pairs of coins agree as often as not."""
    last = torch.finfo(dtype).eps
    weights = [torch.nn.Parameter(torch.ones(200, 64, dtype=dtype)) for _ in range(2)]
    optimizer = optim.SGD(weights, lr=1.0)
    coins = []
    for _ in range(6):
        for weight in weights:
            weight.data.fill_(1.0)
            update_of = Bags(torch.arange(200), torch.arange(201))
            optimizer.apply_bags([weight], update_of, torch.full((200, 64), -last / 2))
        coins.append(torch.stack([(w.detach() > 1) for w in weights]))
    coins = torch.stack(coins).double() * 2 - 1  # [step, table, row, column]
    assert coins.mean().abs() < 5 / coins.numel() ** 0.5
    for dim in range(4):
        count = coins.shape[dim]
        for apart in {1, 2, count // 2} & set(range(1, count)):
            pairs = coins.narrow(dim, 0, count - apart) * coins.narrow(dim, apart, count - apart)
            assert pairs.mean().abs() < 5 / pairs.numel() ** 0.5, (dim, apart)


@in_both
def test_updates_far_below_the_last_place_arrive_on_average(dtype):
    rows, dim, steps, step = 256, 16, 400, torch.finfo(dtype).eps / 64
    moved = {}
    for rounding in optim.base.ROUNDINGS:
        weight = torch.nn.Parameter(torch.ones(rows, dim, dtype=dtype))
        optimizer = optim.SGD([weight], lr=1.0, rounding=rounding)
        for _ in range(steps):
            update(optimizer, torch.arange(rows), torch.full((rows, dim), -step))
        moved[rounding] = weight.detach().double() - 1
    assert not moved["nearest"].any()
    error = moved["stochastic"].std() / (rows * dim) ** 0.5
    assert error > 0
    assert (moved["stochastic"].mean() - steps * step).abs() < 5 * error


@in_both
@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("rounding", optim.base.ROUNDINGS)
def test_ends_of_the_range(dtype, isa_name, rounding):
    info = torch.finfo(dtype)
    most, inf, nan = info.max, float("inf"), float("nan")
    small = info.smallest_normal
    start = torch.tensor([[most, -most, inf, -inf, nan, 0.0, -0.0, most, small, 1.0]]).to(dtype)
    grad = torch.zeros(1, 10)
    grad[0, :2] = torch.tensor([-0.5, 0.5]) * most  # far beyond
    grad[0, 9] = nan
    weight = torch.nn.Parameter(start.repeat(64, 1))
    with isa(isa_name):
        update(optim.SGD([weight], lr=1.0, rounding=rounding), torch.arange(64), grad.expand(64, -1))
    expected = torch.tensor([inf, -inf, inf, -inf, nan, 0.0, 0.0, most, small, nan])
    torch.testing.assert_close(
        weight.detach(), expected.to(dtype).expand(64, -1), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("isa_name", ISAS)
def test_past_the_last_float16_a_number_is_rounded_to_it_or_to_infinity(isa_name):
    beyond = 65504 + 24.0  # of 32 to what would be the next number
    for rounding, chance in (("stochastic", 0.75), ("nearest", 1.0)):
        weight = torch.nn.Parameter(torch.zeros(4000, 1, dtype=torch.float16))
        with isa(isa_name):
            update(
                optim.SGD([weight], lr=1.0, rounding=rounding),
                torch.arange(4000),
                torch.full((4000, 1), -beyond),
            )
        infinite = weight.isinf().double().mean()
        assert ((weight == 65504) | weight.isinf()).all()
        assert abs(float(infinite) - chance) <= 5 * (chance * (1 - chance) / 4000) ** 0.5


# ------------------------------------------------------------------------- the same whatever stands around it


@each
@in_both
def test_threads_change_no_bit(name, dtype):
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        weights = tables(dtype, dims=(16, 21), rows=900)
        optimizer = MAKERS[name](weights)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            ids = torch.randint(0, 900, (16_000,), generator=generator)
            out = ops.embedding_bag_multi(weights, ids, torch.arange(0, 16_001, 4))
            out.backward(torch.randn(out.shape, generator=generator).to(dtype))
        results.append([bits(w) for w in weights])
        assert optimizer.state[weights[0]]["step"] == 2
    assert all(map(torch.equal, *results))
    assert not torch.equal(results[0][0], bits(tables(dtype, dims=(16, 21), rows=900)[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 40])
def test_every_isa_rounds_by_the_same_noise(dtype, dim):
    results = []
    for name in ISAS:
        weight = torch.nn.Parameter(torch.ones(300, dim, dtype=dtype))
        generator = torch.Generator().manual_seed(0)
        with isa(name):
            update(
                optim.SGD([weight], lr=1.0),
                torch.arange(300),
                1e-3 * torch.randn(300, dim, generator=generator),
            )
        results.append(bits(weight))
    assert all(torch.equal(results[0], other) for other in results)


@each
@in_both
@pytest.mark.parametrize("in_backward", [True, False])
def test_a_resumed_training_equals_one_that_was_not_cut_off(name, dtype, in_backward):
    whole = tables(dtype)
    optimizer = MAKERS[name](whole, seed=7, in_backward=in_backward)
    train(whole, optimizer, 4)
    kept = io.BytesIO()
    torch.save((optimizer.state_dict(), [w.detach() for w in whole]), kept)
    train(whole, optimizer, 4, seed=1)
    kept.seek(0)
    state, weights = torch.load(kept)
    assert state["param_groups"][0]["seed"] == 7
    assert state["state"][0]["step"] == 4
    resumed = [torch.nn.Parameter(w) for w in weights]
    other = MAKERS[name](resumed, seed=1, rounding="nearest", in_backward=in_backward)  # the state's win
    other.load_state_dict(state)
    train(resumed, other, 4, seed=1)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(bits(a), bits(b))
        for key, value in optimizer.state[a].items():
            assert value.dtype == other.state[b][key].dtype
            assert torch.equal(value, other.state[b][key])
    again = tables(dtype)
    train(again, MAKERS[name](again, seed=8), 4)
    assert not torch.equal(bits(again[0]), bits(weights[0]))  # another seed, other noise


@in_both
def test_hooks_on_loading_are_heeded(dtype):
    weights = tables(dtype)
    optimizer = optim.RowWiseAdagrad(weights)
    train(weights, optimizer, 2)
    state = optimizer.state_dict()

    def twice(_, loaded):
        doubled = copy.deepcopy(loaded)
        doubled["state"][0]["sum"] *= 2
        return doubled

    optimizer.register_load_state_dict_pre_hook(twice)
    before = optimizer.state[weights[0]]["sum"].clone()
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[weights[0]]["sum"], 2 * before)
    assert optimizer.state[weights[0]]["sum"].dtype == torch.float32


@in_both
def test_states_of_float32_tables_and_of_earlier_versions_load(dtype):
    before = tables(torch.float32)
    earlier = optim.Adagrad(before)
    train(before, earlier, 3)
    state = earlier.state_dict()
    for group in state["param_groups"]:
        del group["rounding"], group["seed"]
    optimizer = optim.Adagrad(tables(dtype), seed=5)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["rounding"] == "stochastic"
    assert optimizer.param_groups[0]["seed"] == 5
    for key, values in enumerate(optimizer.state.values()):
        assert torch.equal(values["sum"], state["state"][key]["sum"])
        assert values["step"] == 3
        assert values["step"].dtype == torch.int64
    earlier.load_state_dict(state)
    assert earlier.param_groups[0]["seed"] == 0


@each
@in_both
def test_tables_in_one_call_or_one_by_one(name, dtype):
    together, alone = tables(dtype), tables(dtype)
    first, second = MAKERS[name](together), MAKERS[name](alone)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(0, 40, (20,), generator=generator)
        grad = torch.randn(10, 21, generator=generator).to(dtype)
        ops.embedding_bag_multi(together, ids, torch.arange(21)).backward(grad)
        parts = zip(alone, ids.split(10), grad.split((16, 5), 1), strict=True)
        for weight, own, g in parts:
            ops.embedding_bag(own, weight, torch.arange(10), mode="sum").backward(g)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(bits(a), bits(b))
    assert first.state_dict()["state"][0]["step"] == second.state_dict()["state"][0]["step"] == 3


@each
@in_both
def test_a_table_of_several_features_takes_one_step(name, dtype):
    """Of the sum of both gradients, which is taken in float32."""
    start = tables(dtype, (16,))[0].detach()
    weight, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    owners = [MAKERS[name]([w], rounding="nearest") for w in (weight, wide)]
    ids = torch.randint(0, 40, (60,), generator=torch.Generator().manual_seed(0))
    grad = torch.randn(15, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    for table in (weight, wide):
        out = ops.embedding_bag_multi([table, table], ids, torch.arange(0, 61, 2))
        out.backward(grad.to(table.dtype))
    assert torch.equal(bits(weight), bits(wide.to(dtype)))
    assert [owner.state_dict()["state"][0]["step"] for owner in owners] == [1, 1]


@each
@in_both
def test_steps_of_accumulated_gradients_are_those_of_the_gradients_sum(name, dtype):
    (weight,), (twin,) = tables(dtype, (16,)), tables(dtype, (16,))
    optimizer, other = MAKERS[name]([weight], in_backward=False), MAKERS[name]([twin])
    ids = torch.tensor([[1, 2], [2, 9]])
    for _ in range(2):
        for _ in range(2):
            ops.embedding_bag(ids, weight, mode="sum").sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert weight.grad is None
        ops.embedding_bag(ids, twin, mode="sum").backward(torch.full((2, 16), 2.0).to(dtype))
    assert other.state[twin]["step"] == 2
    met = torch.tensor([1, 2, 9])
    assert torch.equal(bits(weight)[met], bits(twin)[met])
    assert not torch.equal(bits(weight)[met], bits(tables(dtype, (16,))[0])[met])


def test_scaled_losses():
    (weight,), (twin,) = tables(torch.bfloat16, (16,)), tables(torch.bfloat16, (16,))
    ids = torch.tensor([[1, 2], [2, 9]])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = optim.RowWiseAdagrad([weight], in_backward=False)
    scaler.scale(ops.embedding_bag(ids, weight, mode="sum").square().sum()).backward()
    scaler.step(optimizer)
    plain = optim.RowWiseAdagrad([twin], in_backward=False)
    ops.embedding_bag(ids, twin, mode="sum").square().sum().backward()
    plain.step()
    assert torch.equal(bits(weight), bits(twin))
    (weight,) = tables(torch.float16, (16,))
    optimizer = optim.RowWiseAdagrad([weight], in_backward=False)
    scaler.scale(ops.embedding_bag(ids, weight, mode="sum").sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.step(optimizer)


@in_both
def test_modules_of_the_dtype_train(dtype):
    """A collection that is cast, its tables taken from it; the loss falls."""
    features = [mprec.nn.FeatureConfig(name, 50, 8) for name in "ab"]
    torch.manual_seed(0)
    collection = mprec.nn.EmbeddingBagCollection(features).to(dtype)
    owned, rest = optim.split_parameters(collection)
    assert not rest
    optimizer = optim.RowWiseAdagrad(owned, lr=0.1)
    ids, offsets = torch.randint(0, 50, (40,)), torch.arange(0, 41, 2)
    losses = []
    for _ in range(30):
        loss = (collection(ids, offsets).float() - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert {w.dtype for w in owned} == {dtype}
    assert {v["sum"].dtype for v in optimizer.state.values()} == {torch.float32}


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding: expected one of stochastic, nearest, got 'up'"),
        ({"seed": -1}, r"seed: expected an int in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, "seed: expected an int"),
        ({"seed": 1.5}, "seed: expected an int"),
        ({"seed": True}, "seed: expected an int"),
    ],
)
@each
def test_bad_options_are_named(name, options, message):
    (weight,) = tables(torch.bfloat16, (4,))
    with pytest.raises(ValueError, match=message):
        MAKERS[name]([weight], **options)
    optimizer = MAKERS[name]([weight])  # what failed owns nothing
    (other,) = tables(torch.bfloat16, (4,))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], **options})
    state = optimizer.state_dict()
    state["param_groups"][0] |= options
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["rounding"] == "stochastic"


@in_both
def test_gradients_of_another_type_are_refused(dtype):
    other = torch.bfloat16 if dtype is torch.float16 else torch.float16
    for table, of_grad in ((dtype, other), (torch.float32, dtype), (dtype, torch.float64)):
        weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=table))
        with pytest.raises(TypeError, match=r"grad: expected float32 or the type of weights\[0\]"):
            update(optim.SGD([weight]), torch.arange(3), torch.ones(3, 4, dtype=of_grad))
        assert not weight.any()


@in_both
def test_gradients_of_the_tables_type_are_read_as_they_are(dtype):
    for dim in (1, 8, 16, 19, 32, 64, 70):
        grad = torch.randn(30, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
        for make in MAKERS.values():
            results = []
            for passed in (grad, grad.float()):
                weight = torch.nn.Parameter(torch.ones(9, dim, dtype=dtype))
                update(make([weight]), torch.arange(30) % 9, passed)
                results.append(bits(weight))
            assert torch.equal(*results)


@in_both
def test_a_table_has_one_owner_and_a_device(dtype):
    (weight,) = tables(dtype, (4,))
    owner = optim.SGD([weight])
    with pytest.raises(ValueError, match="belongs to another optimizer of mprec"):
        optim.Adam([weight])
    assert owner.state[weight]["step"] == 0
    with FakeTensorMode():
        on_device = torch.nn.Parameter(torch.empty(3, 2, dtype=dtype, device="cuda"))
        for make in (optim.SGD, optim.RowWiseAdagrad):
            with pytest.raises(ValueError, match=r"of float32 on cuda, got .* on cuda"):
                make([on_device])
        moved = torch.nn.Parameter(torch.empty(3, 2, device="cuda"))
        optimizer = optim.SGD([moved])
        moved.data = moved.data.to(dtype)  # as a module's own cast
        with pytest.raises(ValueError, match="expected a float32 table on cuda"):
            update(optimizer, torch.arange(3), torch.ones(3, 2, dtype=dtype))
    with pytest.raises(ValueError, match=r"of float32, float16 or bfloat16 on cpu .*float64"):
        optim.SGD([torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))])
