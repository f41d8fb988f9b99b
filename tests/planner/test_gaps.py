"""Gap statistics against numpy on the expanded gaps, in one pass and in slices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulation import gaps

run = st.tuples(st.integers(1, 10**14), st.integers(0, 10**9), st.integers(1, 40), st.integers(1, 300))


def expanded(runs):
    return np.sort(np.array([f + i * j for f, i, n, b in runs for j in range(n) for _ in range(b)], dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(st.lists(run, min_size=1, max_size=12), st.sampled_from([10**9, 25]))
def test_matches_numpy(runs, slice_size):
    percentiles = [0.1, 50.0, 90.0, 99.0, 100.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "_SLICE", slice_size)
        patch.setattr(gaps, "_BINS", 16)
        mean, found = gaps.gap_statistics(np.array(runs, dtype=np.int64), percentiles)
    every = expanded(runs)
    assert mean == pytest.approx(float(every.astype(object).sum() / len(every)), rel=1e-12)
    assert found == np.percentile(every, percentiles, method="inverted_cdf").tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(run, min_size=1, max_size=6), st.data())
def test_does_not_depend_on_the_cuts(runs, data):
    pieces = []
    for first, increment, steps, batch in runs:
        cut = data.draw(st.integers(0, steps))
        if cut:
            pieces.append((first, increment, cut, batch))
        if steps > cut:
            pieces.append((first + increment * cut, increment, steps - cut, batch))
    percentiles = [1.0, 50.0, 99.0]
    whole = gaps.gap_statistics(np.array(runs, dtype=np.int64), percentiles)
    assert gaps.gap_statistics(np.array(pieces[::-1], dtype=np.int64), percentiles) == whole
