"""`*_places365.csv`: the metadata format of Im2GPS, Im2GPS3k, YFCC4k, YFCC26k and MP-16.

One row a photo: IMG_ID, AUTHOR (the Flickr photographer), LAT, LON, and what a Places365 classifier saw in it.
"""

from pathlib import Path

from geoclip.datasets import folder

COLUMNS = {"file": "IMG_ID", "lat": "LAT", "lon": "LON", "author": "AUTHOR"}
SCENES = ("indoor", "natural", "urban")  # S3_Label 0, 1, 2


def read(
    csv: Path | str, images: Path | str | None = None, name: str | None = None, trust_header: bool = False
) -> folder.Geotagged:
    """The photos of a `*_places365.csv`, with a column `scene` (indoor, natural or urban).

    Raises as folder.read does, and ValueError for an S3_Label that is not 0, 1 or 2.
    """
    photos = folder.read(csv, images, name, COLUMNS, keep=["S3_Label"], trust_header=trust_header)
    label = photos.table.pop("S3_Label")
    scene = label.map({str(number): scene for number, scene in enumerate(SCENES)})
    if scene.isna().any():
        row = scene.isna().idxmax()
        raise ValueError(
            f"{csv}, line {photos.table.at[row, 'line']}: S3_Label is {label[row]!r}, not 0 (indoor), "
            f"1 (natural) or 2 (urban)"
        )
    photos.table["scene"] = scene
    return photos
