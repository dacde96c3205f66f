"""Scatter plots: marks where the numbers are, round ticks, well-formed and escaped text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from accel.bench.plot import HEIGHT, WIDTH, Chart, Point, page, scatter, ticks

POINTS = [Point(0.2, 0.3, "a <b>", "greedy"), Point(0.8, 0.7, "c", "temperature 1", 0.6, 0.75)]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 1.07), (-8.4, -0.2), (1.2, 250.0), (3.0, 3.001)])
def test_ticks_are_round_and_cover_the_range(low, high):
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9
    assert 3 <= len(marks) <= 14
    assert re.fullmatch(r"[125]e[-+]\d+", f"{step:.0e}") and marks[1] == pytest.approx(round(marks[1] / step) * step)


def test_marks_stand_where_the_numbers_are():
    root = ElementTree.fromstring(scatter(Chart("t", "x", "y", band=0.15), POINTS))
    (circle,) = root.findall(f"{SVG}g/{SVG}circle")
    (square,) = root.findall(f"{SVG}g/{SVG}rect")
    # further right and further up
    assert float(circle.get("cx")) < float(square.get("x"))
    assert float(circle.get("cy")) > float(square.get("y"))
    # on equal axes the first is above the diagonal and the second below it
    (diagonal,) = [each for each in root.findall(f"{SVG}path") if each.get("stroke-dasharray")]
    x0, y0, x1, y1 = map(float, re.findall(r"-?[\d.]+", diagonal.get("d")))
    at = lambda x: y0 + (x - x0) / (x1 - x0) * (y1 - y0)  # noqa: E731
    assert float(circle.get("cy")) < at(float(circle.get("cx")))
    assert float(square.get("y")) + 4 > at(float(square.get("x")) + 4)
    assert len(root.findall(f"{SVG}polygon")) == 1


def test_names_and_legend_are_escaped_text():
    text = scatter(Chart("T & U", "x", "y"), POINTS)
    assert "<b>" not in text and "a &lt;b&gt;" in text and "T &amp; U" in text
    said = [each.text for each in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert {"greedy", "temperature 1", "c"} <= set(said)
    # without a band there is no diagonal
    assert "polygon" not in text


def test_points_of_a_kind_are_joined():
    points = [*POINTS, Point(0.5, 0.9, "d", "greedy")]
    root = ElementTree.fromstring(scatter(Chart("t", "x", "y", joined=True), points))
    lines = [each.get("points").split() for each in root.findall(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [2, 1]
    marks = [f"{float(c.get('cx')):.1f},{float(c.get('cy')):.1f}" for c in root.iter(f"{SVG}circle")]
    assert lines[0] == marks[:2]
    assert "polyline" not in scatter(Chart("t", "x", "y"), points)


def test_nothing_and_one_point_are_plots_too():
    assert "nothing to show" in scatter(Chart("t", "x", "y", band=0.15), [])
    ElementTree.fromstring(scatter(Chart("t", "x", "y"), [Point(0.0, 1.0, "a", "b")]))


def test_a_page_sets_plots_side_by_side():
    root = ElementTree.fromstring(page([(Chart("t", "x", "y"), POINTS), (Chart("u", "x", "y"), POINTS)]))
    assert (root.get("width"), root.get("height")) == (str(2 * WIDTH), str(HEIGHT))
    assert [each.get("transform") for each in root.findall(f"{SVG}g")] == ["translate(0 0)", f"translate({WIDTH} 0)"]
