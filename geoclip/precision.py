"""The arithmetic that answers: bfloat16 where the processor multiplies it faster, single precision elsewhere.

The Fourier phase of the location encoder stays in single precision in every case (see location_encoder).
"""

import contextlib
import functools
import sys
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
CHOICES = ("auto", "fp32", "bf16")


def choose(precision: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """float32 or bfloat16 for inference on `device`; "auto" looks at the processor and says once what it chose.

    Raises ValueError for another name, and for "bf16" on a GPU that has none.
    """
    device = torch.device(device)
    if precision not in CHOICES:
        raise ValueError(f"no precision {precision!r}: give one of {', '.join(CHOICES)}")
    if precision == "auto":
        return _automatic(device.type)
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError("this GPU has no bfloat16 arithmetic; use precision fp32")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_fast_bf16(device_type: str) -> bool:
    """Whether bfloat16 products are done in hardware: AVX-512 BF16 or AMX on a CPU, Ampere or later on a GPU."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


@functools.cache
def _automatic(device_type: str) -> torch.dtype:
    fast = has_fast_bf16(device_type)
    chosen = "bf16, which it multiplies in hardware" if fast else "fp32; it has no fast bf16"
    print(f"geoclip: precision auto: this {device_type} computes in {chosen}", file=sys.stderr)
    return torch.bfloat16 if fast else torch.float32


def packs(device: torch.device | str) -> bool:
    """Whether bfloat16 networks run there as geoclip.cpu_bf16 lays them out: on a CPU for which oneDNN has bf16."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def arithmetic(dtype: torch.dtype, device: torch.device | str = "cpu") -> contextlib.AbstractContextManager:
    """A context in which matrix products are done in `dtype`; normalisations and sums stay in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    # Without the cache: it keeps copies only of weights that need a gradient, and those here do not.
    return torch.autocast(torch.device(device).type, dtype, cache_enabled=False)
