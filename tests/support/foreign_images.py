"""Images that nobody built on ours: of a static busybox alone, with musl, with other Pythons, with words of their own.

Made of Debian's packages and of this machine's Pythons, without a registry. They are tagged by what they are made of.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.images import base_image, require_docker
from tests.support.requirements import require

_FROM_SCRATCH = "FROM scratch\nCOPY root /\n"
_BUSYBOX = _FROM_SCRATCH + 'ENV PATH=/bin\nUSER 65534:65534\nENTRYPOINT ["/bin/busybox"]\nCMD ["echo", "by itself"]\n'
_OPINIONATED = _FROM_SCRATCH + (
    "ENV PATH=/bin GREETING=hello\nUSER 1234:4321\nWORKDIR /srv/place\nSTOPSIGNAL SIGQUIT\n"
    'ENTRYPOINT ["/bin/busybox", "sh", "-c"]\nCMD ["echo $GREETING from $(pwd) as $(id -u)"]\n'
)


def busybox_image() -> str:
    """Nothing but a static busybox, called ``sh`` too, and no /tmp."""
    return _built("busybox", _BUSYBOX, ("busybox-static",))


def musl_image() -> str:
    """A busybox and musl's loader and C library, and no other."""
    return _built("musl", _BUSYBOX, ("busybox-static", "musl"))


def opinionated_image() -> str:
    """One with an ENTRYPOINT, a CMD, a USER, a WORKDIR and a STOPSIGNAL of its own."""
    return _built("opinionated", _OPINIONATED, ("busybox-static",))


def silent_image() -> str:
    """One that runs nothing by itself."""
    return _built("silent", _FROM_SCRATCH, ("busybox-static",))


def python_image(version: str) -> str:
    """The base image with another Python of this machine (``3.8``), which is its ``python3``; skips without one."""
    roots = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    found = next((one for root in roots for one in sorted(root.glob(f"{version}.*"))), None)
    if found is None:
        pytest.skip(f"no Python {version} on this machine to make an image of")
    environment = "ENV PATH=/opt/python/bin:$PATH LD_LIBRARY_PATH=/opt/python/lib"
    dockerfile = f"FROM {base_image()}\nCOPY python /opt/python\n{environment}\nUSER 65534:65534\n"
    tag = f"leoflow-foreign-test:python{found.name}"
    if not _exists(tag):
        with tempfile.TemporaryDirectory() as directory:
            unused = shutil.ignore_patterns("test", "*.a", "__pycache__", "site-packages", "share", "include")
            shutil.copytree(found, Path(directory) / "python", ignore=unused, symlinks=True)
            _docker_build(tag, dockerfile, Path(directory))
    return tag


@functools.cache
def _built(name: str, dockerfile: str, packages: tuple[str, ...]) -> str:
    require_docker()
    content = hashlib.sha256(f"{dockerfile}{packages}".encode()).hexdigest()[:12]
    tag = f"leoflow-foreign-test:{name}-{content}"
    if not _exists(tag):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory) / "root"
            _unpack(packages, Path(directory), root)
            (root / "bin" / "sh").symlink_to("busybox")
            _docker_build(tag, dockerfile, Path(directory))
    return tag


def _unpack(packages: tuple[str, ...], directory: Path, root: Path) -> None:
    """The programs and libraries of Debian's packages, and nothing else of them."""
    done = subprocess.run(["apt-get", "download", "--quiet", *packages], cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        require("docker", f"cannot get what a test's image is made of: {done.stderr.strip()[-200:]}")
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    shutil.rmtree(root / "usr" / "share", ignore_errors=True)


def _docker_build(tag: str, dockerfile: str, directory: Path) -> None:
    (directory / "Dockerfile").write_text(dockerfile)
    subprocess.run(["docker", "build", "--quiet", "--tag", tag, directory], check=True, capture_output=True)


def _exists(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0
