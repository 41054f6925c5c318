"""Embeddings to take away: embed_places, GPSEmbedding in scikit-learn, and the encoder outside Python."""

import doctest
import importlib.util
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from geoclip import earth, gps_embedding, paths
from geoclip.config import LocationEncoderConfig
from geoclip.gps_embedding import GPSEmbedding, embed_places
from geoclip.location_encoder import LocationEncoder

PLACES = [[48.8566, 2.3522], [-33.8688, 151.2093], [90.0, 0.0], [0.0, -180.0]]


@pytest.fixture(scope="module")
def small():
    config = LocationEncoderConfig(sigmas=(1.0, 16.0, 256.0), frequencies=16, width=24, dim=8)
    return LocationEncoder(config, torch.Generator().manual_seed(0)).eval()


def test_arrays_lists_tables_and_tensors_give_the_encoder_s_embedding(small):
    with torch.no_grad():
        expected = small(torch.tensor(PLACES)).numpy()
    table = pd.DataFrame(PLACES, columns=["lat", "lon"])[["lon", "lat"]]  # names, not positions, decide
    for given in (PLACES, np.array(PLACES), table, table.astype("Float64")):
        found = embed_places(given, encoder=small)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    found = embed_places(torch.tensor(PLACES), batch_size=3, encoder=small)
    assert isinstance(found, torch.Tensor) and not found.requires_grad
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_levels(small):
    total, each, concat, best = (
        embed_places(PLACES, levels=levels, encoder=small) for levels in gps_embedding.LEVELS
    )
    assert (total.shape, each.shape, concat.shape, best.shape) == ((4, 8), (4, 3, 8), (4, 24), (4, 8))
    np.testing.assert_allclose(each.sum(1), total, atol=1e-6)
    np.testing.assert_array_equal(each.reshape(4, 24), concat)
    assert gps_embedding.column_names(small)[::7] == ["gps_0", "gps_7"]
    assert gps_embedding.column_names(small, "concat")[::8] == [
        "gps_sigma1_0",
        "gps_sigma16_0",
        "gps_sigma256_0",
    ]


@pytest.mark.parametrize("sigmas", [(1.0, 16.0, 256.0), (256.0, 1.0, 16.0)])
def test_best_holds_the_components_of_the_two_smallest_sigmas_half_whitened(sigmas):
    config = LocationEncoderConfig(sigmas=sigmas, frequencies=16, width=24, dim=8)
    encoder = LocationEncoder(config, torch.Generator().manual_seed(0)).eval()
    latlon = earth.sample_sphere(20_000, torch.Generator().manual_seed(1)).double()
    found = embed_places(latlon, levels="best", encoder=encoder).double()
    each = embed_places(latlon, levels="each", encoder=encoder).double()
    variances = []
    for sigma, columns, scale in ((1.0, 6, 1.0), (16.0, 2, 0.25)):
        level = each[:, sigmas.index(sigma)]
        spread = torch.linalg.svdvals(level - level.mean(0))[:columns] / math.sqrt(len(level))
        variances.append(8 * scale**2 * spread / spread.sum())
    # a rotation keeps the variances along the principal directions
    expected = torch.cat(variances).sort(descending=True).values
    directions = torch.linalg.eigvalsh(found.T.cov()).flip(0)
    torch.testing.assert_close(directions, expected, rtol=0.05, atol=0)
    assert found.mean(0).abs().max() < 0.05
    alone = torch.cat([embed_places(latlon[i : i + 1], levels="best", encoder=encoder) for i in range(5)])
    torch.testing.assert_close(found[:5].float(), alone, rtol=0, atol=1e-4)
    assert gps_embedding.column_names(encoder, "best")[::7] == ["gps_best_0", "gps_best_7"]


def test_no_place_and_one_place(small):
    assert embed_places(np.empty((0, 2)), levels="best", encoder=small).shape == (0, 8)
    assert embed_places(np.empty((0, 2)), encoder=small).shape == (0, 8)
    assert embed_places([[1, 2]], levels="each", encoder=small).shape == (1, 3, 8)


def test_longitudes_up_to_360_are_wrapped(small):
    east, west = (
        embed_places([[10, 190], [10, 180]], encoder=small),
        embed_places([[10, -170], [10, -180]], encoder=small),
    )
    np.testing.assert_array_equal(east, west)


@pytest.mark.parametrize(
    ("latlon", "message"),
    [
        ([[1, 2], [np.nan, 3]], r"places, row 1: \(nan, 3\)"),
        ([[1, 2], [2.35, 48.9], [151.2, -33.9]], r"row 2: \(151.2, -33.9\).*are lat and lon swapped"),
        ([[1, 2], [3, 361]], r"row 1: \(3, 361\)"),
        ([[1, 2], [3, -181]], r"row 1: \(3, -181\)"),
        ([1, 2], r"expected places of shape \(n, 2\).*got \(2,\)"),
        ([[1, 2, 3]], r"got \(1, 3\)"),
        ([["Paris", 2]], "Paris"),
        (pd.DataFrame({"lat": [1, None], "lon": [2, 3]}), r"row 1: \(nan, 3\)"),
        (pd.DataFrame({"latitude": [1], "lon": [2]}), "no column lat, only latitude, lon"),
    ],
)
def test_bad_places_are_named(small, latlon, message):
    with pytest.raises(ValueError, match=message):
        embed_places(latlon, encoder=small)


def test_bad_options_are_named(small, tmp_path):
    with pytest.raises(ValueError, match="levels is 'all'; choose from sum, each, concat, best"):
        embed_places(PLACES, levels="all", encoder=small)
    with pytest.raises(ValueError, match="levels best needs float32, not bfloat16"):
        embed_places(PLACES, levels="best", dtype="bfloat16", encoder=small)
    one = LocationEncoder(LocationEncoderConfig(sigmas=(1.0,), frequencies=16, width=24, dim=8))
    with pytest.raises(ValueError, match=r"at least two σ; this one has \(1.0,\)"):
        embed_places(PLACES, levels="best", encoder=one)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        embed_places(PLACES, batch_size=0, encoder=small)
    with pytest.raises(ValueError, match="dtype is 'int8'; choose from float32, bfloat16, float16"):
        embed_places(PLACES, dtype="int8", encoder=small)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        embed_places(PLACES, encoder=tmp_path / "none.ckpt")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_lower_precision_keeps_the_phase(small, dtype):
    latlon = earth.sample_sphere(300, torch.Generator().manual_seed(0))
    exact, found = embed_places(latlon, encoder=small), embed_places(latlon, dtype=dtype, encoder=small)
    assert found.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    assert torch.cosine_similarity(exact, found.float()).min() > 0.999
    arrays = embed_places(latlon.numpy(), dtype=dtype, encoder=small)
    np.testing.assert_array_equal(arrays, found.float().numpy())


def test_the_released_encoder_is_the_default():
    latlon = torch.tensor(PLACES)
    with torch.no_grad():
        expected = LocationEncoder.pretrained()(latlon)
    torch.testing.assert_close(embed_places(latlon), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_docstring_s_pipeline_runs():
    done = doctest.testmod(gps_embedding)
    assert done.attempted > 5 and done.failed == 0


def test_the_transformer_keeps_scikit_learn_s_conventions(small):
    table = pd.DataFrame(PLACES, columns=["y", "x"], index=list("abcd")).assign(name=["p", "s", "n", "d"])
    step = GPSEmbedding("concat", encoder=small, lat="y", lon="x")
    assert clone(step).get_params()["lat"] == "y"
    found = step.set_output(transform="pandas").fit_transform(table)
    assert list(found.index) == list("abcd") and list(found.columns) == list(step.get_feature_names_out())
    np.testing.assert_array_equal(found, embed_places(PLACES, levels="concat", encoder=small))
    assert step.feature_names_in_.tolist() == ["y", "x"] and step.n_features_in_ == 2
    by_column = make_column_transformer((step, ["x", "y"]), remainder="drop")
    np.testing.assert_array_equal(by_column.fit_transform(table), found)
    with pytest.raises(ValueError, match="there is no column 'y' and 'x', only lat, lon; GPSEmbedding"):
        step.transform(pd.DataFrame(PLACES, columns=["lat", "lon"]))
    with pytest.raises(ValueError, match="levels is 'each'"):
        GPSEmbedding("each").fit(PLACES)
    with pytest.raises(ValueError, match=r"row 0: \(91, 0\)"):
        GPSEmbedding(encoder=small).fit([[91, 0]])


def test_scikit_learn_s_own_checks():
    """Those that do not feed random numbers of any shape, which are no places."""
    results = check_estimator(GPSEmbedding(), on_fail=None, on_skip=None)
    passed = {result["check_name"] for result in results if result["status"] == "passed"}
    assert passed >= {
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_estimators_unfitted",
        "check_get_params_invariance",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_readonly_memmap_input",
        "check_set_params",
    }


@pytest.mark.slow
def test_a_fitted_pipeline_holds_no_weights():
    pipeline = make_pipeline(GPSEmbedding(), Ridge()).fit(PLACES, [1, 2, 3, 4])
    text = pickle.dumps(pipeline)
    assert len(text) < 100_000
    np.testing.assert_array_equal(pickle.loads(text).predict(PLACES), pipeline.predict(PLACES))
    skops = pytest.importorskip("skops.io")
    ours = ["geoclip.gps_embedding.GPSEmbedding"]
    assert skops.get_untrusted_types(data=skops.dumps(pipeline)) == ours
    loaded = skops.loads(skops.dumps(pipeline), trusted=ours)
    np.testing.assert_array_equal(loaded.predict(PLACES), pipeline.predict(PLACES))


# Runs the lines of the docstring that export the encoder, as a reader does: without the checks of types in tests.
EXPORT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from geoclip import earth, gps_embedding
from geoclip.location_encoder import LocationEncoder
lines = [line.strip() for line in gps_embedding.__doc__.splitlines() if line.startswith("    ")]
exec("\\n".join(line for line in lines if line.startswith(("encoder", "n =", *sys.argv[1:]))))
edges = [[90.0, 0], [-90, 0], [90, -180], [0, 180], [0, -180], [45, 180], [-45, -180], [0, 0]]
places = torch.cat([torch.tensor(edges), earth.sample_sphere(20_000, torch.Generator().manual_seed(0))])
with torch.no_grad():
    torch.save([places, encoder(places)], "expected.pt")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of the released encoder, exported in all ways; places, also poles and ±180°; their embeddings."""
    folder, ways = tmp_path_factory.mktemp("exported"), ["torch.jit", "torch.export"]
    if importlib.util.find_spec("onnxscript"):
        ways.append("torch.onnx")
    search = os.pathsep.join([str(paths.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search}
    subprocess.run([sys.executable, "-c", EXPORT, *ways], cwd=folder, env=environment, check=True)
    return folder, *torch.load(folder / "expected.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_torchscript_gives_the_same_embedding(exported):
    folder, places, expected = exported
    with torch.no_grad():
        found = torch.jit.load(folder / "encoder.pt")(places)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_export_gives_the_same_embedding(exported):
    folder, places, expected = exported
    loaded = torch.export.load(folder / "encoder.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(places), expected, rtol=0, atol=1e-5)
        assert loaded(places[:1]).shape == (1, 512)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_same_embedding(exported):
    """In all values, because the phase is in float64; with PyTorch's in float32, 1 % differ by up to 4e-5."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    folder, *given = exported
    places, expected = (part.numpy() for part in given)
    session = runtime.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    (found,) = session.run(None, {name: places})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    wrapped = places[:, 1] != 180  # embed_places takes 180° for -180°, whose embedding differs
    rounded = embed_places(torch.from_numpy(places[wrapped]))
    np.testing.assert_allclose(found[wrapped], rounded, rtol=0, atol=4e-5)
    assert session.run(None, {name: places[:1]})[0].shape == (1, 512)
