"""What each benchmark and training set is, what to expect in it, and where a user gets it.

The environment variable GEOCLIP_DATA names the folder of everything you bring:

    GEOCLIP_DATA/im2gps3k_places365.csv     a card's CSV, here or in benchmarks/
    GEOCLIP_DATA/images/im2gps3k/…          its images, as the CSV names them
    GEOCLIP_DATA/osv-mini/…                 OSV-5M, OSV-Mini and NUS-WIDE keep their own layout in a folder

A sha256 is that of the CSV of public provenance on which this project's coordinate results were computed; a file
with another one is read and said to differ.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from geoclip import paths
from geoclip.datasets import folder, gws15k, osv, places365

PLACES365 = "IMG_ID,AUTHOR,LAT,LON,S3_Label,S16_Label,S365_Label,Prob_indoor,Prob_natural,Prob_urban"
TRANSLOCATOR = "github.com/ShramanPramanick/Transformer_Based_Geo-localization"
FLICKR = "Flickr photos under their photographers' licences; the metadata file: MIT"


@dataclass(frozen=True)
class Card:
    """One data set. n: rows expected, None where no source states it; csv: the file's name, or "" where the data
    set keeps a folder of its own layout, GEOCLIP_DATA/<name>.

    format: the loader ("places365", "gws15k", "osv-mini", "osv-5m", "nus-wide"); sha256 of the CSV or None.
    """

    name: str
    title: str
    what: str
    n: int | None
    columns: str
    format: str
    csv: str
    source: str
    licence: str
    sha256: str | None = None


CARDS = {
    card.name: card
    for card in (
        Card(
            "mp16",
            "MP-16",
            "Geotagged Flickr photos of the MediaEval 2016 Placing Task (from YFCC100M); the paper's training set.",
            4_723_695,
            PLACES365,
            "places365",
            "mp16_places365.csv",
            "MediaEval 2016 Placing Task; as images: huggingface.co/datasets/Jia-py/MP16-Pro (4.12 M still alive "
            "in 2024, `/` in names written `_`). The URL list that went with it was withdrawn by its project.",
            "Creative Commons, each photo its own; academic research",
        ),
        Card(
            "im2gps",
            "Im2GPS",
            "The field's first benchmark (Hays, Efros 2008): 237 geotagged Flickr photos.",
            237,
            PLACES365,
            "places365",
            "im2gps_places365.csv",
            f"graphics.cs.cmu.edu/projects/im2gps; metadata: {TRANSLOCATOR}, resources/",
            FLICKR,
            "213c4d27f805c616948d582f20fe2bd4ab0c7a1ab5af08bee05f6481b0c7077f",
        ),
        Card(
            "im2gps3k",
            "Im2GPS3k",
            "Three thousand further photos of Im2GPS (Vo, Jacobs, Hays 2017); the archive has 3,000 files and "
            "the metadata 2,997 of them.",
            2997,
            PLACES365,
            "places365",
            "im2gps3k_places365.csv",
            f"github.com/lugiavn/revisiting-im2gps (im2gps3ktest.zip); metadata: {TRANSLOCATOR}, resources/",
            FLICKR,
            "0f243d1e23cbb4ab8f0a83fa045ebae642dac2458fb94a1540db6f5f5588031d",
        ),
        Card(
            "yfcc4k",
            "YFCC4k",
            "4,536 geotagged Flickr photos of YFCC100M (Vo, Jacobs, Hays 2017).",
            4536,
            PLACES365,
            "places365",
            "yfcc4k_places365.csv",
            f"images: {TRANSLOCATOR}; metadata: huggingface.co/Jia-py/G3-checkpoint",
            FLICKR,
        ),
        Card(
            "yfcc26k",
            "YFCC26k",
            "Geotagged Flickr photos of YFCC100M by 13,018 photographers, the largest of the four.",
            25_600,
            PLACES365,
            "places365",
            "yfcc25600_places365.csv",
            f"metadata: {TRANSLOCATOR}, resources/; images: from Flickr by their ids, of which a growing share is gone",
            FLICKR,
            "a49363ef7d87e8a2484169a2b0971f07355743d0741b9fcff7ffc8441afd397d",
        ),
        Card(
            "gws15k",
            "GWS15k",
            "Google World Streets 15K: Google Street View images.",
            14_955,
            "path,lat,lon",
            "gws15k",
            "gws15k.csv",
            "not published: ask the authors of GeoGuessNet (github.com/AHKerrigan/GeoGuessNet)",
            "Google Street View imagery, Google's terms",
        ),
        Card(
            "osv5m",
            "OSV-5M",
            "OpenStreetView-5M: Mapillary street views of 225 countries and territories; the test split, whose "
            "places are ≥ 1 km from the 4,894,685 of training.",
            210_122,
            "id,latitude,longitude,…",
            "osv-5m",
            "",
            "huggingface.co/datasets/osv5m/osv5m; unpack to GEOCLIP_DATA/osv5m/{test.csv,images/test/…}",
            "CC BY-SA 4.0",
        ),
        Card(
            "osv-mini",
            "OSV-Mini",
            "A subset of OSV-5M of some 129 K images, with captions' material (region, climate, time); test split.",
            None,
            "id,latitude,longitude,region,sub-region,city,unique_city,unique_sub-region,climate,captured_at,…",
            "osv-mini",
            "",
            "kaggle.com/datasets/josht000/osv-mini-129k; unpack to GEOCLIP_DATA/osv-mini/"
            "{test_mini.csv,test_images/{region}/{id}.jpg}",
            "CC BY-SA 4.0, as OSV-5M",
        ),
        Card(
            "nus-wide",
            "NUS-WIDE, geo-tagged",
            "Flickr photos with 81 concepts, those with a geotag: 41,173 for training, 27,401 for test.",
            68_574,
            "see geoclip.datasets.nus_wide",
            "nus-wide",
            "",
            "the National University of Singapore on request; its geotag files have no public mirror",
            "research use",
        ),
    )
}


def card(name: str) -> Card:
    """The card called `name` (any case, `-` and `_` alike); ValueError lists the known ones."""
    wanted = name.lower().replace("_", "-")
    for known in CARDS.values():
        if wanted in (known.name, known.title.lower()):
            return known
    raise ValueError(f"no benchmark {name!r}; there are {', '.join(CARDS)}")


def data_folder() -> Path:
    """GEOCLIP_DATA; FileNotFoundError says what to set where it is not."""
    found = paths.geoclip_data()
    if found is None:
        raise FileNotFoundError(
            "benchmarks are read from the folder that the environment variable GEOCLIP_DATA names, which is not "
            "set; its layout stands in geoclip/datasets/benchmarks.py"
        )
    return found


def find_csv(wanted: Card, data: Path | None = None) -> Path:
    """The card's CSV in `data` (default: GEOCLIP_DATA); FileNotFoundError says where to get it.

    That of the street-view sets lies in their own folder, the others' at the top or in benchmarks/.
    """
    data = data or data_folder()
    if wanted.format.startswith("osv"):
        return data / wanted.name / ("test.csv" if wanted.format == "osv-5m" else "test_mini.csv")
    if not wanted.csv:
        raise ValueError(f"{wanted.title} is a folder of its own layout, not one CSV")
    tried = [data / wanted.csv, data / "benchmarks" / wanted.csv]
    for csv in tried:
        if csv.is_file():
            return csv
    raise FileNotFoundError(
        f"{wanted.title}: {wanted.csv} is neither at {tried[0]} nor at {tried[1]}; get it from: {wanted.source}"
    )


def on_disk(name: str) -> str:
    """What of a benchmark GEOCLIP_DATA holds: "photos", "coordinates" alone, or "nothing"."""
    data, wanted = paths.geoclip_data(), card(name)
    if data is None:
        return "nothing"
    try:
        csv = find_csv(wanted, data)
    except (FileNotFoundError, ValueError):
        return "nothing"
    if wanted.format.startswith("osv"):
        return "photos" if csv.is_file() else "nothing"
    return "photos" if (data / "images" / wanted.name).is_dir() else "coordinates"


def load(
    name: str, data: Path | None = None, images: Path | str | None = None, trust_header: bool = False
) -> folder.Geotagged:
    """A benchmark or training set by its card's name, complete or not at all.

    images: its folder of images, default GEOCLIP_DATA/images/<name>, and none where that does not exist: the
    coordinates alone give ceilings, floors and leakage. Raises as the loaders do, and ValueError where the CSV
    has another number of rows than the card: a benchmark with rows left out has other scores.
    """
    wanted = card(name)
    data = data or data_folder()
    if wanted.format == "nus-wide":
        raise ValueError("NUS-WIDE is labels beside coordinates: read it with geoclip.datasets.nus_wide")
    if wanted.format == "osv-mini":
        photos = osv.read_mini(data / wanted.name, trust_header=trust_header)
    elif wanted.format == "osv-5m":
        photos = osv.read_5m(data / wanted.name, trust_header=trust_header)
    else:
        default = data / "images" / wanted.name
        images = images or (default if default.is_dir() else None)
        read = places365.read if wanted.format == "places365" else gws15k.read
        photos = read(find_csv(wanted, data), images, wanted.title, trust_header)
    if wanted.n is not None and len(photos) != wanted.n:
        raise ValueError(
            f"{wanted.title}: {len(photos):,} rows where the benchmark has {wanted.n:,}; give a part of it as a "
            f"CSV of your own, so that its scores are not taken for the benchmark's"
        )
    return photos


def read_csv(
    csv: Path | str, images: Path | str | None = None, trust_header: bool = False
) -> folder.Geotagged:
    """Any CSV of photos and places: as the benchmarks' metadata where it is named so, else by its header."""
    read = places365.read if str(csv).endswith("_places365.csv") else folder.read
    return read(csv, images, trust_header=trust_header)


def is_pinned(wanted: Card, csv: Path) -> bool | None:
    """Whether `csv` is the very file that the card pins; None where the card pins none."""
    if wanted.sha256 is None:
        return None
    return hashlib.sha256(csv.read_bytes()).hexdigest() == wanted.sha256
