"""GeoCLIP: the cosine similarity of an image's and a place's embeddings, times a learned temperature.

Paper, section 3 and figure 2.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from geoclip import gallery as galleries
from geoclip import photos, predictor
from geoclip.gallery import Gallery
from geoclip.image_encoder import (
    ImageEncoder,
    ImageEncoderConfig,
    Preprocessing,
    tower_hash,
    warn_unless_released,
)
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig

if TYPE_CHECKING:
    from geoclip.engines.place_index import PlaceIndex


class GeoCLIP(nn.Module):
    """Image encoder, location encoder and temperature. With a gallery, it predicts where images were taken.

    logit_scale: s; a logit is cosine × e^s. It starts at ln(1 / 0.07), as in CLIP.
    """

    gallery: Gallery | None
    index: "PlaceIndex | None"  # see use_index
    _places: Tensor | None  # the gallery's embeddings, computed at first use

    def __init__(
        self, image_encoder: ImageEncoder, location_encoder: LocationEncoder, gallery: Gallery | None = None
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.location_encoder = location_encoder
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.use_gallery(gallery)

    @classmethod
    def build(
        cls,
        image: ImageEncoderConfig | None = None,
        location: LocationEncoderConfig | None = None,
        generator: torch.Generator | None = None,
        gallery: Gallery | None = None,
        with_tower: bool = True,
    ) -> "GeoCLIP":
        """An untrained model of these configurations. `generator` draws all weights that are not loaded."""
        images = ImageEncoder(image, generator, with_tower)
        return cls(images, LocationEncoder(location, generator), gallery)

    @classmethod
    def pretrained(cls, clip_weights: Path | str | None = None, precision: str = "auto") -> "GeoCLIP":
        """The authors' released model with their 100 K gallery, in evaluation mode, on a GPU if there is one.

        Downloads the authors' weights (40 MB) and CLIP ViT-L/14 (1.7 GB) at first use. clip_weights: a local
        file of CLIP's weights instead. precision: see use_precision. Raises OSError, which names what is
        missing and where it belongs, if a download fails, and ValueError for a file that is not the released
        one.
        """
        from geoclip import pretrained

        config = ImageEncoderConfig(weights=str(clip_weights) if clip_weights else "openai")
        if clip_weights:
            warn_unless_released(clip_weights)
        model = cls(ImageEncoder(config, with_tower=False), LocationEncoder.pretrained(), Gallery.official())
        model.image_encoder.head.load_state_dict(pretrained.head_state())
        model.logit_scale.data.fill_(pretrained.logit_scale())
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().use_precision(precision)

    def encode_images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of preprocessed images."""
        return self.encode_features(self.image_encoder.features(images))

    def encode_features(self, features: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of precomputed tower features."""
        return functional.normalize(self.image_encoder.head(features), dim=-1)

    def encode_places(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of (lat, lon) degrees."""
        return functional.normalize(self.location_encoder(latlon), dim=-1)

    def encode_text(self, text: str | Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of texts: CLIP's text tower, then the image head.

        Raises ValueError if the image tower is not a CLIP model.
        """
        import open_clip

        tower, name = self.image_encoder.load_tower(), self.image_encoder.config.tower
        if not hasattr(tower, "encode_text"):
            raise ValueError(f"the tower {name!r} cannot read text; only CLIP models can")
        tokens = open_clip.get_tokenizer(name)([text] if isinstance(text, str) else list(text))
        return self.encode_features(tower.encode_text(tokens.to(self.logit_scale.device)))

    def forward(self, images: Float[Tensor, "n 3 h w"], latlon: Float[Tensor, "m 2"]) -> Float[Tensor, "n m"]:
        """Logits, cosine × e^s, of every image with every place."""
        return self.logit_scale.exp() * self.encode_images(images) @ self.encode_places(latlon).T

    def train(self, mode: bool = True) -> "GeoCLIP":
        """As nn.Module.train. Training changes the gallery's embeddings, so they are discarded."""
        if mode:
            self._places = self.index = None
        return super().train(mode)

    def use_gallery(self, gallery: Gallery | None) -> "GeoCLIP":
        """Answers from `gallery` from now on."""
        self.gallery = gallery
        self._places = self.index = None
        return self

    def use_precision(self, precision: str = "auto") -> "GeoCLIP":
        """Sets the arithmetic of the image tower (ImageEncoder.use_precision); the rest stays in float32."""
        self.image_encoder.use_precision(precision)
        return self

    def use_index(self, probes: int = 32) -> "GeoCLIP":
        """Searches the gallery approximately from now on (PlaceIndex). Raises ImportError without faiss."""
        from geoclip.engines.place_index import PlaceIndex

        gallery = self._known_gallery()
        path = gallery.kept_at(self.location_encoder).with_suffix(".faiss")
        self.index = PlaceIndex(gallery.embed(self.location_encoder, keep=True), probes, path=path)
        return self

    def places(self, keep: bool = False) -> Float[Tensor, "m d"]:
        """The gallery's unit-norm embeddings, computed once: float32 on a CPU, float16 on a GPU.

        The best place in float16 is that in float32 for 99 % of queries, and within 1 km of it for 99.9 %.
        keep: store them on disk, see Gallery.embed. Raises ValueError without a gallery.
        """
        places, device = self._places, self.logit_scale.device
        if places is None:
            places = self._known_gallery().embed(self.location_encoder, keep)
        self._places = places.to(device, torch.float16 if device.type == "cuda" else torch.float32)
        return self._places

    def _known_gallery(self) -> Gallery:
        if self.gallery is None:
            raise ValueError("the model has no gallery; give it one with use_gallery(Gallery(latlon))")
        return self.gallery

    def views(self, photo, ten_crop: bool = False) -> Float[Tensor, "v 3 h w"]:
        """The preprocessed views of a photo: the centre crop, or ten crops (photos.ten_crop).

        photo: anything that photos.open_photo accepts. Raises photos.PhotoError.
        """
        preprocess = self.image_encoder.preprocess
        side = preprocess.pixels * 256 // 224 if ten_crop else preprocess.pixels
        image = photos.open_photo(photo, side)
        crops = photos.ten_crop(image, preprocess.pixels) if ten_crop else [image]
        return torch.stack([preprocess(crop) for crop in crops])

    def encode_views(self, views: Float[Tensor, "n v 3 h w"]) -> Float[Tensor, "n d"]:
        """One query per photo, the mean of its views' embeddings, which averages the views' logits too."""
        views = views.to(self.logit_scale.device)
        return self.encode_images(views.flatten(0, 1)).unflatten(0, views.shape[:2]).mean(1)

    @torch.inference_mode()
    def scores(self, query: Float[Tensor, "n d"] | Float[Tensor, "n v 3 h w"]) -> Float[Tensor, "n m"]:
        """Logits, cosine × e^s, of all gallery places. query: as in `locate`. Takes 4 n m bytes."""
        query = self.encode_views(query) if query.ndim == 5 else query
        logits = self.logit_scale.exp() * galleries.products(self.places(), query).T
        galleries.check_finite(logits)
        return logits

    @torch.inference_mode()
    def locate(
        self, query: Float[Tensor, "n d"] | Float[Tensor, "n v 3 h w"], k: int = 1
    ) -> tuple[Float[Tensor, "n k 2"], Float[Tensor, "n k"]]:
        """The k best places of each query, (lat, lon), and their probabilities, best first.

        query: embeddings (encode_images, encode_text), or the views of n photos. Probabilities are the
        softmax over the whole gallery, or with an index over the places found, which makes them upper bounds.
        They are not calibrated, and duplicate places share theirs. Raises ValueError if k is larger than the
        gallery.
        """
        query = self.encode_views(query) if query.ndim == 5 else query
        scale = self.logit_scale.exp().item()
        if self.index is not None:
            score, index, total = self.index.scan(query, k, scale)
        else:
            score, index, total = galleries.scan(query, self.places(), k, scale)
        probability = (score * scale - total[:, None]).exp()
        galleries.check_finite(probability)
        return self._known_gallery().latlon[index.cpu()], probability

    def predict(
        self, photo, top_k: int = 5, ten_crop: bool = False, batch_size: int = 16
    ) -> tuple[Float[Tensor, "*n k 2"], Float[Tensor, "*n k"]]:
        """The top_k places where photos were taken, (lat, lon), and their probabilities, best first.

        photo: one path, PIL image or array gives (k, 2) and (k,); a list of them, or a folder of photos in
        the order of their paths, gives (n, k, 2) and (n, k). The gallery's embeddings are computed once and
        stored on disk. Raises photos.PhotoError for the first photo that cannot be used.
        """
        several = isinstance(photo, list | tuple)
        if isinstance(photo, str | Path) and Path(photo).is_dir():
            several, photo = True, photos.find_photos([photo])
        todo = list(photo) if several else [photo]
        if not todo:
            raise ValueError("there are no photos to predict: the list is empty")
        galleries.check_k(top_k, len(self.places(keep=True)))
        found = predictor.answer(self, todo, top_k, ten_crop, batch_size, strict=True)
        return (found.latlon, found.probability) if several else (found.latlon[0], found.probability[0])

    def predict_text(
        self, text: str | Sequence[str], top_k: int = 5
    ) -> tuple[Float[Tensor, "*n k 2"], Float[Tensor, "*n k"]]:
        """The top_k places that fit a text best, (k, 2) and (k,), or for a list (n, k, 2) and (n, k)."""
        self.places(keep=True)
        with torch.inference_mode():
            latlon, probability = self.locate(self.encode_text(text), top_k)
        return (latlon[0], probability[0].cpu()) if isinstance(text, str) else (latlon, probability.cpu())


def load_checkpoint(path: Path | str, clip_weights: Path | str | None = None) -> GeoCLIP:
    """Load the model of a checkpoint of `python -m geoclip train`, with its gallery, in evaluation mode.

    clip_weights: a local file to read a frozen tower's weights from, if it was trained on features. Raises as
    read_checkpoint and ImageEncoder.load_tower do.
    """
    checkpoint = read_checkpoint(path)
    try:
        return from_checkpoint(checkpoint, clip_weights=clip_weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint of `python -m geoclip train`; nothing in the file is executed.

    Raises FileNotFoundError, or ValueError for another file or for weights that are not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint["state_dict"]
        checkpoint["geoclip_config"]["image"]  # of all models
    except Exception as error:  # torch's own message may advise to load the file unsafely
        raise ValueError(
            f"{path} is not a checkpoint of `python -m geoclip train`, or is damaged ({type(error).__name__})"
        ) from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite; use another checkpoint")
    return checkpoint


def from_checkpoint(
    checkpoint: dict[str, Any], with_tower: bool = True, clip_weights: Path | str | None = None
) -> GeoCLIP:
    """Build the model of a checkpoint that was read. with_tower: False leaves the image tower out.

    Raises ValueError if the checkpoint holds another model, or weights that do not fit its configuration.
    """
    config, prefix = checkpoint["geoclip_config"], "model."
    if (kind := config.get("model", "geoclip")) != "geoclip":
        raise ValueError(f"the checkpoint holds the model {kind!r}, not GeoCLIP")
    image = ImageEncoderConfig(**config["image"])
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix) and (with_tower or not name.startswith(f"{prefix}image_encoder.tower."))
    }
    brings_tower = any(name.startswith("image_encoder.tower.") for name in weights)
    if brings_tower:  # no pretrained weights are needed
        encoder = ImageEncoder(dataclasses.replace(image, weights=None, frozen=False))
        encoder.config, encoder.preprocess = image, Preprocessing.of(image)
    else:
        weights_file = str(clip_weights) if clip_weights else image.weights
        encoder = ImageEncoder(dataclasses.replace(image, weights=weights_file), with_tower=False)
    model = GeoCLIP(encoder, LocationEncoder(LocationEncoderConfig(**config["location"])))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit its configuration: {error}") from error
    if with_tower and not brings_tower:
        encoder.load_tower()
        if checkpoint.get("geoclip_tower") not in (None, tower_hash(encoder.tower)):
            raise ValueError(
                f"weights {weights_file!r} of {image.tower} are not those that the model was trained with: name the "
                f"right file with --clip-weights"
            )
    if kept := checkpoint.get("geoclip_gallery"):
        model.use_gallery(Gallery(kept["latlon"], kept["source"]))
    return model.eval()
