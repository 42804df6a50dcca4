"""Describes the machine: devices, cores, own addresses, and the hardware and software in a run's provenance."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache, lru_cache
from importlib import metadata
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import torch

from rafce_ray.base.errors import UsageError


def choose_device(wanted: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; also ``cpu``, ``cuda``, ``cuda:1`` and, on a Mac, ``mps``.

    Raises:
        UsageError: no such device is here.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu"]
    if num_gpus:
        here += ["cuda", *(f"cuda:{number}" for number in range(num_gpus))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if wanted == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    if wanted not in here:
        raise UsageError(f"--device {wanted}: there is no such device here. Use one of: auto, {', '.join(here)}.")
    return torch.device(wanted)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=256)
def ip_address_of(host: str) -> IPv4Address | IPv6Address | None:
    """A host that is written as an address, IPv4 for one mapped into IPv6; None for a name."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, by its address or as ``localhost``."""
    address = ip_address_of(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix arithmetic is in the hardware: Ampere and later GPUs, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def resolve_precision(wanted: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``; ``auto`` is bf16 where the hardware has it."""
    if wanted == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return wanted


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Name of the processor or GPU, and what numbers may depend on."""
    name = str(torch.cpu.get_capabilities().get("cpu_name"))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": device.type, "name": name, "threads": torch.get_num_threads()}


def describe_software() -> dict[str, Any]:
    """Versions that numbers may depend on, and the git commit of the code if it is a checkout."""
    versions = {}
    for package in (
        "rafce_ray",
        "torch",
        "torchvision",
        "numpy",
        "pyarrow",
        "kornia",
        "opencv-python-headless",
        "pillow",
        "ray",
    ):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **versions,
        "git_commit": _git_commit(),
    }


@cache
def _git_commit() -> str:
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
