"""The back ends: one dict. A back end is a module with ``create(settings, reporter, observer) -> Executor``.

One that has files of the operator's to read has ``check(settings)`` as well, which a worker calls when it starts.

Modules are named, not imported: a worker of one queue does not pay for the clients of the others.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import cast

from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.base import Executor, FailureReporter, Observer
from leoflow_celery.settings import Settings

BACK_ENDS: dict[ExecutorType, str] = {
    ExecutorType.KUBERNETES: "leoflow_celery.executors.kubernetes",
    ExecutorType.DOCKER: "leoflow_celery.executors.docker",
    ExecutorType.SUBPROCESS: "leoflow_celery.executors.subprocess",
}


def create_executor(
    executor_type: ExecutorType, settings: Settings, reporter: FailureReporter, observer: Observer | None = None
) -> Executor:
    """The executor of a type; ``reporter`` hears of attempts that end without their agent saying so.

    Raises:
        ConfigurationError: this version has no such back end, or what it needs is not installed.
    """
    if executor_type is ExecutorType.INLINE:
        raise ConfigurationError(
            "the inline executor starts nothing: its worker makes the call and waits for the answer"
        )
    module = _module_of(executor_type)
    return cast(Executor, module.create(settings, reporter, observer or Observer()))


def check_executor(executor_type: ExecutorType, settings: Settings) -> None:
    """Read what the settings of a type name, as a launch would: a worker with a wrong file starts nothing.

    Raises:
        ConfigurationError: names the setting, the file and what is wrong.
    """
    if executor_type in BACK_ENDS and (check := getattr(_module_of(executor_type), "check", None)) is not None:
        check(settings)


def _module_of(executor_type: ExecutorType) -> ModuleType:
    module_name = BACK_ENDS.get(executor_type)
    if module_name is None:
        raise ConfigurationError(
            f"the {executor_type} executor is not part of this version; set LEOFLOW_EXECUTOR_TYPE, or the request's "
            f"executor, to one of {', '.join(BACK_ENDS)}"
        )
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == __name__.split(".")[0]:
            raise
        raise ConfigurationError(
            f"the {executor_type} executor needs the package {error.name!r}: "
            f"pip install 'leoflow-celery[{executor_type}]'"
        ) from error
