"""Write the map outlines beside this file from the npm package `world-atlas` (Natural Earth as TopoJSON).

    npm pack world-atlas@2.0.2 && tar xzf world-atlas-2.0.2.tgz
    python data/natural_earth/make.py package/

Natural Earth is in the public domain. TopoJSON stores each stretch of coast or border once, as an "arc" of
integer steps. This script turns the arcs into (lon, lat) lines and rings in degrees. The 1:110 m scale, for
world maps, is kept as it is; the 1:50 m scale, for regions, is simplified to 0.03°, about one pixel of a map.
"""

import json
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path

from shapely import (
    LineString,
    MultiLineString,
    MultiPolygon,
    Polygon,
    box,
    difference,
    intersection,
    make_valid,
    set_precision,
    to_geojson,
    union_all,
)
from shapely.affinity import translate

HERE = Path(__file__).parent
GRID = 0.01  # degrees: about 1 km


def arcs(topology: dict, within_deg: float = 0.0) -> list[list[tuple[float, float]]]:
    """Return each arc as (lon, lat) points: the cumulative, scaled and shifted steps, simplified."""
    (sx, sy), (tx, ty) = topology["transform"]["scale"], topology["transform"]["translate"]
    lines = []
    for steps in topology["arcs"]:
        points = accumulate(map(tuple, steps), lambda a, b: (a[0] + b[0], a[1] + b[1]))
        line = LineString(follow([], [(x * sx + tx, y * sy + ty) for x, y in points]))
        # A closed arc is an island; with fewer than four points it would no longer be a ring.
        simple = line.simplify(within_deg)
        lines.append(list((line if line.is_closed and len(simple.coords) < 4 else simple).coords))
    return lines


def follow(line: list, points: list) -> list:
    """Append `points` to `line` without jumps of 360°: lines of world-atlas may cross the date line."""
    line = list(line)
    for lon, lat in points:
        line.append((lon - 360 * round((lon - line[-1][0]) / 360) if line else lon, lat))
    return line


def area(geometry: dict, lines: list) -> MultiPolygon:
    """Return the polygons of a geometry, cut at the date line and rounded to a grid of 0.01°."""
    kind, indices = geometry["type"], geometry.get("arcs")
    polygons = {"Polygon": [indices], "MultiPolygon": indices}[kind]
    parts = [
        difference(region(outer, lines), union_all([region(h, lines) for h in holes]))
        for outer, *holes in polygons
    ]
    whole = set_precision(union_all(parts), GRID)
    return MultiPolygon([part for part in getattr(whole, "geoms", [whole]) if isinstance(part, Polygon)])


def region(indices: list[int], lines: list):
    """Return the area enclosed by a ring of arcs, within ±180°. Index ~i stands for arc i reversed."""
    points = []
    for index in indices:
        line = lines[index] if index >= 0 else lines[~index][::-1]
        points = follow(points, line[1:] if points else line)
    if len(points) < 4:
        return Polygon()  # an islet of two arcs that simplification has flattened
    if abs(points[-1][0] - points[0][0]) > 180:  # the ring goes around a pole: close it there
        pole = -90.0 if points[0][1] < 0 else 90.0
        points = [*points, (points[-1][0], pole), (points[0][0], pole)]
    shape = make_valid(Polygon(points))
    earth = box(-180, -90, 180, 90)
    return union_all([intersection(translate(shape, turn), earth) for turn in (-360, 0, 360)]).buffer(0)


def flat(indices: list) -> list[int]:
    """Flatten nested lists of arc indices."""
    return [i for part in indices for i in (flat(part) if isinstance(part, list) else [part])]


def write(name: str, features: dict) -> None:
    """Write `features` (name → geometry) as GeoJSON, one feature per line."""
    lines = [
        json.dumps(
            {"type": "Feature", "properties": {"name": label}, "geometry": json.loads(to_geojson(shape))},
            separators=(",", ":"),
            ensure_ascii=False,
        )
        for label, shape in features.items()
    ]
    text = '{"type":"FeatureCollection","features":[\n' + ",\n".join(lines) + "\n]}\n"
    (HERE / name).write_text(text, encoding="utf-8")


def main(package: Path) -> None:
    small = json.loads((package / "countries-110m.json").read_text(encoding="utf-8"))
    lines = arcs(small)
    countries = small["objects"]["countries"]["geometries"]
    write("countries_110m.geojson", {c["properties"]["name"]: area(c, lines) for c in countries})

    fine = json.loads((package / "countries-50m.json").read_text(encoding="utf-8"))
    lines = arcs(fine, within_deg=0.03)
    [land] = fine["objects"]["land"]["geometries"]
    write("land_50m.geojson", {"land": area(land, lines)})

    used = Counter(
        index if index >= 0 else ~index
        for country in fine["objects"]["countries"]["geometries"]
        for index in flat(country["arcs"])
    )
    shared = [lines[index] for index, times in sorted(used.items()) if times > 1]
    write("borders_50m.geojson", {"borders between countries": set_precision(MultiLineString(shared), GRID)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
