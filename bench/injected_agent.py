"""A pod with an injected agent, from submit to user code, against a bare pod; size and start time of what is injected.

As ``bench.kubernetes_latency``, with our agent in an image that need not have one. ``--pods 100`` for the real number.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time

from bench.cluster import namespace
from bench.kubernetes_latency import run_floor, run_ours
from bench.system import System, add_container_arguments, report
from leoflow_celery.client import Client
from leoflow_celery.executors.base import INJECTED_DIR
from leoflow_celery.store import migrate

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
    ours, floor = [], []
    with namespace() as api, System() as system:
        port = system.listen_on(options.address)
        system.start_redis()
        with Client() as client:
            migrate.upgrade(client.services.store.database)
            system.start_gateway(port)
            system.start_worker("workers.control")
            system.start_worker("workers.k8s")
            run_ours(client, options.image)
            for _ in range(options.pods):
                floor.append(run_floor(api, options.image))
                ours.append(run_ours(client, options.image))
            report("submit to user code, agent injected", ours, floor, "s", "≤ 1.5")


if __name__ == "__main__":
    main()
