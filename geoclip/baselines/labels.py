"""Context of an image: climate, month, region and scene as class numbers, and captions made of them.

Unknown labels are UNKNOWN, and the losses leave them out. The labels of the embedded tiles come from maps of
the Earth.
"""

import calendar
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from geoclip.datasets.benchmarks import SCENES

UNKNOWN = -1

# Köppen–Geiger classes in the order of Beck et al. (2018), from 0, as in OSV's column `climate`.
CLIMATES = {
    "Af": "tropical rainforest", "Am": "tropical monsoon", "Aw": "tropical savannah",
    "BWh": "hot desert", "BWk": "cold desert", "BSh": "hot steppe", "BSk": "cold steppe",
    "Csa": "temperate, dry hot summer", "Csb": "temperate, dry warm summer", "Csc": "temperate, dry cold summer",
    "Cwa": "temperate, dry winter, hot summer", "Cwb": "temperate, dry winter, warm summer",
    "Cwc": "temperate, dry winter, cold summer", "Cfa": "temperate, humid, hot summer",
    "Cfb": "temperate, humid, warm summer", "Cfc": "temperate, humid, cold summer",
    "Dsa": "cold, dry hot summer", "Dsb": "cold, dry warm summer",
    "Dsc": "cold, dry short summer", "Dsd": "cold, dry summer, severe winter",
    "Dwa": "cold, dry winter, hot summer", "Dwb": "cold, dry winter, warm summer",
    "Dwc": "cold, dry winter, short summer", "Dwd": "cold, dry and severe winter",
    "Dfa": "cold, humid, hot summer", "Dfb": "cold, humid, warm summer",
    "Dfc": "cold, humid, short summer", "Dfd": "cold, humid, severe winter",
    "ET": "polar tundra", "EF": "polar frost",
}  # fmt: skip
# Labels with fixed classes, given by number; the classes of the others are the names that occur in training.
FIXED = {"climate": tuple(CLIMATES.values()), "month": tuple(calendar.month_name)[1:], "scene": SCENES}
# Stand-in for the scenes of tiles, by Köppen's main group: evergreen, bare (dry or polar), seasonal.
SCENE_OF_GROUP = {"A": 0, "B": 1, "E": 1, "C": 2, "D": 2}


def check_labels(labels: Tensor, classes: int, source: str) -> Tensor:
    """Return `labels` (n,) as int64; raises ValueError unless all are UNKNOWN or 0 … classes − 1."""
    labels = labels.long()
    bad = (labels < UNKNOWN) | (labels >= classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{source}, row {row}: label {int(labels[row])} is outside 0 … {classes - 1} "
            f"({UNKNOWN} is unknown), as are {int(bad.sum())} of {len(labels)} labels"
        )
    return labels


def classes_of(context: pd.DataFrame, columns: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the classes of each label of a training set; raises ValueError for one that is never known."""
    classes = {name: FIXED.get(name) or tuple(sorted(set(context[name].dropna()))) for name in columns}
    for name, found in classes.items():
        if not found:
            raise ValueError(f"the label {name!r} is known for no image: leave it out of heads")
    return classes


def encode(context: pd.DataFrame, classes: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Return the class numbers (n,) of each label; UNKNOWN for values that are absent or new."""
    encoded = {}
    for name, known in classes.items():
        if name in FIXED:
            numbers = pd.to_numeric(context[name]).fillna(UNKNOWN).to_numpy(copy=True)
            encoded[name] = check_labels(torch.from_numpy(numbers), len(known), name)
        else:
            encoded[name] = torch.from_numpy(pd.Index(known).get_indexer(context[name]).astype(np.int64))
    return encoded


def known_cross_entropy(logits: Float[Tensor, "n k"], label: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over known labels; 0, with gradient 0, if none is known."""
    total = functional.cross_entropy(logits.float(), label, ignore_index=UNKNOWN, reduction="sum")
    return total / (label != UNKNOWN).sum().clamp(min=1)


def named(context: pd.DataFrame) -> pd.DataFrame:
    """Return the context with names in place of class numbers, None where they are unknown."""
    words = context.astype(object)
    for head, names in FIXED.items():
        if head in words:
            words[head] = [None if pd.isna(value) else names[int(value)] for value in words[head]]
    return words


def captions(context: pd.DataFrame, template: str) -> list[str]:
    """Return a sentence for each row, from `template` with {names of columns}.

    Parts (between commas) that name something unknown are left out: "a photo in {city}, {county}, {state}"
    becomes "a photo in California" if only the state is known.
    """
    words = named(context)
    lead, _, rest = template.partition("{")
    parts = [(part, set(re.findall(r"{(.*?)}", part))) for part in ("{" + rest).split(", ")]
    sentences = []
    for row in words.to_dict("records"):
        known = {name: value for name, value in row.items() if not pd.isna(value)}
        said = [part.format(**known) for part, names in parts if names <= known.keys()]
        sentences.append((lead + ", ".join(said)).strip())
    return sentences
