"""Google World Streets 15K: a CSV of path,lat,lon, one street view a row."""

from pathlib import Path

from geoclip.datasets import folder

COLUMNS = {"file": "path", "lat": "lat", "lon": "lon"}


def read(
    csv: Path | str, images: Path | str | None = None, name: str | None = None, trust_header: bool = False
) -> folder.Geotagged:
    """The street views of GWS15k; it names no photographers. Raises as folder.read does."""
    return folder.read(csv, images, name, COLUMNS, trust_header=trust_header)
