import gc
import pickle

import pytest
import torch

import mprec.nn
from mprec import huge_pages

needs_huge_pages = pytest.mark.skipif(
    not huge_pages.supported(), reason="this system gives no huge pages to memory that asks for them"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_empty_is_an_ordinary_tensor(dtype):
    x = huge_pages.empty(1000, 33, dtype=dtype)
    assert x.shape == (1000, 33)
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert x.data_ptr() % huge_pages.PAGE == 0
    assert not x.any()
    x.copy_(torch.randint(0, 100, x.shape))
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    row = x[7]
    expected = row.clone()
    del x
    gc.collect()
    assert torch.equal(row, expected)  # a view keeps the memory


def test_empty_sizes():
    assert huge_pages.empty(0, 5).shape == (0, 5)
    assert huge_pages.empty().shape == ()
    with pytest.raises(ValueError, match="size: expected sizes >= 0, got \\(3, -1\\)"):
        huge_pages.empty(3, -1)


@needs_huge_pages
def test_huge_pages_are_there():
    x = huge_pages.empty(20 << 20, dtype=torch.uint8)
    x.fill_(1)
    assert huge_pages.resident(x) > 15 << 20  # the kernel may lack a few


def test_resident_counts_nothing_of_small_tensors():
    assert huge_pages.resident(torch.ones(100)) <= 400


def test_memory_is_returned():
    def mapped():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * 4096

    before = mapped()
    for _ in range(20):
        huge_pages.empty(50 << 20, dtype=torch.uint8)
        gc.collect()
    assert mapped() < before + (200 << 20)


@needs_huge_pages
def test_large_tables_have_them():
    torch.manual_seed(3)
    bag = mprec.nn.EmbeddingBag(300_000, 16, padding_idx=5)
    torch.manual_seed(3)
    plain = mprec.nn.EmbeddingBag(300_000, 16, padding_idx=5, huge_pages=False)
    assert torch.equal(bag.weight, plain.weight)  # initialised alike, padding included
    assert huge_pages.resident(bag.weight) > 12 << 20
    assert "huge_pages=" in repr(bag)
    ids, offsets = torch.randint(0, 300_000, (64,)), torch.arange(0, 64, 4)
    assert torch.equal(bag(ids, offsets), plain(ids, offsets))
    bag.load_state_dict(plain.state_dict())
    assert huge_pages.resident(bag.weight) > 12 << 20
    bag(ids, offsets).sum().backward()
    assert bag.weight.grad.shape == bag.weight.shape


def test_small_or_given_or_elsewhere_tables_are_torchs():
    assert "huge_pages" not in repr(mprec.nn.EmbeddingBag(10, 4))
    given = torch.randn(4, 3)
    assert mprec.nn.EmbeddingBag(4, 3, _weight=given).weight.data_ptr() == given.data_ptr()
    assert mprec.nn.EmbeddingBag.from_pretrained(given).weight.data_ptr() == given.data_ptr()
    with torch.device("meta"):
        assert mprec.nn.EmbeddingBag(1 << 20, 64).weight.is_meta
    assert mprec.nn.EmbeddingBag(1 << 20, 64, device="meta").weight.is_meta
    half = mprec.nn.EmbeddingBag(100, 8, dtype=torch.float16, huge_pages=True)
    assert half.weight.dtype == torch.float16
    assert half.weight.data_ptr() % huge_pages.PAGE == 0


@pytest.mark.parametrize("kind", [mprec.nn.EmbeddingBag, mprec.nn.Embedding])
def test_a_table_beyond_all_memory_is_torchs_error(kind):
    with pytest.raises(RuntimeError):
        kind(2**40, 2**20)
