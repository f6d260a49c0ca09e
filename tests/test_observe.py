from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from graphs import conv_relu_conv, graph, images, measured, normal, residual
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.calibration.observe import StreamingHistogram, channel_mean
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.ranges import load_ranges
from deploykit.hub.plan import observed
from deploykit.hub.running import session
from deploykit.hub.slices import Slicer


def all_values(made, data, names):
    """The tensors' values on all samples at once, by another route: cut out of the graph and run as one batch."""
    import onnx

    slicer = Slicer(onnx.load_model_from_string(made.bytes))
    batch = next(data.batches(len(data))).inputs
    found = {}
    for name in names:
        found[name] = batch[name] if name in batch else session(slicer.cut([name], [])).run(None, batch)[0]
    return found


def test_ranges_are_the_extremes_over_all_samples() -> None:
    made, data = residual(), images()
    ranges = measured(made, data)
    for name, array in all_values(made, data, ranges.tensors).items():
        assert ranges.tensors[name].low == pytest.approx(array.min(), abs=1e-5)
        assert ranges.tensors[name].high == pytest.approx(array.max(), abs=1e-5)


def test_moving_average_ranges_are_the_mean_of_each_samples_extremes() -> None:
    made, data = conv_relu_conv(), images()
    stats = measured(made, data).tensors["r"]
    array = all_values(made, data, ["r"])["r"].reshape(len(data), -1)
    assert stats.average_low == pytest.approx(array.min(axis=1).mean(), abs=1e-5)
    assert stats.average_high == pytest.approx(array.max(axis=1).mean(), abs=1e-5)


def test_channel_means_are_kept_for_outputs_of_products_and_nothing_else() -> None:
    made, data = residual(), images()
    ranges = measured(made, data)
    assert set(ranges.means) == {"a", "b", "y"}
    array = all_values(made, data, ["b"])["b"]
    np.testing.assert_allclose(ranges.means["b"], array.mean(axis=(0, 2, 3)), atol=1e-5)


def test_inputs_of_the_graph_are_observed_too() -> None:
    assert "x" in observed(residual())[0]


def test_ranges_survive_their_file(tmp_path) -> None:
    ranges = measured(residual(), images(), "mse")
    ranges.save(tmp_path / "r.json")
    again = load_ranges(tmp_path / "r.json")
    assert again.to_dict() == ranges.to_dict()
    assert again.has_histograms


def test_calibrating_with_nothing_is_refused() -> None:
    with pytest.raises(DeploykitError, match="no calibration samples"):
        measured(conv_relu_conv(), images().take(slice(0, 0)))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_streaming_histogram_counts_every_value_in_its_bin(values, parts) -> None:
    histogram = StreamingHistogram(64)
    for part in np.array_split(np.asarray(values, np.float32), parts):
        if part.size:
            histogram.add(part, float(part.min()), float(part.max()))
    assert histogram.counts.sum() == len(values)
    width = 2 * histogram.limit / 64
    edges = -histogram.limit + width * np.arange(65)
    for k, count in enumerate(histogram.counts):
        inside = sum(edges[k] <= v < edges[k + 1] for v in values)
        near = sum(min(abs(v - edges[k]), abs(v - edges[k + 1])) <= 1e-4 * histogram.limit for v in values)
        assert abs(inside - count) <= near  # values on an edge may fall to either side in float32


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_channel_mean_is_numpys_mean_over_the_other_axes(n, c, h, w) -> None:
    array = normal(n + 10 * c, n, c, h, w)
    np.testing.assert_allclose(channel_mean(array, 1), array.mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(channel_mean(array, -1), array.mean(axis=(0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_sample_among_good_ones_is_refused(bad) -> None:
    x = normal(0, 8, 3, 8, 8)
    x[3, 0, 0, 0] = bad
    with pytest.raises(DeploykitError, match="NaN or infinite"):
        measured(conv_relu_conv(), DataSet.of({"x": x}))


def test_channel_means_are_of_evenly_spread_samples_where_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.calibration.observe.AVERAGED", 4)
    made, data = residual(), images(10)
    ranges = measured(made, data)
    assert ranges.averaged == 4
    array = all_values(made, data, ["b"])["b"][[0, 3, 6, 9]]
    np.testing.assert_allclose(ranges.means["b"], array.mean(axis=(0, 2, 3)), atol=1e-5)
    assert ranges.tensors["b"].high == pytest.approx(all_values(made, data, ["b"])["b"].max(), abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_sample_is_refused_where_no_means_are_taken_too(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.calibration.observe.AVERAGED", 1)
    x = normal(0, 8, 3, 8, 8)
    x[3, 0, 0, 0] = bad
    with pytest.raises(DeploykitError, match=r"tensor 'x' becomes NaN or infinite .*\(sample 3\)"):
        measured(conv_relu_conv(), DataSet.of({"x": x}))


def test_what_becomes_nan_inside_is_seen_at_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.calibration.observe.AVERAGED", 1)
    made = graph("(float[batch,3] x) => (float[batch,2] y) { r = Sqrt(x) y = MatMul(r, w) }", w=normal(0, 3, 2))
    x = np.ones((8, 3), np.float32)
    x[5] = -1.0
    with pytest.raises(DeploykitError, match=r"tensor 'y' becomes NaN or infinite .*\(sample 5\)"):
        measured(made, DataSet.of({"x": x}))


def test_older_ranges_are_read_with_means_of_all_samples(tmp_path: Path) -> None:
    ranges = measured(residual(), images())
    old = ranges.to_dict()
    del old["averaged"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load_ranges(tmp_path / "old.json").averaged == ranges.samples
