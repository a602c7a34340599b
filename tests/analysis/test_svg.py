"""The charts: well-formed, to scale, the same bytes again."""

import xml.dom.minidom

import pytest

from proxynorm.analysis.svg import dot_chart, line_chart, ticks


def test_charts_are_well_formed_and_escape_names():
    for chart in (
        dot_chart({"a<b": [1.0, 2.0], "c": []}, "x & y", {"c": 1.5}),
        line_chart({"<s>": [(0, 1), (1, 2)]}, "x", "y"),
    ):
        assert chart.startswith("<svg") and xml.dom.minidom.parseString(chart)
    assert dot_chart({"a": [1.0]}, "x") == dot_chart({"a": [1.0]}, "x")


def test_dots_lie_where_the_values_are():
    document = xml.dom.minidom.parseString(dot_chart({"a": [90.0, 91.0], "b": [92.0]}, "x"))
    dots = [float(dot.getAttribute("cx")) for dot in document.getElementsByTagName("circle")]
    low, high, mean, single, _ = dots
    assert mean == pytest.approx((low + high) / 2, abs=0.02) and single - high == pytest.approx(
        high - low, abs=0.02
    )


@pytest.mark.parametrize("low, high", [(0, 1), (88.3, 92.1), (-3, 1e4), (0.5, 0.5)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert len(found) <= 7 and all(low - 1e-6 <= value <= high + 1e-6 for value in found)
