"""Why a callable could not be run, each with the exit code that says so."""


class RuntimeFailure(Exception):
    """One line for a human. ``exit_code`` is the process's; ``reason`` is left in the reason file when not empty."""

    exit_code = 2
    reason = ""


class NotCallable(RuntimeFailure):
    """The module or the callable does not exist: this can never work."""

    reason = "invalid_spec"


class ImportExited(RuntimeFailure):
    """The module ended the process while it was imported; nothing was called."""

    exit_code = 1


class InvalidResult(RuntimeFailure):
    """The callable returned something that is not JSON."""

    exit_code = 3
    reason = "invalid_xcom"
