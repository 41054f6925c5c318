"""GeoCLIP: the cosine similarity of an image's and a place's embeddings, times a learned temperature.

Paper, section 3 and figure 2.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from geoclip import gallery as galleries
from geoclip import photos, predictor, pretrained
from geoclip.engines.place_index import PlaceIndex
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, warn_unless_released
from geoclip.location_encoder import LocationEncoder


class GeoCLIP(nn.Module):
    """Image encoder, location encoder and temperature. With a gallery, it predicts where images were taken.

    logit_scale: s; a logit is cosine × e^s. It starts at ln(1 / 0.07), as in CLIP.
    """

    gallery: Gallery | None
    index: PlaceIndex | None  # searches the gallery approximately where it is set
    _places: Tensor | None  # the gallery's embeddings, computed at first use

    def __init__(self, image_encoder: ImageEncoder, location_encoder: LocationEncoder, gallery=None):
        super().__init__()
        self.image_encoder = image_encoder
        self.location_encoder = location_encoder
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.use_gallery(gallery)

    @classmethod
    def pretrained(cls, clip_weights: Path | str | None = None, precision: str = "auto") -> "GeoCLIP":
        """The authors' released model with their 100 K gallery, in evaluation mode, on a GPU if there is one.

        Downloads the authors' weights (40 MB) and CLIP ViT-L/14 (1.7 GB) at first use. clip_weights: a local
        file of CLIP's weights instead. precision: of the image tower, see ImageEncoder.use_precision.
        """
        if clip_weights:
            warn_unless_released(clip_weights)
        config = ImageEncoderConfig(weights=str(clip_weights or "openai"))
        model = cls(ImageEncoder(config, with_tower=False), LocationEncoder.pretrained(), Gallery.official())
        model.image_encoder.head.load_state_dict(pretrained.head_state())
        model.logit_scale.data.fill_(pretrained.logit_scale())
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        model.image_encoder.use_precision(precision)
        return model

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
        """Unit-norm embeddings of texts, from CLIP's text tower. Raises ValueError for another tower."""
        return self.encode_features(self.image_encoder.text_features(text))

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

    def places(self, keep: bool = False) -> Float[Tensor, "m d"]:
        """The gallery's unit-norm embeddings, computed once: float32 on a CPU, float16 on a GPU.

        The best place in float16 is that in float32 for 99 % of queries, and within 1 km of it for 99.9 %.
        keep: store them on disk, see Gallery.embed.
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
        """The preprocessed views of a photo; see Preprocessing.views."""
        return self.image_encoder.preprocess.views(photo, ten_crop)

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
        They are not calibrated, and duplicate places share theirs.
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
        the order of their paths, gives (n, k, 2) and (n, k). The gallery's embeddings are stored on disk.
        """
        if isinstance(photo, str | Path) and Path(photo).is_dir():
            photo = photos.find_photos([photo])
        if not isinstance(photo, list | tuple):
            latlon, probability = self.predict([photo], top_k, ten_crop)
            return latlon[0], probability[0]
        if not photo:
            raise ValueError("there are no photos to predict: the list is empty")
        galleries.check_k(top_k, len(self.places(keep=True)))
        found = predictor.answer(self, photo, top_k, ten_crop, batch_size, strict=True)
        return found.latlon, found.probability

    @torch.inference_mode()
    def predict_text(
        self, text: str | Sequence[str], top_k: int = 5
    ) -> tuple[Float[Tensor, "*n k 2"], Float[Tensor, "*n k"]]:
        """The top_k places that fit a text best, (k, 2) and (k,), or for a list (n, k, 2) and (n, k)."""
        self.places(keep=True)
        latlon, probability = self.locate(self.encode_text(text), top_k)
        return (latlon[0], probability[0].cpu()) if isinstance(text, str) else (latlon, probability.cpu())
