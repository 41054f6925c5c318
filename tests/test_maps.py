"""maps.py: places land where they belong, ways are great circles, and nothing reaches for the network."""

import socket

import matplotlib
import numpy as np
import pyproj
import pytest
import shapely

matplotlib.use("Agg")

from geoclip import maps, paths

SPHERE = pyproj.Geod(a=6371008.8, f=0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a map tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    maps.plt.close("all")


def drawn(figure):
    figure.canvas.draw()
    return figure


def countries():
    import json

    text = (paths.NATURAL_EARTH / "countries_110m.geojson").read_text(encoding="utf-8")
    return {
        f["properties"]["name"]: shapely.geometry.shape(f["geometry"]) for f in json.loads(text)["features"]
    }


@pytest.mark.parametrize(
    ("name", "lat", "lon"),
    [("France", 46.5, 2.5), ("Fiji", -17.8, 178.0), ("Russia", 66.5, -172.0), ("Antarctica", -89.99, 12.0)],
)
def test_outlines_hold_their_places_on_both_sides_of_the_date_line(name, lat, lon):
    assert countries()[name].contains(shapely.Point(lon, lat))
    assert not countries()[name].contains(shapely.Point(lat, lon))


@pytest.mark.parametrize("name", ["countries_110m", "land_50m"])
def test_outlines_cover_the_land_of_the_earth(name):
    shapes = maps._outlines(name)
    assert all(shape.is_valid for shape in shapes)
    area = sum(
        abs(SPHERE.geometry_area_perimeter(shapely.geometry.polygon.orient(part))[0])
        for shape in shapes
        for part in shapely.get_parts(shape)
    )
    assert area / 1e12 == pytest.approx(147.5, abs=2.5)  # million km², Antarctica's ice included


def test_outlines_are_small():
    assert sum(path.stat().st_size for path in paths.NATURAL_EARTH.iterdir() if path.is_file()) < 1_000_000


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ((48.9, 2.4), (40.7, -74.0)),
        ((10.0, 170.0), (-10.0, -170.0)),
        ((80.0, 0.0), (80.0, 180.0)),
        ((5.0, 5.0),) * 2,
    ],
)
def test_great_circle_is_the_shortest_way(start, end):
    way = maps.great_circle(start, end)
    np.testing.assert_allclose(way[[0, -1]], [start, end], atol=1e-9)
    length = SPHERE.line_length(way[:, 1], way[:, 0])
    straight = SPHERE.inv(start[1], start[0], end[1], end[0])[2]
    assert length == pytest.approx(straight, rel=1e-9, abs=1e-3)
    steps = SPHERE.line_lengths(way[:, 1], way[:, 0])
    assert np.max(steps, initial=0.0) < 112_000


def test_great_circle_between_antipodes_is_half_the_earth():
    way = maps.great_circle((0.0, 0.0), (0.0, 180.0))
    assert SPHERE.line_length(way[:, 1], way[:, 0]) == pytest.approx(np.pi * 6371008.8, rel=1e-9)


def test_a_way_over_the_date_line_is_cut_in_two():
    axes = maps.earth_axes(maps.figure())
    assert len(maps._on_map(axes, maps.great_circle((0.0, 170.0), (0.0, -170.0)))) == 2
    assert len(maps._on_map(axes, maps.great_circle((0.0, -20.0), (0.0, 20.0)))) == 1


@pytest.mark.parametrize("world", [True, False])
def test_each_pixel_of_a_grid_projects_onto_itself(world):
    figure = maps.figure()
    axes = maps.earth_axes(figure) if world else maps.region_axes(figure, (-17.8, 178.0), 4000)
    pixels = maps.grid(axes, columns=50)
    x, y, _ = axes.projection.transform_points(maps.PLATE, pixels.latlon[:, 1], pixels.latlon[:, 0]).T
    left, right, bottom, top = pixels.extent
    rows, columns = np.nonzero(pixels.inside)
    np.testing.assert_allclose(x, left + (columns + 0.5) * (right - left) / 50, atol=1e4)
    np.testing.assert_allclose(y, top - (rows + 0.5) * (top - bottom) / len(pixels.inside), atol=1e4)
    # An equal-area map covers as much of its rectangle as the Earth has surface; a region's is full.
    rectangle_km2 = (right - left) * (top - bottom) / 1e6
    assert pixels.inside.mean() == pytest.approx(510.07e6 / rectangle_km2 if world else 1.0, abs=0.01)


def test_a_pixel_shows_the_mean_of_its_points_on_land():
    axes = maps.earth_axes(maps.figure(), filled=False)
    every, pixels = (maps.grid(axes, columns=40, samples=3, land=land) for land in (False, True))
    assert every.width_km == pytest.approx(maps.grid(axes, columns=40).width_km)
    points = np.ma.masked_all(every.inside.shape)
    points[every.inside] = every.latlon[:, 0]
    image = every.image(every.latlon[:, 0])
    assert image.shape == (len(points) // 3, 40)
    for row, column in [(0, 20), (9, 0), (10, 20), (18, 39)]:
        square = points[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert (
            image[row, column] is np.ma.masked
            if square.mask.all()
            else image[row, column] == pytest.approx(square.mean())
        )
    # Land covers 29 % of the Earth; the middle of the Pacific is not land, the middle of Brazil is.
    assert len(pixels.latlon) / len(every.latlon) == pytest.approx(0.29, abs=0.02)
    nearest = [np.abs(pixels.latlon - place).sum(1).min() for place in ([0.0, -140.0], [-10.0, -52.0])]
    assert nearest[0] > 10 and nearest[1] < 2
    assert pixels.image(np.ones(len(pixels.latlon))).max() == 1


@pytest.mark.slow
def test_heat_map_is_brightest_at_its_query():
    query = np.array([-33.9, 151.2])
    axes = maps.earth_axes(maps.figure(), filled=False)
    pixels = maps.grid(axes, columns=180)
    away = np.abs(pixels.latlon - query).sum(1)
    maps.similarity(axes, pixels, -away, top_k=np.array([[-33.9, 151.2], [0.0, 0.0]]), truth=query)
    picture = axes.get_images()[0]
    row, column = np.unravel_index(np.ma.argmax(picture.get_array()), picture.get_array().shape)
    left, right, bottom, top = picture.get_extent()
    x, y = axes.projection.transform_point(query[1], query[0], maps.PLATE)
    assert left + (column + 0.5) * (right - left) / 180 == pytest.approx(x, abs=2e5)
    assert top - (row + 0.5) * (top - bottom) / len(pixels.inside) == pytest.approx(y, abs=2e5)
    assert {text.get_text() for text in axes.texts} == {"1", "2"}
    drawn(axes.figure)


def test_density_counts_every_place():
    generator = np.random.default_rng(0)
    latlon = np.stack([generator.uniform(-90, 90, 500), generator.uniform(-180, 180, 500)], 1)
    axes = maps.earth_axes(maps.figure(data="made places"))
    maps.density(axes, latlon)
    [cells] = [c for c in axes.collections if type(c).__name__ == "PolyCollection"]
    assert cells.get_array().sum() == 500
    assert drawn(axes.figure)._supxlabel.get_text() == "made places"


def test_errors_are_counted_by_class_and_a_miss_is_the_furthest():
    truth = np.zeros((5, 2))
    predicted = np.array([[0, 1.0], [0, 5.0], [0, 20.0], [0, 90.0], [np.nan, np.nan]])
    axes = maps.earth_axes(maps.figure())
    maps.errors(axes, truth, predicted, limit=4)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["≤ 200 km: 20 %", "≤ 750 km: 20 %", "≤ 2,500 km: 20 %", "further: 40 %"]
    assert axes.get_legend().get_title().get_text() == "error (dot: true place), % of 5 images, 4 drawn"
    with pytest.raises(ValueError, match="5 true places and 4"):
        maps.errors(axes, truth, predicted[:4])
    drawn(axes.figure)


def test_categories_have_a_legend_only_where_colours_tell_them_apart():
    for count in (3, 20):
        axes = maps.earth_axes(maps.figure(), filled=False)
        pixels = maps.grid(axes, columns=60)
        labels = (np.arange(len(pixels.latlon)) % (count + 1)) - 1
        maps.categories(axes, pixels, labels, [f"class {i}" for i in range(count)])
        assert (axes.get_legend() is None) == (count == 20)
        shown = axes.get_images()[0].get_array()
        assert np.ma.count(shown) == (labels >= 0).sum()
        drawn(axes.figure)


def test_wrong_sizes_are_refused():
    axes = maps.earth_axes(maps.figure())
    pixels = maps.grid(axes, columns=20)
    with pytest.raises(ValueError, match="expected 176 values, one per point"):
        maps.similarity(axes, pixels, np.zeros(3))
    with pytest.raises(ValueError, match="labels run from 0 to 5"):
        maps.categories(axes, pixels, np.arange(len(pixels.latlon)) % 6, ["a", "b"])
    with pytest.raises(ValueError, match="12,000 km"):
        maps.region_axes(maps.figure(), (0, 0), 20_000)


@pytest.mark.parametrize("centre", [(48.86, 2.35), (-17.8, 179.9), (89.0, 0.0), (-89.0, 90.0)])
def test_a_region_anywhere_can_be_drawn(centre):
    axes = maps.region_axes(maps.figure(2, 2), centre, 1500)
    maps.points(axes, np.array([centre]), "here")
    drawn(axes.figure)
    assert axes.get_xlim() == (-750_000, 750_000)


def test_colours_get_darker_in_order_so_that_a_map_can_be_read_in_grey():
    def lightness(colours):
        return [np.dot(matplotlib.colors.to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in colours]

    for colours in (maps.ERROR_COLOURS, maps.CATEGORIES[:5]):
        assert np.all(np.diff(lightness(colours)) < -0.05)
    assert len(set(maps.CATEGORIES)) == 8


def test_answers_far_outside_a_region_leave_its_map_as_it_is(tmp_path):
    figure = maps.figure(9.0, 3.4)
    axes = maps.region_axes(figure, (25.5, 51.5), 400, (1, 3, 3))
    pixels = maps.grid(axes, 10)
    maps.similarity(axes, pixels, pixels.latlon[:, 0], top_k=[[25.5, 51.5], [32.9, 13.2]])
    figure.savefig(tmp_path / "map.png")  # a collapsed layout is a warning, and so an error here
