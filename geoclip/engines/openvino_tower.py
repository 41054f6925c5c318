"""OpenVINO as the CPU engine of a frozen image tower.

A tower is converted once and kept in the cache. Later processes map it into memory in about a second, without
importing open_clip or reading the PyTorch weights.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor, nn

from geoclip import paths

IMAGES_AT_ONCE = 8  # larger batches are no faster on a CPU and need more memory


def is_available() -> bool:
    """Return whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def has_bf16() -> bool:
    """Return whether OpenVINO multiplies bfloat16 in hardware on this CPU (AVX-512 BF16 or AMX)."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOTower:
    """A converted tower as a function: images (n, 3, p, p) float32 → features (n, c) float32, on the CPU."""

    def __init__(self, path: Path, arithmetic: str):
        import openvino

        hint = "bf16" if arithmetic == "bf16" else "f32"
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        self.compiled = openvino.Core().compile_model(path, "CPU", options)

    def __call__(self, images: Float[Tensor, "n 3 p p"]) -> Float[Tensor, "n c"]:
        parts = images.detach().cpu().float().split(IMAGES_AT_ONCE)
        return torch.cat([torch.from_numpy(self.compiled(part.numpy())[0].copy()) for part in parts])


def kept(key: str, arithmetic: str) -> Path | None:
    """Return the model in the cache, or None; a damaged one is reported and removed."""
    folder = _folder(key, arithmetic)
    if not folder.exists():
        return None
    with contextlib.suppress(OSError, ValueError):
        if json.loads((folder / "sha256.json").read_text()) == _digests(folder):
            return folder / "tower.xml"
    warnings.warn(f"{folder} is damaged: the tower is converted again", stacklevel=2)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _digests(folder: Path) -> dict[str, str]:
    return {name: paths.sha256(folder / name) for name in ("tower.xml", "tower.bin")}


def convert(visual: nn.Module, key: str, arithmetic: str, calibration: Iterable[Tensor], pixels: int) -> Path:
    """Convert a tower (n, 3, p, p) → (n, c), unless the cache holds it, and return its file.

    calibration: batches of preprocessed photos, from which int8 takes its ranges. Weights are stored in half
    precision, as OpenAI released them, unless that would change them in fp32.
    """
    import openvino

    folder = _folder(key, arithmetic)
    paths.make_folder(folder.parent)
    with FileLock(folder.with_suffix(".lock")):
        if (there := kept(key, arithmetic)) is not None:
            return there
        model = openvino.convert_model(_traced(visual, pixels), input=[-1, 3, pixels, pixels])
        if arithmetic == "int8":
            model = _to_int8(model, calibration)
        halved = arithmetic != "fp32" or all(torch.equal(w, w.half().float()) for w in visual.parameters())
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            openvino.save_model(model, temporary / "tower.xml", compress_to_fp16=halved)
            (temporary / "sha256.json").write_text(json.dumps(_digests(temporary)))
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / "tower.xml"


def _folder(key: str, arithmetic: str) -> Path:
    return paths.CACHE / "towers" / f"{key}-{arithmetic}"


def _traced(visual: nn.Module, pixels: int):
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # OpenVINO does not know the fused operator
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated, and fixes shapes that are constant here
            return torch.jit.trace(visual, torch.zeros(1, 3, pixels, pixels), check_trace=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _to_int8(model, calibration: Iterable[Tensor]):
    try:
        import nncf
    except ImportError as error:
        raise ImportError("int8 needs nncf: pip install nncf") from error
    images = nncf.Dataset([batch.numpy() for batch in calibration])
    return nncf.quantize(model, images, model_type=nncf.ModelType.TRANSFORMER)
