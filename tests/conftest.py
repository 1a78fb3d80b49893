"""What holds for every test: no settings of the developer, nothing left behind, output shown on failure."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator

import pytest

from tests.support import environment, leaks, process

pytest_plugins = ["tests.support.fixtures"]

# Before any test module is imported: an import of settings must not see the developer's own.
environment.strip_settings()


def pytest_configure(config: pytest.Config) -> None:
    directory = environment.isolate_temporary_directory()
    config.add_cleanup(lambda: environment.remove_temporary_directory(directory))
    process.end_tests_on_sigterm()
    # Started in the background we may have been told to ignore it, and every process of a test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the test's processes printed beside its failure."""
    report = yield
    if report.failed:
        for one in process.started_in_this_test:
            report.sections.append((f"output of {one.name} (pid {one.pid})", one.output()[-8_000:]))
    return report


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """A test that set a LEOFLOW_* variable by hand does not decide the next one."""
    yield
    environment.strip_settings()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a process, a non-daemon thread or a temporary directory behind fails."""
    is_unit = "unit" in request.path.parts
    before = leaks.Footprint.take(orphans=not is_unit)
    yield
    found = leaks.leaks_since(before)
    process.started_in_this_test.clear()
    if found:
        leaks.kill_leaked_processes(before)
        pytest.fail("left behind: " + "; ".join(found), pytrace=False)
