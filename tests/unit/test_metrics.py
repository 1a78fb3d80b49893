from __future__ import annotations

import importlib
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from leoflow_celery import metrics
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import MetricsSettings
from tests.support.ports import free_port

#: name → labels, as dashboards know them.
NAMES = {
    "leoflow_task_state_transitions_total": {"from_state", "to_state", "dag_id"},
    "leoflow_task_duration_seconds": {"dag_id", "task_id", "task_type"},
    "leoflow_task_retries_total": {"dag_id", "task_id"},
    "leoflow_task_pod_creation_duration_seconds": set(),
    "leoflow_task_cold_start_seconds": {"dag_id"},
    "leoflow_xcom_size_bytes": {"dag_id"},
    "leoflow_xcom_push_total": {"dag_id"},
    "leoflow_xcom_pull_total": {"dag_id"},
    "leoflow_xcom_rejected_total": {"reason"},
    "leoflow_pods_created_total": {"dag_id", "result"},
    "leoflow_pods_running": set(),
    "leoflow_pod_pending_duration_seconds": set(),
    "leoflow_kubernetes_api_calls_total": {"operation", "result"},
    "leoflow_dispatch_queue_depth": set(),
    "leoflow_dispatch_at_capacity_total": set(),
    "leoflow_dispatch_latency_seconds": set(),
    "leoflow_tasks_undispatchable_total": {"reason"},
    "leoflow_auth_failures_total": {"reason"},
    "leoflow_messages_refused_total": {"queue", "kind"},
    "leoflow_messages_expired_total": {"queue"},
    "leoflow_clock_offset_seconds": {"server"},
    "leoflow_dead_letters": set(),
    "leoflow_dead_letters_dropped_total": set(),
    "leoflow_queue_depth": {"queue"},
    "leoflow_queue_oldest_age_seconds": {"queue"},
    "leoflow_claims_total": {"result"},
    "leoflow_fenced_writes_total": {"kind"},
    "leoflow_failures_total": {"reason", "class"},
    "leoflow_relaunches_total": {"reason"},
    "leoflow_reconcile_duration_seconds": {"executor"},
    "leoflow_staging_volumes": {"state"},
    "leoflow_secret_backend_failures_total": {"backend"},
    "leoflow_agents_connected": set(),
}


@pytest.fixture(autouse=True)
def fresh():
    metrics._registered.cache_clear()
    yield
    metrics._registered.cache_clear()


def record_everything():
    metrics.record_transition("queued", "running", "sales")
    metrics.record_duration("sales", "load", "python", 3.2)
    metrics.record_retry("sales", "load")
    metrics.record_cold_start("sales", 0.4)
    metrics.record_failure(FailureReason.OOM_KILLED)
    metrics.record_relaunch("evicted")
    metrics.record_claim("granted")
    metrics.record_fenced("state")
    metrics.record_xcom_push("sales", 100)
    metrics.record_xcom_pull("sales")
    metrics.record_xcom_rejected("payload_too_large")
    metrics.record_dispatch(0.02)
    metrics.record_at_capacity()
    metrics.record_undispatchable("invalid_spec")
    metrics.record_refused("dispatch", "body")
    metrics.record_expired("maintenance")
    metrics.set_clock_offset("broker", -120)
    metrics.set_dead_letters(3)
    metrics.record_dead_letters_dropped(2)
    metrics.set_queue_depths({"k8s": 3, "inline": 4, "results": 5}, ["k8s", "inline"])
    metrics.set_queue_oldest_age("k8s", 12)
    metrics.record_pod_created("sales", "created", 0.2)
    metrics.record_pod_pending(2)
    metrics.set_pods_running(7)
    metrics.record_kubernetes_call("create_pod", "201")
    metrics.record_reconcile("kubernetes", 0.3)
    metrics.set_staging_volumes({"active": 2, "released": 1})
    metrics.set_agents_connected(9)
    metrics.record_auth_failure("expired")
    metrics.record_secret_failure("command")


def samples(text=None):
    families = text_string_to_metric_families(text or metrics.exposition().decode())
    return [sample for family in families for sample in family.samples]


def value(name, **labels):
    return next(sample.value for sample in samples() if sample.name == name and sample.labels == labels)


def test_the_exposition_has_exactly_the_names_and_labels_of_the_dashboards():
    record_everything()
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(metrics.exposition().decode())
        if family.name.startswith("leoflow_")
    }
    assert set(families) == set(NAMES)
    for name, family in families.items():
        labels = {frozenset(set(sample.labels) - {"le"}) for sample in family.samples}
        assert labels == {frozenset(NAMES[name])}, name


def test_every_name_is_there_before_anything_happens():
    text = metrics.exposition().decode()
    missing = [name for name in NAMES if f"# TYPE {name} " not in text]
    assert missing == []


def test_values():
    record_everything()
    metrics.record_transition("queued", "running", "sales")
    assert value("leoflow_task_state_transitions_total", from_state="queued", to_state="running", dag_id="sales") == 2
    assert value("leoflow_task_duration_seconds_sum", dag_id="sales", task_id="load", task_type="python") == 3.2
    assert value("leoflow_failures_total", reason="oom_killed", **{"class": "resources"}) == 1
    assert value("leoflow_dispatch_queue_depth") == 7
    assert value("leoflow_queue_depth", queue="results") == 5
    assert value("leoflow_xcom_size_bytes_count", dag_id="sales") == 1
    assert value("leoflow_agents_connected") == 9


def test_clocks_that_disagree_do_not_make_negative_times():
    metrics.record_cold_start("sales", -0.01)
    assert value("leoflow_task_cold_start_seconds_sum", dag_id="sales") == 0


def test_an_unknown_reason_makes_no_new_series():
    metrics.record_failure("a free text of somebody's agent")
    assert value("leoflow_failures_total", reason="non_zero_exit", **{"class": "user"}) == 1


def test_task_ids_can_be_switched_off():
    metrics.configure(MetricsSettings(task_id_label=False))
    for number in range(100):
        metrics.record_duration("sales", f"load-{number}", "python", 1)
        metrics.record_retry("sales", f"load-{number}")
    assert value("leoflow_task_duration_seconds_count", dag_id="sales", task_id="", task_type="python") == 100
    assert value("leoflow_task_retries_total", dag_id="sales", task_id="") == 100


def test_importing_again_registers_nothing_twice():
    metrics.record_claim("granted")
    importlib.reload(metrics)
    metrics.record_claim("granted")
    assert value("leoflow_claims_total", result="granted") == 1


def test_importing_is_cheap():
    code = (
        "import sys, leoflow_celery.metrics; assert not {'prometheus_client', 'pydantic', 'celery'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_endpoint():
    metrics.record_claim("granted")
    port = free_port()
    stop = metrics.serve(port, "127.0.0.1")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert 'leoflow_claims_total{result="granted"} 1.0' in text
        assert "process_resident_memory_bytes" in text
        with pytest.raises(ConfigurationError, match=f"metrics port {port} cannot be used"):
            metrics.serve(port, "127.0.0.1")
    finally:
        stop()


def test_port_0_is_off():
    metrics.serve(0)()


def test_a_pool_of_processes_is_shown_as_one(tmp_path):
    code = (
        "import os\n"
        "from leoflow_celery import metrics\n"
        "metrics.record_claim('granted')\n"
        "children = []\n"
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        metrics.record_claim('granted'); metrics.set_agents_connected(2); os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "print(metrics.exposition().decode())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'leoflow_claims_total{result="granted"} 4.0' in result.stdout
