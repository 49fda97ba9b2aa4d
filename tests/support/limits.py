"""A process that dies under a test ends the whole run, with that test's name."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, sched: Any) -> None:
    """xdist's: without it the other workers go on, and with ``--dist loadfile`` the rest of the file never comes."""
    # seconds in which the other workers may finish what they are at
    sched.config.pluginmanager.getplugin("dsession").nodemanager.EXIT_TIMEOUT = 1
    pytest.exit(f"{crashitem} ended its process (crash or time limit); what it was doing is above", returncode=1)
