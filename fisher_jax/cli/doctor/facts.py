"""What a bug report starts with: versions, settings, devices, memory, caches."""

import contextlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from fisher_jax._support.machine import installed

_PACKAGES = ("fisher-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "ml_dtypes")
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_")
_NAMES = ("NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "FISHER_JAX_CACHE")

# What changes results or speed, with the value that it has when nobody sets it.
_SETTINGS: Mapping[str, Any] = {
    "jax_default_matmul_precision": None,
    "jax_enable_x64": False,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_disable_jit": False,
    "jax_check_tracer_leaks": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_transfer_guard": None,
    "jax_default_device": None,
    "jax_compilation_cache_dir": None,
}
_ALWAYS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_compilation_cache_dir")


def packages() -> dict[str, str]:
    """Versions of Python and of what the library builds on, with the plugins of JAX for accelerators."""
    python = f"{platform.python_version()} ({platform.python_implementation()}, {sys.platform} {platform.machine()})"
    plugins = {d.name for d in distributions() if (d.name or "").startswith(("jax-", "jax_", "libtpu"))}
    return {"Python": python} | {
        name: installed(name, "not installed") for name in (*_PACKAGES, *sorted(plugins - set(_PACKAGES)))
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that JAX, XLA and the library read, as they are set."""
    return {k: v for k, v in sorted(variables.items()) if k.startswith(_VARIABLES) or k in _NAMES}


def host() -> dict[str, str]:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cores": str(cores)}
    memory = _memory()
    if memory:
        found["host memory"] = ", ".join(f"{size / 2**30:.1f} GiB {kind}" for kind, size in memory.items())
    return found


def _memory() -> dict[str, int]:
    """Bytes, where the system tells."""
    found = {}
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found["in all"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found["available"] = int(line.split()[1]) * 1024
    for line in _lines(Path("/sys/fs/cgroup/memory.max")):
        if line.isdigit():
            found["allowed to this container"] = int(line)
    return found


def _lines(file: Path) -> Iterable[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def jax_settings() -> dict[str, str]:
    """JAX's settings that change results, those that differ from their defaults and the most important always."""
    import jax

    values = {name: getattr(jax.config, name, default) for name, default in _SETTINGS.items()}
    return {k: str(v) for k, v in values.items() if k in _ALWAYS or v != _SETTINGS[k]}


def devices() -> dict[str, str]:
    """Every kind of device once, with its number and memory; the caches of the library.

    Raises whatever JAX raises where there is no device.
    """
    import jax

    from fisher_jax.models import weight_cache

    all_devices = jax.devices()
    kinds = dict.fromkeys((device.platform, device.device_kind) for device in all_devices)
    shown = []
    for platform_name, kind in kinds:
        same = [d for d in all_devices if (d.platform, d.device_kind) == (platform_name, kind)]
        size = (same[0].memory_stats() or {}).get("bytes_limit")
        memory = f", {size / 2**30:.1f} GiB each for JAX" if size else ""
        shown.append(f"{len(same)} x {platform_name} ({kind}{memory})")
    found = {"devices": "; ".join(shown), "backend": f"{jax.default_backend()}, {_runtime(all_devices[0])}"}
    if jax.process_count() > 1:
        found["processes"] = str(jax.process_count())
    return found | {"cache of models": _folder(weight_cache.folder())}


def _runtime(device: Any) -> str:
    return " ".join(str(getattr(device.client, "platform_version", "")).split()) or "no version given"


def _folder(path: Path) -> str:
    try:
        sizes = [file.stat().st_size for file in path.iterdir() if file.is_file()]
    except OSError:
        return f"{path} (nothing there)"
    return f"{path} ({len(sizes)} files, {sum(sizes) / 2**20:.0f} MiB)"
