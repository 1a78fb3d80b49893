"""The program beside the user's process: claims the attempt, runs it, ships its logs, reports how it ended.

It starts once per task, so it imports neither pydantic, SQLAlchemy, requests, Celery nor a cluster client.

====================  =================================================================================================
``lifecycle``         the order of things: register, inputs, run, deliver
``config``            the agent's environment
``client``            calls to the control plane, foreign errors mapped, retries
``stopping``          why the task must stop: the first reason counts
``heartbeat``         the lease, and the control plane's wish to stop
``inputs``            XCom inputs, variables and connections
``command``           what is executed, and the environment it sees
``process``           the user process: its session, its end, its descendants
``output``            bytes of any kind → lines
``stdout_mirror``     the same lines on the agent's own output
``spool``, ``logs``   lines on disk until the control plane has them
``result``            return value and reason that the process left behind
``report``            termination log, return value, final state
``forkserver``        a pre-imported agent that forks one agent per task
====================  =================================================================================================
"""
