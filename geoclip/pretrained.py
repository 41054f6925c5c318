"""Released weights: the authors' package and OpenAI's CLIP, fetched once, checked by SHA-256, read without pickle.

The authors' package carries the location encoder, the image head, the temperature and the 100 K gallery; it is
unpacked, never installed, because its import name is ours too. CLIP ViT-L/14 is the file that it uses too.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np

from geoclip import paths

if TYPE_CHECKING:
    from torch import Tensor

NAME, VERSION = "geoclip", "1.3.0"
WHEEL = f"{NAME}-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "08a93791166a279d52b95c466a952c75f17f654cc61bdf6ab20355325b564dec"
AUTHORS = paths.CACHE / "authors"

LOCATION_ENCODER = "geoclip/model/weights/location_encoder_weights.pth"
HEAD = "geoclip/model/weights/image_encoder_mlp_weights.pth"
TEMPERATURE = "geoclip/model/weights/logit_scale_weights.pth"
GALLERY = "geoclip/model/gps_gallery/coordinates_100K.csv"
KAUAI = "geoclip/images/Kauai.png"
# Positions in the released nn.Sequential → positions in ours (Linear, ReLU, … from 0).
LAYERS = {"capsule.1": "mlp.0", "capsule.3": "mlp.2", "capsule.5": "mlp.4", "head.0": "mlp.6"}

CLIP_TOWER = "ViT-L-14-quickgelu"  # open_clip's name; without QuickGELU the same weights give other features
TINY_CLIP = "tiny-clip"  # of tiny-clip.json: random weights, for rehearsals and tests
CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
CLIP_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
CLIP_FILE = "model.safetensors"
CLIP_SHA256 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"


def authors_wheel() -> Path:
    """Return the authors' released package (a wheel of 40 MB) in the cache, downloading it at the first call."""
    wheel = AUTHORS / WHEEL
    if not wheel.exists():
        paths.make_folder(AUTHORS)
        with filelock.FileLock(AUTHORS / ".lock"):
            if not wheel.exists():  # another process may have fetched it in the meantime
                _download(wheel)
    _check(wheel, paths.sha256(wheel), WHEEL_SHA256)
    return wheel


def authors_package() -> Path:
    """Return the folder that holds the authors' package `geoclip/`, unpacked; never import it beside ours."""
    folder = AUTHORS / f"{NAME}-{VERSION}"
    with zipfile.ZipFile(authors_wheel()) as wheel:
        for name in wheel.namelist():
            path, content = folder / name, wheel.read(name)
            if not path.is_file() or path.read_bytes() != content:
                with paths.atomic(path) as temporary:
                    temporary.write_bytes(content)
    return folder


def kauai() -> Path:
    """Return the authors' example photo, `Kauai.png` (an island of Hawaii)."""
    return authors_package() / KAUAI


def location_encoder_state() -> dict:
    """Return the released location encoder's tensors under the names in ours.

    Weight decay has left 97,000 of the 9 million weights below the smallest normal number of float32, and an Intel
    processor takes 20 times as long for a layer that has such weights. They are 0 here: no embedding changes.
    """
    import torch

    state, least = {}, torch.finfo(torch.float32).smallest_normal
    for name, tensor in _load(LOCATION_ENCODER).items():
        level, _, rest = name.removeprefix("LocEnc").partition(".")
        layer, _, kind = rest.rpartition(".")
        ours = "frequencies" if rest == "capsule.0.b" else f"{LAYERS[layer]}.{kind}"
        state[f"levels.{level}.{ours}"] = tensor.masked_fill(tensor.abs() < least, 0)
    return state


def head_state() -> dict:
    """Return the released image head, 768 → 768 → 512: tensors under the keys `0.*` and `2.*`."""
    return dict(_load(HEAD))


def logit_scale() -> float:
    """Return the released s; similarities are multiplied by exp(s)."""
    return float(_load(TEMPERATURE))


def official_gallery() -> np.ndarray:
    """Return the authors' gallery, float64 (100000, 2) in (lat, lon) degrees; 94,123 of the points are distinct."""
    return np.loadtxt(io.BytesIO(_read(GALLERY)), delimiter=",", skiprows=1)


def clip_file() -> Path:
    """Return OpenAI's CLIP ViT-L/14 (1.7 GB) in the Hugging Face cache, downloading it at the first call."""
    import huggingface_hub as hub

    options = {"repo_id": CLIP_REPOSITORY, "filename": CLIP_FILE, "revision": CLIP_REVISION}
    try:
        path = Path(hub.hf_hub_download(**options, local_files_only=True))
    except OSError:
        try:
            # ask once: without a network, the download itself would retry for half a minute
            hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
            path = Path(hub.hf_hub_download(**options))
        except Exception as error:  # each HTTP library raises its own
            raise FileNotFoundError(
                f"CLIP ViT-L/14 ({CLIP_REPOSITORY}, {CLIP_FILE}, 1.7 GB) is not in {hub.constants.HF_HUB_CACHE} and "
                f"could not be downloaded ({_first_line(error)}). Without a network, copy the file and pass its path "
                "as clip_weights. The location encoder, the gallery and probes work without it"
            ) from error
    _check(path, paths.sha256(path), CLIP_SHA256)
    return path


def has_clip_file() -> bool:
    """Return whether clip_file() needs no network."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(CLIP_REPOSITORY, CLIP_FILE, revision=CLIP_REVISION), str)


def clip_at(path: Path | str) -> Path:
    """Return the path of a local CLIP file. Raises FileNotFoundError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP weights at {path}; give a .safetensors or .pt file")
    return path


def read_clip(path: Path | str) -> "dict[str, Tensor]":
    """Return the tensors of a local CLIP file under open_clip's names, without executing anything in it.

    Takes .safetensors, or PyTorch files of plain tensors, with Hugging Face's or open_clip's names.
    """
    import torch
    from safetensors.torch import load_file

    try:
        safe = Path(path).suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip readers each raise their own
        raise ValueError(
            f"{path} cannot be read as tensors without executing it ({_first_line(error)}); give a .safetensors "
            f"file, such as {CLIP_FILE} of {CLIP_REPOSITORY}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors; give a .safetensors file of CLIP")
    return _from_hugging_face(state) if "visual_projection.weight" in state else state


def _from_hugging_face(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Rename a Hugging Face CLIPModel's tensors as open_clip does; q, k and v become one matrix."""
    import torch

    names = tomllib.loads(Path(__file__).with_name("clip_names.toml").read_text(encoding="utf-8"))
    renamed = {}
    for name, tensor in state.items():
        if re.search(r"position_ids$|\.[kv]_proj\.(weight|bias)$", name):
            continue  # counters, and what is joined with the q of its layer
        if name in names["transposed"]:
            renamed[names["transposed"][name]] = tensor.T.contiguous()
            continue
        ours = name
        for theirs, part in names["parts"].items():
            ours = ours.replace(theirs, part)
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", ours):
            ours = f"{match[1]}.attn.in_proj_{match[2]}"
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        renamed[ours] = tensor
    return renamed


def _load(member: str):
    import torch  # takes seconds to import, and the set-up downloads without it

    return torch.load(io.BytesIO(_read(member)), map_location="cpu", weights_only=True)


def _read(member: str) -> bytes:
    """Return the bytes of one file of the wheel, which is checked before anything parses them."""
    with zipfile.ZipFile(authors_wheel()) as wheel:
        return wheel.read(member)


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        wrong = f"its SHA-256 is {found}, expected {expected}"
        raise ValueError(f"{path} is not the released file: {wrong}; delete it and run again")


def _download(wheel: Path) -> None:
    """Fetch the wheel with pip, which works wherever the dependencies could be installed from."""
    print(f"geoclip: fetching the authors' released weights (40 MB) into {wheel.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".fetch.") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{NAME}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        # a wheel runs no code while it is fetched
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
        command += ["--retries=2", "--timeout=20", "--requirement", str(requirements), "--dest", folder]
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        fetched = Path(folder) / WHEEL
        if ran.returncode or not fetched.exists():
            reason = re.search("^ERROR: (.+)", ran.stderr, re.MULTILINE)
            raise FileNotFoundError(
                f"the authors' released package is not at {wheel} and could not be downloaded (pip: "
                f"{reason[1] if reason else 'no message'}); connect to a package index once, or put {WHEEL} there "
                "yourself. Prediction with your own checkpoints still works"
            )
        _check(fetched, paths.sha256(fetched), WHEEL_SHA256)
        os.replace(fetched, wheel)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
