"""The image encoder: an image tower, then a two-layer head into the space of the location embeddings.

Paper, section 3.1: CLIP ViT-L/14, frozen, and a trainable head. The embedded profile trains a small
convolutional tower from scratch instead, since CLIP's weights are not at hand everywhere.
"""

import contextlib
import copy
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from geoclip import photos
from geoclip.config import ImageEncoderConfig
from geoclip.location_encoder import initialise

CONV_TOWER = "conv"
TIMM = "timm/"


@dataclass(frozen=True)
class Preprocessing:
    """What a tower expects of an image: the one preprocessing behind training, embedding, prediction and evaluation.

    pixels: side p of the square input. resample: "bicubic" or "bilinear". mean, std: of the RGB channels in [0, 1].
    resize: "shortest" resizes the short side to p and cuts out the centre; "squash" resizes both sides to p.
    """

    pixels: int = 224
    resample: str = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize: str = "shortest"

    @classmethod
    def of(cls, config: ImageEncoderConfig) -> "Preprocessing":
        """The preprocessing of a tower, without loading it. Raises ValueError for an unknown tower.

        "conv" takes RGB in [-1, 1], as tiles are rendered. Local files and random weights of a CLIP tower take
        OpenAI's statistics, open_clip's default.
        """
        if config.tower == CONV_TOWER:
            return cls(32)
        if config.tower.startswith(TIMM):
            import timm

            known = timm.models.get_pretrained_cfg(timm_name(config.tower))
            data = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())
            return cls(data["input_size"][-1], data["interpolation"], tuple(data["mean"]), tuple(data["std"]))
        import open_clip

        clip_feature_dim(config.tower)
        released = open_clip.get_pretrained_cfg(config.tower, config.weights or "") or {}
        pixels = open_clip.get_model_config(config.tower)["vision_cfg"].get("image_size", 224)
        mean = released.get("mean", open_clip.OPENAI_DATASET_MEAN)
        std = released.get("std", open_clip.OPENAI_DATASET_STD)
        resize = released.get("resize_mode", "shortest")
        return cls(pixels, released.get("interpolation", "bicubic"), tuple(mean), tuple(std), resize)

    def crop(self, image: Image.Image) -> Image.Image:
        """The p × p pixels that the tower sees of an RGB image."""
        p = self.pixels
        if self.resize == "squash":
            return image.resize((p, p), self.filter)
        return photos.centre_crop(photos.resize(image, p, self.filter), p)

    @property
    def filter(self) -> Image.Resampling:
        """Pillow's name of `resample`."""
        return Image.Resampling[self.resample.upper()]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 p p"]:
        """The tower's input for one RGB image."""
        return self.normalise(torch.from_numpy(np.array(self.crop(image))).permute(2, 0, 1))

    def normalise(self, images: Tensor) -> Float[Tensor, "*n 3 p p"]:
        """Standardise RGB images (…, 3, p, p): uint8, or floats in [0, 1]."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class ConvTower(nn.Module):
    """Four strided convolutions for tiles of 32 to 64 px; on two cores as good as small ResNets, 3× as fast."""

    feature_dim = 4 * 256

    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 128, 256]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            # normalised over groups of channels, not over the batch: an image's feature is its own
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        # 32 px come out as 2 × 2; what lies in which corner is kept
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
        return self.layers(images)


class ImageEncoder(nn.Module):
    """Embeds images: tower (n, 3, h, w) → (n, c), head (n, c) → (n, d), not normalised.

    preprocess: PIL image → (3, h, w) for the tower (CLIP: bicubic to 224, centre crop, CLIP's statistics; "conv":
        bicubic to 32, centre crop, RGB in [-1, 1], as its tiles are rendered).
    feature_dim: c, 768 for ViT-L/14.
    """

    def __init__(
        self,
        config: ImageEncoderConfig | None = None,
        generator: torch.Generator | None = None,
        with_tower: bool = True,
    ):
        """with_tower: False leaves the tower out until load_tower, for training on features."""
        super().__init__()
        self.config = config = config or ImageEncoderConfig()
        self.preprocess = Preprocessing.of(config)
        self.tower: nn.Module | None = None
        self.dtype = torch.float32  # of a CLIP tower's arithmetic
        conv = config.tower == CONV_TOWER
        self.feature_dim = ConvTower.feature_dim if conv else clip_feature_dim(config.tower)
        if with_tower:
            self.load_tower()
        self.head = nn.Sequential(
            nn.Linear(self.feature_dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.dim)
        )
        initialise(self.head, generator)
        if conv and with_tower and config.weights is None:
            initialise(self.tower, generator)

    def load_tower(self) -> None:
        """Make the tower and its preprocessing, with the weights that the configuration names.

        Raises as load_clip and load_conv do, and ValueError for a frozen "conv" without weights.
        """
        config = self.config
        if config.tower != CONV_TOWER:
            self.tower = load_clip(config.tower, config.weights)
        elif config.weights is not None:
            self.tower = load_conv(config.weights)
        elif config.frozen:
            raise ValueError('the "conv" tower has no released weights: train it with frozen=False')
        else:
            self.tower = ConvTower()
        self.tower.requires_grad_(not config.frozen)

    def use_precision(self, chosen: str = "auto") -> None:
        """Replace a CLIP tower by itself in bfloat16 (in_bf16); it can be asked, and no longer trained.

        "conv" stays as it is: rounding it saves no time and moves one answer in twenty (LOG).
        """
        from geoclip import precision

        dtype = precision.choose(chosen, self.head[0].weight.device)
        if dtype == torch.float32 and self.dtype != dtype:
            raise ValueError("the model's tower is in bfloat16; load the model again to answer in float32")
        if self.config.tower != CONV_TOWER and self.dtype != dtype:
            self.tower.visual = in_bf16(self.tower.visual, self.head[0].weight.device)
            self.dtype = torch.bfloat16

    def train(self, mode: bool = True) -> "ImageEncoder":
        """As nn.Module.train, but a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen and self.tower is not None:
            self.tower.eval()
        return self

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
        """What the tower says of the images, before the head; for CLIP the projected, unnormalised feature."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            if hasattr(self.tower, "encode_image"):
                return self.tower.encode_image(images.to(self.dtype)).to(images.dtype)
            return self.tower(images)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embeddings (not normalised) of preprocessed images."""
        return self.head(self.features(images))


def in_bf16(visual: nn.Module, device: torch.device) -> nn.Module:
    """The tower in bfloat16, for answering and embedding: (n, 3, h, w) bfloat16 → (n, c).

    All of it: under autocast, with sums and norms in float32, a GPU took 1.4 times as long and the cosine to
    float32 was no better. On a CPU a CLIP tower runs as cpu_bf16 lays it out. The given one keeps its weights.
    """
    from geoclip import cpu_bf16, precision

    if precision.packs(device) and cpu_bf16.is_plain(visual):
        return cpu_bf16.Tower(visual)
    return copy.deepcopy(visual).to(torch.bfloat16)


def clip_feature_dim(tower: str) -> int:
    """Width of an open_clip model's projected feature; ValueError for a name open_clip does not know."""
    import open_clip

    config = open_clip.get_model_config(tower)
    if config is None:
        raise ValueError(f'no tower {tower!r}: give "conv" or one of open_clip.list_models()')
    return config["embed_dim"]


def load_conv(checkpoint: str) -> ConvTower:
    """The "conv" tower of a checkpoint of `python -m geoclip train`; nothing in the file is executed.

    Raises FileNotFoundError, or ValueError for a file without such a tower.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"no checkpoint at {checkpoint}: train the tower first, or give its last.ckpt"
        )
    prefix = "model.image_encoder.tower."
    tower = ConvTower()
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        tower.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    except Exception as error:
        raise ValueError(f'{checkpoint} holds no "conv" tower of a training run') from error
    return tower


def timm_name(tower: str) -> str:
    """The name after "timm/"; ValueError where timm has no such model."""
    import timm

    name = tower.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ValueError(f"no tower {tower!r}: {TIMM!r} may be followed by any of timm.list_models()")
    return name


def load_clip(tower: str, weights: str | None) -> nn.Module:
    """An open_clip model in evaluation mode.

    weights: "openai" (for the paper's tower the pinned file of geoclip.clip, downloaded at first use with
    progress, then kept), another of open_clip's tags, a local file in Hugging Face's or open_clip's naming, or
    None for random weights. Raises ValueError for an unknown tower or a file that does not fit it, and
    OSError, saying what still works, where weights cannot be had.
    """
    import open_clip

    from geoclip import clip

    clip_feature_dim(tower)
    state, tag = None, weights
    if weights == "openai" and tower == clip.TOWER:
        state, tag = clip.read(clip.released_file()), None
    elif weights is not None and ("/" in weights or Path(weights).suffix):
        state, tag = clip.read(weights), None
    try:
        with quiet_root(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # random weights are the same in every process
            model = open_clip.create_model(tower, pretrained=tag, pretrained_image=False, weights_only=True)
    except (OSError, RuntimeError) as error:  # open_clip wraps a failed download in a RuntimeError
        if tag is None:
            raise
        raise missing_clip(tower, weights, error) from error
    if state is not None:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        unlike = [name for name in shapes if name not in state or state[name].shape != shapes[name]]
        if unlike:
            raise ValueError(
                f"{weights} does not fit CLIP {tower}: {len(unlike)} of {len(shapes)} tensors are missing or of "
                f"another shape, such as {unlike[0]}"
            )
        model.load_state_dict(state)
    return model.eval()


@contextlib.contextmanager
def quiet_root():
    """Without open_clip's warning that a model was built with random weights, which is meant here."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def missing_clip(tower: str, weights: str | None, error: Exception) -> OSError:
    """The error for weights of another CLIP that are neither kept nor reachable."""
    return OSError(
        f"the {weights!r} weights of CLIP {tower} are not kept here and could not be downloaded "
        f"({str(error).splitlines()[0]}). With a network they are fetched at first use; without one, copy them "
        f"over and give their path as weights. Without them the location encoder, gallery, probes, maps and the embedded profile still work."
    )
