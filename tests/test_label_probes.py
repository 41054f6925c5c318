"""Label probes: mean average precision by hand; the rest is tested with the data set, in test_nus_wide."""

import numpy as np
import pytest

from geoclip.studies import label_probes


def test_mean_average_precision_by_hand():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.9, 0.1], [0.7, 0.8, 0.2], [0.1, 0.2, 0.3]])
    found = label_probes.mean_average_precision(labels, scores)
    first = (1 / 1 + 2 / 3) / 2  # concept 0: ranks 1 and 3; concept 1 is perfect; concept 2 has no positive
    assert found["concepts"] == 2 and np.isclose(found["map_macro"], (first + 1) / 2)
    assert found["chance"] == 4 / 8  # of the two concepts that have positives
    with pytest.raises(ValueError, match="none of the 3 concepts"):
        label_probes.mean_average_precision(np.zeros((4, 3), int), scores)
