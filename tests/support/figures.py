"""What can be measured of whether a figure is legible."""

from __future__ import annotations

from itertools import combinations

from flowdppo_fast.runs import figures


def watched(monkeypatch) -> dict[str, list[tuple[str, str]]]:
    """Overlapping texts of every figure that is saved from now on, by the name of its file."""
    save, found = figures.save, {}

    def saved(figure, path):
        save(figure, path)
        found[path.name] = overlapping_texts(figure)
        return path

    monkeypatch.setattr(figures, "save", saved)
    return found


def overlapping_texts(figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other: titles, labels, ticks, legends, words in a plot.

    Args:
        figure: of matplotlib, drawn or saved before.
    """
    texts = [figure._suptitle] if figure._suptitle else []
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        if not axes.axison:
            continue
        texts += [axes.title, axes._left_title, axes._right_title, *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts.append(axis.label)
            texts += [t for t, place in zip(axis.get_ticklabels(), axis.get_ticklocs()) if low <= place <= high]
    shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
    # a pixel of a page's 800 is no overlap: a box is larger than its letters
    boxes = [(text.get_text(), text.get_window_extent().padded(-2)) for text in shown]
    return [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
