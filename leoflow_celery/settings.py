"""Every setting, its unit, its default and why. With ``environment``, the only file that reads the environment.

A setting is the environment variable ``LEOFLOW_<GROUP>_<FIELD>`` (``LEOFLOW_BROKER_URL``, ``LEOFLOW_GATEWAY_LISTEN``);
a few keep the names Leoflow gave them. A secret may also come from a file:
``LEOFLOW_JWT_SECRET_FILE=/run/secrets/jwt``, and any setting from the file that ``LEOFLOW_ENV_FILE`` names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from leoflow_celery.broker_url import BrokerUrl, OptionalBrokerUrl
from leoflow_celery.environment import read_files, state_dir
from leoflow_celery.errors import ConfigurationError


def _config(prefix: str) -> SettingsConfigDict:
    return SettingsConfigDict(env_prefix=prefix, frozen=True, extra="ignore", populate_by_name=True)


class BrokerSettings(BaseSettings):
    """The Celery broker and result backend."""

    model_config = _config("LEOFLOW_BROKER_")

    url: BrokerUrl = "redis://127.0.0.1:6379/0"
    #: Empty: the broker's own URL. Workers need no SQL, so results live in Redis.
    result_url: OptionalBrokerUrl = ""
    #: Every Redis key starts with it, so that systems can share a server.
    key_prefix: str = "leoflow:"
    #: Seconds until what a worker held is delivered again after the worker was last heard of. One that lives says so
    #: three times in that time, however long its tasks take; one that is cut off may be working on it still.
    visibility_timeout_seconds: int = 600
    #: Of one message, each of which ended with its worker or its process. After these it is a dead letter.
    max_deliveries: int = Field(default=5, ge=2)
    #: Without these two a black-holed broker hangs a publisher for minutes.
    connect_timeout_seconds: float = 2
    socket_timeout_seconds: float = 5
    #: How long a result is kept for AsyncResult.get().
    result_expires_seconds: int = 7 * 24 * 3600
    #: A larger message is refused before it is read. A request may have 1 MiB, which sealing and base64 make 2.
    max_message_bytes: int = Field(default=8 * 1024 * 1024, ge=1_024)
    #: A message whose ``eta`` is further ahead is refused: a worker holds it until then, in memory.
    max_delay_seconds: float = Field(default=24 * 3600, gt=0)
    #: Which commands of ``celery control`` workers obey: those that ask (``celery inspect``, Flower), or all of them.
    #: Everybody who can write to the broker can send them, and the others end, stop or redirect workers.
    remote_control: Literal["inspect", "all"] = "inspect"
    #: Refused messages that are kept to be looked at; the oldest one goes for the newest.
    dead_letters: int = Field(default=1_000, ge=1)
    #: Of a larger one only the beginning is kept, and it cannot be sent again.
    dead_letter_max_bytes: int = Field(default=65_536, ge=1_024)


class DatabaseSettings(BaseSettings):
    """The SQL database: the source of truth."""

    model_config = _config("LEOFLOW_DATABASE_")

    url: SecretStr = SecretStr("sqlite:///leoflow.db")
    pool_size: int = 5
    #: How long a writer waits for a lock or a connection before DatabaseUnavailable.
    timeout_seconds: float = 15


class SecuritySettings(BaseSettings):
    """Keys. ``leoflow keys`` prints a fresh pair."""

    model_config = _config("LEOFLOW_")

    #: Secrets of agent tokens (HS256, at least 32 bytes each), comma separated, newest first: the first signs, each of
    #: them verifies (rotation).
    jwt_secret: SecretStr = SecretStr("")
    #: Fernet keys, comma separated, newest first: the first seals, all of them open (rotation). A launch worker has
    #: those of its queue only, as ``leoflow keys --for docker`` prints them: ``docker:KEY``.
    seal_keys: SecretStr = SecretStr("")
    #: Lifetime of the token an agent is launched with. Longer than any task may wait and run; the claim, not the token,
    #: ends access, and an agent that renews can use it for Register only.
    agent_token_ttl_seconds: int = 7 * 24 * 3600
    #: Lifetime of the tokens that such an agent gets from then on; heartbeats bring the next one after a third of it.
    agent_token_renewed_ttl_seconds: Annotated[float, Field(gt=0)] = 15 * 60


def _parse_names(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


#: An empty variable is none: as a path it would be the working directory, and everything in it would be handed out.
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]


class GatewaySettings(BaseSettings):
    """The agents' gRPC server."""

    model_config = _config("LEOFLOW_GATEWAY_")

    #: host:port, or unix:/path. Port 0 picks a free one.
    listen: str = "127.0.0.1:9090"
    #: Both or none; without them the channel is plain text and variables and connections are refused.
    tls_cert: OptionalPath = None
    tls_key: OptionalPath = None
    #: Serve variables and connections on a plain-text channel all the same (one machine, private network).
    allow_insecure_secrets: bool = False
    #: Who knows variables, connections and secrets with source env, in this order; the first that knows a name wins.
    #: files, environment, command, or an entry point of the group leoflow_celery.secret_backends.
    secret_backends: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_names)] = ("files",)
    #: files: a directory with tenants/<tenant>/<kind>s/<name>, tenants/<tenant>/dags/<dag>/<kind>s/<name> and
    #: shared/<kind>s/<name>; kinds are variable, connection and secret.
    secret_files: OptionalPath = None
    #: files: the tenant default's alone, each a directory with one file per name, or a JSON object in a file.
    variables_path: OptionalPath = None
    connections_path: OptionalPath = None
    secrets_path: OptionalPath = None
    #: environment: what the names of its variables start with.
    secret_environment_prefix: str = "LEOFLOW_VALUE_"  # noqa: S105 - a name
    #: command: what to run, with its arguments, quoted as in a shell. No shell runs it.
    secret_command: str = ""
    #: command: it is stopped after this many seconds. Less than the time for all back ends together.
    secret_command_timeout_seconds: Annotated[float, Field(gt=0)] = 10
    #: command: how long an answer is kept that does not say so itself; 0 keeps none.
    secret_command_ttl_seconds: Annotated[float, Field(ge=0)] = 60
    #: Questions to back ends at a time, each in a thread; one tenant has at most half of them.
    secret_threads: Annotated[int, Field(ge=1)] = 16
    #: Until an agent hears that no back end answered, and asks again. It waits 20 s for one call.
    secret_timeout_seconds: Annotated[float, Field(gt=0)] = 15
    #: A holder silent for longer can be replaced. Six heartbeats.
    lease_seconds: float = 90
    #: For how long after its end a holder may repeat its report and send its last log lines.
    ended_access_seconds: Annotated[float, Field(ge=0)] = 300
    #: Heartbeats are written to SQL together, this often.
    heartbeat_flush_seconds: float = 1.0
    #: Threads that talk to SQL.
    store_threads: int = 8
    #: How long open calls may finish on shutdown.
    shutdown_grace_seconds: float = 5
    #: Prometheus endpoint; 0 is off.
    metrics_port: int = 0


class AgentDefaults(BaseSettings):
    """What dispatch tells every agent."""

    model_config = _config("LEOFLOW_")

    #: Where agents find the gateway, host:port.
    control_plane_addr: str = "127.0.0.1:9090"


def _parse_limits(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    pairs = (part.partition("=") for part in value.split(",") if part.strip())
    return {name.strip(): limit.strip() for name, _, limit in pairs}


class DispatchSettings(BaseSettings):
    """How requests become messages."""

    model_config = _config("LEOFLOW_DISPATCH_")

    #: The standard executor: kubernetes, docker or subprocess.
    executor_type: Literal["kubernetes", "docker", "subprocess"] = Field(
        default="kubernetes",
        validation_alias=AliasChoices("LEOFLOW_EXECUTOR_TYPE", "LEOFLOW_DISPATCH_EXECUTOR_TYPE", "executor_type"),
    )
    #: Executors that a request may be run by, comma separated; another one is refused at the door. Empty: the standard
    #: one and inline, so that nobody reaches a host's processes or another cluster that nobody meant to offer.
    permitted_executors: Annotated[
        tuple[Literal["kubernetes", "docker", "subprocess", "inline"], ...], NoDecode, BeforeValidator(_parse_names)
    ] = ()
    #: queue → most messages it may hold before submit refuses, as k8s=1000,docker=200. Empty: no limit.
    queue_limits: Annotated[dict[str, int], NoDecode, BeforeValidator(_parse_limits)] = Field(default_factory=dict)


class InlineSettings(BaseSettings):
    """http_api tasks in the control plane."""

    model_config = _config("LEOFLOW_INLINE_HTTP_")

    #: Total deadline of one task over all its attempts, in seconds; a task asking for more is refused.
    max_duration: int = 300
    #: Further attempts after the first for transient failures, of calls that may be repeated (GET, PUT, DELETE) and say
    #: no http_request.attempts. POST and PATCH are made once unless they say so.
    max_retries: int = 3
    #: Response bytes read at the most.
    max_response_bytes: int = 1_048_576
    user_agent: str = "leoflow-celery"
    #: What inline calls may reach: ``public`` (the Internet only), ``any but link-local`` (private networks too), or
    #: CIDRs, comma separated. Addresses of cloud metadata services are never part of it. Every address that a name
    #: resolves to counts, and every redirect. Calls in pods and containers are a matter of their network's policy.
    addresses: str = "any but link-local"
    #: Hosts or CIDRs that may be called all the same, also link-local and metadata addresses, comma separated.
    allow_addresses: str = ""


class SubprocessSettings(BaseSettings):
    """Agents as host processes: development mode."""

    model_config = _config("LEOFLOW_SUBPROCESS_")

    #: Any program that speaks the agent protocol; empty runs ours.
    agent_path: str = ""
    #: Working directory of the agent; empty keeps the worker's own.
    work_dir: str = ""
    #: <root>/<dag_id>/bin/python runs the DAG's tasks when it exists.
    venvs_root: str = Field(
        default="",
        validation_alias=AliasChoices("LEOFLOW_LITE_VENVS_ROOT", "LEOFLOW_SUBPROCESS_VENVS_ROOT", "venvs_root"),
    )
    #: Per-attempt directories live here; empty means a directory below the system's temporary one.
    state_dir: str = ""
    #: Keep a pre-imported agent and fork it per task (only for our own agent).
    preload_agent: bool = True
    #: Attempts that this host runs at once; more wait in the queue, where other hosts take them. 0: 16 for each core
    #: as far as each has 256 MiB of memory, and at least 4 (most tasks wait for a server).
    max_running: Annotated[int, Field(ge=0)] = 0


class KubernetesSettings(BaseSettings):
    """Task pods: where the API is, and what every pod of the queue has."""

    model_config = _config("LEOFLOW_KUBERNETES_")

    #: Empty: the service account of the pod we run in, else $KUBECONFIG, else ~/.kube/config.
    kubeconfig: Path | None = None
    context: str = ""
    #: Empty: the namespace of the service account or of the context, else "default".
    namespace: str = ""
    connect_timeout_seconds: float = 5
    #: For the server's next word in one call. A list page of 500 pods takes a loaded API server seconds.
    request_timeout_seconds: float = 30
    #: How long a credential plugin of the kubeconfig may take before it is ended; the launch is then tried again. Those
    #: of the large clouds take one to three seconds.
    credential_timeout_seconds: Annotated[float, Field(gt=0)] = 15
    #: Connections kept open. They are opened when threads need them: more than the worker's concurrency costs nothing.
    max_connections: int = 64
    #: How the agent's token and environment reach the pod: a Secret that the pod owns, or plain values in the pod's
    #: specification (one API call less, and readable for everyone who may read pods).
    agent_environment: Literal["secret", "plain"] = "secret"
    #: Where the agent has its token from. ``secret``: it comes with its environment, as above. ``exchange``: the pod
    #: has none; its agent shows the gateway a token of the pod's service account and gets the attempt's token for it.
    #: The gateway needs the same setting: it asks the cluster which pod that is.
    agent_token: Literal["secret", "exchange"] = "secret"  # noqa: S105 - a place
    #: YAML or JSON of a Pod, merged over our defaults for all pods of this queue (strategic merge); requests go on top.
    pod_template: Path | None = None
    #: YAML: what a request's pod_override may set beside the safe defaults, what every pod is forced to have, and what
    #: is refused. Empty: the safe defaults.
    policy: OptionalPath = None
    #: Containers cannot write but to /tmp, /staging and other volumes.
    read_only_root: bool = False
    service_account: str = ""
    #: A label value that tells this system's pods and claims from those of another one in the namespace.
    system: str = ""
    #: Names of Secrets, comma separated.
    image_pull_secrets: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_names)] = ()
    #: What the kubelet waits between SIGTERM and SIGKILL; the agent gives user code five seconds less.
    termination_grace_seconds: int = 30
    #: A pod's deadline is timeout_seconds plus this: the agent ends user code on time and says so, the deadline ends a
    #: pod whose agent cannot.
    deadline_allowance_seconds: int = 60
    #: How long a pod may stay pending before it is given up; 0 is for ever.
    pending_timeout_seconds: float = 600
    #: How long a pod may wait for room in a full cluster, or for whoever opens its scheduling gate (Kueue), as in a
    #: queue; 0 is for ever.
    capacity_timeout_seconds: float = 86_400
    #: How long a pod waits for a registry that is away (5xx, 429, no answer); 0 is for ever.
    registry_timeout_seconds: float = 1_800
    #: How long one init container may work; 0 is for ever.
    init_timeout_seconds: float = 3_600
    #: How long a pod's container may run whose agent has not called; 0 is for ever.
    claim_timeout_seconds: float = 900
    #: What the kubelet tries again by itself (an image that is not found, a container whose Secret comes late)
    #: is given up after so long: two or three of its tries.
    startup_patience_seconds: float = 30
    #: How long an ended pod stays for people to look at.
    finished_grace_seconds: float = 600
    #: Keep a deleted pod in sight, by a finalizer, until its end is recorded: else a drained node takes successes with
    #: it, and their tasks run again. Needs to patch pods; without that right no pod is held. Off before the system is
    #: removed for good: pods that are held then have to be let go by hand.
    hold_pods: bool = True
    #: Refuse a staging claim at once when no storage class can serve it. Needs to read storage classes, which belong to
    #: the cluster; without that right nothing is checked. Off: for volumes that an administrator made by hand.
    check_storage_class: bool = True
    #: Pods per page of a list call.
    page_size: int = 500
    #: Last lines of a pod that died without its agent reporting.
    log_tail_lines: int = 50

    @property
    def exchanges_tokens(self) -> bool:
        """Whether pods hold no token."""
        return self.agent_token == "exchange"  # noqa: S105 - a place


class DockerSettings(BaseSettings):
    """Task containers on a Docker Engine."""

    model_config = _config("LEOFLOW_DOCKER_")

    #: Empty: $DOCKER_HOST, else the Engine's standard socket. TLS as for the docker command (DOCKER_TLS_VERIFY, …).
    url: str = ""
    #: What this host is called in records and queues; empty: derived from the Engine's name and id.
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")] = ""
    #: Several systems may share an Engine, and none may remove what another one runs: the name of this one, on every
    #: container and volume. Empty: derived from the broker (its address, database and key prefix).
    system: str = ""
    #: Of one call to the Engine; a pull takes longer and has its own.
    request_timeout_seconds: int = 60
    #: Less than the broker's visibility timeout, after which another worker would be asked to start the same task.
    pull_timeout_seconds: int = 540
    #: Connections kept open. They are opened when threads need them: more than the worker's concurrency costs nothing.
    max_connections: int = 32
    #: The network of task containers; empty: the Engine's default bridge.
    network: str = ""
    #: Host directory with one directory per agent CA config map and per task secret, mounted read-only into containers.
    secrets_dir: str = ""
    #: YAML: which images may run, and the most of each resource that a container may have. Empty: any.
    policy: OptionalPath = None
    #: How the agent's token and the request's variables reach the container: in a file that the agent removes, or plain
    #: in the container's configuration (for agents that do not know LEOFLOW_AGENT_ENV_FILE).
    agent_environment: Literal["file", "plain"] = "file"
    #: Containers cannot write but to /tmp (memory), /staging and /run/leoflow.
    read_only_root: bool = False
    #: Containers of this system that one Engine runs at once; more messages wait in the queue, where other hosts take
    #: them. 0: 16 for each core of the Engine's host as far as each has 256 MiB of memory, and at least 4.
    max_running: Annotated[int, Field(ge=0)] = 0
    #: Processes and threads in one container; 0 is no limit.
    pids_limit: int = 4_096
    #: What ``docker logs`` keeps of a container (the control plane has the whole log).
    log_max_size: str = "10m"
    log_max_files: int = 2
    #: Between SIGTERM and SIGKILL; the agent gives user code five seconds less.
    termination_grace_seconds: int = 30
    #: The same backstop as for pods: a container is stopped this long after its timeout_seconds.
    deadline_allowance_seconds: int = 60
    #: How long an ended container stays for people to look at.
    finished_grace_seconds: float = 600
    #: Last lines of a container that died without its agent reporting.
    log_tail_lines: int = 50


class StagingSettings(BaseSettings):
    """Staging volumes: the shared directory of a run."""

    model_config = _config("LEOFLOW_STAGING_")

    #: A failed run keeps its volume so long after its end; one whose run is unknown so long after its creation.
    ttl_seconds: float = 24 * 3600
    #: When a request names none.
    default_size: str = "1Gi"


class XComSettings(BaseSettings):
    """Where XCom values are kept."""

    model_config = _config("LEOFLOW_XCOM_")

    #: sql or redis.
    backend: Literal["sql", "redis"] = "sql"
    #: For the redis back end; empty: the broker's URL.
    redis_url: OptionalBrokerUrl = ""
    max_bytes: int = 262_144
    ttl_seconds: int = 7 * 24 * 3600


class LogSettings(BaseSettings):
    """Task logs on disk."""

    model_config = _config("LEOFLOW_LOGS_")

    root: Path = Field(default_factory=lambda: state_dir() / "logs")
    #: Logs older than this are pruned; 0 keeps them for ever.
    retention_seconds: int = 30 * 24 * 3600
    #: Of one line on disk, escapes counted: a longer one is cut and says so. Our own agent sends pieces of 16 KiB.
    max_line_bytes: int = Field(default=65_536, ge=1_024)
    #: Of the log of one try on disk. The last line says that it is full; what comes later is dropped.
    max_try_bytes: int = Field(default=256 * 1024 * 1024, ge=65_536)


class MaintenanceSettings(BaseSettings):
    """Reapers, sweeps and budgets. Units are seconds unless the name says otherwise."""

    model_config = _config("LEOFLOW_MAINTENANCE_")

    max_relaunches: int = 2
    relaunch_backoff_seconds: float = 1.0
    heartbeat_timeout_seconds: float = 90
    lost_message_seconds: float = 60
    queued_timeout_seconds: float = 3_600
    #: How long a started attempt may take until its agent calls; a pod's time begins after its pending timeout.
    launch_timeout_seconds: float = 900
    cancel_grace_seconds: float = 60
    #: When Redis went back (a failover, a crash, an empty restart), ends told this long ago at most are told again. An
    #: empty Redis has forgotten days of them, and their callbacks have long been heard.
    retell_seconds: float = Field(default=600, ge=0)
    #: A try whose container was killed for its memory starts again with its memory limit times this; 1 switches it off.
    oom_memory_factor: float = 1.0
    #: The most that such a limit may grow to (a Kubernetes quantity).
    oom_max_memory: str = "16Gi"
    #: How often beat sends the reapers, the reconcile and the completion sweep.
    interval_seconds: float = 15
    #: How often beat sends the staging GC: a run that succeeded frees its volume within this time.
    staging_interval_seconds: float = 60
    #: Tries, their events and their runs are removed so long after their end; 0 keeps them for ever.
    history_retention_seconds: float = 0
    #: How often beat sends XCom expiry and the pruning of logs and history.
    housekeeping_interval_seconds: float = 3_600


class MetricsSettings(BaseSettings):
    """Prometheus."""

    model_config = _config("LEOFLOW_METRICS_")

    #: Port of a worker's endpoint; 0 is off.
    port: int = 0
    #: task_id labels multiply series; switch them off on large systems.
    task_id_label: bool = True


class HealthSettings(BaseSettings):
    """How a supervisor sees that a process without a port is alive."""

    model_config = _config("LEOFLOW_HEALTH_")

    #: A worker touches it every 2 s while it is connected to the broker, beat with every message. Empty: nobody does.
    file: Path | None = None


class Settings(BaseSettings):
    """All groups, read once. ``Settings.load()`` reads the environment; tests build groups from keywords."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    database: DatabaseSettings = Field(default_factory=DatabaseSettings)
    security: SecuritySettings = Field(default_factory=SecuritySettings)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    agent: AgentDefaults = Field(default_factory=AgentDefaults)
    dispatch: DispatchSettings = Field(default_factory=DispatchSettings)
    inline: InlineSettings = Field(default_factory=InlineSettings)
    subprocess: SubprocessSettings = Field(default_factory=SubprocessSettings)
    kubernetes: KubernetesSettings = Field(default_factory=KubernetesSettings)
    docker: DockerSettings = Field(default_factory=DockerSettings)
    staging: StagingSettings = Field(default_factory=StagingSettings)
    xcom: XComSettings = Field(default_factory=XComSettings)
    logs: LogSettings = Field(default_factory=LogSettings)
    maintenance: MaintenanceSettings = Field(default_factory=MaintenanceSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    health: HealthSettings = Field(default_factory=HealthSettings)

    @classmethod
    def load(cls) -> Settings:
        """The settings of this process.

        Raises:
            ConfigurationError: names the variable, its problem and never a secret's value.
        """
        read_files()
        try:
            return cls()
        except ValidationError as error:
            item = error.errors(include_url=False, include_input=False)[0]
            name, said = _variable(error.title, item["loc"]), item["msg"].removeprefix("Value error, ")
            raise ConfigurationError(f"{name}: {said}") from None  # the cause repeats the value


def variables(group: type[BaseSettings]) -> dict[str, tuple[str, ...]]:
    """Field → the environment variables that set it, the first that is set wins."""
    prefix = str(group.model_config.get("env_prefix", ""))
    return {name: _names_of(name, field, prefix) for name, field in group.model_fields.items()}


def _names_of(name: str, field: FieldInfo, prefix: str) -> tuple[str, ...]:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(one for one in alias.choices if isinstance(one, str) and one.startswith("LEOFLOW_"))
    return (alias if isinstance(alias, str) else f"{prefix}{name}".upper(),)


def _variable(group_name: str, place: tuple[int | str, ...]) -> str:
    """The environment variable behind a field that pydantic found wrong (an aliased field is its variable already)."""
    first, *rest = (str(part) for part in place)
    groups = (field.annotation for field in Settings.model_fields.values())
    prefix = next((str(g.model_config["env_prefix"]) for g in groups if g is not None and g.__name__ == group_name), "")
    name = first if first.startswith(prefix) else f"{prefix}{first}".upper()
    return f"{name} ({'.'.join(rest)})" if rest else name


def environment_with_prefix(prefix: str) -> dict[str, str]:
    """The variables of this process whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in os.environ.items() if name.startswith(prefix)}


def environment_for_commands() -> dict[str, str]:
    """What a command of the operator's may see of this process's environment: none of our settings and keys."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LEOFLOW_")}
