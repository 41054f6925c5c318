"""Profiles of notebook parameters (notebooks/profiles): what `reproduce` and `sweep` give to which notebook."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import yaml

from geoclip import paths

REMEDIES = {"make": "make it with:", "without": "without it,"}  # what is said of missing data


@dataclass(frozen=True)
class Profile:
    """The content of a profile.

    parameters: given to every notebook that has them. notebooks: stem → its own `parameters`, and a `grid` of
    values. data: name of what the notebooks read → `parameter` that names its folder (and `key`, such as
    `outer/inner`, if that is a mapping), number of `samples`, their `source`, and `make`, the command that
    makes the folder. An entry without `parameter` is always there, and one that says what happens `without`
    it is not missed as long as another one of its parameter is there.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    notebooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int = 3
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str | Path) -> "Profile":
        """Read notebooks/profiles/NAME.yaml or a YAML file; `${NAME}` in it is an environment variable."""
        path = paths.profile(name)
        known = {"GEOCLIP_DATA": str(folder)} if (folder := paths.geoclip_data()) else {}
        try:
            text = path.read_text(encoding="utf-8")
            content = yaml.safe_load(Template(text).safe_substitute(os.environ | known)) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        kinds = {"parameters": dict, "notebooks": dict, "seeds": int, "data": dict}
        _check(content, kinds, f"{path}: a profile has")
        for stem, own in content.get("notebooks", {}).items():
            _check(own, {"parameters": dict, "grid": dict}, f"{path}, {stem}: a notebook has")
        kinds = {"samples": int, "source": str, "parameter": str, "key": object, "make": str, "without": str}
        for name, about in content.get("data", {}).items():
            _check(about, kinds, f"{path}, {name}: data have", needed=("samples", "source"))
        return cls(path.stem, **content)

    def given(self, notebook: Path, known: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that the notebook gets, of those that it has (`known`): the shared ones, then its own."""
        own = self.notebooks.get(notebook.stem, {})
        if wrong := sorted((own.get("parameters", {}).keys() | own.get("grid", {}).keys()) - known.keys()):
            raise ValueError(
                f"{notebook.name} has no parameter {', '.join(wrong)}; it has {', '.join(known)}"
            )
        shared = {name: value for name, value in self.parameters.items() if name in known}
        return shared | own.get("parameters", {})

    def whole(self, notebook: Path, known: Mapping[str, Any]) -> dict[str, Any]:
        """As `given`, with all settings of the grid and all seeds, for one run of the notebook."""
        own, given = self.notebooks.get(notebook.stem, {}), self.given(notebook, known)
        given |= {name: values for name, values in own.get("grid", {}).items() if values}
        if own and isinstance(known.get("SEEDS"), list):  # elsewhere SEEDS is their number
            given["SEEDS"] = list(range(self.seeds))
        return given

    def samples(self, given: Mapping[str, Any], fractions=(1,)) -> dict[str, tuple[str, str]]:
        """Name of the data → how many samples, from where; and what is missing ("" if nothing is).

        given: values of the notebook's parameters. fractions: the parts of the training data that are used.
        """
        found = {}
        for name, about in self.data.items():
            parameter = about.get("parameter")
            if parameter not in (None, *given):
                continue
            place = given.get(parameter)
            for key in str(about["key"]).split("/") if "key" in about else ():
                inside = place.items() if isinstance(place, dict) else ()
                place = {str(k): value for k, value in inside}.get(key)
            parts = fractions if parameter == "DATA" else (1,)
            count = ", ".join(f"{round(about['samples'] * part):,}" for part in parts)
            gone = [f"MISSING: {place}"]
            gone += [f"{do} {about[what]}" for what, do in REMEDIES.items() if what in about]
            there = parameter is None or (place and Path(str(place)).exists())
            found[name] = f"{count} samples ({about['source']})", "" if there else "; ".join(gone)
        return found

    def missing(self, given: Mapping[str, Any]) -> list[str]:
        """What of the data is missing, and how to make it."""
        return [f"{name} {gone}" for name, gone, needed in self._gone(given) if needed]

    def left_out(self, given: Mapping[str, Any]) -> list[str]:
        """What is missing and not needed, and what the notebook does without it."""
        return [f"{name} {gone}" for name, gone, needed in self._gone(given) if not needed]

    def _gone(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
        """Name, reason and whether it is needed, of what is missing."""
        found = {name: gone for name, (_, gone) in self.samples(given).items()}
        there = {self.data[name].get("parameter") for name, gone in found.items() if not gone}
        for name, gone in found.items():
            if gone:
                about = self.data[name]
                yield name, gone, "without" not in about or about["parameter"] not in there


def _check(content: Any, kinds: Mapping[str, type], what: str, needed: Sequence[str] = ()) -> None:
    """Raise ValueError that starts with `what` unless content is a mapping of these names to these types."""
    if not isinstance(content, dict):
        raise ValueError(f"{what} {', '.join(kinds)}, not {content!r}")
    if wrong := sorted(map(str, content.keys() - kinds.keys())):
        raise ValueError(f"{what} {', '.join(kinds)}, not {wrong}")
    for name, kind in kinds.items():
        if name in content or name in needed:
            value = content.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{what} {name} of type {kind.__name__}, not {value!r}")
