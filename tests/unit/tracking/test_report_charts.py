"""Curves of the report: thinned, they look the same."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.tracking.report_charts import downsample


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=500),
    st.integers(8, 100),
)
def test_downsampling_keeps_ends_extremes_and_gaps(values: list[float], limit: int) -> None:
    steps = [float(step) for step in range(len(values))]
    xs, ys = downsample(steps, values, limit)
    assert len(xs) <= max(limit, 2)
    assert xs == sorted(set(xs))
    assert (xs[0], xs[-1]) == (steps[0], steps[-1])
    assert all(ys[i] == values[int(x)] or math.isnan(values[int(x)]) for i, x in enumerate(xs))
    finite = [value for value in values if math.isfinite(value)]
    shown = [value for value in ys if math.isfinite(value)]
    assert (min(finite, default=0), max(finite, default=0)) == (min(shown, default=0), max(shown, default=0))
    assert any(map(math.isnan, ys)) == any(map(math.isnan, values))
