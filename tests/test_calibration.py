import dataclasses
import json
import math

import pytest
import torch

from geoclip import calibration, earth
from geoclip.calibration import Calibration, NeighbourFit
from geoclip.decider import Decider
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP
from geoclip.posterior import Places, Posterior


def drawn(temperature, kernel_km, n=150, m=1000):
    """Scores, and true places drawn from their posterior."""
    generator = torch.Generator().manual_seed(0)
    places = Places(earth.sample_sphere(m, generator))
    logits = 6 * torch.randn(n, m, generator=generator)
    index = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    move = kernel_km * torch.randn(n, 2, generator=generator, dtype=torch.double)
    return logits, earth.destination(places.latlon[index], *move.T), places


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "kernel_km"), [(0.5, 8.0), (2.0, 64.0)])
def test_the_fit_finds_what_the_places_were_drawn_with(temperature, kernel_km):
    logits, truth, places = drawn(temperature, kernel_km)
    fitted = calibration.fit(logits.split(64), truth, places, "synthetic")
    assert fitted.temperature == pytest.approx(temperature, rel=0.45)
    assert fitted.kernel_km == pytest.approx(kernel_km, rel=0.45)
    assert fitted.background < 0.03
    assert (fitted.fitted_on, fitted.images) == ("synthetic", 150)
    posterior = fitted.posterior(places, logits)
    assert posterior.log_density(truth).mean().item() == pytest.approx(fitted.nats, abs=0.05)


def test_a_true_place_in_the_gallery_is_left_out_of_the_fit():
    logits, _, places = drawn(1.0, 8.0, n=50)
    itself = places.latlon[logits.argmax(1)]
    fitted = calibration.fit(logits.split(64), itself, places, "")
    assert fitted.kernel_km > 50  # not 2 km, as if the gallery held every place that is asked for


@pytest.mark.slow
def test_neighbours_are_fitted_with_places_of_their_own():
    generator = torch.Generator().manual_seed(0)
    latlon = earth.sample_sphere(150 * 8, generator).double().view(150, 8, 2)
    logits = 4 * torch.randn(150, 8, generator=generator)
    index = torch.multinomial(logits.softmax(1), 1, generator=generator)
    truth = latlon.gather(1, index[..., None].expand(-1, -1, 2))[:, 0]
    move = 32 * torch.randn(150, 2, generator=generator, dtype=torch.double)
    fitted = calibration.fit_neighbours(logits, latlon, earth.destination(truth, *move.T), "synthetic")
    assert fitted.kernel_km == pytest.approx(32, rel=0.45)
    assert fitted.temperature == pytest.approx(1, rel=0.45)


def test_a_calibration_is_kept_beside_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    assert Calibration.load(checkpoint) == Calibration()
    fitted = Calibration(0.5, 4.0, 0.1, "400 tiles", 400, -8.7)
    assert fitted.save(checkpoint).name == "last.calibration.json"
    assert Calibration.load(checkpoint) == fitted
    near = dataclasses.replace(fitted, neighbours=NeighbourFit("mine, 0", 0.5, 1.0, 8.0, 61.0))
    assert near.save(checkpoint).name == "last.neighbours.json"
    assert Calibration.load(checkpoint, True) == near and Calibration.load(checkpoint) == fitted


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"temperature": 0}', '{"kernel_km": "5"}', '{"background": NaN}', '{"other": 1}']
)
def test_a_damaged_calibration_is_named(tmp_path, text):
    (tmp_path / "last.calibration.json").write_text(text)
    with pytest.raises(ValueError, match=r"last\.calibration\.json is not a calibration"):
        Calibration.load(tmp_path / "last.ckpt")


def test_calibration_error_is_the_gap_between_said_and_found():
    mass = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    hit = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < mass
    assert calibration.calibration_error(mass, hit) < 0.015
    assert calibration.calibration_error(mass / 2, hit) == pytest.approx(0.25, abs=0.015)


def test_conformal_levels_cover_exchangeable_images():
    level = torch.rand(400, generator=torch.Generator().manual_seed(0)) ** 3  # regions that are too large
    used = calibration.conformal_level(0.9, level[:200])
    assert (level[200:] <= used).double().mean().item() == pytest.approx(0.9, abs=0.05)
    assert used == pytest.approx(0.9**3, abs=0.1)
    assert calibration.conformal_level(0.9, level[:5]) == 1.0  # too few to say


def small_model(places):
    generator = torch.Generator().manual_seed(0)
    images = ImageEncoder(ImageEncoderConfig("conv", None, False, 16, 8), generator)
    locations = LocationEncoder(LocationEncoderConfig((1.0,), 8, 16, 1, 8), generator)
    return GeoCLIP(images, locations, Gallery(torch.tensor(places))).eval()


def test_alternatives_follow_in_the_order_of_the_probability_that_is_shown():
    crowd = [[-40.1, 5.0], [-39.9, 5.0], [-40.0, 4.88], [-40.0, 5.12]]  # four low peaks within 25 km
    model = small_model([[0.0, 0.0], [40.0, 5.0], *crowd])
    model.scores = lambda query: query
    decider = Decider(model, "mode", Calibration(kernel_km=4.0))
    logits = torch.tensor([[3.0, 2.0, 0.9, 0.9, 0.9, 0.9]]).log()
    by_density = decider.posterior(logits).answers("mode", 3)[0]
    latlon, mass = decider.locate(logits, 4)
    torch.testing.assert_close(latlon[0, :3], by_density[[0, 2, 1]])
    assert mass[0, 0] > 0.3 and mass[0, 1] > mass[0, 2]
    assert latlon[0, 3].isnan().all() and mass[0, 3].isnan()


def test_a_decider_answers_with_distinct_places_and_their_probability():
    model = small_model([[0.0, 0.0], [0.0, 0.1], [40.0, 5.0], [-40.0, 5.0]])
    decider = Decider(
        model, "mode", Calibration(kernel_km=10.0), lambda p: [{"entropy": e} for e in p.entropy.tolist()]
    )
    query = model.encode_places(torch.tensor([[40.0, 5.0], [0.0, 0.0]])).detach()
    latlon, mass = decider.locate(query, 4)
    expected = Calibration(kernel_km=10.0).posterior(decider.places, model.scores(query))
    assert isinstance(expected, Posterior)
    torch.testing.assert_close(latlon[:, 0], expected.answer("mode"))
    assert latlon[:, 3].isnan().all() and mass[:, 3].isnan().all()  # two of the four places are one mode
    assert mass[:, :3].sum(1).tolist() == pytest.approx([1, 1], abs=0.15)
    corrected = Decider(model, "mode", Calibration(kernel_km=10.0, within=(0.0, 1.0), found=(0.3, 0.8)))
    fitted = corrected.locate(query, 3)[1]
    torch.testing.assert_close(fitted[:, 0], 0.3 + 0.5 * mass[:, 0])  # only the first answer is looked up
    torch.testing.assert_close(fitted[:, 1] / fitted[:, 2], mass[:, 1] / mass[:, 2])
    assert fitted.sum(1).tolist() == pytest.approx([1, 1], abs=0.15)
    assert len(decider.described) == 2 and all(math.isfinite(d["entropy"]) for d in decider.described)
    assert json.dumps(decider.described)


def test_the_hit_rate_is_that_of_answers_with_such_a_mass():
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(4000, generator=generator, dtype=torch.double)
    rate = torch.sigmoid(-2 * torch.log1p(-mass) - 1)
    hit = torch.rand(4000, generator=generator, dtype=torch.double) < rate
    fitted = calibration.with_hit_rate(Calibration(), mass[:2000], hit[:2000])
    asked = fitted.hit_rate(mass[2000:])
    assert (asked - rate[2000:]).abs().max() < 0.05
    assert calibration.calibration_error(asked, hit[2000:]) < 0.05  # 2,000 answers are off by 0.03 by chance
    assert calibration.calibration_error(mass[2000:], hit[2000:]) > 0.1
    assert (torch.tensor(fitted.found).diff() >= 0).all()
    always = calibration.with_hit_rate(Calibration(), mass[:50], torch.ones(50, dtype=torch.bool))
    assert 0.95 < always.hit_rate(mass).min() and always.hit_rate(mass).max() < 1
