"""What is known of an image besides its coordinates: climate, month, region, scene, and captions made of them.

Labels are class numbers, UNKNOWN where nothing is known: the losses leave those out. The embedded data have
no such labels of their own; theirs come from maps of the Earth at the tile's place.
"""

import dataclasses
import re

import numpy as np
import pandas as pd
import torch
from torch import Tensor

UNKNOWN = -1

# Köppen–Geiger classes in the order of Beck et al. (2018), as in OSV's column `climate`, from 0.
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
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
# Heads whose classes are fixed; those of all others are the names that occur in training.
FIXED = {"climate": tuple(CLIMATES.values()), "month": MONTHS}
SCENES = ("indoor", "natural", "urban")  # S3_Label
# Embedded stand-in for scenes, by Köppen's main group: evergreen wet, bare (dry or polar), seasonal.
SCENE_OF_GROUP = {"A": 0, "B": 1, "E": 1, "C": 2, "D": 2}


def check_labels(labels: Tensor, classes: int, source: str) -> Tensor:
    """`labels` as int64 (n,), 0 … classes − 1 or UNKNOWN; ValueError with row and value for any other."""
    labels = torch.as_tensor(labels).long()
    bad = (labels < UNKNOWN) | (labels >= classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{source}, row {row}: label {int(labels[row])} is outside 0 … {classes - 1} ({UNKNOWN} is unknown); "
            f"{int(bad.sum())} of {len(labels)} are"
        )
    return labels


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of each head, by name; kept in checkpoints."""

    names: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, context: pd.DataFrame, heads: tuple[str, ...]) -> "Classes":
        """Those of a training set's context; ValueError where a head has no column or no known value."""
        names = {}
        for head in heads:
            if head not in context:
                raise ValueError(f"there is no label {head!r} in these data; there are {', '.join(context)}")
            names[head] = FIXED.get(head) or tuple(sorted(set(context[head].dropna())))
            if not names[head]:
                raise ValueError(f"the label {head!r} is known for no image; leave it out of heads")
        return cls(names)

    def __call__(self, context: pd.DataFrame) -> dict[str, Tensor]:
        """Class numbers (n,) of each head; UNKNOWN where the value is absent or did not occur in training."""
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
    """A sentence for each row, from `template` with {names of columns}.

    A part (between commas) that names something unknown is left out: with neither city nor county,
    "a photo in {city}, {county}, {state}" says "a photo in California" where only the state is known.
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
