"""Order of samples: permutations that depend on the seed, the iteration and the epoch only."""

from spin.data import epoch_order, history_window, iteration_samples


def test_an_epoch_visits_every_pair_once():
    for iteration in range(2):
        for epoch in range(2):
            assert sorted(epoch_order(50, 1, iteration, epoch)) == list(range(50))


def test_orders_differ_by_seed_iteration_and_epoch_and_repeat():
    keys = [(seed, iteration, epoch) for seed in (1, 2) for iteration in (0, 1) for epoch in (0, 1)]
    orders = {key: tuple(epoch_order(50, *key)) for key in keys}
    assert len(set(orders.values())) == len(keys)
    assert all(tuple(epoch_order(50, *key)) == order for key, order in orders.items())


def test_an_iteration_plays_other_samples_than_the_one_before():
    first, second = (iteration_samples(1000, 64, 7, iteration) for iteration in (0, 1))
    assert len(set(first)) == len(set(second)) == 64
    assert set(first) != set(second)
    assert all(0 <= sample < 1000 for sample in first)


def test_history_window():
    assert [history_window(iteration, 1) for iteration in range(3)] == [[0], [0, 1], [1, 2]]
    assert history_window(3, 0) == [3]
    assert history_window(3, 9) == [0, 1, 2, 3]
