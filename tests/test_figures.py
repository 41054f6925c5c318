"""Figures show each distance with its interval, and the best model is that of the lowest median error."""

import numpy as np
import pandas as pd
import torch

from geoclip.studies import figures


def summary():
    rows = [
        {"data": "made", "seeds": 3, "split": split, "setting": f"queue {queue}", "queue": queue}
        | {
            f"acc_{km}km{end}": 10.0 + change
            for km in (1, 25, 200, 750, 2500)
            for end, change in ENDS.items()
        }
        for split in ("random", "blocked")
        for queue in (0, 256, 1024)
    ]
    return pd.DataFrame(rows)


ENDS = {"": 0.0, "_low": -3.0, "_high": 2.0}


def test_figures_show_every_distance_and_its_interval():
    curves = figures.draw_curves(summary(), "queue", "places in the queue")
    assert [axis.get_title("left") for axis in curves.axes] == ["random", "blocked"]
    for axis in curves.axes:
        assert len(axis.lines) == 5 and len(axis.collections) == 5
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == (7.0, 12.0)
        assert list(axis.lines[0].get_xdata()) == [0, 256, 1024]
    assert curves.get_suptitle() == "made; means and 95 % intervals over 3 seeds"
    settings = figures.draw_differences(summary(), ["blocked"])
    assert [axis.get_title("left") for axis in settings.axes] == ["blocked"]
    labels = [text.get_text() for text in settings.axes[0].get_yticklabels()]
    assert labels == ["queue 1024", "queue 256", "queue 0"]  # the first setting on top
    segments = settings.axes[0].collections[0].get_segments()
    assert np.allclose(segments[0][:, 0], [7.0, 12.0])
    by_split = figures.draw_by_split(summary(), ["queue 0", "queue 256"], ["acc_200km", "acc_750km"])
    assert [axis.get_title("left") for axis in by_split.axes] == ["≤ 200 km", "≤ 750 km"]
    for axis in by_split.axes:
        assert [text.get_text() for text in axis.get_xticklabels()] == ["random", "blocked"]
        assert len(axis.collections) == 2


def test_the_best_model_of_a_block_has_the_lowest_median_over_tests_and_seeds(monkeypatch):
    latlon = torch.tensor([[5.0, 5.0], [6, 6], [7, 7], [-5, -175], [-6, -176]])
    errors = {
        "a": np.array([[1.0, 100, 2, 9, 9], [1, 100, 2, 9, 9]]),
        "b": np.array([[3.0, 3, 3, 1, 1], [50, 50, 50, 1, 1]]),
    }
    pixels = np.array([[0.1, 9.9], [-0.1, -170.1], [-9.9, -179.9], [50.0, 50.0]])
    for fewest, best in ((2, [0, 1, 1, -1]), (3, [0, -1, -1, -1])):
        monkeypatch.setattr(figures, "FEWEST", fewest)
        assert figures.best_model(errors, latlon, pixels).tolist() == best
