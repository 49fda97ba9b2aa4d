"""What commands need beyond torch, said before it is imported."""

from __future__ import annotations

import importlib.util

_TRAINER = {
    "accelerate": "accelerate",
    "anyio": "anyio",
    "diffusers": "diffusers",
    "httpx2": "httpx2",
    "matplotlib": "matplotlib",
    "peft": "peft",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "yaml": "pyyaml",
}


def check_extra() -> None:
    """Raises:
    ValueError: a package of the ``trainer`` extra is not installed.
    """
    missing = [package for module, package in _TRAINER.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; pip install 'flowdppo_fast[trainer]' brings them")
