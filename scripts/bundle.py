"""Gather the self-contained agent: a Python, the agent, and every library they load, in one directory.

It runs in the build of the image ``leoflow-agent``. The directory works in an image that has nothing, at this one path:
its interpreter names the loader beside it, and finds its libraries by a run path. What the agent cannot import is left
out, and all byte code stands alone, but for ``leoflow_runtime``: that is run by whatever Python an image has.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

#: Where it is mounted; at most as long as the loader's own path, see ``_relocate``.
HOME = Path("/opt/leoflow-agent")
VERSION = "python{}.{}".format(*sys.version_info)
#: What the agent starts as, and what it starts itself.
ENTRIES = ("leoflow_celery.agent.__main__", "leoflow_celery.executors.inline_http.__main__")
#: Reached by somebody's import, and used by nothing that we do.
LEFT_OUT = frozenset(
    {
        *("test", "unittest", "doctest", "pdb", "pydoc", "pydoc_data", "tkinter", "turtle", "idlelib", "lib2to3"),
        *("distutils", "ensurepip", "venv", "sqlite3", "curses", "dbm", "xmlrpc", "wsgiref", "site"),
    }
)
#: Of packages that are copied whole: what only their developers, or the agent's, have a use for.
_UNUSED = re.compile(r"(^|/)(tests?|testing|v1|compiler|_cython/_cygrpc|__pycache__)(/|$)|^pydantic/mypy\.py$")
_UNUSED_FILES = (".pyi", ".pyx", ".pxd", ".pxi", ".proto", ".h", ".c", ".cc", ".pem.orig")
#: A kernel runs scripts in an image without a shell.
AGENT = f"""#!{HOME}/bin/python -I
import os, shutil, sys
# Python tasks run in the image's own interpreter.
if not os.environ.get("LEOFLOW_PYTHON"):
    os.environ["LEOFLOW_PYTHON"] = next(filter(shutil.which, ("python3", "python")), "python3")
from leoflow_celery.agent.__main__ import command
command()
"""
#: Copies the directory into an empty one: what an init container does. Without shutil it starts in half the time.
INSTALL = f"""#!{HOME}/bin/python -IS
import os, sys
source, target = "{HOME}", sys.argv[1]
for folder, names, files in os.walk(source):
    there = target + folder[len(source):]
    for name in names:
        os.mkdir(there + "/" + name, 0o755)
    for name in files:
        with open(folder + "/" + name, "rb", 0) as given:
            status = os.fstat(given.fileno())
            to = os.open(there + "/" + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, status.st_mode & 0o777)
            left = status.st_size
            while left:
                left -= os.sendfile(to, given.fileno(), None, left)
            os.close(to)
"""


def main() -> None:
    """Gather from the packages of the directories that the command line names."""
    parser = argparse.ArgumentParser(description="Gather the self-contained agent.")
    parser.add_argument("--patchelf", required=True, help="the program")
    parser.add_argument("packages", nargs="+", type=Path, help="directories with the agent and all that it imports")
    arguments = parser.parse_args()
    library = HOME / "lib" / VERSION
    library.mkdir(parents=True)
    (HOME / "bin").mkdir()
    _copy_standard_library(library, arguments.packages)
    for packages in arguments.packages:
        _copy_packages(packages, library)
    _compile(library)
    interpreter = HOME / "bin" / "python"
    shutil.copy(os.path.realpath(sys.executable), interpreter)
    _relocate(interpreter, library, arguments.patchelf)
    for name, text in (("leoflow-agent", AGENT), ("install", INSTALL)):
        (HOME / "bin" / name).write_text(text)
        (HOME / "bin" / name).chmod(0o755)
    for path in HOME.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    size = sum(path.stat().st_size for path in HOME.rglob("*") if path.is_file())
    sys.stdout.write(f"{HOME}: {size / 1e6:.1f} MB\n")


def _copy_standard_library(target: Path, packages: Iterable[Path]) -> None:
    """What the agent can reach by imports, and what it has imported when all of it is; a few modules escape either."""
    standard = Path(sysconfig.get_path("stdlib"))
    found = {*_reached(packages, standard), *_imported(packages), *standard.glob("encodings/*.py")}
    for path in sorted(found):
        if path.is_relative_to(standard) and path.relative_to(standard).parts[0].removesuffix(".py") not in LEFT_OUT:
            _copy(path, target / path.relative_to(standard))
    # Nothing of an image's own packages gets between the agent and its modules; and this starts faster.
    (target / "site.py").write_text("")
    (target / "lib-dynload").mkdir(exist_ok=True)


def _reached(packages: Iterable[Path], standard: Path) -> Iterator[Path]:
    """By any import statement, in whatever function."""
    finder = _Finder([*map(str, packages), str(standard), str(standard / "lib-dynload")], excludes=LEFT_OUT)
    for name in ENTRIES:
        finder.import_hook(name)
    yield from (Path(one.__file__) for one in finder.modules.values() if one.__file__)


class _Finder(ModuleFinder):
    def find_module(self, name: str, path: list[str] | None, parent: Any = None) -> Any:
        """It cannot read a package without an ``__init__``: what is below one (google.protobuf) is found by importing."""
        try:
            return super().find_module(name, path, parent)
        except AttributeError as error:
            raise ImportError(name) from error


def _imported(packages: Iterable[Path]) -> Iterator[Path]:
    """By code that no import statement shows: extension modules, names computed at run time."""
    ask = (
        "import importlib, json, pkgutil, sys; sys.path[:0] = json.loads(sys.argv[1])\n"
        "for name in json.loads(sys.argv[2]):\n"
        "    package = importlib.import_module(name.rpartition('.')[0])\n"
        "    for one in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(one.name)\n"
        "import encodings.idna, grpc.aio\n"
        "print(json.dumps([m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)]))"
    )
    arguments = [json.dumps([str(one) for one in packages]), json.dumps(ENTRIES)]
    done = subprocess.run([sys.executable, "-c", ask, *arguments], check=True, capture_output=True, text=True)
    yield from map(Path, json.loads(done.stdout))


def _copy_packages(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        is_metadata = ".dist-info/" in name or name.startswith(("pip/", "setuptools/", "_distutils_hack/"))
        unused = _UNUSED.search(name) or name.endswith(_UNUSED_FILES) or is_metadata
        if path.is_file() and not unused:
            _copy(path, target / name)


def _compile(library: Path) -> None:
    """Byte code in place of its source: half the size, and no second file is looked for at a start."""
    runtime = library / "leoflow_runtime"
    for folder in (one for one in library.iterdir() if one.is_dir() and one != runtime):
        _compiled(compileall.compile_dir(folder, quiet=1, legacy=True))
    _compiled(compileall.compile_dir(library, maxlevels=0, quiet=1, legacy=True))
    for path in library.rglob("*.py"):
        if not path.is_relative_to(runtime):
            path.unlink()


def _compiled(is_done: object) -> None:
    if not is_done:
        raise SystemExit("a module cannot be compiled")


def _relocate(interpreter: Path, library: Path, patchelf: str) -> None:
    """Bring the shared libraries of all programs, and the loader; nothing is looked for in the image itself.

    The interpreter's run path is of the old kind, which holds for all that is loaded, and before LD_LIBRARY_PATH.
    """
    binaries = [interpreter, *library.rglob("*.so"), *library.rglob("*.so.*")]
    found = {name: path for one in binaries for name, path in _libraries(one)}
    folder = HOME / "lib"
    for name, path in found.items():
        _copy(path, folder / name)
    # Before glibc 2.34 names are looked up by libraries that only its configuration names.
    beside = next(path.parent for name, path in found.items() if name.startswith("libc.so"))
    for path in [*beside.glob("libnss_dns.so.2"), *beside.glob("libnss_files.so.2"), *beside.glob("libresolv.so.2")]:
        _copy(path, folder / path.name)
    loader = next(name for name in found if name.startswith("ld-linux"))
    (folder / loader).chmod(0o755)
    subprocess.run(
        [patchelf, "--set-interpreter", folder / loader, "--force-rpath", "--set-rpath", folder, interpreter],
        check=True,
    )


def _libraries(binary: Path) -> Iterator[tuple[str, Path]]:
    said = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True).stdout
    for name, path in re.findall(r"^\s*(?:(\S+) => )?(/\S+) \(0x", said, re.MULTILINE):
        yield name or Path(path).name, Path(path)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)  # the file that a link means


if __name__ == "__main__":
    main()
