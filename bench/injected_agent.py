"""A pod with an injected agent, from submit to user code, against a bare pod; size and start time of what is injected.

As ``bench.kubernetes_latency``, with our agent in an image that need not have one. ``--pods 100`` for the real number.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time

from bench.kubernetes_latency import measure
from bench.system import add_container_arguments, report
from leoflow_celery.executors.base import INJECTED_DIR

_STARTS = 5


def start_seconds(image: str, *command: str) -> float:
    """The median time of a container that runs one program of the agent's image."""
    found = []
    for _ in range(_STARTS):
        started = time.monotonic()
        run = ["docker", "run", "--rm", "--network=none", "--entrypoint", command[0], image, *command[1:]]
        subprocess.run(run, capture_output=True)
        found.append(time.monotonic() - started)
    return statistics.median(found)


def report_bundle(image: str) -> None:
    """Its size, and how long the agent needs to find out that it has no attempt, over the interpreter alone."""
    ask = ["docker", "image", "inspect", "--format", "{{.Size}}", image]
    size = int(subprocess.run(ask, check=True, capture_output=True, text=True).stdout)
    python = start_seconds(image, f"{INJECTED_DIR}/bin/python", "-ISc", "")
    agent = start_seconds(image, f"{INJECTED_DIR}/bin/leoflow-agent")
    print(f"injected agent: {size / 1e6:.1f} MB, starts in {agent - python:.2f} s more than its bare interpreter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=10)
    parser.add_argument("--agent-image", default="leoflow-agent:latest", help="what is injected (make images)")
    add_container_arguments(parser)
    options = parser.parse_args()
    report_bundle(options.agent_image)
    os.environ |= {"LEOFLOW_KUBERNETES_AGENT": "inject", "LEOFLOW_KUBERNETES_AGENT_IMAGE": options.agent_image}
    report("submit to user code, agent injected", *measure(options), "s", "≤ 1.5")


if __name__ == "__main__":
    main()
