"""GeoCLIP, reproduced: where on Earth was a photo taken?

    from geoclip import GeoCLIP, embed_places

    gps, probability = GeoCLIP.pretrained().predict("photo.jpg", top_k=5)
    embedding = embed_places([[40.7128, -74.0060]])   # (1, 512), NumPy

Importing the package is light: torch and the rest come with the first name that needs them.
"""

import importlib
import warnings

# In notebooks, progress bars of libraries look for widgets that are not needed here.
warnings.filterwarnings("ignore", message="IProgress not found")

_PUBLIC = {
    "GPSEmbedding": "gps_embedding",
    "GeoCLIP": "model",
    "Gallery": "gallery",
    "ImageEncoder": "image_encoder",
    "ImageEncoderConfig": "config",
    "LocationEncoder": "location_encoder",
    "LocationEncoderConfig": "config",
    "embed_places": "gps_embedding",
    "TrainConfig": "training.config",
    "load_checkpoint": "training.checkpoints",
    "train": "training.runs",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"geoclip.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'geoclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
