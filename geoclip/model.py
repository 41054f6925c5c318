"""GeoCLIP: cosine similarity of an image's and a place's embeddings, times a learned temperature.

Paper, section 3 and figure 2.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from geoclip import gallery as galleries
from geoclip import photos, precision
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, Preprocessing
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig

if TYPE_CHECKING:
    from geoclip.place_index import PlaceIndex

NO_GALLERY = "the model has no gallery: give it one with use_gallery(Gallery(latlon))"


class GeoCLIP(nn.Module):
    """Image encoder, location encoder and temperature; with a gallery it answers where an image was taken.

    logit_scale: s, similarities are cosine × e^s; starts at ln(1 / 0.07) as in CLIP.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        location_encoder: LocationEncoder,
        gallery: Gallery | None = None,
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.location_encoder = location_encoder
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.gallery = gallery
        self._places: Tensor | None = None  # the gallery's embedding, made at first use
        self.index: PlaceIndex | None = None  # searched instead of all places, see use_index
        self.dtype = torch.float32

    @classmethod
    def build(
        cls,
        image: ImageEncoderConfig | None = None,
        location: LocationEncoderConfig | None = None,
        generator: torch.Generator | None = None,
        gallery: Gallery | None = None,
        with_tower: bool = True,
    ) -> "GeoCLIP":
        """A model of this shape, not trained; `generator` draws all that is not loaded."""
        images = ImageEncoder(image, generator, with_tower)
        return cls(images, LocationEncoder(location, generator), gallery)

    @classmethod
    def pretrained(
        cls, clip_weights: Path | str | None = None, precision: precision.Precision = "auto"
    ) -> "GeoCLIP":
        """The authors' released model with its 100 K gallery, in evaluation mode.

        Head, location encoder and temperature are fetched at first use (40 MB), CLIP ViT-L/14 too (1.7 GB)
        unless `clip_weights` names a local file of it. On the GPU where there is one. precision: of
        use_precision; "fp32" is the authors'.
        Raises OSError that says what is missing, where it would be put and what still works, and ValueError for
        a file that is not the released one.
        """
        from geoclip import pretrained

        config = ImageEncoderConfig(weights=str(clip_weights) if clip_weights else "openai")
        model = cls(ImageEncoder(config), LocationEncoder.pretrained(), Gallery.official())
        model.image_encoder.head.load_state_dict(pretrained.head_state())
        model.logit_scale.data.fill_(pretrained.logit_scale())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device).eval().use_precision(precision)

    def encode_images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of preprocessed images."""
        return self.encode_features(self.image_encoder.features(images))

    def encode_features(self, features: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of tower features that were computed before."""
        return functional.normalize(self.image_encoder.head(features), dim=-1)

    def encode_places(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of (lat, lon) degrees."""
        return functional.normalize(self.location_encoder(latlon), dim=-1)

    def encode_text(self, text: str | Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of texts, through CLIP's text tower and the images' head.

        Raises ValueError where the tower has no text.
        """
        import open_clip

        tower = self.image_encoder.tower
        if not hasattr(tower, "encode_text"):
            raise ValueError(f"the tower {self.image_encoder.config.tower!r} knows no text: only CLIP's do")
        tokens = open_clip.get_tokenizer(self.image_encoder.config.tower)(
            [text] if isinstance(text, str) else list(text)
        )
        return self.encode_features(tower.encode_text(tokens.to(self.logit_scale.device)))

    def forward(self, images: Float[Tensor, "n 3 h w"], latlon: Float[Tensor, "m 2"]) -> Float[Tensor, "n m"]:
        """Logits: cosine × e^s of every image with every place."""
        return self.logit_scale.exp() * self.encode_images(images) @ self.encode_places(latlon).T

    def train(self, mode: bool = True) -> "GeoCLIP":
        """As nn.Module.train; what is known of the gallery is dropped, since training changes it."""
        if mode:
            self._forget_places()
        return super().train(mode)

    def use_gallery(self, gallery: Gallery) -> "GeoCLIP":
        """Answer from `gallery` from now on."""
        self.gallery = gallery
        self._forget_places()
        return self

    def _forget_places(self) -> None:
        self._places = self.index = None

    def use_precision(self, chosen: precision.Precision = "auto") -> "GeoCLIP":
        """Answer in this precision from now on, on the present device; "auto" says once what it takes.

        bfloat16 replaces the image tower for good, so it is for answering, not for training. The head, the
        Fourier phase and the comparison of the best places stay in float32. Raises ValueError for float32 on a
        model that is in bfloat16.
        """
        dtype = precision.choose(chosen, self.logit_scale.device)
        if dtype == self.dtype:
            return self
        if dtype == torch.float32:
            raise ValueError("the model's tower is in bfloat16; load the model again to answer in float32")
        self.dtype = dtype
        self._forget_places()
        self.image_encoder.to_bf16()
        return self

    def places(self, keep: bool = False) -> Float[Tensor, "m d"]:
        """The gallery's unit-norm embedding, computed once; `keep` keeps it on disk too."""
        if self.gallery is None:
            raise ValueError(NO_GALLERY)
        if self._places is None:
            self._places = self.gallery.embed(self.location_encoder, keep, dtype=self.dtype)
        self._places = self._places.to(self.logit_scale.device)
        return self._places

    def use_index(self, probes: int = 32) -> "GeoCLIP":
        """Search this gallery approximately from now on (place_index); worth it beyond a few million places.

        Embeddings and index are kept on disk, and both mapped from there. Raises ImportError without faiss.
        """
        from geoclip.place_index import PlaceIndex

        if self.gallery is None:
            raise ValueError(NO_GALLERY)
        path = self.gallery.kept_at(self.location_encoder, self.dtype).with_suffix(".faiss")
        places = self.gallery.embed(self.location_encoder, keep=True, dtype=self.dtype)
        self.index = PlaceIndex(places, probes, path=path)
        return self

    @torch.inference_mode()
    def locate(
        self, query: Float[Tensor, "n d"], k: int = 1
    ) -> tuple[Float[Tensor, "n k 2"], Float[Tensor, "n k"]]:
        """The k best places of unit-norm queries (encode_images, encode_features): (lat, lon), probability.

        Probabilities are the softmax over the whole gallery (with an index: over what it found, so too high);
        they are not calibrated, and duplicates share. Raises ValueError for k larger than the gallery.
        """
        scale = self.logit_scale.exp().item()
        exact = None if self.dtype == torch.float32 else self._encode_rows
        if self.index is not None:
            score, index, total = self.index.scan(query, k, scale, exact)
        else:
            score, index, total = galleries.scan(query, self.places(), k, scale, exact)
        probability = (score * scale - total[:, None]).exp()
        return self.gallery.latlon[index.cpu()], probability

    def _encode_rows(self, index: Int[Tensor, "n w"]) -> Float[Tensor, "n w d"]:
        """Rows of the gallery, encoded again in float32: rounded, one in six best places was another (LOG)."""
        rows, where = index.unique(return_inverse=True)
        places = galleries.embed(self.location_encoder, self.gallery.latlon[rows.cpu()])
        return places.to(index.device)[where]

    def views(self, photo, ten_crop: bool = False) -> Float[Tensor, "v 3 h w"]:
        """What the tower sees of a photo: the centre, or the four corners and the centre, each also mirrored.

        The photo is whatever photos.open_photo takes. Raises photos.PhotoError.
        """
        image = photos.open_photo(photo)
        centre = self.image_encoder.preprocess(image)
        if not ten_crop:
            return centre[None]
        crops = photos.ten_crop(image, centre.shape[-1])
        return torch.stack([self.image_encoder.preprocess(crop) for crop in crops])

    @torch.inference_mode()
    def locate_views(
        self, views: Float[Tensor, "n v 3 h w"], k: int = 1
    ) -> tuple[Float[Tensor, "n k 2"], Float[Tensor, "n k"]]:
        """As locate, from v views of each photo: the mean of their logits, then the softmax."""
        latlon, probability = self.locate(self.encode_views(views), k)
        return latlon, probability.cpu()

    def encode_views(self, views: Float[Tensor, "n v 3 h w"]) -> Float[Tensor, "n d"]:
        """One query of each photo's views, the mean of their embeddings; of one view it is unit-norm."""
        views = views.to(self.logit_scale.device)
        # logits are linear in the query, so the mean of the queries gives the mean of the logits
        return self.encode_images(views.flatten(0, 1)).unflatten(0, views.shape[:2]).mean(1)

    def predict(
        self, photo, top_k: int = 5, ten_crop: bool = False, batch_size: int = 16
    ) -> tuple[Float[Tensor, "*n k 2"], Float[Tensor, "*n k"]]:
        """Where photos were taken: the top_k places (lat, lon) and their probabilities, best first.

        photo: one path, PIL image or array → (k, 2) and (k,); a list of them, or a folder of photos in order
        of their paths → (n, k, 2) and (n, k). The gallery's embedding is computed once and kept on disk.
        Raises photos.PhotoError for the first photo that cannot be used, ValueError for top_k > the gallery.
        """
        several = isinstance(photo, list | tuple)
        if isinstance(photo, str | Path) and Path(photo).is_dir():
            several, photo = True, photos.find_photos([photo])
        todo = list(photo) if several else [photo]
        if not todo:
            raise ValueError("there are no photos to predict: the list is empty")
        galleries.check_k(top_k, len(self.places(keep=True)))
        answers, step = [], max(1, batch_size // 10) if ten_crop else batch_size
        for start in range(0, len(todo), step):
            views = torch.stack([self.views(one, ten_crop) for one in todo[start : start + step]])
            answers.append(self.locate_views(views, top_k))
        latlon, probability = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return (latlon, probability) if several else (latlon[0], probability[0])

    @torch.inference_mode()
    def predict_text(
        self, text: str | Sequence[str], top_k: int = 5
    ) -> tuple[Float[Tensor, "*n k 2"], Float[Tensor, "*n k"]]:
        """The top_k places that a text fits best, (k, 2) and (k,); a list of texts gives (n, k, 2) and (n, k)."""
        self.places(keep=True)
        latlon, probability = self.locate(self.encode_text(text), top_k)
        probability = probability.cpu()
        return (latlon[0], probability[0]) if isinstance(text, str) else (latlon, probability)


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
            f"{path} is not a checkpoint of `python -m geoclip train`, or it is damaged ({type(error).__name__})"
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
    if kept := checkpoint.get("geoclip_gallery"):
        model.use_gallery(Gallery(kept["latlon"], kept["source"]))
    return model.eval()
