"""Ours and the authors' released package, with the same weights, give the same numbers.

CLIP's own weights are 1.7 GB and not at hand everywhere, so CLIP is given random ones of its exact shape, in
Hugging Face's files: theirs reads them as their users' do, ours carries them over to open_clip. All that
comes after CLIP (head, location encoder, temperature, gallery) is what was released.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import sklearn.datasets
import torch
from safetensors.torch import save_file
from torch.nn import functional

from geoclip import paths, pretrained
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.model import GeoCLIP

pytestmark = pytest.mark.slow
TEXTS = ["desert", "a photo of the Eiffel Tower at night", "Naïve café, São Paulo!"]
ENCODED = 2  # photos that go through CLIP; all of them are compared after preprocessing
EVERY = 40  # of the gallery, for all predictions but the first
EDGES = [
    *[[lat, lon] for lat in (90.0, 89.9999, -89.9999, -90.0) for lon in (-180.0, -45.5, 0.0, 180.0)],
    *[[lat, lon] for lat in (-60.25, 0.0, 12.5) for lon in (-180.0, -179.9999, 179.9999, 180.0, 0.0)],
]


def photos() -> list[str]:
    """Real photos: scikit-learn's, the authors' own, and those of GEOCLIP_DATA where it is set."""
    china = Path(sklearn.datasets.__file__).parent / "images/china.jpg"
    data = paths.geoclip_data()
    found = [] if data is None else sorted((data / "photos").glob("*.jpg"))
    return [str(path) for path in [pretrained.kauai(), china, *found]]


def random_clip(folder: Path) -> None:
    """ViT-L/14 with random weights in Hugging Face's files, spread so that different photos differ much."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    config = CLIPConfig(
        projection_dim=768,
        text_config=text,
        vision_config={**vision, "patch_size": 14, "projection_dim": 768},
    )
    assert config.vision_config.hidden_act == "quick_gelu"  # as in OpenAI's own configuration
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CLIPModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = values / math.sqrt(math.prod(shape[1:]))
        else:
            state[name] = 0.1 * values + float("norm" in name and name.endswith("weight"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.encoder))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
    special = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>", "pad_token": "<end_of_text>"}
    special |= {"unk_token": "<end_of_text>", "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


@pytest.fixture(scope="module")
def both():
    """What the authors' package answers; what ours does; our model; the folder of the weights."""
    pytest.importorskip("transformers")
    # not pytest's temporary folder, which would keep the 1.7 GB of three runs
    with tempfile.TemporaryDirectory() as name, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        (folder / "clip").mkdir()
        random_clip(folder / "clip")
        theirs = run_authors(folder)
        patch.setattr(paths, "CACHE", folder / "cache")  # so that the gallery is embedded here and now
        model = GeoCLIP.pretrained(folder / "clip/model.safetensors", "fp32")
        encoded = []
        hook = model.location_encoder.register_forward_hook(lambda _, given, made: encoded.append(made))
        ours = dict(zip(("latlon", "probability"), model.predict(photos()[0], top_k=5), strict=True))
        hook.remove()
        ours["places"] = torch.cat(encoded)
        ours["features"] = model.image_encoder.features(theirs["processed"][:ENCODED])
        yield theirs, ours, model, folder


def run_authors(folder: Path) -> dict[str, torch.Tensor]:
    """What run_authors.py wrote down, in a process that has their package on its path and not ours."""
    job = {"package": str(pretrained.authors_package()), "photos": photos(), "texts": TEXTS}
    job |= {"encoded": ENCODED, "every": EVERY, "edges": EDGES}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("run_authors.py")
    ran = subprocess.run(
        [sys.executable, script, folder],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    with np.load(folder / "theirs.npz") as theirs:
        return {name: torch.from_numpy(theirs[name]) for name in theirs.files}


def relative(ours, theirs):
    """Largest difference of a row, in parts of that row's length."""
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


def same_places(ours, theirs):
    """Whether two lists of places are the same; places of equal probability may change places."""
    return sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_the_random_weights_tell_photos_apart(both):
    theirs, *_ = both
    cosine = functional.cosine_similarity(theirs["images"][0], theirs["images"][1], dim=0)
    assert cosine < 0.99, "with one feature for all photos, agreement would mean nothing"


def test_a_image_features(both):
    theirs, ours, model, _ = both
    assert relative(ours["features"], theirs["features"]) <= 1e-4
    assert relative(model.image_encoder.head(ours["features"]), theirs["images"]) <= 1e-4


@pytest.mark.data
def test_b_preprocessing_of_real_photos(both):
    theirs, _, model, _ = both
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    for path, processed in zip(photos(), theirs["processed"], strict=True):
        [view] = model.views(path)
        difference = ((view - processed) * std).abs()
        # 1/255 is asked for; a crop that lies one pixel off gives 10/255, other arithmetic 0.01/255
        assert difference.mean() <= 0.1 / 255, path


def test_c_predict_with_the_whole_gallery(both):
    theirs, ours, *_ = both
    assert same_places(ours["latlon"], theirs["latlon"])
    assert (ours["probability"] - theirs["probability"]).abs().max() <= 1e-5
    assert theirs["probability"][0] > 100 * 1e-5, "the tolerance must be small against what is compared"


def test_c_predict_of_several_photos_from_part_of_the_gallery(both):
    theirs, ours, model, _ = both
    whole = model.gallery
    model.use_gallery(Gallery(theirs["gallery"][::EVERY]))
    from_pixels = model.locate(model.encode_features(ours["features"]), 5)
    from_photos = model.predict(photos()[:ENCODED], top_k=5)
    model.use_gallery(whole)
    for i in range(ENCODED):
        assert same_places(from_pixels[0][i], theirs["part_latlon"][i])
        assert same_places(from_photos[0][i], theirs["part_latlon"][i])
    assert (from_pixels[1] - theirs["part_probability"]).abs().max() <= 1e-5
    # 40 times fewer places have 40 times the probability, and the pixels are rounded differently in places
    assert (from_photos[1] / theirs["part_probability"] - 1).abs().max() <= 2e-3


def test_d_text_features(both):
    theirs, _, model, _ = both
    ours = open_clip.get_tokenizer(model.image_encoder.config.tower)(TEXTS)
    for mine, tokens in zip(ours.tolist(), theirs["tokens"].tolist(), strict=True):
        end = tokens.index(49407)
        assert mine[: end + 1] == tokens[: end + 1]
    embedded = functional.normalize(theirs["texts"], dim=-1)
    assert relative(model.encode_text(TEXTS), embedded) <= 1e-4
    assert functional.cosine_similarity(embedded[0], embedded[1], dim=0) < 0.99


def test_e_location_encoder(both):
    theirs, ours, model, _ = both
    assert torch.equal(model.gallery.latlon, theirs["gallery"])
    assert (ours["places"] - theirs["places"]).abs().max() <= 1e-5
    assert theirs["places"].abs().max() > 1e-2
    assert (model.location_encoder(torch.tensor(EDGES)) - theirs["edges"]).abs().max() <= 1e-5


def test_the_examples_of_their_readme_run_with_our_package(both, monkeypatch, capsys):
    _, ours, model, _ = both
    monkeypatch.setattr(GeoCLIP, "pretrained", lambda: model)  # CLIP's own weights are not at hand
    with zipfile.ZipFile(pretrained.authors_wheel()) as wheel:
        readme = wheel.read(f"{pretrained.NAME}-{pretrained.VERSION}.dist-info/METADATA").decode()
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        # the one difference: ours says by name that the weights are the released ones
        example = re.sub(r"\b(GeoCLIP|LocationEncoder)\(\)", r"\1.pretrained()", example)
        exec(example.replace('"image.png"', repr(photos()[0])), {})
    printed = capsys.readouterr().out
    lat, lon = ours["latlon"][0].tolist()
    assert f"Prediction 1: ({lat:.6f}, {lon:.6f})" in printed
    assert f"Probability: {ours['probability'][4]:.6f}" in printed
    assert "torch.Size([2, 512])" in printed


def test_without_quickgelu_the_features_are_others(both):
    theirs, *_, folder = both
    config = ImageEncoderConfig(tower="ViT-L-14", weights=str(folder / "clip/model.safetensors"))
    plain = ImageEncoder(config).features(theirs["processed"][:1])
    assert relative(plain, theirs["features"][:1]) > 1e-2


def test_their_package_is_not_ours():
    import geoclip

    assert Path(geoclip.__file__).is_relative_to(paths.ROOT)
    assert not any(Path(entry).is_relative_to(pretrained.AUTHORS) for entry in sys.path if entry)
