"""``make demo``: starts the example's service, runs ``leoflow lite run dag.json`` against it, and stops it again.

It ends with the run's Gantt chart, its report file and three commands to go on with. Options behind it are handed to
``leoflow lite run``: ``python examples/sales/demo.py --state-dir /tmp/demo``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from server import PORT, serving

DAG = Path(__file__).with_name("dag.json")
REPORT = "sales-report.html"


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
    """Run the demo, show what became of it, and return the exit code of the run."""
    with service_and_dag() as dag:
        command = [sys.executable, "-m", "leoflow_celery.cli", "lite", "run", str(dag), "--report", REPORT, *options]
        with subprocess.Popen(command) as run:
            try:
                code = run.wait()
            except KeyboardInterrupt:  # Ctrl-C reached the run as well; it ends by itself
                return run.wait()
    if code in (0, 1) and not {"-h", "--help"}.intersection(options):
        show(options)
    return code


def show(options: list[str]) -> None:
    """The chart of the run, and what to type next: the command as it is installed beside this Python."""
    named = dict(pairwise(options))
    system = ["--state-dir", named["--state-dir"]] if "--state-dir" in named else ["--lite"]
    run = named.get("--run-id", "latest")
    # On stderr, as the run's progress: stdout is the run's values.
    chart = [sys.executable, "-m", "leoflow_celery.cli", *system, "status", "sales", run, "--gantt"]
    environment = {"COLUMNS": str(shutil.get_terminal_size().columns), **os.environ}
    subprocess.run(chart, stdout=sys.stderr, env=environment, check=False)
    installed = Path(sys.executable).with_name("leoflow")
    near = installed.relative_to(Path.cwd()) if installed.is_relative_to(Path.cwd()) else installed
    leoflow = shlex.join([str(near), *system])
    print(f"\nopen {named.get('--report', REPORT)} in a browser, or go on with:", file=sys.stderr)
    for words in (("logs", "sales", run), ("status", "sales", run, "exchange_rate"), ("xcom", "sales", run)):
        print(f"  {leoflow} {shlex.join(words)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
