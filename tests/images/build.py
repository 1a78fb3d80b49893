"""Build stand-ins for the server images of compose.yaml: ``python -m tests.images.build``.

For machines that reach Debian's packages but no image registry. A tag that exists already, the official image perhaps,
is left alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.images import base_image

HERE = Path(__file__).parent
#: The tag that compose.yaml names → our folder and Debian's package. The versions are Debian 12's.
STAND_INS = {
    "redis:7": ("redis", "redis-server"),
    "postgres:15": ("postgres", "postgresql-15"),
}


def main() -> None:
    for image in STAND_INS:
        sys.stdout.write(f"{image}: {'built' if build_when_missing(image) else 'exists'}\n")


def build_when_missing(image: str) -> bool:
    """Whether the stand-in had to be built.

    Raises:
        CalledProcessError: a package cannot be downloaded, or the build failed.
    """
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0:
        return False
    server, package = STAND_INS[image]
    with tempfile.TemporaryDirectory() as directory:
        context = Path(directory)
        shutil.copytree(HERE / server, context / server)
        shutil.copy(HERE / "Dockerfile", context)
        _download(package, context / "packages")
        arguments = ["--build-arg", f"BASE_IMAGE={base_image()}", "--build-arg", f"SERVER={server}", "--tag", image]
        subprocess.run(["docker", "build", "--quiet", *arguments, directory], check=True, capture_output=True)
    return True


def _download(package: str, target: Path) -> None:
    """The package and whatever of its dependencies the base image lacks."""
    (target / "partial").mkdir(parents=True)
    dpkg_status = target / "partial" / "status"
    with dpkg_status.open("wb") as file:
        command = ["docker", "run", "--rm", "--entrypoint", "cat", base_image(), "/var/lib/dpkg/status"]
        subprocess.run(command, check=True, stdout=file)
    options = [f"Dir::State::status={dpkg_status}", f"Dir::Cache::archives={target}", "APT::Sandbox::User=root"]
    command = ["apt-get", "install", "--download-only", "--no-install-recommends", "--yes", "--quiet", package]
    subprocess.run([*command, *(f"-o{option}" for option in options)], check=True, capture_output=True)
    shutil.rmtree(target / "partial")
    (target / "lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
