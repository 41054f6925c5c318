"""GeoCLIP: cosine similarity of an image's and a place's embeddings, times a learned temperature.

Paper, section 3 and figure 2.
"""

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from geoclip import gallery as galleries
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig


class GeoCLIP(nn.Module):
    """Image encoder, location encoder and temperature; with a gallery it answers where an image was taken.

    log_scale: s, similarities are cosine × e^s; starts at ln(1 / 0.07) as in CLIP.
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
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.gallery = gallery
        self._places: Tensor | None = None  # the gallery's embedding, made at first use

    @classmethod
    def build(
        cls,
        image: ImageEncoderConfig | None = None,
        location: LocationEncoderConfig | None = None,
        generator: torch.Generator | None = None,
        gallery: Gallery | None = None,
    ) -> "GeoCLIP":
        """A model of this shape, not trained; `generator` draws all that is not loaded."""
        return cls(ImageEncoder(image, generator), LocationEncoder(location, generator), gallery)

    def encode_images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of preprocessed images."""
        return functional.normalize(self.image_encoder(images), dim=-1)

    def encode_features(self, features: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of tower features that were computed before."""
        return functional.normalize(self.image_encoder.head(features), dim=-1)

    def encode_places(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        """Unit-norm embeddings of (lat, lon) degrees."""
        return functional.normalize(self.location_encoder(latlon), dim=-1)

    def forward(self, images: Float[Tensor, "n 3 h w"], latlon: Float[Tensor, "m 2"]) -> Float[Tensor, "n m"]:
        """Logits: cosine × e^s of every image with every place."""
        return self.log_scale.exp() * self.encode_images(images) @ self.encode_places(latlon).T

    def train(self, mode: bool = True) -> "GeoCLIP":
        """As nn.Module.train; what is known of the gallery is dropped, since training changes it."""
        if mode:
            self._places = None
        return super().train(mode)

    def use_gallery(self, gallery: Gallery) -> "GeoCLIP":
        """Answer from `gallery` from now on."""
        self.gallery, self._places = gallery, None
        return self

    def places(self, keep: bool = False) -> Float[Tensor, "m d"]:
        """The gallery's unit-norm embedding, computed once; `keep` keeps it on disk too."""
        if self.gallery is None:
            raise ValueError("the model has no gallery: give it one with use_gallery(Gallery(latlon))")
        if self._places is None:
            self._places = self.gallery.embed(self.location_encoder, keep=keep)
        return self._places

    @torch.inference_mode()
    def locate(
        self, query: Float[Tensor, "n d"], k: int = 1
    ) -> tuple[Float[Tensor, "n k 2"], Float[Tensor, "n k"]]:
        """The k best places of unit-norm queries (encode_images, encode_features): (lat, lon), probability.

        Probabilities are the softmax over the whole gallery; they are not calibrated, and duplicates share.
        Raises ValueError for k larger than the gallery.
        """
        places = self.places()
        galleries.check_k(k, len(places))
        logits = self.log_scale.exp() * query @ places.T
        probability, index = logits.softmax(-1).topk(k, dim=-1)
        return self.gallery.latlon[index.cpu()], probability


def load_checkpoint(path: Path | str) -> GeoCLIP:
    """The trained model in a checkpoint of `python -m geoclip train`, with its gallery, in evaluation mode.

    Raises FileNotFoundError, or ValueError for a checkpoint of another kind of model or configuration.
    """
    from geoclip import training

    return training.load(path).model.eval()
