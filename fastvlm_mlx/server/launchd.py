"""The property list with which macOS starts a server at login."""

from __future__ import annotations

import plistlib
from collections.abc import Mapping, Sequence

LABEL = "fastvlm-mlx.serve"


def property_list(command: Sequence[str], environment: Mapping[str, str], *, folder: str, log: str) -> str:
    """The text of a launch agent.

    Args:
        command: The program and its arguments.
        environment: Variables that it needs.
        folder: Where it starts, for paths that are relative.
        log: The file that its stderr goes to.
    """
    agent = {
        "Label": LABEL,
        "ProgramArguments": list(command),
        "EnvironmentVariables": dict(environment),
        "WorkingDirectory": folder,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "ProcessType": "Interactive",
        "StandardErrorPath": log,
    }
    return plistlib.dumps(agent, sort_keys=False).decode().expandtabs(2)
