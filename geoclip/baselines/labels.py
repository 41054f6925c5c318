"""Context of an image: climate, month, region and scene as class numbers, and captions made of them.

Unknown labels are UNKNOWN, and the losses leave them out. The labels of the embedded tiles come from maps of
the Earth.
"""

import calendar
import dataclasses
import re

import numpy as np
import pandas as pd
import torch
from torch import Tensor

UNKNOWN = -1

# Köppen–Geiger classes in the order of Beck et al. (2018), from 0, as in OSV's column `climate`.
CLIMATES = {
    "Af": "tropical rainforest",
    "Am": "tropical monsoon",
    "Aw": "tropical savannah",
    "BWh": "hot desert",
    "BWk": "cold desert",
    "BSh": "hot steppe",
    "BSk": "cold steppe",
    "Csa": "temperate, dry hot summer",
    "Csb": "temperate, dry warm summer",
    "Csc": "temperate, dry cold summer",
    "Cwa": "temperate, dry winter, hot summer",
    "Cwb": "temperate, dry winter, warm summer",
    "Cwc": "temperate, dry winter, cold summer",
    "Cfa": "temperate, humid, hot summer",
    "Cfb": "temperate, humid, warm summer",
    "Cfc": "temperate, humid, cold summer",
    "Dsa": "cold, dry hot summer",
    "Dsb": "cold, dry warm summer",
    "Dsc": "cold, dry short summer",
    "Dsd": "cold, dry summer, severe winter",
    "Dwa": "cold, dry winter, hot summer",
    "Dwb": "cold, dry winter, warm summer",
    "Dwc": "cold, dry winter, short summer",
    "Dwd": "cold, dry and severe winter",
    "Dfa": "cold, humid, hot summer",
    "Dfb": "cold, humid, warm summer",
    "Dfc": "cold, humid, short summer",
    "Dfd": "cold, humid, severe winter",
    "ET": "polar tundra",
    "EF": "polar frost",
}
MONTHS = tuple(calendar.month_name)[1:]
# Heads with fixed classes; the classes of the others are the names that occur in training.
FIXED = {"climate": tuple(CLIMATES.values()), "month": MONTHS}
SCENES = ("indoor", "natural", "urban")  # S3_Label
# Stand-in for the scenes of tiles, by Köppen's main group: evergreen, bare (dry or polar), seasonal.
SCENE_OF_GROUP = {"A": 0, "B": 1, "E": 1, "C": 2, "D": 2}


def check_labels(labels: Tensor, classes: int, source: str) -> Tensor:
    """Return `labels` (n,) as int64; raises ValueError unless all are UNKNOWN or 0 … classes − 1."""
    labels = torch.as_tensor(labels).long()
    bad = (labels < UNKNOWN) | (labels >= classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{source}, row {row}: label {int(labels[row])} is outside 0 … {classes - 1} "
            f"({UNKNOWN} is unknown), as are {int(bad.sum())} of {len(labels)} labels"
        )
    return labels


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of each head; saved in checkpoints."""

    names: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, context: pd.DataFrame, heads: tuple[str, ...]) -> "Classes":
        """Return those of a training set; raises ValueError for a head without a column or a known value."""
        names = {}
        for head in heads:
            if head not in context:
                raise ValueError(f"the data have no label {head!r}; they have {', '.join(context)}")
            names[head] = FIXED.get(head) or tuple(sorted(set(context[head].dropna())))
            if not names[head]:
                raise ValueError(f"the label {head!r} is known for no image: leave it out of heads")
        return cls(names)

    def __call__(self, context: pd.DataFrame) -> dict[str, Tensor]:
        """Return the class numbers (n,) of each head; UNKNOWN for values that are absent or new."""
        encoded = {}
        for head, names in self.names.items():
            column = context[head]
            if head in FIXED:
                numbers = pd.to_numeric(column).fillna(UNKNOWN).to_numpy(copy=True)
                encoded[head] = check_labels(torch.from_numpy(numbers), len(names), head)
            else:
                encoded[head] = torch.from_numpy(pd.Index(names).get_indexer(column).astype(np.int64))
        return encoded


def captions(context: pd.DataFrame, template: str) -> list[str]:
    """Return a sentence for each row, from `template` with {names of columns}.

    Parts (between commas) that name something unknown are left out: "a photo in {city}, {county}, {state}"
    becomes "a photo in California" if only the state is known.
    """
    words = context.astype(object)
    for head, names in FIXED.items():
        if head in words:
            words[head] = [None if pd.isna(value) else names[int(value)] for value in words[head]]
    lead, _, rest = template.partition("{")
    parts = [(part, set(re.findall(r"{(.*?)}", part))) for part in ("{" + rest).split(", ")]
    sentences = []
    for row in words.to_dict("records"):
        known = {name: value for name, value in row.items() if not pd.isna(value)}
        said = [part.format(**known) for part, names in parts if names <= known.keys()]
        sentences.append((lead + ", ".join(said)).strip())
    return sentences
