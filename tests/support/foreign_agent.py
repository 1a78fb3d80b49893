"""An agent that is not ours, as one that somebody else wrote from the protocol alone would be.

It sends no session and no capability, numbers standard output and standard error apart, reads no acknowledgement, never
renews its token, leaves no termination record and ends with 1 when it cannot report. Run it as
``python -m tests.support.foreign_agent`` with an agent's environment.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import grpc

from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import AUTHORIZATION_KEY, METHODS, serialize

#: It tries to report so often, and waits for each answer so long.
_ATTEMPTS, _SECONDS = 2, 3


class Agent:
    """One attempt."""

    def __init__(self) -> None:
        self.channel = grpc.insecure_channel(os.environ["LEOFLOW_CONTROL_PLANE_ADDR"])
        self.metadata = [(AUTHORIZATION_KEY, f"Bearer {os.environ['LEOFLOW_AGENT_TOKEN']}")]
        self.lines: queue.SimpleQueue[pb.LogLine | None] = queue.SimpleQueue()

    def call(self, name: str, request: Any, attempts: int = _ATTEMPTS) -> Any:
        method = METHODS[name]
        stub: Any = self.channel.unary_unary(method.path, serialize, method.response.FromString)
        try:
            return stub(request, timeout=_SECONDS, metadata=self.metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            again = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            if not again or attempts <= 1:
                raise
        return self.call(name, request, attempts - 1)

    def stream_logs(self) -> None:
        method = METHODS["StreamLogs"]
        stub: Any = self.channel.stream_stream(method.path, serialize, method.response.FromString)
        try:
            for _ in stub(iter(self.lines.get, None), metadata=self.metadata, wait_for_ready=True):
                pass
        except grpc.RpcError:
            pass  # what it wrote is lost, and nobody is told

    def read(self, pipe: IO[bytes], stream: str) -> None:
        for number, text in enumerate(pipe, 1):
            line = pb.LogLine(message=text.decode().rstrip("\n"), stream=stream, line_number=number)
            line.time.GetCurrentTime()
            self.lines.put(line)

    def run(self) -> int:
        """The exit code of the agent."""
        logs = threading.Thread(target=self.stream_logs)
        logs.start()
        try:
            self.call("Register", pb.RegisterRequest(agent_version="1.4.0", hostname="elsewhere"))
            spec = self.call("GetTaskSpec", pb.GetTaskSpecRequest())
            self.call("ReportState", pb.ReportStateRequest(state=pb.TASK_STATE_RUNNING))
            self.call("ReportState", self.work(spec))
        except grpc.RpcError as error:
            sys.stderr.write(f"foreign agent: {error.code()}\n")
            return 1
        finally:
            self.lines.put(None)
            logs.join(_SECONDS)
        return 0

    def work(self, spec: pb.TaskSpec) -> pb.ReportStateRequest:
        with tempfile.TemporaryDirectory() as directory:
            value = Path(directory, "return_value")
            argv = {
                "bash": ["bash", "-c", spec.entrypoint],
                "python": [os.environ.get("LEOFLOW_PYTHON", sys.executable), "-m", "leoflow_runtime", spec.entrypoint],
            }[spec.operator]
            inputs = {
                f"LEOFLOW_XCOM_{parameter.upper()}": self.call(
                    "FetchXCom", pb.FetchXComRequest(upstream_task_id=upstream)
                ).value.decode()
                for parameter, upstream in spec.xcom_input_mapping.items()
            }
            environment = {**os.environ, **spec.environment, **inputs, "LEOFLOW_RETURN_VALUE_PATH": str(value)}
            process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stderr is not None
            readers = [
                threading.Thread(target=self.read, args=(pipe, name))
                for pipe, name in ((process.stdout, "stdout"), (process.stderr, "stderr"))
            ]
            for reader in readers:
                reader.start()
            code = process.wait()
            for reader in readers:
                reader.join()
            if code:
                return pb.ReportStateRequest(state=pb.TASK_STATE_FAILED, exit_code=code)
            if value.exists():
                pushed = self.call("PushXCom", pb.PushXComRequest(key="return_value", value=value.read_bytes()))
                if not pushed.accepted:
                    text = f"return value refused: {json.dumps(pushed.rejection_reason)}"
                    return pb.ReportStateRequest(state=pb.TASK_STATE_FAILED, exit_code=0, error_message=text)
        return pb.ReportStateRequest(state=pb.TASK_STATE_SUCCESS)


if __name__ == "__main__":
    sys.exit(Agent().run())
