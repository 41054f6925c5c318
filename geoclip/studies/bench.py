"""Measurements: how fast each part is, beside the limits of the machine and beside the authors' package.

Every row states what was done, how often, the median and the spread of its seconds, and the seconds that the
machine's measured matrix rate and memory bandwidth allow for the same work (`limit_s`).
"""

import dataclasses
import datetime
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from geoclip import earth, gallery, image_encoder, paths, precision, pretrained
from geoclip.datasets import features
from geoclip.datasets.sources import Views
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP

OURS, AUTHORS = "ours", "authors' package 1.3.0"
TOWER = "ViT-L-14-quickgelu"


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `cpu` is for two cores, `gpu` for one large GPU, `tiny` only tries the code.

    tower: an open_clip model; images: batches; places: gallery sizes searched; encoded: places encoded;
    indexed: places of which an index is made;
    epoch: cached features of one epoch (MP-16 has 4,723,695 photos); photos: JPEGs embedded with decoding.
    """

    tower: str
    images: tuple[int, ...]
    places: tuple[int, ...]
    encoded: tuple[int, ...]
    indexed: int
    steps: int
    epoch: int
    photos: int
    runs: int
    gemm: int
    copy_mb: int


SIZES = {
    "cpu": Sizes(TOWER, (1, 8, 32), (1_000, 10_000, 100_000, 1_000_000, 10_000_000), (100_000,), 2_000_000, 3, 0, 48, 5, 2048, 256),
    "gpu": Sizes(
        TOWER, (1, 64, 256, 512), (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000),
        (100_000, 1_000_000), 2_000_000, 200, 4_723_695, 8192, 20, 8192, 4096,
    ),
    "tiny": Sizes("ViT-B-32-quickgelu", (1, 4), (1_000, 10_000), (200,), 5_000, 1, 600, 16, 1, 256, 16),
}  # fmt: skip


class Bench:
    """One device, its measured limits, and the rows measured on it so far."""

    def __init__(self, device: str, sizes: Sizes, say: Callable[[str], None] = print):
        self.device, self.sizes, self.say = torch.device(device), sizes, say
        self.rows: list[dict] = []
        self.dtype = precision.choose("auto", self.device)
        self.gemm: dict[torch.dtype, float] = {}
        self.products: dict[torch.dtype, Callable[[], object]] = {}
        self.bandwidth = 0.0

    def measure_gemm(self, dtype: torch.dtype, runs: int) -> None:
        """The matrix rate now, FLOP/s, as the median of `runs` products; a warm processor's is below a cold one's."""
        self.gemm[dtype] = (
            2 * self.sizes.gemm**3 / statistics.median(self.seconds(self.products[dtype], runs, 5))
        )

    def beside_gemm(
        self, work: Callable[[], object], dtype: torch.dtype, runs: int | None = None
    ) -> list[float]:
        """As seconds(work), with matrix products between the calls, whose median rate is from then on the limit."""
        taken, rates = [], []
        work()
        for _ in range(runs or self.sizes.runs):
            self.measure_gemm(dtype, 20)
            taken += self.seconds(work, 1, 0)
            rates.append(self.gemm[dtype])
        self.gemm[dtype] = statistics.median(rates)
        return taken

    def seconds(self, work: Callable[[], object], runs: int | None = None, warm: int = 2) -> list[float]:
        """Seconds of each of `runs` calls, each waited for."""
        taken = []
        for run in range(-warm, runs or self.sizes.runs):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if run >= 0:
                taken.append(time.perf_counter() - began)
        return taken

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(
        self, task: str, seconds: list[float], system: str = OURS, size: int | None = None, items: float = 0,
        flop: float = 0, read_bytes: float = 0, dtype: torch.dtype | None = None, note: str = "",
    ) -> dict:  # fmt: skip
        """A row; items are what `rate` counts a second, flop and read_bytes what the limit is computed from."""
        median = statistics.median(seconds)
        limit = max(
            flop / self.gemm[dtype or self.dtype] if flop else 0,
            read_bytes / self.bandwidth if read_bytes else 0,
        )
        row = {
            "task": task, "system": system, "size": size, "precision": name_of(dtype or self.dtype),
            "median_s": median, "low_s": min(seconds), "high_s": max(seconds), "runs": len(seconds),
            "rate": items / median if items else np.nan, "limit_s": limit or np.nan,
            "share_of_limit": limit / median if limit else np.nan, "note": note,
        }  # fmt: skip
        self.rows.append(row)
        rate = f", {row['rate']:,.1f} a second" if items else ""
        share = f", {100 * row['share_of_limit']:.0f} % of the limit" if limit else ""
        self.say(f"{system:8.8} {task} {size or '':,}: {median:.4g} s{rate}{share} {note}" if size else
                 f"{system:8.8} {task}: {median:.4g} s{rate}{share} {note}")  # fmt: skip
        return row

    def note(
        self, task: str, value: float, unit: str, system: str = OURS, dtype: torch.dtype | None = None
    ) -> None:
        """A row that is no time: a rate, a cosine, megabytes."""
        kind = name_of(dtype) if dtype else ""
        self.rows.append({"task": task, "system": system, "precision": kind, "rate": value, "note": unit})
        self.say(f"{system:8.8} {task} {kind}: {value:.6g} {unit}")

    def free(self) -> None:
        """Give memory back between tasks."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def name_of(dtype: torch.dtype) -> str:
    """ "fp32" or "bf16"."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def machine(device: torch.device) -> dict:
    """What the numbers were measured on, and when."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "hardware": gpu or cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "cuda": torch.version.cuda if gpu else "",
        "python": platform.python_version(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load_average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


# ------------------------------------------------------------------------------------------------- the limits


def limits(bench: Bench) -> None:
    """The machine's matrix rate in each precision and its memory bandwidth, on random data."""
    n = bench.sizes.gemm
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        bench.products[dtype] = lambda a=a, b=b: a @ b
        bench.measure_gemm(dtype, 100)
        bench.note("limit: matrix product", bench.gemm[dtype] / 1e9, "GFLOP/s", "machine", dtype)
    x = torch.randn(bench.sizes.copy_mb << 18, device=bench.device)
    bench.bandwidth = x.numel() * 4 / min(bench.seconds(x.sum, 10, 3))
    bench.note("limit: memory read", bench.bandwidth / 1e9, "GB/s", "machine", torch.float32)


def flop_of(module: nn.Module, *inputs: Tensor) -> float:
    """Floating-point operations of one call, counted by PyTorch."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, which the counter does not know
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return float(counter.get_total_flops())


# -------------------------------------------------------------------------------------------------- the tasks


def tower(bench: Bench, compiled: bool = False) -> None:
    """Images a second through the tower, from decoded bytes to float16 features on the CPU."""
    config = ImageEncoderConfig(bench.sizes.tower, None)
    encoder = ImageEncoder(config, torch.Generator().manual_seed(0))
    pixels = image_encoder.Preprocessing.of(config).pixels
    flop = flop_of(encoder.tower.visual, torch.zeros(1, 3, pixels, pixels))
    encoder.to(bench.device)
    generator = torch.Generator().manual_seed(0)
    for batch in bench.sizes.images[-2:] if compiled else bench.sizes.images:
        torch.compiler.reset()  # compiled for this batch, and not for any
        images = torch.randint(256, (batch, 3, pixels, pixels), generator=generator, dtype=torch.uint8)
        if bench.device.type == "cuda":
            images = images.pin_memory()
        for dtype, name in ((bench.dtype, "auto"), (torch.float32, "fp32")):
            if name == "fp32" and (dtype == bench.dtype or batch != 8):
                continue
            run = features.Tower(
                encoder, image_encoder.Preprocessing.of(config), batch, name_of(dtype), compiled
            )
            taken = bench.beside_gemm(lambda run=run, images=images: run(images), dtype)
            bench.add(
                "image tower" + ", compiled" * compiled, taken, size=batch, items=batch, flop=batch * flop, dtype=dtype,
                note=f"{flop / 1e9:.0f} GFLOP an image",
            )  # fmt: skip
            if batch == 8 or (compiled and batch == bench.sizes.images[-1]):
                single = features.Tower(encoder, image_encoder.Preprocessing.of(config), 8, "fp32", False)
                cosine = (
                    torch.cosine_similarity(run(images)[:8].float(), single(images[:8]).float()).min().item()
                )
                bench.note("image tower, least cosine to fp32", cosine, "cosine", dtype=dtype)
    del encoder
    bench.free()


def agreement(bench: Bench) -> None:
    """How often bfloat16 gives the place that float32 gives: crops of two real photos, random CLIP weights.

    The released head, location encoder and gallery answer; with random weights of the tower photos lie closer
    together than with CLIP's, so that rounding moves more answers.
    """
    from sklearn.datasets import load_sample_image

    from geoclip import photos

    config, generator = ImageEncoderConfig(bench.sizes.tower, None), np.random.default_rng(0)
    whole = [photos.open_photo(load_sample_image("china.jpg")), photos.open_photo(str(pretrained.kauai()))]
    crops = []
    for i in range(bench.sizes.photos):
        photo = whole[i % len(whole)]
        left, top = generator.integers(0, (photo.width // 2, photo.height // 2))
        crops.append(photo.crop((left, top, left + photo.width // 2, top + photo.height // 2)))
    answers = {}
    for name in ("fp32", "bf16"):
        torch.manual_seed(0)  # open_clip draws its random weights from the global state
        images = ImageEncoder(config, torch.Generator().manual_seed(0))
        if images.feature_dim == 768:  # other towers keep a random head
            images.head.load_state_dict(pretrained.head_state())
        model = GeoCLIP(images, LocationEncoder.pretrained(), gallery.Gallery.official())
        answers[name] = model.eval().use_precision(name).predict(crops, 1)[0][:, 0]
    apart = earth.haversine_km(answers["fp32"], answers["bf16"])
    bench.note(
        "top-1 in bf16 is that of fp32", 100 * (apart == 0).double().mean().item(), f"% of {len(crops)} crops"
    )
    bench.note(
        "top-1 in bf16 is within 25 km of that of fp32",
        100 * (apart <= 25).double().mean().item(),
        f"% of {len(crops)} crops",
    )


def decoding(bench: Bench, workers: int) -> None:
    """Images a second of `embed` as a whole: JPEGs of 1024 × 768 from files, decoded, through the tower, to disk."""
    from PIL import Image

    from geoclip.datasets.sources import open_source

    n = bench.sizes.photos
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        rows = ["IMG_FILE,LAT,LON"]
        for i in range(n):
            if i < 64:  # pictures with the detail of a photo: a coarse pattern and fine noise
                coarse = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)
                picture = np.asarray(
                    Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC), np.int16
                )
                picture = np.clip(picture + generator.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{i}.jpg", quality=85)
            else:
                os.link(folder / f"{i % 64}.jpg", folder / f"{i}.jpg")
            rows.append(f"{i}.jpg,{i % 90},{i % 180}")
        (folder / "photos.csv").write_text("\n".join(rows) + "\n")
        encoder = ImageEncoder(ImageEncoderConfig(bench.sizes.tower, None), torch.Generator().manual_seed(0))
        encoder.to(bench.device)
        source = open_source(str(folder / "photos.csv"), photos_a_part=max(8, n // (4 * max(1, workers))))
        batch = max(bench.sizes.images)
        taken = []
        for run in range(3):
            report = features.embed(source, encoder, folder / f"out{run}", Views(), min(batch, 256), workers)
            taken.append(report.seconds)
        megabytes = sum((folder / f"{i}.jpg").stat().st_size for i in range(min(64, n))) / min(64, n) / 1e6
        bench.add(
            "embed JPEGs, decoding in", taken, size=n, items=n,
            note=f"{workers} decoding processes, 1024 × 768, {megabytes:.2f} MB each",
        )  # fmt: skip
        started = time.perf_counter()
        chunks = sum(len(chunk.ids) for chunk in source.chunks(0, Views(), image_encoder.Preprocessing(), 32))
        bench.add("decode JPEGs, one process", [time.perf_counter() - started], size=chunks, items=chunks)
    bench.free()


def places(bench: Bench) -> None:
    """Encoding places, beside the floating-point limit."""
    encoder = LocationEncoder(generator=torch.Generator().manual_seed(0)).to(bench.device).eval()
    flop = place_flop(encoder.config)
    block = 1 << 16 if bench.device.type == "cuda" else 4096
    for n in bench.sizes.encoded:
        latlon = earth.sample_sphere(n, torch.Generator().manual_seed(1))
        taken = bench.beside_gemm(
            lambda latlon=latlon: gallery.embed(encoder, latlon, block), torch.float32, 3
        )
        bench.add("encode a gallery", taken, size=n, items=n, flop=n * flop, dtype=torch.float32)
    bench.free()


def searching(bench: Bench) -> None:
    """The five best of galleries of growing size, for 1 and 64 queries.

    The limit is reading the gallery once, or, where that takes longer, as with 64 queries on a CPU, multiplying it.
    """
    dim = LocationEncoderConfig().dim
    generator = torch.Generator(bench.device).manual_seed(0)
    for n in bench.sizes.places:
        for dtype in (torch.float16 if bench.device.type == "cuda" else torch.float32,):
            size = n * dim * dtype.itemsize
            if size > free_memory(bench.device) * (0.85 if bench.device.type == "cuda" else 0.65):
                bench.say(f"search {n:,} {name_of(dtype)}: {size / 1e9:.0f} GB do not fit, not measured")
                continue
            rows = torch.empty(n, dim, dtype=dtype, device=bench.device)
            for part in rows.split(1 << 20):
                part.copy_(nn.functional.normalize(
                    torch.randn(part.shape, generator=generator, device=bench.device), dim=1
                ))  # fmt: skip
            for q in (1, 64):
                query = nn.functional.normalize(
                    torch.randn(q, dim, generator=generator, device=bench.device), dim=1
                )
                taken = bench.seconds(lambda query=query, rows=rows: gallery.search(query, rows, 5), 5, 1)
                bench.add(
                    f"search, {q} quer{'y' if q == 1 else 'ies'}", taken, size=n, items=q, read_bytes=size,
                    flop=2 * q * n * dim, dtype=dtype, note=f"{size / 1e6:,.0f} MB",
                )  # fmt: skip
            del rows
            bench.free()


def indexing(bench: Bench) -> None:
    """An index over the places of the released encoder: how long it takes, and what it finds of an exact search.

    The queries are synthetic_queries, as far from their places as photos are.
    """
    from geoclip.engines.place_index import PlaceIndex, synthetic_queries

    n = bench.sizes.indexed
    generator = torch.Generator().manual_seed(3)
    rows = gallery.embed(LocationEncoder.pretrained(), earth.sample_sphere(n, generator))
    query = synthetic_queries(rows, 64)
    began = time.perf_counter()
    index = PlaceIndex(rows)
    bench.add("build an index", [time.perf_counter() - began], size=n, items=n)
    for q in (1, 64):
        taken = bench.seconds(lambda q=q: index.scan(query[:q], 5), 5, 1)
        bench.add(f"search with an index, {q} quer{'y' if q == 1 else 'ies'}", taken, size=n, items=q)
    bench.note("search with an index, recall of the five best", 100 * index.measured, f"% at {n:,} places")


def free_memory(device: torch.device) -> float:
    """Bytes that can be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return next(
        int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")
    )


def place_flop(config: LocationEncoderConfig) -> float:
    """Floating-point operations of encoding one place: its matrix products."""
    widths = [2 * config.frequencies] + [config.width] * config.hidden_layers + [config.dim]
    return 2 * len(config.sigmas) * sum(a * b for a, b in itertools.pairwise(widths))


def step_flop(batch: int, queue: int, feature_dim: int = 768) -> float:
    """Floating-point operations of one training step on features: forward, and twice that backward."""
    config, head = LocationEncoderConfig(), ImageEncoderConfig()
    place = place_flop(config)
    image = 2 * (feature_dim * head.hidden + head.hidden * head.dim)
    return 3 * (batch * image + (batch + queue) * place + 2 * batch * (batch + queue) * config.dim)


def training_step(bench: Bench, compiled: str = "") -> None:
    """One step on features, 512 images against 512 + 4,096 places, with optimiser, as training does it."""
    from geoclip.training.config import TrainConfig
    from geoclip.training.data import seeded
    from geoclip.training.module import GeoCLIPTraining

    batch, queue = 512, 4096
    with made_features(4 * batch, 1) as folder:
        config = TrainConfig(
            data=str(folder), image=ImageEncoderConfig(TOWER, None), batch_size=batch, queue=queue
        )
        data = GeoCLIPTraining.training_set(config)
        data.keep_on(bench.device)
        module = GeoCLIPTraining.build(config, data).to(bench.device).train()
        if compiled:
            module.view_loss = torch.compile(module.view_loss, mode=compiled)
        (optimizer,), _ = module.configure_optimizers()
        steps = iter(range(10**9))

        def step() -> None:
            number = next(steps)
            keys = [(0, (number * batch + i) % len(data)) for i in range(batch)]
            loaded = {name: value.to(bench.device) for name, value in data.__getitems__(keys).items()}
            with precision.arithmetic(
                bench.dtype if bench.device.type == "cuda" else torch.float32, bench.device
            ):
                loss = module.loss(loaded, seeded(0, number))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        repeats = bench.sizes.steps if bench.device.type == "cuda" else 3

        def several() -> None:
            for _ in range(repeats):
                step()

        dtype = bench.dtype if bench.device.type == "cuda" else torch.float32
        taken = [seconds / repeats for seconds in bench.seconds(several, 3, 1)]
        bench.add(
            "training step on features, 512 + 4,096" + f", compiled ({compiled})" * bool(compiled), taken,
            items=batch, flop=step_flop(batch, queue), dtype=dtype, note=f"mean of {repeats} steps",
        )  # fmt: skip
    bench.free()


def epoch(bench: Bench) -> None:
    """`train` on as many made features as MP-16 has photos: seconds of each of two epochs, and what that means."""
    from geoclip.training import runs
    from geoclip.training.config import TrainConfig

    n = bench.sizes.epoch
    with made_features(n, 1) as folder:
        config = TrainConfig(
            data=str(folder), image=ImageEncoderConfig(TOWER, None), epochs=2, workers=0,
            precision="auto" if bench.device.type == "cuda" else "32-true",
        )  # fmt: skip
        began = time.perf_counter()
        run = runs.train(config, folder / "run")
        whole = time.perf_counter() - began
        seconds = run.result["epoch_seconds"]
    bench.add("epoch on features", seconds[-1:], size=n, items=n, flop=step_flop(512, 4096) * (n // 512),
              note=f"second epoch; the first took {seconds[0]:.1f} s with compilation, all {whole:.1f} s with loading")  # fmt: skip
    epochs = TrainConfig().epochs
    bench.note("whole training on features, projected", epochs * seconds[-1] + whole - sum(seconds),
               f"seconds: {epochs} epochs of {n:,} at the measured pace, and the measured start")  # fmt: skip


class made_features(tempfile.TemporaryDirectory):
    """A folder of n random features of ViT-L/14's width at random places, as `embed` would leave it."""

    def __init__(self, n: int, views: int):
        super().__init__()
        self.n, self.views = n, views

    def __enter__(self) -> Path:
        out = Path(super().__enter__()) / "features"
        image, a_shard = ImageEncoderConfig(TOWER, None), 1 << 16
        info = features.FeatureInfo(
            TOWER, None, "made", image_encoder.Preprocessing.of(image), Views(number=self.views), 768, "made", "made", "made",
            -(-self.n // a_shard),
        )  # fmt: skip
        out.mkdir()
        features.claim(out, info)
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(min(a_shard, self.n), self.views, 768, generator=generator).half().numpy()
        for part in range(info.shards):
            shard, rows = features.Shard(part), min(a_shard, self.n - part * a_shard)
            # each shard another view of the same random numbers: drawing 3.6 billion would take longer than training
            shard.features = [np.roll(block, part, axis=-1)[:rows]]
            shard.ids = [str(i) for i in range(rows)]
            shard.latlon = earth.sample_sphere(rows, generator).numpy()
            shard.write(out, info, torch.float32)
        return out


# Their package, in a process of its own: its import name is ours too. CLIP has random weights, as ours has.
AUTHORS_PROCESS = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
began = time.perf_counter()
import torch
import geoclip
imported = time.perf_counter() - began
torch.set_num_threads(int(sys.argv[2]))
model = geoclip.GeoCLIP(clip_pretrained=False).eval()
model.image_encoder.CLIP.requires_grad_(False)  # as it is with released weights
ready = time.perf_counter() - began
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"import": imported, "ready": ready}), flush=True)
trained = [p for p in model.parameters() if p.requires_grad]
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
        loss = torch.nn.functional.cross_entropy(model(images, places), torch.arange(value))
        loss.backward()
        optimizer.step()
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": peak()}), flush=True)
"""

# One photo in a new process, from the start of Python to the answer; CLIP has random weights.
OUR_PROCESS = """
import json, resource, sys, time
import torch
from geoclip import pretrained
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder
from geoclip.model import GeoCLIP
torch.set_num_threads(int(sys.argv[2]))
model = GeoCLIP(ImageEncoder(ImageEncoderConfig(sys.argv[3], None)), LocationEncoder.pretrained(), Gallery.official())
model.eval().use_precision("auto").predict(sys.argv[1], 5)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


class Authors:
    """The authors' released package at work in its own process, asked for one task at a time."""

    def __init__(self):
        threads = str(torch.get_num_threads())
        self.process = subprocess.Popen(
            [sys.executable, "-c", AUTHORS_PROCESS, str(pretrained.authors_package()), threads],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.start = json.loads(self.process.stdout.readline())
        self.peak_mb = 0.0

    def seconds(self, task: str, value=None) -> float:
        """Seconds of one task, measured in its process."""
        self.process.stdin.write(json.dumps([task, value]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.peak_mb = answer["peak_mb"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(60)


def starting(bench: Bench) -> None:
    """Seconds to import and to show the help, in new processes, alternating."""
    package = str(pretrained.authors_package())
    commands = {
        ("import torch", "PyTorch"): ["-c", "import torch"],
        ("import geoclip", OURS): ["-c", "import geoclip"],
        ("python -m geoclip --help", OURS): ["-m", "geoclip", "--help"],
        ("import geoclip", AUTHORS): ["-c", f"import sys; sys.path.insert(0, {package!r}); import geoclip"],
    }
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in commands}
    for _ in range(bench.sizes.runs):
        for key, arguments in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=paths.ROOT)
            taken[key].append(time.perf_counter() - began)
    for (task, system), seconds in taken.items():
        bench.add(task, seconds, system, note="new process")


def answering(bench: Bench) -> None:
    """One photo, cold and warm, 64 photos, the gallery, and a training step: ours and theirs, alternating."""
    photo = str(pretrained.kauai())
    threads = torch.get_num_threads()
    cold = {}
    with tempfile.TemporaryDirectory() as cache:
        # the gallery's embedding is not kept yet in the first, and is in the second
        for state in ("gallery not kept yet", "gallery kept"):
            link = Path(cache) / "authors"
            if not link.exists():
                link.symlink_to(pretrained.AUTHORS)
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", OUR_PROCESS, photo, str(threads), bench.sizes.tower], check=True,
                capture_output=True, text=True, cwd=paths.ROOT, env=os.environ | {"GEOCLIP_CACHE": cache},
            )  # fmt: skip
            cold[state] = time.perf_counter() - began
            peak = float(done.stdout.splitlines()[-1])
            bench.add("predict a photo, new process", [cold[state]], note=state)
        bench.note("predict a photo, peak memory", peak, "MB")
    began = time.perf_counter()
    authors = Authors()
    first = authors.seconds("predict", photo)
    bench.add("predict a photo, new process", [time.perf_counter() - began], AUTHORS)
    bench.note("predict a photo, peak memory", authors.peak_mb, "MB", AUTHORS)
    bench.say(f"their first answer took {first:.1f} s after {authors.start['ready']:.1f} s of start")

    model = GeoCLIP(
        ImageEncoder(ImageEncoderConfig(bench.sizes.tower, None)), LocationEncoder.pretrained(), gallery.Gallery.official()
    ).eval()  # fmt: skip
    flop, places_flop = (
        flop_of(model.image_encoder.tower.visual, torch.zeros(1, 3, 224, 224)),
        place_flop(model.location_encoder.config),
    )
    model.use_precision("auto").predict(photo)
    image = model.views(photo)
    rounds = max(3, bench.sizes.runs - 2)
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for task, system, work in (
            ("predict a photo", OURS, lambda: model.predict(photo)),
            ("image tower alone", OURS, lambda: model.encode_images(image)),
            (
                "encode a gallery, first time",
                OURS,
                lambda: model.gallery.embed(model.location_encoder),
            ),
            (
                "encode a gallery, after",
                OURS,
                lambda: model.gallery.embed(model.location_encoder, True).sum(),
            ),
            ("predict a photo", AUTHORS, None),
            ("encode a gallery, first time", AUTHORS, None),
        ):
            with torch.inference_mode():
                seconds = (
                    bench.seconds(work, 1, 0)[0]
                    if work
                    else authors.seconds("predict" if "photo" in task else "gallery", photo)
                )
            taken.setdefault((task, system), []).append(seconds)
    for (task, system), seconds in taken.items():
        dtype = bench.dtype if system == OURS else torch.float32
        tower_work = flop if "photo" in task or "tower" in task else 0
        again = "after" in task or (system == OURS and "photo" in task)
        encoding = 0 if again or "tower" in task else 100_000 * places_flop
        bench.add(
            task, seconds, system, 100_000 if "gallery" in task else 1, 1, tower_work + encoding, dtype=dtype
        )
    bench.add(
        "predict 64 photos",
        bench.seconds(lambda: model.predict([photo] * 64), 2, 0),
        size=64,
        items=64,
        flop=64 * flop,
    )
    one = statistics.median(taken["predict a photo", AUTHORS])
    bench.add(
        "predict 64 photos",
        [64 * one],
        AUTHORS,
        64,
        64,
        note="64 times the measured one: it takes one photo",
        dtype=torch.float32,
    )
    few, more = authors.seconds("step", 2), authors.seconds("step", 6)
    whole = few + (more - few) / 4 * 510
    bench.add("training step, 512 + 4,096, tower in it", [whole], AUTHORS, items=512, dtype=torch.float32,
              note=f"from steps of 2 ({few:.1f} s) and 6 ({more:.1f} s) images, linear in images")  # fmt: skip
    authors.close()
    bench.free()


def cpu(bench: Bench) -> None:
    """All that a CPU is asked, the table of the README first."""
    limits(bench)
    for work in (starting, answering, training_step, tower, searching, places, indexing, agreement):
        attempt(bench, work.__name__, lambda work=work: work(bench))
    attempt(bench, "decoding", lambda: decoding(bench, len(os.sched_getaffinity(0))))


def gpu(bench: Bench) -> None:
    """All that a GPU is asked, the surest first."""
    limits(bench)
    tower(bench)
    for mode in ("", "default", "reduce-overhead"):
        attempt(bench, f"training step {mode}", lambda mode=mode: training_step(bench, mode))
    attempt(bench, "epoch", lambda: epoch(bench))
    attempt(bench, "compiled tower", lambda: tower(bench, compiled=True))
    attempt(bench, "places", lambda: places(bench))
    attempt(bench, "decoding", lambda: decoding(bench, len(os.sched_getaffinity(0))))
    attempt(bench, "searching", lambda: searching(bench))


def attempt(bench: Bench, task: str, work: Callable[[], None]) -> None:
    """Measure a task; one that fails is named, with the reason, and the others go on."""
    try:
        work()
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        bench.note(f"{task}: not measured", float("nan"), str(error).splitlines()[0][:200])
    bench.free()


def table(bench: Bench):
    """The rows as a pandas table, with the machine in every row."""
    import pandas as pd

    about = machine(bench.device) | {"sizes": dataclasses.astuple(bench.sizes)[0]}
    return pd.DataFrame(bench.rows).assign(**about)


# ------------------------------------------------------------------------------------------------ what it means


def measured(name: str):
    """The rows of data/results/NAME.csv where `bench` made them here, else those of data/measured; their origin."""
    import pandas as pd

    for folder in (paths.RESULTS, paths.DATA / "measured"):
        path = folder / f"{name}.csv"
        if path.is_file():
            return pd.read_csv(path), folder.name
    raise FileNotFoundError(
        f"no {name}.csv in data/results or data/measured: not measured yet, `make bench` does it"
    )


STEP, AUTHORS_STEP = "training step on features, 512 + 4,096", "training step, 512 + 4,096, tower in it"


def beside_authors(rows):
    """Seconds of ours and of the authors' package for what both were asked in one run, and how many times faster."""
    import pandas as pd

    tasks = [
        "predict a photo, new process",
        "predict a photo",
        "predict 64 photos",
        "encode a gallery, first time",
        STEP,
    ]
    table = []
    for task in tasks:
        theirs = one(
            rows, AUTHORS_STEP if task == STEP else task, "median_s", system=AUTHORS, default=math.nan
        )
        kept = {"note": "gallery kept"} if "new process" in task else {}
        ours = one(rows, task, "median_s", system=OURS, default=math.nan, **kept)
        table.append({"task": task, "ours_s": ours, "authors_s": theirs, "times_faster": theirs / ours})
    return pd.DataFrame(table)


def aims(rows):
    """What was aimed at on two cores, what was measured, and whether it was reached."""
    import pandas as pd

    def of(task: str, column: str = "median_s", **where) -> float:
        return one(rows, task, column, default=math.nan, system=OURS, **where)

    authors = beside_authors(rows).set_index("task")["times_faster"]
    limits = {
        q: 1 / of(f"search, {q}", "share_of_limit", size=100_000, precision="bf16")
        for q in ("1 query", "64 queries")
    }
    table = [
        ("predict a photo, warm: times the authors' speed", ">=", 15, authors["predict a photo"]),
        ("… times the image tower alone", "<=", 1.3, of("predict a photo") / of("image tower alone")),
        ("image tower, batch 8: % of the matrix rate", ">=", 85, 100 * of("image tower", "share_of_limit", size=8, precision="bf16")),
        ("image tower, batch 32: % of the matrix rate", ">=", 85, 100 * of("image tower", "share_of_limit", size=32, precision="bf16")),
        ("100 K gallery, first time: times its limit", "<=", 1.2, 1 / of("encode a gallery", "share_of_limit", precision="bf16")),
        ("… after, seconds", "<=", 0.3, of("encode a gallery, after")),
        ("search 100 K, 1 query: times its limit", "<=", 2, limits["1 query"]),
        ("search 100 K, 64 queries: times its limit", "<=", 2, limits["64 queries"]),
        ("training step: times the authors' speed", ">=", 200, authors[STEP]),
        ("import geoclip: seconds beyond torch's import", "<=", 0.2, of("import geoclip") - one(rows, "import torch", "median_s", default=math.nan)),
        ("python -m geoclip --help, seconds", "<=", 1, of("python -m geoclip --help")),
    ]  # fmt: skip
    table = pd.DataFrame(table, columns=["what", "sense", "aim", "measured"])
    above = table["sense"] == ">="
    table["reached"] = (table["measured"] >= table["aim"]).where(above, table["measured"] <= table["aim"])
    return table.assign(aim=table["sense"] + " " + table["aim"].astype(str)).drop(columns="sense")


def one(rows, task: str, column: str, default: float | None = None, **where) -> float:
    """The value in `column` of the first row of `task` (and of these other columns).

    Where there is none: `default`, or KeyError without one.
    """
    chosen = rows[rows["task"] == task]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    if chosen.empty:
        if default is None:
            raise KeyError(f"no row {task!r} with {where}")
        return default
    return float(chosen[column].iloc[0])


def growth_in_images(rows, counts=(100_000, 4_723_695, 100_000_000), views: int = 8, gpus=(1, 8, 64)):
    """What n training images cost: gigabytes of features, hours to embed them, minutes of an epoch.

    Hours and minutes are the measured rates of one GPU, divided by the number of GPUs: shards are divided with no
    communication, and an epoch's gradients (42 MB a step) are not counted. An estimate, but for one GPU.
    """
    import pandas as pd

    tower = rows[rows["task"].isin(["image tower", "image tower, compiled"])]["rate"].max()
    decoded = one(rows, "embed JPEGs, decoding in", "rate")
    trained = one(rows, "epoch on features", "rate")
    table = []
    for n in counts:
        for k in gpus:
            table.append({
                "images": n, "gpus": k, "features_gb": n * views * 768 * 2 / 1e9,
                "embed_hours": n * views / tower / k / 3600, "embed_decoding_hours": n / decoded / k / 3600,
                "epoch_minutes": n / trained / k / 60,
            })  # fmt: skip
    return pd.DataFrame(table)


def growth_in_places(rows, counts=(100_000, 1_000_000, 10_000_000, 100_000_000)):
    """What m places cost: gigabytes in float32 and bfloat16, seconds to encode, milliseconds of a search.

    Encoding is the measured rate at the largest gallery that was encoded; searches are measured (NaN where not).
    """
    import pandas as pd

    encoded = rows[(rows["task"] == "encode a gallery") & (rows["precision"] == "bf16")]["rate"].max()
    table = []
    for m in counts:
        row = {
            "places": m,
            "fp32_gb": m * 512 * 4 / 1e9,
            "bf16_gb": m * 512 * 2 / 1e9,
            "encode_s": m / encoded,
        }
        for q in ("1 query", "64 queries"):
            found = rows[
                (rows["task"] == f"search, {q}") & (rows["size"] == m) & (rows["precision"] == "bf16")
            ]
            row[f"search_{q.replace(' ', '_')}_ms"] = 1000 * found["median_s"].min()
        table.append(row)
    return pd.DataFrame(table)
