"""docs/tutorial.md, line by line: the wheel, a new virtual environment, and what the page tells a reader to type."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.markdown import Block, blocks
from tests.support.process import ManagedProcess
from tests.support.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with our wheel; pip finds all others where it always does."""
    source, directory = tmp_path_factory.mktemp("source") / "s", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "docs", "*.egg-info", "build", "dist"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    return directory


class Reader:
    """Somebody who types what the page says, block by block, in one shell."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment
        self.other_terminal: ManagedProcess | None = None
        self.output = ""
        self._typed: list[str] = []

    def follow(self, block: Block) -> None:
        place = f"{block.page.name}:{block.line}"
        match block.language:
            case "json" | "python":
                (self.directory / block.title).write_text(block.text)
            case "sh" if block.title:
                self._open_terminal(block)
            case "sh":
                for line in block.text.splitlines():
                    self._type(line, place)
            case "text":
                expect(block.text, self.output, place)
            case _:
                raise AssertionError(f"{place}: a block of an unknown kind {block.language!r}")

    def _type(self, line: str, place: str) -> None:
        """One line, in a shell that has what earlier lines set; its output joins that of its block."""
        before = "\n".join(one for one in self._typed if one.startswith((". ", "eval ")))
        done = subprocess.run(
            ["bash", "-e", "-c", f"{before}\n{line}"],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240 * PATIENCE,
            check=False,
        )
        self.output = self.output[-20_000:] + done.stderr + done.stdout
        assert done.returncode == 0, f"{place}: {line}\n{done.stdout}{done.stderr}"
        self._typed.append(line)

    def _open_terminal(self, block: Block) -> None:
        script = block.text.replace("leoflow lite up", "exec leoflow lite up")
        self.other_terminal = ManagedProcess(
            ["bash", "-c", script], self.directory / "up.out", env=self.environment, cwd=self.directory, name="lite up"
        )
        self.other_terminal.wait_for_line("leoflow lite is up", 60)

    def leave(self) -> None:
        """Ctrl-C in the other terminal."""
        if self.other_terminal is not None:
            terminal = self.other_terminal
            terminal.send_signal(signal.SIGINT)
            wait_until(lambda: terminal.returncode is not None, 60, terminal.output)
            terminal.stop()


def expect(shown: str, output: str, place: str) -> None:
    """Every line that the page shows is in the output, in this order; ``…`` and blanks stand for anything."""
    position = 0
    for line in shown.splitlines():
        words = [re.escape(word) for word in line.split()]
        pattern = r"\s+".join(words).replace("…", ".*?")
        # What was printed by an earlier block may not satisfy this one twice, but blocks follow each other closely.
        found = re.compile(pattern).search(output, position)
        assert found, f"{place}: nobody printed {line!r}:\n{output}"
        position = found.end()


@pytest.mark.timeout(900)
def test_every_line_of_the_tutorial_does_what_the_page_says(dist: Path, tmp_path: Path) -> None:
    directory = tmp_path / "t"
    directory.mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    own = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "XDG_STATE_HOME": str(tmp_path / "h"),
        "PIP_FIND_LINKS": " ".join([*os.environ.get("PIP_FIND_LINKS", "").split(), str(dist)]),
        "PIP_QUIET": "1",
    }
    reader = Reader(directory, {**os.environ, **own})
    before = ""
    try:
        for block in blocks(PAGE):
            if block.language == "sh" and before != "sh":
                reader.output = ""
            reader.follow(block)
            before = block.language
    finally:
        reader.leave()
    assert "Traceback" not in reader.output
