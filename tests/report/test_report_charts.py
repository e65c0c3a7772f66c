import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchmine.report.charts import (
    Chart,
    draw,
    linear_axis,
    log_axis,
    make_curve,
    moving_mean,
    tick_texts,
)
from patchmine.report.curve_words import does
from patchmine.report.series import Series
from patchmine.report.words import duration, number, points, title

values = st.floats(-1e6, 1e6).map(lambda v: round(v, 6))


def series(steps: list[float], numbers: list[float]) -> Series:
    return Series(np.asarray(steps, dtype=float), np.asarray(numbers, dtype=float))


def test_a_short_series_is_drawn_as_it_is() -> None:
    curve = make_curve(0, "x", series([1, 2, 9], [3, 1, 2]), smooth=True)
    assert curve.mean.tolist() == [3, 1, 2]
    assert not curve.binned
    assert curve.smooth is None


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), values), min_size=30, max_size=200, unique_by=lambda p: p[0]
    ),
    st.integers(2, 29),
)
def test_bins_keep_mean_and_extremes(pairs: list[tuple[int, float]], most: int) -> None:
    steps, numbers = zip(*sorted(pairs), strict=True)
    curve = make_curve(0, "x", series(list(steps), list(numbers)), smooth=False, most=most)
    assert len(curve.steps) <= most
    assert curve.low.min() == min(numbers)
    assert curve.high.max() == max(numbers)
    assert np.all(np.diff(curve.steps) > 0)
    # The slow twin: put every step into its bin by hand.
    width = (steps[-1] - steps[0]) / most
    edges = [steps[0] + width * k for k in range(most)]
    bins: dict[int, list[float]] = {}
    for step, value in zip(steps, numbers, strict=True):
        k = max(
            i
            for i, edge in enumerate(np.linspace(steps[0], steps[-1], most + 1)[:-1])
            if edge <= step
        )
        bins.setdefault(k, []).append(value)
    assert len(edges) == most
    assert curve.mean == pytest.approx(
        [sum(held) / len(held) for held in bins.values()], rel=1e-9, abs=1e-6
    )


def test_a_hundred_thousand_values_become_few_and_none_is_lost() -> None:
    steps = np.arange(100_000.0)
    numbers = np.ones(100_000)
    numbers[12_345] = 50.0
    curve = make_curve(0, "x", Series(steps, numbers), smooth=True)
    assert len(curve.steps) <= 360
    assert curve.high.max() == 50.0


@given(st.lists(values, min_size=1, max_size=50), st.integers(0, 8))
def test_moving_mean_against_its_slow_twin(numbers: list[float], reach: int) -> None:
    slow = []
    for i in range(len(numbers)):
        r = min(reach, i, len(numbers) - 1 - i)
        slow.append(sum(numbers[i - r : i + r + 1]) / (2 * r + 1))
    assert moving_mean(np.asarray(numbers), reach) == pytest.approx(slow, rel=1e-6, abs=1e-3)


def test_a_moving_mean_keeps_straight_lines_straight() -> None:
    line = np.linspace(3, 7, 40)
    assert moving_mean(line, 5) == pytest.approx(line)


@given(values, values, st.booleans())
def test_linear_axes_hold_their_values_and_round_labels(
    a: float, b: float, from_zero: bool
) -> None:
    low, high = sorted((a, b))
    axis = linear_axis(low, high, from_zero)
    assert axis.low <= low
    assert axis.high >= high
    assert 2 <= len(axis.ticks) <= 12
    places = axis.place(np.array([low, high]))
    assert np.all((places >= -1e-9) & (places <= 1 + 1e-9))
    texts = tick_texts(axis)
    assert len(set(texts)) == len(texts)


@given(st.floats(1e-6, 1e5), st.floats(1, 1e6))
def test_log_axes_hold_their_values(low: float, ratio: float) -> None:
    axis = log_axis(low, low * ratio)
    places = axis.place(np.array([low, low * ratio]))
    assert np.all((places >= 0) & (places <= 1))
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert len(axis.ticks) <= 16


def test_labels_have_the_decimals_they_need() -> None:
    assert tick_texts(linear_axis(0, 1)) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert tick_texts(linear_axis(0, 4500, from_zero=True)) == [
        "0",
        "1,000",
        "2,000",
        "3,000",
        "4,000",
    ]
    assert tick_texts(linear_axis(0, 1.5e-4, from_zero=True)) == ["0", "5.0e-5", "1.0e-4", "1.5e-4"]


def test_a_log_scale_is_offered_only_where_it_can_be_drawn() -> None:
    positive = Chart(
        "a", "A", "", [make_curve(0, "x", series([1, 2], [1.0, 9.0]), smooth=False)], log_axis=True
    )
    with_zero = Chart(
        "a", "A", "", [make_curve(0, "x", series([1, 2], [0.0, 9.0]), smooth=False)], log_axis=True
    )
    assert [scale.name for scale in draw(positive, 2.0).scales] == ["linear", "log"]
    assert [scale.name for scale in draw(with_zero, 2.0).scales] == ["linear"]


def test_a_single_value_is_drawn() -> None:
    curve = make_curve(0, "x", series([5], [2.0]), smooth=True)
    drawing = draw(Chart("a", "A", "", [curve], log_axis=True, wide=True), 5.0)
    assert "nan" not in repr((drawing.scales, drawing.rows, drawing.data))
    assert drawing.data["curves"][0]["text"] == ["2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (20.0, "20"), (1234.5, "1,234"), (12.3456, "12.35"), (0.41234, "0.4123"), (1.5e-4, "1.5e-4"),
        (-0.25, "-0.2500"), (2.5e9, "2.5e9"), (math.nan, "\N{EN DASH}"), (0.99999, "1.0000"), (1e-9, "1e-9"),
    ],
)  # fmt: skip
def test_numbers_as_a_reader_wants_them(value: float, text: str) -> None:
    assert number(value) == text


def test_words() -> None:
    assert [duration(s) for s in (45, 750, 11_100, 3599.9)] == [
        "45 s",
        "12 min 30 s",
        "3 h 05 min",
        "1 h 00 min",
    ]
    assert [points(v) for v in (9.14, -3.0)] == ["+9.1", "\N{MINUS SIGN}3.0"]
    assert [title(name) for name in ("loss_pixel", "lr", "knn")] == [
        "Loss pixel",
        "Learning rate",
        "kNN",
    ]


def share_chart(values: list[float]) -> Chart:
    curve = make_curve(0, "x", series(list(range(1, len(values) + 1)), values), smooth=False)
    return Chart("a", "A", "", [curve], is_share=True, unit=" %")


@pytest.mark.parametrize(
    "values", [[99.5, 100.0], [100.0, 100.0], [0.0, 0.4], [0.0, 100.0], [97.0, 99.99], [-3.0, 1e9]]
)
def test_axes_of_shares_end_at_0_and_100(values: list[float]) -> None:
    (scale,) = draw(share_chart(values), 5.0).scales
    ticks = [float(text.removesuffix(" %")) for _, text in scale.labels]
    assert all(0 <= tick <= 100 for tick in ticks)
    assert all(-1e-6 <= place <= 100 + 1e-6 for place, _ in scale.labels)
    ends = [
        float(y) for path in scale.paths for _, y in re.findall(r"([\d.]+) ([\d.]+)", path.data)
    ]
    assert ends
    assert all(0 <= y <= 1000 for y in ends)


def test_an_axis_of_shares_reaches_100_only_where_values_do() -> None:
    (scale,) = draw(share_chart([40.0, 60.0]), 5.0).scales
    assert scale.labels[-1][1] == "60 %"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (list(np.linspace(1, 0.5, 100)), "fell from 1 to 0.5101, still falling in the last tenth"),
        ([*np.linspace(1, 0.5, 60), *[0.5] * 60], "fell from 1 to 0.5000, flat in the last tenth"),
        ([*np.linspace(1, 0, 90), *np.linspace(0, 0.2, 10)], "rising in the last tenth"),
        ([3.0, 3.001], "stayed near 3.001"),
        ([3.0, 1.0, 3.0], "ended near its start, at 3, between 1 and 3"),
        ([3.0], "3, a single value so far"),
        ([3.0, 2.0], "fell from 3 to 2"),
    ],
)
def test_a_sentence_says_what_a_curve_does(values: list[float], said: str) -> None:
    text = does(series(list(range(len(values))), values), number)
    assert text.endswith(said)


def test_noise_is_no_trend() -> None:
    noise = np.random.default_rng(0).standard_normal(200)
    values = [*np.linspace(5, 1, 100), *(1 + 0.05 * noise)]
    assert does(series(list(range(300)), values), number).endswith("flat in the last tenth")


def test_a_score_names_its_best() -> None:
    said = does(series([100, 200, 300], [1.0, 5.0, 4.0]), number, is_score=True)
    assert said == "rose from 1 to 4; best 5 at step 200"
