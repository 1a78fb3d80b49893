"""The part of an agent's environment that travels by file: what nobody who inspects a container may see."""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from pathlib import Path

from leoflow_celery.errors import ConfigurationError

VARIABLE = "LEOFLOW_AGENT_ENV_FILE"


def absorb_environment_file(environ: MutableMapping[str, str]) -> None:
    """Add the variables of the file, a JSON object, and remove the file: the user's process finds neither.

    Raises:
        ConfigurationError: the file cannot be read or removed; it is there for the first start only.
    """
    path = environ.pop(VARIABLE, "")
    if not path:
        return
    try:
        variables = json.loads(Path(path).read_bytes())
        os.unlink(path)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{VARIABLE}={path}: there is none; it was read and removed at the first start"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{VARIABLE}={path}: {error}") from error
    environ.update(variables)
