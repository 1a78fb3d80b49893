"""``make demo``: starts the example's service, runs ``leoflow lite run dag.json`` against it, and stops it again.

Options behind it are handed to ``leoflow lite run``: ``python examples/sales/demo.py --state-dir /tmp/demo``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from server import PORT, serving

DAG = Path(__file__).with_name("dag.json")


@contextmanager
def service_and_dag() -> Iterator[Path]:
    """The DAG as it is when the service gets the port it names, else a copy that names the port it got."""
    with ExitStack() as stack:
        try:
            stack.enter_context(serving(PORT))
            dag = DAG
        except OSError:  # the port is taken; any other will do
            port = stack.enter_context(serving(0))
            dag = Path(stack.enter_context(tempfile.TemporaryDirectory()), DAG.name)
            dag.write_text(DAG.read_text().replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{port}"))
        yield dag


def main(options: list[str]) -> int:
    """Run the demo and return the exit code of the run."""
    with service_and_dag() as dag:
        command = [sys.executable, "-m", "leoflow_celery.cli", "lite", "run", str(dag), *options]
        with subprocess.Popen(command) as run:
            try:
                return run.wait()
            except KeyboardInterrupt:  # Ctrl-C reached the run as well; it ends by itself
                return run.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
