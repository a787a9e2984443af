import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from components.rl.curriculum import gaussian_counts, order_problems

RATES = [i / 100 for i in range(100)]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=60), st.integers(1, 8), st.integers(1, 10))
def test_every_batch_is_full_and_problems_repeat_only_after_all_were_used(rates, size, batches):
    plan = order_problems(rates, batch_size=size, num_batches=batches, seed=0)

    assert [len(batch) for batch in plan] == [size] * batches
    uses = Counter(i for batch in plan for i in batch)
    assert set(uses) <= set(range(len(rates)))
    if size * batches <= len(rates):
        assert max(uses.values()) == 1


@given(st.floats(0, 1), st.floats(0.02, 2), st.integers(1, 200))
def test_counts_follow_the_gaussian_to_less_than_one_problem_a_bin(centre, width, size):
    weights = [math.exp(-0.5 * (((number + 0.5) / 10 - centre) / width) ** 2) for number in range(10)]
    counts = gaussian_counts(centre, width, size)

    assert sum(counts) == size
    assert all(abs(count - size * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


def test_batches_go_from_easy_to_hard():
    plan = order_problems(RATES, batch_size=10, num_batches=6, width=0.1, seed=1)
    means = [sum(RATES[i] for i in batch) / len(batch) for batch in plan]

    assert means[0] > 0.7
    assert means[-1] < 0.35
    assert means[0] > means[3] > means[-1]
