"""GPS embeddings for other tasks: `embed_places`, and `GPSEmbedding` for scikit-learn's pipelines::

    embedding = embed_places([[48.8566, 2.3522], [-33.8688, 151.2093]])       # (2, 512), NumPy

Three ways to use the encoder without this package; all take (lat, lon) degrees of any number of places::

    encoder, places = LocationEncoder.pretrained(), torch.zeros(2, 2)
    encoder.double_phase = True
    n = {0: torch.export.Dim("n", min=1)}
    torch.jit.trace(encoder, places, check_trace=False).save("encoder.pt")
    torch.export.save(torch.export.export(encoder, (places,), dynamic_shapes=(n,)), "encoder.pt2")
    torch.onnx.export(encoder, (places,), "encoder.onnx", dynamic_shapes=(n,), external_data=False)

With the phase in float64, ONNX Runtime and PyTorch agree to 1e-5 in every value (the largest is 0.09). In float32, as
the authors compute it, a phase of thousands of radians at σ 2⁸ is rounded: one value in a hundred then differs by up
to 4e-5 between libraries or processors. Exporting to ONNX needs `pip install onnx onnxscript`. None of the three
checks the coordinates or wraps 180°.
"""

import copy
import functools
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from tqdm import tqdm

from geoclip import earth
from geoclip.location_encoder import LocationEncoder

LEVELS = ("sum", "each", "concat", "best")
DTYPES = ("float32", "bfloat16", "float16")
PROGRESS_ABOVE = 100_000  # places
BEST_FITTED_ON = 4096  # places
BEST_SECOND = 0.25  # standard deviation of the second level's part of "best", relative to the first's


def embed_places(
    latlon,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = torch.float32,
    levels: str = "sum",
    encoder: LocationEncoder | Path | str = "released",
) -> Float[Tensor, "n ..."] | Float[np.ndarray, "n ..."]:
    """Embeddings of places, not normalised and without gradients, computed in batches.

    A tensor gives a tensor on its device, anything else a NumPy array. Beside the result, which takes 2 GB
    per million places, a million take less than 0.3 GB, which `bench.py --only embedding` measures. On a
    terminal, more than 100,000 places show their progress.

    Args:
        latlon: (n, 2) array, tensor or list of (lat, lon) in degrees, or a DataFrame with columns `lat` and
            `lon`. Longitudes above 180 and up to 360, as climate data have them, are wrapped.
        batch_size: Places computed at once; by default 512 on a CPU, whose cache holds them, else 8,192.
        device: Where to compute; "auto" is the device of a given encoder, else a GPU if there is one.
        dtype: Precision of the MLPs and of the result: float32, bfloat16 or float16. The phase of the Fourier
            features stays in float32. NumPy has no bfloat16, so its arrays are float32 then.
        levels: "sum" (n, d), as the model uses it; "each" (n, s, d), one embedding for each σ; "concat"
            (n, s × d), the same side by side, of which a linear model can read more than of their sum; or
            "best" (n, d), principal components of the two smallest σ, 3 d / 4 and d / 4, from which a linear
            model reads more than from the sum (notebooks 10 and 17). They are fitted in each call, in about
            a second, on places spread evenly over the Earth, without labels.
        encoder: "released", a checkpoint of `python -m geoclip train`, or a LocationEncoder.

    Raises ValueError, with the row and the value, for coordinates that are missing or out of range, and for
    "best" in half precision or of an encoder with a single σ.
    """
    if levels not in LEVELS:
        raise ValueError(f"levels is {levels!r}; choose from {', '.join(LEVELS)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; choose from {', '.join(DTYPES)}")
    dtype = getattr(torch, name)
    places = check_places(latlon)
    encoder = load_encoder(encoder, device)
    if levels == "best" and dtype != torch.float32:
        raise ValueError(f"levels best needs float32, not {name}, whose rounding it would amplify")
    maps = _best_maps(encoder) if levels == "best" else []
    at, each = next(encoder.parameters()).device, (len(encoder.levels), encoder.config.dim)
    shape = {"sum": each[1:], "each": each, "concat": (each[0] * each[1],), "best": each[1:]}[levels]
    batch_size = batch_size or (512 if at.type == "cpu" else 8192)
    found = torch.empty(len(places), *shape, dtype=dtype, device=places.device)
    with (
        torch.inference_mode(),
        torch.autocast(at.type, dtype, enabled=dtype != torch.float32),
        tqdm(total=len(places), unit="place", disable=None if len(places) > PROGRESS_ABOVE else True) as bar,
    ):
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size].to(at, torch.float32)
            if levels == "best":
                xy = encoder.project(batch)
                part = sum(encoder.levels[i](xy).float() @ weight + bias for i, weight, bias in maps)
            else:
                part = encoder(batch) if levels == "sum" else encoder.by_level(batch).movedim(0, 1)
            found[start : start + batch_size] = part.reshape(len(batch), *shape)
            bar.update(len(batch))
    if isinstance(latlon, Tensor):
        return found
    return (found.float() if dtype == torch.bfloat16 else found).numpy()


@torch.inference_mode()
def _best_maps(encoder: LocationEncoder) -> list[tuple[int, Tensor, Tensor]]:
    """(level, weight (d, d), bias (d,)) of the two smallest σ: "best" is the sum of level @ weight + bias.

    Each level's principal components are divided by the square root of their standard deviation. Whitening, which
    divides by the standard deviation itself, is too rough where places are few. The rotation at the end keeps a
    scaler of the columns from whitening them after all.
    """
    sigmas, d = encoder.config.sigmas, encoder.config.dim
    if len(sigmas) < 2:
        raise ValueError(f"levels best needs an encoder with at least two σ; this one has {sigmas}")
    turn = np.arange(BEST_FITTED_ON) + 0.5  # a Fibonacci lattice: each place stands for the same area
    lat = np.degrees(np.arcsin(1 - 2 * turn / BEST_FITTED_ON))
    lon = turn * 180 * (3 - math.sqrt(5)) % 360 - 180
    at = next(encoder.parameters()).device
    xy = encoder.project(torch.from_numpy(np.column_stack([lat, lon])).to(at, torch.float32))
    order = sorted(range(len(sigmas)), key=sigmas.__getitem__)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0] * math.sqrt(d)
    maps = []
    for level, scale, rows in zip(order, (1, BEST_SECOND), np.split(rotation, [d - d // 4]), strict=False):
        pca = PCA(len(rows), svd_solver="covariance_eigh").fit(encoder.levels[level](xy).cpu().double())
        spread = np.sqrt(pca.explained_variance_)
        weight = pca.components_.T / np.sqrt(spread) @ rows * scale / math.sqrt(spread.sum())
        maps.append(
            (level, *(torch.from_numpy(a).to(at, torch.float32) for a in (weight, -pca.mean_ @ weight)))
        )
    return maps


def check_places(latlon) -> Float[Tensor, "n 2"]:
    """The places of `embed_places` as a tensor with longitude in [-180, 180). Raises as it does."""
    if hasattr(latlon, "columns"):  # a DataFrame: the names say which column is which
        if missing := [name for name in ("lat", "lon") if name not in latlon]:
            raise ValueError(
                f"the DataFrame has no column {' and '.join(missing)}, only {', '.join(map(str, latlon))}; "
                "rename its columns, or pass an array of (lat, lon)"
            )
        latlon = latlon[["lat", "lon"]].to_numpy(np.float64, na_value=np.nan)
    if not isinstance(latlon, Tensor):
        latlon = torch.from_numpy(np.array(latlon, dtype=np.float64))
    if latlon.ndim != 2 or latlon.shape[1] != 2:
        raise ValueError(f"expected places of shape (n, 2), (lat, lon) in degrees; got {tuple(latlon.shape)}")
    lat, lon = latlon.unbind(1)
    return earth.check_latlon(
        torch.stack([lat, torch.where((lon > 180) & (lon <= 360), lon - 360, lon)], 1), "places"
    )


def load_encoder(
    encoder: LocationEncoder | Path | str = "released", device: str | torch.device = "auto"
) -> LocationEncoder:
    """A location encoder in evaluation mode: "released", that of a checkpoint, or the given one.

    device: see `embed_places`; a given encoder stays where it is, and a copy is moved. Raises as
    read_checkpoint does.
    """
    if isinstance(encoder, LocationEncoder):
        here = next(encoder.parameters()).device
        if device == "auto" or here == torch.device(device):
            return encoder
        loaded = copy.deepcopy(encoder)
    else:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if encoder == "released":
            return _released(str(device))
        from geoclip.training.checkpoints import from_checkpoint, read_checkpoint

        loaded = from_checkpoint(read_checkpoint(encoder), with_tower=False).location_encoder
    return loaded.to(device).eval()


@functools.cache
def _released(device: str) -> LocationEncoder:
    return LocationEncoder.pretrained().to(device)


def column_names(encoder: LocationEncoder, levels: str = "sum") -> list[str]:
    """Names of the columns: gps_0 … of "sum", gps_best_0 … of "best", gps_sigma16_0 … of "concat" with σ."""
    sigmas = encoder.config.sigmas if levels == "concat" else ()
    prefixes = [f"gps_sigma{sigma:g}" for sigma in sigmas] or ["gps_best" if levels == "best" else "gps"]
    return [f"{prefix}_{i}" for prefix in prefixes for i in range(encoder.config.dim)]


class GPSEmbedding(TransformerMixin, BaseEstimator):
    """Embeds (lat, lon), as a step of a scikit-learn pipeline.

    Nothing is learned from the data, so the embedding itself cannot leak from the test places. Only the
    parameters are pickled, never the released weights. In a search over other steps, `memory=` of the
    pipeline keeps the embeddings.

    Args:
        levels: "sum", "concat" or "best", see `embed_places`; so are encoder, batch_size, device and dtype.
        lat, lon: Columns of a DataFrame; its other columns are not used. An array has exactly these two.

    >>> import numpy as np
    >>> from sklearn.linear_model import Ridge
    >>> from sklearn.model_selection import cross_val_score
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> rng = np.random.default_rng(0)
    >>> places = np.column_stack([rng.uniform(-60, 60, 400), rng.uniform(-180, 180, 400)])
    >>> height = np.cos(np.deg2rad(places[:, 0])) * np.sin(np.deg2rad(places[:, 1]))
    >>> pipeline = make_pipeline(GPSEmbedding("concat"), StandardScaler(), Ridge(100))
    >>> bool(cross_val_score(pipeline, places, height).mean() > 0.85)
    True
    """

    def __init__(
        self,
        levels: str = "sum",
        encoder: LocationEncoder | Path | str = "released",
        lat: str = "lat",
        lon: str = "lon",
        batch_size: int | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ):
        self.levels, self.encoder, self.lat, self.lon = levels, encoder, lat, lon
        self.batch_size, self.device, self.dtype = batch_size, device, dtype

    def fit(self, X, y=None) -> "GPSEmbedding":
        """Checks the parameters and the places; raises ValueError as `embed_places` does."""
        if self.levels not in ("sum", "concat", "best"):
            raise ValueError(f"levels is {self.levels!r}; a transformer takes sum, concat or best")
        check_places(self._select(X, reset=True))
        self.names_ = column_names(load_encoder(self.encoder, self.device), self.levels)
        return self

    def transform(self, X) -> Float[np.ndarray, "n d"]:
        """The embeddings of the places; raises ValueError as `embed_places` does."""
        check_is_fitted(self)
        X = self._select(X, reset=False)
        return embed_places(X, self.batch_size, self.device, self.dtype, self.levels, self.encoder)

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        """Names of the columns: gps_0 …, gps_best_0 … for "best", or gps_sigma16_0 … for "concat"."""
        check_is_fitted(self)
        return np.asarray(self.names_, dtype=object)

    def _select(self, X, reset: bool) -> np.ndarray:
        if hasattr(X, "columns"):
            if missing := [name for name in (self.lat, self.lon) if name not in X]:
                raise ValueError(
                    f"there is no column {' and '.join(map(repr, missing))}, only "
                    f"{', '.join(map(str, X.columns))}; GPSEmbedding(lat=…, lon=…) takes other names"
                )
            X = X[[self.lat, self.lon]]
        return validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite=False)
