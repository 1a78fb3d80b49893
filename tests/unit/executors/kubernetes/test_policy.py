"""What an override may set: field by field, over every field that the newest API has."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.attempt import staging_claim_name
from leoflow_celery.domain.pod_fields import TYPES, misfit
from leoflow_celery.errors import ConfigurationError, PermanentLaunchError
from leoflow_celery.executors.kubernetes.pod import build_pod, pod_base
from leoflow_celery.executors.kubernetes.policy import FREE, PodPolicy, override_problems
from leoflow_celery.settings import KubernetesSettings
from tests.unit.executors.kubernetes.built import SETTINGS, launch, task

DEFAULT = PodPolicy()
CLAIM = staging_claim_name("sales", "r1", "default")


def spec(**fields: Any) -> dict[str, Any]:
    return {"spec": fields}


def of_task(**fields: Any) -> dict[str, Any]:
    return spec(containers=[{"name": "task", **fields}])


def volume(**source: Any) -> dict[str, Any]:
    return spec(volumes=[{"name": "v", **source}])


def problems(override: dict[str, Any], policy: PodPolicy = DEFAULT, template: Any = None) -> list[str]:
    base = pod_base(SETTINGS, template)
    return [str(one) for one in override_problems(override, launch().request, policy, base)]


ALLOWED = [
    {"metadata": {"labels": {"team": "a", "kueue.x-k8s.io/queue-name": "q"}, "annotations": {"a": "b"}}},
    {"apiVersion": "v1", "kind": "Pod"},
    spec(nodeSelector={"$patch": "replace", "gpu": "a100"}),
    spec(tolerations=[{"key": "a", "operator": "Exists"}]),
    spec(affinity={"nodeAffinity": {}}),
    spec(priorityClassName=None, priority=None),
    spec(runtimeClassName="gvisor"),
    spec(activeDeadlineSeconds=7, terminationGracePeriodSeconds=120),
    spec(resources={"limits": {"cpu": "1"}}),
    spec(securityContext={"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "runAsNonRoot": True}),
    of_task(image="a:1", imagePullPolicy="Always", command=["a"], args=["b"], workingDir="/app"),
    of_task(resources={"limits": {"nvidia.com/gpu": "1"}, "requests": {"cpu": "1"}}),
    of_task(env=[{"name": "A", "value": "b"}, {"name": "B", "$patch": "delete"}, {"$patch": "replace"}]),
    of_task(env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]),
    of_task(env=[{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}]),
    of_task(envFrom=[{"prefix": "A_", "configMapRef": {"name": "c"}}]),
    of_task(
        securityContext={"privileged": False, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    ),
    of_task(securityContext={"readOnlyRootFilesystem": True, "seccompProfile": {"type": "RuntimeDefault"}}),
    volume(emptyDir={"medium": "Memory", "sizeLimit": "1Gi"}),
    volume(configMap={"name": "c", "items": [{"key": "k", "path": "p"}]}),
    volume(projected={"sources": [{"configMap": {"name": "c"}}]}),
    volume(persistentVolumeClaim={"claimName": CLAIM}),
    spec(
        volumes=[{"name": "v", "emptyDir": {}}],
        containers=[
            {"name": "task", "volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "a", "readOnly": True}]}
        ],
    ),
    of_task(volumeMounts=[{"name": "leoflow-staging", "mountPath": "/data", "subPath": "x"}]),
]


@pytest.mark.parametrize("override", ALLOWED, ids=str)
def test_an_override_may_set_what_is_a_tasks_own(override: dict[str, Any]) -> None:
    assert problems(override) == []
    assert misfit(override) is None


REFUSED = [
    # The host, and other people's containers.
    (volume(hostPath={"path": "/etc"}), "spec.volumes[v].hostPath"),
    (spec(hostNetwork=True), "spec.hostNetwork"),
    (spec(hostPID=True), "spec.hostPID"),
    (spec(hostIPC=True), "spec.hostIPC"),
    (spec(hostUsers=True), "spec.hostUsers"),
    (spec(hostAliases=[{"ip": "1.2.3.4", "hostnames": ["a"]}]), "spec.hostAliases"),
    (spec(shareProcessNamespace=True), "spec.shareProcessNamespace"),
    (spec(nodeName="n1"), "spec.nodeName"),
    (spec(schedulerName="mine"), "spec.schedulerName"),
    (of_task(ports=[{"containerPort": 80, "hostPort": 80}]), "spec.containers[task].ports"),
    (of_task(volumeDevices=[{"name": "v", "devicePath": "/dev/sda"}]), "spec.containers[task].volumeDevices"),
    # Privilege.
    (of_task(securityContext={"privileged": True}), "spec.containers[task].securityContext.privileged"),
    (of_task(securityContext={"runAsUser": 0}), "spec.containers[task].securityContext.runAsUser"),
    (of_task(securityContext={"runAsGroup": 0}), "spec.containers[task].securityContext.runAsGroup"),
    (of_task(securityContext={"runAsUser": None}), "spec.containers[task].securityContext.runAsUser"),
    (of_task(securityContext={"runAsNonRoot": False}), "spec.containers[task].securityContext.runAsNonRoot"),
    (
        of_task(securityContext={"allowPrivilegeEscalation": True}),
        "spec.containers[task].securityContext.allowPrivilegeEscalation",
    ),
    (of_task(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), "securityContext.capabilities"),
    (of_task(securityContext={"capabilities": {"drop": []}}), "securityContext.capabilities"),
    (of_task(securityContext={"capabilities": None}), "securityContext.capabilities"),
    (of_task(securityContext={"capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]}}), "securityContext.capabilities"),
    (of_task(securityContext={"procMount": "Unmasked"}), "securityContext.procMount"),
    (of_task(securityContext={"seccompProfile": {"type": "Unconfined"}}), "securityContext.seccompProfile"),
    (of_task(securityContext={"appArmorProfile": {"type": "Unconfined"}}), "securityContext.appArmorProfile"),
    (of_task(securityContext={"$patch": "replace"}), "securityContext.$patch"),
    (of_task(securityContext={"$patch": "delete"}), "securityContext.$patch"),
    (of_task(securityContext=None), "spec.containers[task].securityContext"),
    (spec(securityContext=None), "spec.securityContext"),
    (spec(securityContext={"runAsUser": 0}), "spec.securityContext.runAsUser"),
    (spec(securityContext={"runAsNonRoot": None}), "spec.securityContext.runAsNonRoot"),
    (spec(securityContext={"supplementalGroups": [0]}), "spec.securityContext.supplementalGroups"),
    (spec(securityContext={"sysctls": []}), "spec.securityContext.sysctls"),
    # Identity.
    (spec(serviceAccountName="admin"), "spec.serviceAccountName"),
    (spec(serviceAccount="admin"), "spec.serviceAccount"),
    (spec(automountServiceAccountToken=True), "spec.automountServiceAccountToken"),
    (volume(projected={"sources": [{"serviceAccountToken": {"path": "t"}}]}), "sources[0].serviceAccountToken"),
    (volume(projected={"sources": [{"clusterTrustBundle": {"path": "t"}}]}), "sources[0].clusterTrustBundle"),
    (spec(imagePullSecrets=[{"name": "other"}]), "spec.imagePullSecrets[other].name"),
    (volume(secret={"secretName": "other"}), "spec.volumes[v].secret.secretName"),
    (volume(projected={"sources": [{"secret": {"name": "other"}}]}), "sources[0].secret.name"),
    (of_task(envFrom=[{"secretRef": {"name": "other"}}]), "envFrom[0].secretRef.name"),
    (
        of_task(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "other", "key": "k"}}}]),
        "env[A].valueFrom.secretKeyRef.name",
    ),
    (of_task(env=[{"name": "A", "valueFrom": {"fileKeyRef": {"key": "k"}}}]), "env[A].valueFrom.fileKeyRef"),
    # Metadata.
    ({"metadata": {"finalizers": ["a/b"]}}, "metadata.finalizers"),
    ({"metadata": {"ownerReferences": []}}, "metadata.ownerReferences"),
    ({"metadata": {"name": "mine"}}, "metadata.name"),
    ({"metadata": {"namespace": "kube-system"}}, "metadata.namespace"),
    ({"metadata": {"labels": {"leoflow.io/run-id": "other"}}}, "metadata.labels"),
    ({"metadata": {"annotations": {"leoflow.io/seal": "x"}}}, "metadata.annotations"),
    ({"metadata": {"labels": None}}, "metadata.labels"),
    ({"metadata": {"annotations": {"$patch": "replace"}}}, "metadata.annotations.$patch"),
    (
        {"metadata": {"annotations": {"container.apparmor.security.beta.kubernetes.io/task": "unconfined"}}},
        "container.apparmor.security.beta.kubernetes.io/task",
    ),
    (
        {"metadata": {"annotations": {"seccomp.security.alpha.kubernetes.io/pod": "unconfined"}}},
        "seccomp.security.alpha",
    ),
    # Containers, and directives that would take away what stands there.
    (spec(containers=[{"name": "proxy", "image": "proxy:1"}]), "spec.containers[proxy]"),
    (spec(initContainers=[{"name": "task", "image": "a:1"}]), "spec.initContainers[task]"),
    (spec(ephemeralContainers=[{"name": "e"}]), "spec.ephemeralContainers"),
    (spec(containers=[{"$patch": "replace"}]), "spec.containers[0]"),
    (spec(containers=[{"name": "task", "$patch": "delete"}]), "spec.containers[task].$patch"),
    (spec(containers=None), "spec.containers"),
    ({"spec": {"$patch": "replace", "containers": []}}, "spec.$patch"),
    ({"spec": None}, "pod_override.spec"),
    ({"$patch": "replace"}, "pod_override.$patch"),
    (of_task(lifecycle={"preStop": {"exec": {"command": ["a"]}}}), "spec.containers[task].lifecycle"),
    (of_task(livenessProbe={"exec": {"command": ["a"]}}), "livenessProbe"),
    (of_task(terminationMessagePath="/x"), "terminationMessagePath"),
    (of_task(resources={"claims": [{"name": "gpu"}]}), "spec.containers[task].resources.claims"),
    (of_task(resources=None), "spec.containers[task].resources"),
    (spec(restartPolicy="Always"), "spec.restartPolicy"),
    (spec(terminationGracePeriodSeconds=3_601), "spec.terminationGracePeriodSeconds"),
    # Volumes and mounts.
    (volume(persistentVolumeClaim={"claimName": "others"}), "persistentVolumeClaim.claimName"),
    (volume(persistentVolumeClaim={"readOnly": False}), "persistentVolumeClaim.claimName"),
    (volume(nfs={"server": "s", "path": "/"}), "spec.volumes[v].nfs"),
    (volume(csi={"driver": "d"}), "spec.volumes[v].csi"),
    (volume(ephemeral={}), "spec.volumes[v].ephemeral"),
    (volume(image={"reference": "a"}), "spec.volumes[v].image"),
    (volume(**{"$patch": "delete"}), "spec.volumes[v].$patch"),
    (volume(hostPath=None, emptyDir={}), "spec.volumes[v].hostPath"),
    (volume(), "spec.volumes[v]"),
    (spec(volumes=[{"name": "leoflow-identity", "emptyDir": {}}]), "spec.volumes[leoflow-identity]"),
    (of_task(volumeMounts=[{"name": "not-mine", "mountPath": "/host"}]), "volumeMounts[not-mine].name"),
    (of_task(volumeMounts=[{"mountPath": "/host", "readOnly": False}]), "volumeMounts[0].name"),
    (
        of_task(volumeMounts=[{"name": "leoflow-tmp", "mountPath": "/a", "mountPropagation": "Bidirectional"}]),
        "volumeMounts[leoflow-tmp].mountPropagation",
    ),
]


@pytest.mark.parametrize(("override", "path"), REFUSED, ids=[path for _, path in REFUSED])
def test_an_override_may_not_set_what_is_the_hosts_the_operators_or_another_tasks(
    override: dict[str, Any], path: str
) -> None:
    found = problems(override)
    assert any(path in one for one in found), found
    with pytest.raises(PermanentLaunchError, match="pod_override") as caught:
        DEFAULT.check(launch().request.evolve(pod_override=override), pod_base(SETTINGS))
    assert caught.value.reason == "forbidden"


# -- every field of the newest API ------------------------------------------------------------------------------------

#: Objects whose members are judged one by one, and the members that may be set (see the tests above for how far).
JUDGED = {
    "PodSpec": {
        *("activeDeadlineSeconds", "affinity", "containers", "nodeSelector", "priority", "priorityClassName"),
        *(
            "runtimeClassName",
            "terminationGracePeriodSeconds",
            "tolerations",
            "resources",
            "securityContext",
            "volumes",
        ),
        "imagePullSecrets",
    },
    "Container": {
        *("name", "image", "imagePullPolicy", "command", "args", "workingDir", "resources", "env", "envFrom"),
        *("volumeMounts", "securityContext"),
    },
    "SecurityContext": set(),
    "PodSecurityContext": set(),
    "Volume": {"name", "emptyDir"},
    "VolumeMount": {"name", "mountPath", "subPath", "subPathExpr", "readOnly"},
    "VolumeProjection": set(),
    "EnvVarSource": {"fieldRef", "resourceFieldRef"},
    "EnvFromSource": {"prefix"},
    "ObjectMeta": {"labels", "annotations"},
    "ResourceRequirements": {"limits", "requests"},
}


def placed(kind: str, name: str, value: Any) -> dict[str, Any]:
    member = {name: value}
    match kind:
        case "PodSpec":
            return spec(**member)
        case "ObjectMeta":
            return {"metadata": member}
        case "Container":
            return of_task(**member)
        case "SecurityContext":
            return of_task(securityContext=member)
        case "PodSecurityContext":
            return spec(securityContext=member)
        case "Volume":
            return volume(**member)
        case "VolumeMount":
            return of_task(volumeMounts=[{"name": "leoflow-tmp", "mountPath": "/x", **member}])
        case "VolumeProjection":
            return volume(projected={"sources": [member]})
        case "EnvVarSource":
            return of_task(env=[{"name": "A", "valueFrom": member}])
        case "EnvFromSource":
            return of_task(envFrom=[member])
        case _:
            return of_task(resources=member)


def sample(kind: str) -> Any:
    """A value of a kind that says nothing harmless."""
    if kind.startswith("["):
        return [sample(kind[1:-1])]
    if kind.startswith("{"):
        return {"a": sample(kind[1:-1])}
    return {"string": "x", "integer": 0, "boolean": True, "number": 0.5, "quantity": "1"}.get(kind, {})


def fields() -> Iterator[tuple[str, str]]:
    for kind, allowed in JUDGED.items():
        for name in TYPES[kind]:
            # Hardening values are true; that they may be set is tested above.
            if name not in allowed and name not in ("readOnlyRootFilesystem", "runAsNonRoot"):
                yield kind, name


@pytest.mark.parametrize(("kind", "name"), list(fields()))
def test_each_other_field_is_refused_and_a_new_one_too(kind: str, name: str) -> None:
    assert problems(placed(kind, name, sample(TYPES[kind][name])))
    assert problems(placed(kind, "fieldOfNextYear", {"a": 1}))


@pytest.mark.parametrize(
    "name", sorted(set(TYPES["PodSpec"]) - {"containers", "initContainers", "ephemeralContainers", "volumes"})
)
def test_an_operator_can_free_each_field_of_a_pod(name: str) -> None:
    policy = PodPolicy.model_validate({"allow": {"fields": [f"spec.{name}"]}})
    assert problems(spec(**{name: sample(TYPES["PodSpec"][name])}), policy) == []


@pytest.mark.parametrize("name", sorted(TYPES["Container"]))
def test_an_operator_can_free_each_field_of_the_container(name: str) -> None:
    policy = PodPolicy.model_validate({"allow": {"fields": [f"spec.containers.{name}"]}})
    if name != "name":
        assert problems(of_task(**{name: sample(TYPES["Container"][name])}), policy) == []


def test_what_is_free_by_default_is_a_field() -> None:
    PodPolicy.model_validate({"allow": {"fields": sorted(FREE)}})


def test_a_field_that_was_freed_frees_no_other() -> None:
    policy = PodPolicy.model_validate({"allow": {"fields": ["spec.containers.lifecycle", "spec.volumes.nfs"]}})
    assert problems(of_task(lifecycle={"preStop": {}}), policy) == []
    assert problems(volume(nfs={"server": "s", "path": "/"}), policy) == []
    assert problems(of_task(lifecycleX={}), policy)
    # A name is no place: whoever gives an item this one does not get what is freed elsewhere.
    sly = {"name": "x].lifecycle[", "image": "a:1", "securityContext": {"privileged": True}}
    assert problems(spec(containers=[sly]), policy)
    assert problems(
        spec(containers=[sly]),
        PodPolicy.model_validate({"allow": {"sidecars": True, "fields": ["spec.containers.lifecycle"]}}),
    )


def test_listed_secrets_config_maps_and_claims() -> None:
    policy = PodPolicy.model_validate({"allow": {"secrets": ["team-*"], "config_maps": ["c"], "claims": ["data"]}})
    assert problems(volume(secret={"secretName": "team-db"}), policy) == []
    assert problems(of_task(envFrom=[{"secretRef": {"name": "team-db"}}]), policy) == []
    assert problems(volume(persistentVolumeClaim={"claimName": "data"}), policy) == []
    assert problems(volume(configMap={"name": "c"}), policy) == []
    assert problems(volume(secret={"secretName": "other"}), policy)
    assert problems(volume(configMap={"name": "other"}), policy)
    # A part of a reference would be merged into the template's, and read another key of the operator's Secret.
    assert problems(volume(secret={"items": []}), policy)
    assert problems(of_task(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"key": "other"}}}]), policy)


def test_the_requests_own_secrets_are_the_operators_matter_once_he_lists_some() -> None:
    request = launch(
        task_secret_name="db",
        task_secret_mount_path="/db",
        secrets=[{"name": "A", "source": "k8s_secret", "reference": "api/key"}],
    ).request
    base = pod_base(SETTINGS)
    DEFAULT.check(request, base)
    PodPolicy.model_validate({"allow": {"secrets": ["db", "api"]}}).check(request, base)
    with pytest.raises(PermanentLaunchError, match=r"secrets\.0\.reference: names the Secret 'api'"):
        PodPolicy.model_validate({"allow": {"secrets": ["db"]}}).check(request, base)


# -- the operator's own containers and volumes ------------------------------------------------------------------------

TEMPLATE = {
    "spec": {
        "volumes": [
            {"name": "host", "hostPath": {"path": "/var/log"}},
            {"name": "scripts", "configMap": {"name": "s"}},
        ],
        "containers": [
            {
                "name": "shipper",
                "image": "operator.example/shipper",
                "securityContext": {"privileged": True},
                "volumeMounts": [{"name": "host", "mountPath": "/logs"}, {"name": "scripts", "mountPath": "/s"}],
            }
        ],
    }
}
SIDECARS = PodPolicy.model_validate({"allow": {"sidecars": True}})


@pytest.mark.parametrize(
    "override",
    [
        spec(containers=[{"name": "shipper", "command": ["mine"]}]),
        spec(volumes=[{"name": "scripts", "configMap": {"name": "mine"}}]),
        spec(
            volumes=[{"name": "host", "emptyDir": {}}],
            containers=[{"name": "task", "volumeMounts": [{"name": "host", "mountPath": "/h"}]}],
        ),
        of_task(volumeMounts=[{"name": "host", "mountPath": "/h"}]),
    ],
    ids=str,
)
def test_the_templates_containers_and_volumes_are_nobody_elses(override: dict[str, Any]) -> None:
    assert problems(override, SIDECARS, TEMPLATE)


def built(policy: dict[str, Any], template: Any = None, **fields: Any) -> dict[str, Any]:
    return build_pod(launch(**fields), SETTINGS, pod_base(SETTINGS, template), "s", PodPolicy.model_validate(policy))


def test_a_sidecar_that_is_allowed_is_confined_like_the_task() -> None:
    native = {"name": "init", "image": "a:1", "restartPolicy": "Always"}
    override = spec(containers=[{"name": "proxy", "image": "proxy:1"}], initContainers=[native])
    pod = built({"allow": {"sidecars": True}}, TEMPLATE, pod_override=override)
    added = {one["name"]: one for kind in ("containers", "initContainers") for one in pod["spec"][kind]}
    for name in ("proxy", "init"):
        assert added[name]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert added[name]["securityContext"]["allowPrivilegeEscalation"] is False
    assert added["shipper"]["securityContext"] == {"privileged": True}
    assert problems(spec(containers=[{"name": "proxy", "securityContext": {"privileged": True}}]), SIDECARS)


# -- force and refuse -------------------------------------------------------------------------------------------------


def test_what_is_forced_wins_over_all() -> None:
    policy = {
        "force": {
            "runtime_class": "gvisor",
            "service_account": "tasks",
            "node_selector": {"pool": "tasks"},
            "tolerations": [{"key": "tasks", "operator": "Exists"}],
        }
    }
    override = spec(runtimeClassName=None, nodeSelector={"pool": "mine", "disk": "ssd"}, tolerations=[{"key": "a"}])
    execution = {"service_account": "other", "node_selector": {"$patch": "x"}}
    for _ in range(2):
        pod = built(policy, {"spec": {"serviceAccount": "old"}}, pod_override=copy.deepcopy(override))
        assert pod["spec"]["runtimeClassName"] == "gvisor"
        assert pod["spec"]["serviceAccountName"] == "tasks"
        assert "serviceAccount" not in pod["spec"]
        assert pod["spec"]["nodeSelector"] == {"pool": "tasks", "disk": "ssd"}
        assert pod["spec"]["tolerations"] == [{"key": "a"}, {"key": "tasks", "operator": "Exists"}]
    pod = built(policy, execution={"service_account": execution["service_account"]})
    assert pod["spec"]["serviceAccountName"] == "tasks"


@pytest.mark.parametrize(
    ("policy", "fields", "words"),
    [
        ({"refuse": {"service_accounts": ["admin*"]}}, {"execution": {"service_account": "admin-x"}}, "'admin-x'"),
        (
            {"refuse": {"priority_classes": ["system-*"]}},
            {"pod_override": spec(priorityClassName="system-node-critical")},
            "priorityClassName: 'system-node-critical'",
        ),
        (
            {"refuse": {"label_prefixes": ["net.example/"]}},
            {"pod_override": {"metadata": {"labels": {"net.example/zone": "x"}}}},
            "'net.example/zone'",
        ),
        (
            {"refuse": {"annotation_prefixes": ["sidecar.istio.io/"]}},
            {"pod_override": {"metadata": {"annotations": {"sidecar.istio.io/inject": "false"}}}},
            "'sidecar.istio.io/inject'",
        ),
        (
            {"refuse": {"label_prefixes": ["kueue."]}},
            {"pod_override": {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": None}}}},
            "'kueue.x-k8s.io/queue-name'",
        ),
        (
            {"images": {"allow": ["registry.example/"]}},
            {"image": "tasks:1"},
            r"spec.containers\[task\].image: 'tasks:1'",
        ),
        ({"images": {"refuse": ["evil"]}}, {"pod_override": of_task(image="evil:1")}, "docker.io/library/evil"),
    ],
)
def test_what_is_refused_names_field_and_value(policy: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PermanentLaunchError, match=words) as caught:
        built(policy, **fields)
    assert caught.value.reason == "forbidden"


CEILINGS = {"ceilings": {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": "1"}}


def test_a_container_without_a_limit_gets_the_ceiling_and_reserves_nothing() -> None:
    resources = task(built(CEILINGS))["resources"]
    assert resources == {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "0", "memory": "0"}}
    asked = {"requests": {"cpu": "1"}, "limits": {"memory": "64Mi"}}
    resources = task(built(CEILINGS, resources=asked))["resources"]
    assert resources == {"limits": {"cpu": "2", "memory": "64Mi"}, "requests": {"cpu": "1"}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"resources": {"limits": {"cpu": "3"}}}, r"resources\.limits\.cpu: 3 is more than the 2"),
        ({"resources": {"requests": {"cpu": "3"}}}, r"resources\.requests\.cpu: 3 is more"),
        ({"pod_override": of_task(resources={"limits": {"nvidia.com/gpu": 2}})}, r"limits\.nvidia\.com/gpu: 2 is more"),
        ({"pod_override": spec(resources={"limits": {"memory": "2Gi"}})}, r"spec\.resources\.limits\.memory: 2Gi"),
    ],
)
def test_more_than_the_ceiling_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PermanentLaunchError, match=words) as caught:
        built(CEILINGS, **fields)
    assert caught.value.reason == "invalid_quantity"


def test_the_operators_own_containers_are_not_judged() -> None:
    policy = {"images": {"allow": ["docker.io/library/tasks"]}, **CEILINGS}
    pod = built(policy, TEMPLATE)
    (shipper,) = [one for one in pod["spec"]["containers"] if one["name"] == "shipper"]
    assert "resources" not in shipper


def test_a_queue_label_of_kueue_in_the_template_reaches_the_pod() -> None:
    template = {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "tasks"}}}
    pod = built({"refuse": {"label_prefixes": ["kueue.x-k8s.io/"]}}, template)
    assert pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tasks"
    assert "leoflow.io/run-id" in pod["metadata"]["labels"]


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alow: {}", "alow: is not a known key"),
        ("force: {nodeSelector: {}}", r"force\.nodeSelector: is not a known key"),
        ("force: {node_selector: {a: 1}}", r"force\.node_selector\.a: .*string"),
        ("force: {tolerations: [{effect: Never}]}", r"force\.tolerations\.0\.effect"),
        ("allow: {fields: [spec.hostPaths]}", r"allow\.fields\.0: .*'spec\.hostPaths' is not a field of a Pod"),
        ("allow: {fields: [spec]}", "would allow all of it"),
        ("allow: {sidecars: 'maybe'}", r"allow\.sidecars: .*boolean"),
        ("ceilings: {memory: 1 GB}", "not a Kubernetes quantity"),
    ],
)
def test_a_policy_that_cannot_be_meant_stops_the_worker(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"LEOFLOW_KUBERNETES_POLICY=.*policy\.yaml: .*{words}"):
        PodPolicy.load(path)


def test_an_empty_variable_is_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEOFLOW_KUBERNETES_POLICY", "")
    assert PodPolicy.load(KubernetesSettings().policy) == DEFAULT
