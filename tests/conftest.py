"""What holds for every test: no settings of the developer, nothing left behind, output shown on failure."""

from __future__ import annotations

import signal
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support import environment, leaks, process

pytest_plugins = ["tests.support.fixtures"]

# Before any test module is imported: an import of settings must not see the developer's own.
environment.strip_settings()
# Tests run beside each other; an example that took long says nothing.
hypothesis.settings.register_profile("leoflow", deadline=None)
hypothesis.settings.load_profile("leoflow")


#: The folders of the tiers, by what their tests take: an acceptance file is minutes, a unit file milliseconds.
TIERS = ("acceptance", "integration", "contract", "unit")
_TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    directory = environment.isolate_temporary_directory()
    config.add_cleanup(lambda: environment.remove_temporary_directory(directory))
    process.end_tests_on_sigterm()
    # Started in the background we may have been told to ignore it, and every process of a test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with its tier, and put files in a good order when several workers share them.

    The long ones come first, or the last to be begun would keep one worker busy alone. Within a tier they are mixed, so
    that those beside each other seldom wait for the same Docker Engine or cluster.
    """
    for item in items:
        if (tier := _tier(item)) is not None:
            item.add_marker(tier)
    if environment.worker_name():
        items.sort(
            key=lambda item: (TIERS.index(_tier(item) or "unit"), zlib.crc32(item.nodeid.partition("::")[0].encode()))
        )


def _tier(item: pytest.Item) -> str | None:
    """The folder below tests/ that a test is in; None for a test from elsewhere."""
    parts = item.path.relative_to(_TESTS).parts if item.path.is_relative_to(_TESTS) else ()
    return parts[0] if parts and parts[0] in TIERS else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the test's processes printed beside its failure."""
    report = yield
    if report.failed:
        report.sections.extend(process.sections())
    return report


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """A test that set a LEOFLOW_* variable by hand does not decide the next one."""
    yield
    environment.strip_settings()


# Tests run beside each other; an example that took long says nothing.
hypothesis.settings.register_profile("leoflow", deadline=None)
hypothesis.settings.load_profile("leoflow")


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
