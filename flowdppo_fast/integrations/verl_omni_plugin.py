"""Registers the fused losses and step on import: the value of verl-omni's ``actor_rollout_ref.model.external_lib``.

Flags other than the defaults come from the environment of the workers, as ``name=value`` pairs separated by commas:
``FLOWDPPO_VERL_OMNI="log_ratio=means,kl_with_dt=true"``; the names are those of
:class:`flowdppo_fast.integrations.verl_omni.Options`.
"""

import dataclasses
import os

from .verl_omni import Options, register

VARIABLE = "FLOWDPPO_VERL_OMNI"


def options_of(text: str) -> Options:
    """:class:`Options` from ``name=value`` pairs.

    Raises:
        ValueError: a pair without ``=``, an unknown name, or a value out of its choices.
    """
    known = {field.name for field in dataclasses.fields(Options)}
    values: dict[str, str | bool] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"{VARIABLE}: got {pair!r}, expected name=value with one of {', '.join(sorted(known))}")
        values[name] = {"true": True, "false": False}.get(value.lower(), value)
    return Options(**values)  # type: ignore[arg-type]


register(options=options_of(os.environ.get(VARIABLE, "")))
