"""Every row of every epoch exactly once, from arithmetic alone."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order, SourceOrder, permute


@given(st.integers(1, 5_000), st.binary(min_size=1, max_size=8))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_of_one_value_is_that_of_all():
    size = 12_345
    everything = permute(np.arange(size), size, b"key")
    for value in (0, 1, 777, size - 1):
        assert permute(np.array([value]), size, b"key")[0] == everything[value]


def test_permutations_look_random():
    # 400 keys of 100 values: every (value, image) is expected 4 times. The sum of squared errors
    # over the expectation has mean 9,801 and standard deviation 140; 6 of these are allowed.
    size, keys = 100, 400
    seen = np.zeros((size, size))
    neighbours = 0
    for key in range(keys):
        image = permute(np.arange(size), size, key.to_bytes(4, "big"))
        seen[np.arange(size), image] += 1
        neighbours += int((np.diff(image) == 1).sum())
    expected = keys / size
    assert abs(((seen - expected) ** 2 / expected).sum() - (size - 1) ** 2) < 6 * 140
    # successors stay neighbours once in a permutation on average; 6 deviations of sqrt(400)
    assert abs(neighbours - keys * (size - 1) / size) < 6 * 20


shards = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(shards, st.integers(0, 2**40), st.integers(1, 15), st.integers(0, 3))
def test_every_epoch_reads_every_row_once(shard_rows, seed, window_shards, epoch):
    order = SourceOrder("a", shard_rows, seed=seed, window_shards=window_shards)
    total = sum(shard_rows)
    epochs, shard, row = order.place(np.arange(epoch * total, (epoch + 1) * total))
    assert set(epochs.tolist()) == {epoch}
    expected = {(s, r) for s, rows in enumerate(shard_rows) for r in range(rows)}
    assert set(zip(shard.tolist(), row.tolist(), strict=True)) == expected


def test_rows_of_a_window_come_from_its_shards_alone():
    order = SourceOrder("a", [10] * 12, seed=1, window_shards=3)
    _, shard, _ = order.place(np.arange(120))
    windows = [set(shard[i : i + 30].tolist()) for i in range(0, 120, 30)]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert set.union(*windows) == set(range(12))


def test_epochs_seeds_and_sources_have_orders_of_their_own():
    def read(name="a", seed=1, epoch=0):
        order = SourceOrder(name, [50, 50], seed=seed, window_shards=2)
        _, shard, row = order.place(np.arange(epoch * 100, epoch * 100 + 100))
        return tuple((shard * 50 + row).tolist())

    orders = [read(), read(epoch=1), read(seed=2), read(name="b"), tuple(range(100))]
    assert len(set(orders)) == len(orders)
    assert read() == read()


@settings(deadline=None, max_examples=20)
@given(
    st.dictionaries(st.text("abc", min_size=1), shards, min_size=1, max_size=4),
    st.integers(0, 10**9),
    st.integers(1, 300),
    st.data(),
)
def test_an_address_depends_on_seed_and_row_alone(sources, first_row, rows, data):
    def order():
        return Order(sources, [i + 1 for i in range(len(sources))], seed=5, window_shards=2)

    together = np.stack(order().addresses(np.arange(first_row, first_row + rows)), axis=1)
    # asked one by one, in another order, of an object with another past
    for i in data.draw(st.permutations(range(rows)))[:10]:
        assert tuple(together[i]) == order().address(first_row + i)


def test_a_run_over_several_sources_reads_each_exactly_once_per_epoch():
    sources = {"a": [7, 7, 3], "b": [5], "c": [20, 1]}
    order = Order(sources, [0.5, 0.2, 0.3], seed=3, window_shards=2)
    found = order.addresses(np.arange(1000))
    for number, shard_rows in enumerate(sources.values()):
        mine = found.source == number
        total = sum(shard_rows)
        for epoch in range(int(mine.sum()) // total):
            of_epoch = mine & (found.epoch == epoch)
            pairs = set(
                zip(found.shard[of_epoch].tolist(), found.row[of_epoch].tolist(), strict=True)
            )
            assert len(pairs) == of_epoch.sum() == total


def test_addresses_are_quick_at_full_scale():
    # the published corpus: 24,000 shards of 8,192 rows, in eleven sources
    order = Order(
        {f"source-{i}": [8192] * 2200 for i in range(11)}, [1.0] * 11, seed=0, window_shards=16
    )
    order.addresses(np.arange(10))
    took = []
    for first in (100_000_000, 100_100_000, 100_200_000):
        started = time.thread_time()
        order.addresses(np.arange(first, first + 20_000))
        took.append(time.thread_time() - started)
    # 50,000 a second are enough for a rank; the least, since garbage may be collected in between
    assert min(took) < 0.4
