"""The style that all figures share."""

from __future__ import annotations

import matplotlib
import pytest
from PIL import Image
from support.figures import overlapping_texts

from flowdppo_fast.runs import figures, plots


def drawn() -> figures.Figure:
    figure, axes = figures.panels(2)
    for number, axis in enumerate(axes):
        axis.plot([1, 2, 3], [1e-4, 1e-2, 10.0], **figures.SERIES[number].kwargs(label=f"line {number}"))
        axis.set(title="panel", xlabel="iteration [rollouts]", ylabel="KL [nats]")
        figures.log_scale(axis.yaxis)
    figures.legend(figure, axes)
    return figure


@pytest.mark.parametrize("looks", [figures.METHODS.values(), figures.FORMS.values(), figures.SERIES])
def test_things_of_one_kind_differ_in_colour_and_without_it(looks):
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(looks)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (5e-4, 0.8, ["0.001", "0.01", "0.1"]),
        (0.8, 2e4, ["1", "10", "100", "1,000", "10,000"]),
        (0.018, 0.6, ["0.02", "0.05", "0.1", "0.2", "0.5"]),
        (8e-7, 2e-3, ["$10^{-6}$", "$10^{-5}$", "$10^{-4}$", "$10^{-3}$"]),
        (4e-8, 3e-7, ["$5\\times10^{-8}$", "$10^{-7}$", "$2\\times10^{-7}$"]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low, high, labels):
    figure, (axis,) = figures.panels(1)
    axis.plot([1, 2], [low, high])
    axis.set_ylim(low, high)
    figures.log_scale(axis.yaxis)
    figure.draw_without_rendering()
    shown = [t.get_text() for t, y in zip(axis.get_yticklabels(), axis.get_yticks()) if low <= y <= high]
    assert shown == labels
    # matplotlib's own choice between two steps is not rounded to one of them
    assert figures._log_text(1.4e-6, 1.3e-6, 1.5e-6) == "$1.4\\times10^{-6}$"


def test_a_figure_is_an_opaque_card_and_the_same_bytes_each_time(tmp_path):
    with figures.style():
        first, again = (figures.save(drawn(), tmp_path / name) for name in ("a/first.png", "a/again.png"))
    assert first.read_bytes() == again.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == ["again.png", "first.png"]
    with Image.open(first) as image:
        assert set(image.info) <= {"dpi"}
        assert image.width == 1600
        pixels = image.convert("RGBA")
    assert pixels.getextrema()[3] == (255, 255)
    assert pixels.getpixel((800, 8))[:3] == (255, 255, 255)
    assert pixels.getpixel((800, 0))[:3] != (255, 255, 255)


def test_the_style_is_the_projects_and_leaves_the_callers():
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0}):
        with figures.style():
            (line,) = drawn().axes[0].lines
        assert line.get_linewidth() == figures._STYLE["lines.linewidth"]
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_a_legend_hides_no_data():
    with figures.style():
        figure = drawn()
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(axis.get_tightbbox()) for axis in figure.axes)
    assert [text.get_text() for text in legend.get_texts()] == ["line 0", "line 1"]
    assert overlapping_texts(figure) == []


def test_labels_of_a_runs_plot_do_not_meet(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    names = ("reward", "reward/aesthetic score", "eval/reward", "kl_new_old_nats", "masked_fraction",
             "pos_rm_fraction", "neg_rm_fraction", "grad_norm", "seconds_sampling", "seconds_updates")  # fmt: skip
    history = [{"iteration": i, **dict.fromkeys(names, 0.014 * i)} for i in range(1, 30)]
    plots.plot_run(history, tmp_path / "metrics.png")
    kept[0].draw_without_rendering()
    assert overlapping_texts(kept[0]) == []
