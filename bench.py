"""Measure speed beside the authors' package and beside the limits of the machine.

    make bench                                  a CPU: 15 to 60 minutes on two cores
    .venv/bin/python bench.py --device cuda     a GPU
    .venv/bin/python bench.py --only search     one group of measurements

Every row names the task, the system, the median and range of its seconds and, where it applies, the seconds that
the machine's measured matrix rate and memory bandwidth allow for the same work (`limit_s`). CLIP has random weights
on both sides. The table goes to data/results/11_bench.csv (…_gpu.csv), which notebook 11 reads.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from geoclip import earth, gallery, paths, pretrained
from geoclip.config import ImageEncoderConfig, LocationEncoderConfig
from geoclip.datasets import features, sources
from geoclip.datasets.embedding import Shard, claim, embed
from geoclip.engines import openvino_tower
from geoclip.gps_embedding import embed_places
from geoclip.image_encoder import ImageEncoder
from geoclip.location_encoder import LocationEncoder
from geoclip.model import GeoCLIP
from geoclip.posterior import Places

OURS, AUTHORS = "ours", f"authors' package {pretrained.VERSION}"
TOWER = pretrained.CLIP_TOWER
MP16 = 4_723_695  # photos
STEP, AUTHORS_STEP = "training step on features, 512 + 4,096", "training step, 512 + 4,096, tower in it"

# Their package runs in a process of its own, since its import name is ours too.
AUTHORS_PROCESS = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import geoclip
torch.set_num_threads(int(sys.argv[2]))
model = geoclip.GeoCLIP(clip_pretrained=False).eval()
model.image_encoder.CLIP.requires_grad_(False)  # as it is with released weights
trained = [p for p in model.parameters() if p.requires_grad]
print(json.dumps(None), flush=True)
for line in sys.stdin:
    task, value = json.loads(line)
    began = time.perf_counter()
    if task == "predict":
        model.predict(value, 5)
    elif task == "gallery":
        with torch.no_grad():
            model.location_encoder(model.gps_gallery)
    elif task == "step":
        images, places = torch.randn(value, 3, 224, 224), model.gps_gallery[:512 + 4096]
        optimizer = torch.optim.Adam(trained, lr=3e-5)
        torch.nn.functional.cross_entropy(model(images, places), torch.arange(value)).backward()
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": peak}), flush=True)
"""

# The peak is that of a whole process, of Linux's VmHWM, because ru_maxrss of a new process starts with its parent's; a
# first, small call has loaded what stays.
EMBED_PLACES = """
import pathlib, re, sys
import psutil, torch
from geoclip import earth
from geoclip.gps_embedding import embed_places
from geoclip.location_encoder import LocationEncoder
places = earth.sample_sphere(int(sys.argv[1]), torch.Generator().manual_seed(1)).double().numpy()
encoder = LocationEncoder(generator=torch.Generator().manual_seed(0)).eval()
embed_places(places[:8], encoder=encoder)
before = psutil.Process().memory_info().rss
found = embed_places(places, encoder=encoder)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print((peak - before - found.nbytes) / 2**20)
"""


class Bench:
    """The rows measured so far, on one device."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = torch.device(device), quick
        self.rows: list[dict] = []
        self.bandwidth = 0.0
        n = 512 if quick else 8192 if self.device.type == "cuda" else 2048
        self.factors = torch.randn(2, n, n, device=self.device)

    def seconds(self, work: Callable[[], object], runs: int = 5, warm: int = 1) -> list[float]:
        """Seconds of each of `runs` calls, after `warm` calls that are not counted."""
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return [timer.timeit(1).mean for _ in range(warm + (1 if self.quick else runs))][warm:]

    def matrix_rate(self, dtype: torch.dtype = torch.float32, runs: int = 5) -> float:
        """Floating-point operations a second of a large matrix product, now."""
        a, b = self.factors.to(dtype)
        return 2 * len(a) ** 3 / statistics.median(self.seconds(lambda: a @ b, runs, 2))

    def beside_rate(self, work: Callable[[], object], runs: int = 5) -> tuple[list[float], float]:
        """Seconds of `work` and the matrix rate, measured in turn: a warm processor is slower than a cold one."""
        work()
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        seconds, rates = [], []
        for _ in range(1 if self.quick else runs):
            seconds += self.seconds(work, 1, 0)
            rates.append(self.matrix_rate(dtype))
        return seconds, statistics.median(rates)

    def add(self, task, seconds, system=OURS, precision="fp32", size=None, items=0, limit_s=np.nan, note=""):
        """Add and print a row of times (a list); `items` are what `rate` counts per second."""
        median = statistics.median(seconds)
        row = {"task": task, "system": system, "precision": precision, "size": size, "median_s": median}
        row |= {"low_s": min(seconds), "high_s": max(seconds), "runs": len(seconds)}
        row |= {"rate": items / median if items else np.nan, "limit_s": limit_s}
        self.rows.append(row | {"share_of_limit": limit_s / median, "note": note})
        share = f", {100 * limit_s / median:.0f} % of the limit" if limit_s == limit_s else ""
        print(f"{system:.8}  {task} {size or ''} {precision}: {median:.4g} s{share}  {note}", flush=True)

    def value(self, task: str, value: float, unit: str, system: str = OURS, precision: str = "") -> None:
        """Add and print a row that is not a time; its value stands in the column `rate`, its unit in `note`."""
        row = {"task": task, "system": system, "precision": precision, "rate": value, "note": unit}
        self.rows.append(row)
        print(f"{system:.8}  {task} {precision}: {value:.6g} {unit}", flush=True)

    def table(self) -> pd.DataFrame:
        """The rows, each with the machine it was measured on."""
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        cpu = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.machine())
        about = {"hardware": gpu or cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        if not gpu and openvino_tower.is_available():
            about["bf16_in_hardware"] = openvino_tower.has_bf16()
        about |= {"torch": torch.__version__, "python": platform.python_version()}
        about |= {"date": datetime.datetime.now(datetime.UTC).date(), "load_average": os.getloadavg()[0]}
        return pd.DataFrame(self.rows).assign(**about)


class Authors:
    """The authors' package in its own process, asked for one task at a time."""

    def __init__(self):
        command = [sys.executable, "-c", AUTHORS_PROCESS, str(pretrained.authors_package())]
        self.process = subprocess.Popen(
            [*command, str(torch.get_num_threads())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.process.stdout.readline()  # it is ready

    def ask(self, task: str, value=None) -> dict[str, float]:
        self.process.stdin.write(json.dumps([task, value]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def limits(bench: Bench) -> None:
    """The machine's matrix rate and memory bandwidth."""
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        bench.value("limit: matrix product", bench.matrix_rate(dtype, 20) / 1e9, "GFLOP/s", "machine", name)
    x = torch.randn(1 << (22 if bench.quick else 26), device=bench.device)
    bench.bandwidth = 4 * x.numel() / min(bench.seconds(x.sum, 10, 3))
    bench.value("limit: memory read", bench.bandwidth / 1e9, "GB/s", "machine")


def start(bench: Bench) -> None:
    """Importing, and the command line's help, in new processes."""
    authors = f"import sys; sys.path.insert(0, {str(pretrained.authors_package())!r}); import geoclip"
    for task, system, arguments in (
        ("import torch", "PyTorch", ["-c", "import torch"]),
        ("import geoclip", OURS, ["-c", "import geoclip"]),
        ("python -m geoclip --help", OURS, ["-m", "geoclip", "--help"]),
        ("import geoclip", AUTHORS, ["-c", authors]),
    ):
        command = [sys.executable, *arguments]
        run = functools.partial(subprocess.run, command, check=True, capture_output=True, cwd=paths.ROOT)
        bench.add(task, bench.seconds(run), system, note="new process")


def photo(bench: Bench) -> None:
    """One photo, in a new process and warm; the gallery; both systems in turn."""
    picture = str(pretrained.kauai())
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "clip.safetensors"
        save_random_clip(weights)
        command = [sys.executable, "-m", "geoclip", "predict", picture, "--clip-weights", str(weights)]
        precisions = ["auto"] if bench.quick else ["auto", "int8"]
        for precision in precisions:
            for state in ("first time: the tower is converted, the gallery embedded", "both kept"):
                seconds, peak = in_a_new_process([*command, "--precision", precision], Path(name) / "cache")
                bench.add("predict a photo, new process", [seconds], precision=precision, size=1, note=state)
            bench.value("predict a photo, peak memory", peak, "MB", precision=precision)
        os.environ["GEOCLIP_CACHE"] = str(Path(name) / "cache")
        began = time.perf_counter()
        authors = Authors()
        peak = authors.ask("predict", picture)["peak_mb"]
        bench.add("predict a photo, new process", [time.perf_counter() - began], AUTHORS, size=1)
        bench.value("predict a photo, peak memory", peak, "MB", AUTHORS)

        model = GeoCLIP.pretrained(weights, "auto")
        model.predict(picture)
        image, flop = model.views(picture), place_flop(LocationEncoderConfig()) * len(model.gallery)
        works = {
            "predict a photo": lambda: model.predict(picture),
            "image tower alone": lambda: model.image_encoder.features(image),
            "encode a gallery, first time": lambda: model.gallery.embed(model.location_encoder),
        }
        theirs = {"predict a photo": "predict", "encode a gallery, first time": "gallery"}
        taken: dict[tuple[str, str], list[float]] = {}
        with torch.inference_mode():
            for _ in range(1 if bench.quick else 4):
                for task, work in works.items():
                    taken.setdefault((task, OURS), []).extend(bench.seconds(work, 1, 0))
                for task, asked in theirs.items():
                    taken.setdefault((task, AUTHORS), []).append(authors.ask(asked, picture)["seconds"])
        rate = bench.matrix_rate()
        for (task, system), seconds in taken.items():
            limit = flop / rate if "gallery" in task else np.nan
            precision = model.image_encoder.precision if system == OURS else "fp32"
            bench.add(task, seconds, system, precision, limit_s=limit)
        for precision in [*precisions[1:], "fp32"]:
            model.image_encoder.use_precision(precision)
            bench.add("predict a photo", bench.seconds(works["predict a photo"], 3), precision=precision)
        few, more = (authors.ask("step", n)["seconds"] for n in ((1, 2) if bench.quick else (2, 6)))
        slope = (more - few) / (1 if bench.quick else 4)
        note = "extrapolated from small batches"
        bench.add(AUTHORS_STEP, [few + slope * 510], AUTHORS, items=512, note=note)
        authors.close()


def tower(bench: Bench) -> None:
    """Images through the tower, beside the matrix rate, and how far each precision is from fp32."""
    name = "ViT-B-32-quickgelu" if bench.quick else TOWER
    encoder = ImageEncoder(ImageEncoderConfig(name, None), torch.Generator().manual_seed(0)).eval()
    flop = flop_of(encoder.tower.visual, torch.zeros(1, 3, 224, 224))
    encoder.to(bench.device)
    cuda = bench.device.type == "cuda"
    precisions = ["fp32", "auto"] + ([] if cuda or bench.quick else ["int8"])
    if not cuda and openvino_tower.is_available() and openvino_tower.has_bf16():
        precisions.insert(1, "bf16")
    crops = torch.cat(encoder._calibration())[:8].to(bench.device)
    with torch.inference_mode():
        exact = encoder.features(crops)
        for precision in precisions:
            encoder.use_precision(precision)
            cosine = torch.cosine_similarity(exact, encoder.features(crops)).min().item()
            bench.value("image tower, least cosine to fp32", cosine, "cosine, 8 crops", precision=precision)
            for batch in (1, 4) if bench.quick else (64, 256, 512) if cuda else (1, 8, 32):
                images = torch.randn(batch, 3, 224, 224, device=bench.device)
                seconds, rate = bench.beside_rate(functools.partial(encoder.features, images))
                limit = np.nan if precision == "int8" else batch * flop / rate
                bench.add("image tower", seconds, OURS, precision, batch, batch, limit)


def embedding(bench: Bench) -> None:
    """Embedding places beside the matrix rate; and for other tasks, with the memory that it takes."""
    encoder = LocationEncoder(generator=torch.Generator().manual_seed(0)).to(bench.device).eval()
    n, million = (1_000, 2_000) if bench.quick else (100_000, 1_000_000)
    latlon = earth.sample_sphere(million, torch.Generator().manual_seed(1))
    flop = place_flop(encoder.config)
    seconds, rate = bench.beside_rate(lambda: gallery.embed(encoder, latlon[:n]), 3)
    bench.add("encode a gallery", seconds, size=n, items=n, limit_s=n * flop / rate)
    seconds, rate = bench.beside_rate(lambda: embed_places(latlon.numpy(), encoder=encoder), 1)
    bench.add("embed_places", seconds, size=million, items=million, limit_s=million * flop / rate)
    if bench.device.type == "cpu":
        command = [sys.executable, "-c", EMBED_PLACES, str(million)]
        printed = subprocess.check_output(command, cwd=paths.ROOT, text=True)
        bench.value("embed_places, peak memory beside the result", float(printed.split()[-1]), "MB")


def search(bench: Bench) -> None:
    """The five best places for 1 and 64 queries; the limit is reading or multiplying the gallery once."""
    cuda = bench.device.type == "cuda"
    dtype, name = (torch.float16, "fp16") if cuda else (torch.float32, "fp32")
    largest = 10_000 if bench.quick else 100_000_000 if cuda else 1_000_000
    rate = bench.matrix_rate(torch.bfloat16 if cuda else torch.float32)
    for n in (size for size in (10_000, 100_000, 1_000_000, 100_000_000) if size <= largest):
        places = torch.empty(n, 512, dtype=dtype, device=bench.device)
        for part in places.split(1 << 20):
            part.copy_(nn.functional.normalize(torch.randn(part.shape, device=bench.device), dim=1))
        for q in (1, 64):
            query = nn.functional.normalize(torch.randn(q, 512, device=bench.device), dim=1)
            seconds = bench.seconds(lambda query=query, places=places: gallery.search(query, places, 5))
            limit = max(places.nbytes / bench.bandwidth, 2 * q * n * 512 / rate)
            bench.add(f"search, {q} quer{'y' if q == 1 else 'ies'}", seconds, OURS, name, n, q, limit)
        del places


def decision(bench: Bench) -> None:
    """The posterior of 1 and of 256 queries over 100,000 places, and its mode, beyond the search; on the CPU."""
    n = 2_000 if bench.quick else 100_000
    generator = torch.Generator().manual_seed(0)
    latlon = torch.as_tensor(pretrained.official_gallery())[:n].double()
    places = Places(latlon)
    for q in (1, 16 if bench.quick else 256):
        centre = earth.unit_sphere(latlon[torch.randint(n, (q,), generator=generator)])
        logits = (60 * centre @ places.xyz.T).float() + 3 * torch.randn(q, n, generator=generator)
        seconds = bench.seconds(lambda logits=logits: places.posterior(logits, 5.0, 0.5, 0.02).answer("mode"))
        bench.add(f"decision, {q} quer{'y' if q == 1 else 'ies'}", seconds, size=n, items=q)


def training(bench: Bench) -> None:
    """A step on features, 512 images against 512 + 4,096 places; on a GPU an epoch of MP-16's size too."""
    from geoclip.training import runs
    from geoclip.training.config import TrainConfig
    from geoclip.training.data import seeded
    from geoclip.training.module import GeoCLIPTraining

    cuda = bench.device.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = random_features(Path(name) / "features", MP16 if cuda else 2048)
        image = ImageEncoderConfig(TOWER, None)
        config = TrainConfig(data=str(folder), image=image, epochs=2, workers=0)
        data = GeoCLIPTraining.training_set(config)
        data.keep_on(bench.device)
        module = GeoCLIPTraining.build(config, data).to(bench.device).train()
        (optimizer,), _ = module.configure_optimizers()
        batch = data.__getitems__([(0, i) for i in range(512)])
        batch = {key: value.to(bench.device) for key, value in batch.items()}

        def step() -> None:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=cuda):
                loss = module.loss(batch, seeded(0))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        seconds, rate = bench.beside_rate(step, 3)
        bench.add(STEP, seconds, items=512, limit_s=step_flop() / rate)
        if cuda:
            run = runs.train(config, Path(name) / "run", accelerator="gpu")
            epoch = run.result["epoch_seconds"][-1]
            bench.add("epoch on features", [epoch], precision="bf16", size=MP16, items=MP16)


def decoding(bench: Bench) -> None:
    """`embed` as a whole: JPEGs of 1024 × 768 read, decoded, through the tower, and written."""
    from PIL import Image

    n = 16 if bench.quick else 8192 if bench.device.type == "cuda" else 48
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = Image.open(pretrained.kauai()).convert("RGB").resize((1024, 768))
        for i in range(min(n, 64)):
            picture.save(folder / f"{i}.jpg", quality=85)
        rows = [f"{i % 64}.jpg,{i % 90},{i % 180}" for i in range(n)]
        (folder / "photos.csv").write_text("\n".join(["IMG_FILE,LAT,LON", *rows]) + "\n")
        tower_name = "ViT-B-32-quickgelu" if bench.quick else TOWER
        encoder = ImageEncoder(ImageEncoderConfig(tower_name, None)).to(bench.device)
        source = sources.open_source(str(folder / "photos.csv"))
        workers = os.cpu_count() or 1
        report = embed(source, encoder, folder / "out", workers=workers)
        note = f"{workers} decoding processes"
        bench.add("embed JPEGs, decoding in", [report.seconds], OURS, encoder.precision, n, n, note=note)


def in_a_new_process(command: list[str], cache: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of a command, with its own cache beside the authors' unpacked package."""
    cache.mkdir(exist_ok=True)
    if not (cache / "authors").exists():
        (cache / "authors").symlink_to(pretrained.AUTHORS)
    # measured by a small process between: a process also counts the memory of the one that started it
    program = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    program += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    environment = os.environ | {"GEOCLIP_CACHE": str(cache)}
    command, began = [sys.executable, "-c", program, *command], time.perf_counter()
    printed = subprocess.check_output(command, env=environment, cwd=paths.ROOT)
    return time.perf_counter() - began, float(printed)


def save_random_clip(path: Path) -> None:
    """CLIP ViT-L/14 with random weights, in half precision as OpenAI released its own."""
    from safetensors.torch import save_file

    model = ImageEncoder(ImageEncoderConfig(TOWER, None)).tower
    save_file({name: tensor.half().float().contiguous() for name, tensor in model.state_dict().items()}, path)


def random_features(out: Path, n: int) -> Path:
    """A folder of n random features at random places, as `embed` leaves it."""
    image, in_shard = ImageEncoderConfig(TOWER, None), 1 << 16
    encoder = ImageEncoder(image, with_tower=False)
    out.mkdir(parents=True)
    info = features.FeatureInfo(
        tower=TOWER, weights=None, tower_hash="random", preprocessing=encoder.preprocess, views=sources.Views(),
        dim=768, source="random", data="random", recipe=features.RECIPE, shards=-(-n // in_shard),
    )  # fmt: skip
    claim(out, info)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(in_shard, n), 1, 768, generator=generator).half().numpy()
    for part in range(info.shards):
        shard, rows = Shard(), min(in_shard, n - part * in_shard)
        shard.features = [np.roll(block, part, axis=-1)[:rows]]  # drawing 3.6 billion numbers takes longer
        shard.ids = [str(i) for i in range(rows)]
        shard.latlon = earth.sample_sphere(rows, generator).numpy()
        shard.write(out, part, info, "fp32")
    return out


def flop_of(module: nn.Module, images: Tensor) -> float:
    """Floating-point operations of one call, counted by PyTorch."""
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused operator
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            module(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return float(counter.get_total_flops())


def place_flop(config: LocationEncoderConfig) -> float:
    """Floating-point operations of the matrix products that embed one place."""
    widths = [2 * config.frequencies] + [config.width] * config.hidden_layers + [config.dim]
    return 2 * len(config.sigmas) * sum(a * b for a, b in itertools.pairwise(widths))


def step_flop(batch: int = 512, queue: int = 4096, c: int = 768) -> float:
    """Floating-point operations of one training step on features: forward, and twice that backward."""
    config, head = LocationEncoderConfig(), ImageEncoderConfig()
    image = 2 * (c * head.hidden + head.hidden * head.dim)
    logits = 2 * batch * (batch + queue) * config.dim
    return 3 * (batch * image + (batch + queue) * place_flop(config) + logits)


GROUPS = (start, photo, training, tower, embedding, search, decision, decoding)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    groups = {group.__name__: group for group in GROUPS}
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what to measure")
    parser.add_argument("--only", choices=groups, help="one group of measurements")
    parser.add_argument("--quick", action="store_true", help="small sizes, one run each: only tries the code")
    parser.add_argument("--out", type=Path, help="default: data/results/11_bench.csv, or 11_bench_gpu.csv")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    cuda = options.device == "cuda"
    out = options.out or paths.RESULTS / f"11_bench{'_gpu' if cuda else ''}.csv"
    bench = Bench(options.device, options.quick)
    try:
        limits(bench)
        for name, group in groups.items():
            if options.only in (None, name) and not (cuda and group in (start, photo, decision)):
                group(bench)
    finally:  # what was measured before an interruption is kept
        with paths.atomic(out) as temporary:
            bench.table().to_csv(temporary, index=False, float_format="%.6g")
    print(f"{len(bench.rows)} rows in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
