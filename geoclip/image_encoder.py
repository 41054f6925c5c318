"""The image encoder: a frozen image tower, then a two-layer head into the space of the location embeddings.

Paper, section 3.1: CLIP ViT-L/14 and a trainable head; for tiles, a small convolutional tower instead.
"""

import copy
import functools
import hashlib
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from geoclip import paths, photos, pretrained
from geoclip.config import ImageEncoderConfig
from geoclip.engines import openvino_tower
from geoclip.layers import initialise, mlp

CONV_TOWER = "conv"
TIMM = "timm/"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
Precision = Literal["auto", "fp32", "bf16", "int8"]


@dataclass(frozen=True)
class Preprocessing:
    """What a tower expects of an image: the one preprocessing behind training, embedding, prediction and evaluation."""

    pixels: int = 224  # side p of the square input
    resample: str = "bicubic"  # or "bilinear"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of the RGB channels in [0, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize: str = "shortest"  # the short side to p, then the centre is cut out; "squash": both sides to p

    @classmethod
    def of(cls, config: ImageEncoderConfig) -> "Preprocessing":
        """The preprocessing of a tower, without loading it.

        Local files and random weights of a CLIP tower take OpenAI's statistics, open_clip's default.
        """
        if config.tower == CONV_TOWER:
            return cls(32)  # RGB in [-1, 1], as tiles are rendered
        if config.tower.startswith(TIMM):
            import timm

            known = timm.models.get_pretrained_cfg(timm_name(config.tower))
            data = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())
            return cls(data["input_size"][-1], data["interpolation"], tuple(data["mean"]), tuple(data["std"]))
        if config.tower == pretrained.CLIP_TOWER:  # with any weights; importing open_clip would take seconds
            return cls(224, "bicubic", OPENAI_MEAN, OPENAI_STD)
        import open_clip

        feature_dim(config.tower)
        released = open_clip.get_pretrained_cfg(config.tower, config.weights or "") or {}
        pixels = open_clip.get_model_config(config.tower)["vision_cfg"].get("image_size", 224)
        mean, std = released.get("mean", OPENAI_MEAN), released.get("std", OPENAI_STD)
        how, resize = released.get("interpolation", "bicubic"), released.get("resize_mode", "shortest")
        return cls(pixels, how, tuple(mean), tuple(std), resize)

    def views(self, photo, ten_crop: bool = False) -> Float[Tensor, "v 3 p p"]:
        """The tower's input for each view of a photo (see photos.open_photo): the centre crop, or ten crops."""
        image = photos.open_photo(photo, self.pixels * 256 // 224 if ten_crop else self.pixels)
        crops = photos.ten_crop(image, self.pixels, self.filter) if ten_crop else [image]
        return torch.stack([self(crop) for crop in crops])

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
    """Four strided convolutions for tiles of 32 to 64 px; as accurate as small ResNets here and 3 times as fast."""

    feature_dim = 4 * 256

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, 32, 64, 128, 256)):
            # normalised over groups of channels and not over the batch, so that a feature depends on its image alone
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        # 32 px become 2 × 2, which keeps what lies in which corner
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
        return self.layers(images)


class ImageEncoder(nn.Module):
    """Embeds images: tower (n, 3, p, p) → (n, c), head (n, c) → (n, d), not normalised.

    generator: draws the initial weights. preprocess: PIL image → (3, p, p) for the tower. feature_dim: c, 768
    for ViT-L/14. tower: the PyTorch tower, loaded when it is needed if `with_tower` is False.
    """

    tower: nn.Module | None
    engine: Callable[[Tensor], Tensor] | None = None  # replaces the tower in inference
    precision = "fp32"

    def __init__(self, config: ImageEncoderConfig | None = None, generator=None, with_tower: bool = True):
        super().__init__()
        self.config = config = config or ImageEncoderConfig()
        self.preprocess = Preprocessing.of(config)
        self.feature_dim = feature_dim(config.tower)
        self.register_module("tower", None)  # before the head, as checkpoints order them
        self.head = mlp(self.feature_dim, config.hidden, config.dim)
        initialise(self.head, generator)
        if with_tower:
            self.load_tower(generator)

    def load_tower(self, generator: torch.Generator | None = None) -> nn.Module:
        """Return the PyTorch tower, building it with the configured weights at the first call."""
        config = self.config
        if self.tower is None:
            if config.tower.startswith(TIMM):
                self.tower = load_timm(config).eval()
            elif config.tower != CONV_TOWER:
                self.tower = load_clip(config.tower, config.weights)
            elif config.weights is not None:
                self.tower = load_conv(config.weights)
            elif config.frozen:
                raise ValueError('the "conv" tower has no released weights: train it with frozen=False')
            else:
                self.tower = ConvTower()
                initialise(self.tower, generator)
            self.tower.requires_grad_(not config.frozen).to(self.head[0].weight.device)
        return self.tower

    def use_precision(self, chosen: str = "auto") -> "ImageEncoder":
        """Choose the arithmetic and the engine of the tower for inference.

        "fp32" is plain PyTorch; "bf16" and "int8" run on a CPU through OpenVINO, and "bf16" on a GPU through
        PyTorch. "auto" takes bf16 where the hardware multiplies it, else fp32, through OpenVINO on a CPU. The
        "conv" tower and the head always stay in fp32. int8 has been checked on random weights only.
        """
        if chosen not in get_args(Precision):
            raise ValueError(f"no precision {chosen!r}: give one of {', '.join(get_args(Precision))}")
        device = self.head[0].weight.device.type
        openvino = device == "cpu" and openvino_tower.is_available()
        gpu_has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        automatic, self.engine, through = chosen == "auto", None, ""
        if self.config.tower == CONV_TOWER:
            automatic, chosen = False, "fp32"
        elif automatic:
            fast = openvino_tower.has_bf16() if openvino else gpu_has_bf16
            chosen = "bf16" if fast else "fp32"
        if openvino and (automatic or chosen != "fp32"):
            self.engine, through = self._openvino(chosen), " through OpenVINO"
        elif gpu_has_bf16 and chosen == "bf16":
            visual = copy.deepcopy(visual_part(self.load_tower())).bfloat16()
            self.engine = lambda images: visual(images.bfloat16()).to(images.dtype)
        elif chosen != "fp32":
            remedy = "use auto, or on a CPU `pip install openvino`"
            raise ValueError(f"precision {chosen} is not available on this device: {remedy}")
        if self.engine is None:
            self.load_tower()
            chosen, through = "fp32", ""
        if automatic:
            _report_once(f"precision auto: the image tower runs in {chosen}{through}")
        self.precision = chosen
        return self

    def _openvino(self, arithmetic: str) -> Callable[[Tensor], Tensor] | None:
        """Open this tower's OpenVINO model, converting it at first use; None if it cannot be converted."""
        # a file's hash is known without loading it; a loaded tower may come from a checkpoint
        file = clip_file(self.config.tower, self.config.weights) if self.tower is None else None
        digest = paths.sha256(file) if file else tower_hash(self.load_tower())
        key = f"{self.config.tower.replace('/', '-')}-{digest[:16]}"
        if (kept := openvino_tower.kept(key, arithmetic)) is None:
            visual, pixels = visual_part(self.load_tower()), self.preprocess.pixels
            calibration = self._calibration() if arithmetic == "int8" else []
            try:
                kept = openvino_tower.convert(visual, key, arithmetic, calibration, pixels)
            except RuntimeError as error:  # a tower that OpenVINO cannot express
                reason = str(error).strip().splitlines()[0]
                _report_once(f"{self.config.tower} runs in PyTorch: OpenVINO cannot convert it ({reason})")
                return None
        return openvino_tower.OpenVINOTower(kept, arithmetic)

    def _calibration(self) -> list[Tensor]:
        """Preprocessed crops of three real photos, (10, 3, p, p) each."""
        from sklearn.datasets import load_sample_images

        real = [*load_sample_images().images, pretrained.kauai()]
        return [self.preprocess.views(photo, ten_crop=True) for photo in real]

    def train(self, mode: bool = True) -> "ImageEncoder":
        """As nn.Module.train, except that a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen and self.tower is not None:
            self.tower.eval()
        return self

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
        """Backbone features: the tower's output before the head. CLIP's are projected and not normalised."""
        if self.engine is not None:
            return self.engine(images)
        tower = self.load_tower()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            return tower.encode_image(images) if hasattr(tower, "encode_image") else tower(images)

    def text_features(self, text: str | Sequence[str]) -> Float[Tensor, "n c"]:
        """CLIP's projected features of texts, not normalised."""
        import open_clip

        tower, name = self.load_tower(), self.config.tower
        if not hasattr(tower, "encode_text"):
            raise ValueError(f"the tower {name!r} cannot read text; only CLIP models can")
        tokens = open_clip.get_tokenizer(name)([text] if isinstance(text, str) else list(text))
        return tower.encode_text(tokens.to(self.head[0].weight.device))

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embeddings of preprocessed images, not normalised."""
        return self.head(self.features(images))


def feature_dim(tower: str) -> int:
    """Width c of a tower's feature. Raises ValueError for a name that neither open_clip nor timm knows."""
    if tower == CONV_TOWER:
        return ConvTower.feature_dim
    if tower.startswith(TIMM):
        import timm

        with torch.device("meta"):
            return timm.create_model(timm_name(tower), num_classes=0).num_features
    if tower == pretrained.CLIP_TOWER:
        return 768  # without importing open_clip, which takes seconds
    import open_clip

    if tower == pretrained.TINY_CLIP and tower not in open_clip.list_models():
        open_clip.add_model_config(Path(__file__).with_name(f"{tower}.json"))
    config = open_clip.get_model_config(tower)
    if config is None:
        raise ValueError(f'no tower {tower!r}: give "conv" or one of open_clip.list_models()')
    return config["embed_dim"]


def timm_name(tower: str) -> str:
    """The name after "timm/". Raises ValueError for one that timm does not know."""
    import timm

    name = tower.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ValueError(f"no tower {tower!r}: {TIMM!r} may be followed by any of timm.list_models()")
    return name


def load_timm(config: ImageEncoderConfig) -> nn.Module:
    """A timm model without its classifier; random weights are the same each time. OSError if there are none."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            return timm.create_model(
                timm_name(config.tower), pretrained=config.weights is not None, num_classes=0
            )
        except (OSError, RuntimeError) as error:
            reason = f"the weights of {config.tower} are not cached and could not be downloaded"
            remedy = "connect to the network once, or set image.weights to null for random weights"
            raise OSError(f"{reason}: {remedy}") from error


def visual_part(tower: nn.Module) -> nn.Module:
    """The half of a CLIP model that sees images; another tower whole."""
    return getattr(tower, "visual", tower)


def tower_hash(tower: nn.Module) -> str:
    """Hash of the weights that make image features; a CLIP model's text half does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(visual_part(tower).state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_conv(checkpoint: str) -> ConvTower:
    """The "conv" tower in a checkpoint of `geoclip train`; nothing in the file is executed."""
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}; give the last.ckpt of a trained tower")
    tower, prefix = ConvTower(), "model.image_encoder.tower."
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        tower.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    except Exception as error:
        raise ValueError(f'{checkpoint} does not hold the "conv" tower of a training run') from error
    return tower


def clip_file(tower: str, weights: str | None) -> Path | None:
    """The local file that a CLIP tower's weights come from; None for an open_clip tag or random weights."""
    if weights == "openai" and tower == pretrained.CLIP_TOWER:
        return pretrained.clip_file()
    if weights and ("/" in weights or Path(weights).suffix):
        return pretrained.clip_at(weights)
    return None


def load_clip(tower: str, weights: str | None) -> nn.Module:
    """An open_clip model in evaluation mode.

    weights: "openai" (for the paper's tower, the pinned file of pretrained.clip_file), another open_clip tag,
    a local file with Hugging Face's or open_clip's names, or None for random weights.
    """
    import open_clip

    feature_dim(tower)
    file = clip_file(tower, weights)
    state, tag = (pretrained.read_clip(file), None) if file else (None, weights)
    logging.disable(logging.WARNING)  # open_clip warns that weights are random, which is intended here
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # random weights are the same in every process
            model = open_clip.create_model(tower, pretrained=tag, pretrained_image=False, weights_only=True)
    except (OSError, RuntimeError) as error:  # open_clip wraps a failed download in a RuntimeError
        if tag is None:
            raise
        raise OSError(
            f"the {weights!r} weights of CLIP {tower} are not in the cache and could not be downloaded "
            f"({str(error).strip().splitlines()[0]}); without a network, pass the path of a copy as weights"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    if state is not None:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        unlike = [name for name in shapes if name not in state or state[name].shape != shapes[name]]
        if unlike:
            wrong = f"{len(unlike)} of {len(shapes)} tensors are missing or have another shape"
            raise ValueError(f"{weights} does not fit CLIP {tower}: {wrong}, such as {unlike[0]}")
        model.load_state_dict(state)
    return model.eval()


def warn_unless_released(weights: Path | str) -> None:
    """Warn, with the file's hash, if a CLIP file is not the one that the released model was trained with."""
    found, released = paths.sha256(pretrained.clip_at(weights)), pretrained.CLIP_SHA256
    if found != released:
        other = f"{weights} (SHA-256 {found[:16]}…) is not the released CLIP ViT-L/14 ({released[:16]}…)"
        _report_once(f"{other}: with other weights, the released model's answers mean nothing")


@functools.cache
def _report_once(message: str) -> None:
    print(f"geoclip: {message}", file=sys.stderr)
