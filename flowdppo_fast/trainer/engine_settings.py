"""Settings of servers that sample in the trainer's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from .settings import SECTION, Positive, require


@dataclass
class EnginesConfig:
    """> Parameters of servers that sample in the place of this process.

    Args:
        urls: of the servers, such as ``http://10.0.0.2:30000``; none means that the trainer samples itself. A group is
            a request, and the requests of a pipeline call (``sampling.batch_size``) go to all servers at once.
        protocol: ``"flowdppo"`` (``python -m flowdppo_fast.trainer.engines.serve``) or ``"sglang"`` (SGLang's
            ``POST /rollout/generate``, a request per image).
        weights: how adapters get there: ``"http"`` sends the file, ``"file"`` its path below ``run.output_dir``,
            which the servers must see.
        timeout: seconds for one answer.
        retries: further tries of a server before its work goes to the others.
    """

    __pydantic_config__ = SECTION

    urls: tuple[str, ...] = ()
    protocol: Literal["flowdppo", "sglang"] = "flowdppo"
    weights: Literal["http", "file"] = "http"
    timeout: Positive = 600.0
    retries: Annotated[int, Field(ge=0), Strict()] = 2


def check_engines(config: Any) -> None:
    """Raises ``ValueError`` where the settings of a run do not go with its ``engines``."""
    e = config.engines
    for url in e.urls:
        require(url.startswith(("http://", "https://")), "engines.urls", url, "http:// or https://")
    if e.urls:
        require(config.model.train == "lora", "engines.urls", e.urls, "none with model.train='full': adapters are sent")
        require(
            e.protocol != "sglang" or e.weights == "file", "engines.weights", e.weights,
            "'file' with engines.protocol='sglang', which reads adapters from a path",
        )  # fmt: skip
