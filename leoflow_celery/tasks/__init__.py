"""The Celery tasks, one module per queue: load, decide, act, record.

``launch`` serves k8s, docker and subprocess without SQL; ``inline``, ``dispatch``, ``results`` and ``maintenance`` run
where the SQL credentials are.
"""
