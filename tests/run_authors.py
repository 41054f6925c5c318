"""Runs the authors' released package in a process of its own and writes down what it answers.

usage: python run_authors.py FOLDER, which holds clip/ (a Hugging Face CLIP) and job.json. No test; started by
test_against_authors.py with only their package, and never ours, on its path.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
sys.path.insert(0, job["package"])

from PIL import Image  # noqa: E402

import geoclip  # noqa: E402  (theirs: it is on the path only now)

assert Path(geoclip.__file__).is_relative_to(job["package"]), (
    f"{geoclip.__file__} is not the authors' package"
)
torch.set_grad_enabled(False)
# Their weights hold numbers below the normal ones, with which some processors take 20 times as long.
torch.set_flush_denormal(True)
model = geoclip.GeoCLIP(clip_path=folder / "clip").eval()
places = {}
model.location_encoder.register_forward_hook(lambda _, given, made: places.update({len(given[0]): made}))

results = {}
processed, features = [], []
for path in job["photos"]:
    with Image.open(path) as image:
        processed.append(model.image_encoder.preprocess_image(image.convert("RGB")))
    if len(features) < job["encoded"]:
        output = model.image_encoder.CLIP.get_image_features(pixel_values=processed[-1])
        features.append(getattr(output, "pooler_output", output))
results["processed"] = torch.cat(processed)
results["features"] = torch.cat(features)
results["images"] = model.image_encoder.mlp(results["features"])

tokens = model.image_encoder.image_processor.tokenizer(job["texts"], padding=True, return_tensors="pt")
output = model.image_encoder.CLIP.get_text_features(**tokens)
results["tokens"] = tokens["input_ids"]
results["texts"] = model.image_encoder.mlp(getattr(output, "pooler_output", output))

# Their predict embeds the whole gallery each time, so once with all of it and then with a part.
gallery = model.gps_gallery
results["latlon"], results["probability"] = model.predict(job["photos"][0], 5)
results["gallery"] = gallery
results["places"] = places[len(gallery)]
model.gps_gallery = gallery[:: job["every"]].contiguous()
answers = [model.predict(path, 5) for path in job["photos"][: job["encoded"]]]
results["part_latlon"] = torch.stack([latlon for latlon, _ in answers])
results["part_probability"] = torch.stack([probability for _, probability in answers])
results["edges"] = model.location_encoder(torch.tensor(job["edges"]))
np.savez(folder / "theirs.npz", **{name: value.numpy() for name, value in results.items()})
