"""What kind of value belongs where in a Pod: the fields of core/v1, as the newest published API schema has them.

A value of the wrong kind (a number where text belongs) is found here, at the door and at a worker's start. The API
server would refuse it as well, but its words quote what stands beside it, which may be a password.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

#: Type, then its fields with their kinds: ``[K]`` is a list of K, ``{K}`` an object whose values are K. Written from
#: the schemas of Kubernetes 1.37, in which a field once known has its kind for good; a test compares the two.
_TABLE: Final = """
AWSElasticBlockStoreVolumeSource fsType:string partition:integer readOnly:boolean volumeID:string
Affinity nodeAffinity:NodeAffinity podAffinity:PodAffinity podAntiAffinity:PodAntiAffinity
AppArmorProfile localhostProfile:string type:string
AzureDiskVolumeSource cachingMode:string diskName:string diskURI:string fsType:string kind:string readOnly:boolean
AzureFileVolumeSource readOnly:boolean secretName:string shareName:string
CSIVolumeSource driver:string fsType:string nodePublishSecretRef:LocalObjectReference readOnly:boolean
    volumeAttributes:{string}
Capabilities add:[string] drop:[string]
CephFSVolumeSource monitors:[string] path:string readOnly:boolean secretFile:string secretRef:LocalObjectReference
    user:string
CinderVolumeSource fsType:string readOnly:boolean secretRef:LocalObjectReference volumeID:string
ClusterTrustBundleProjection labelSelector:LabelSelector name:string optional:boolean path:string signerName:string
    user:integer
ConfigMapEnvSource name:string optional:boolean
ConfigMapKeySelector key:string name:string optional:boolean
ConfigMapProjection items:[KeyToPath] name:string optional:boolean
ConfigMapVolumeSource defaultMode:integer defaultUser:integer items:[KeyToPath] name:string optional:boolean
Container args:[string] command:[string] env:[EnvVar] envFrom:[EnvFromSource] image:string imagePullPolicy:string
    lifecycle:Lifecycle livenessProbe:Probe name:string ports:[ContainerPort] readinessProbe:Probe
    resizePolicy:[ContainerResizePolicy] resources:ResourceRequirements restartPolicy:string
    restartPolicyRules:[ContainerRestartRule] securityContext:SecurityContext startupProbe:Probe stdin:boolean
    stdinOnce:boolean terminationMessagePath:string terminationMessagePolicy:string tty:boolean
    volumeDevices:[VolumeDevice] volumeMounts:[VolumeMount] workingDir:string
ContainerPort containerPort:integer hostIP:string hostPort:integer name:string protocol:string
ContainerResizePolicy resourceName:string restartPolicy:string
ContainerRestartRule action:string exitCodes:ContainerRestartRuleOnExitCodes
ContainerRestartRuleOnExitCodes operator:string values:[integer]
DownwardAPIProjection items:[DownwardAPIVolumeFile]
DownwardAPIVolumeFile fieldRef:ObjectFieldSelector mode:integer path:string resourceFieldRef:ResourceFieldSelector
    user:integer
DownwardAPIVolumeSource defaultMode:integer defaultUser:integer items:[DownwardAPIVolumeFile]
EmptyDirVolumeSource medium:string mode:integer sizeLimit:quantity
EnvFromSource configMapRef:ConfigMapEnvSource prefix:string secretRef:SecretEnvSource
EnvVar name:string value:string valueFrom:EnvVarSource
EnvVarSource configMapKeyRef:ConfigMapKeySelector fieldRef:ObjectFieldSelector fileKeyRef:FileKeySelector
    resourceFieldRef:ResourceFieldSelector secretKeyRef:SecretKeySelector
EphemeralContainer args:[string] command:[string] env:[EnvVar] envFrom:[EnvFromSource] image:string
    imagePullPolicy:string lifecycle:Lifecycle livenessProbe:Probe name:string ports:[ContainerPort]
    readinessProbe:Probe resizePolicy:[ContainerResizePolicy] resources:ResourceRequirements restartPolicy:string
    restartPolicyRules:[ContainerRestartRule] securityContext:SecurityContext startupProbe:Probe stdin:boolean
    stdinOnce:boolean targetContainerName:string terminationMessagePath:string terminationMessagePolicy:string
    tty:boolean volumeDevices:[VolumeDevice] volumeMounts:[VolumeMount] workingDir:string
EphemeralVolumeSource volumeClaimTemplate:PersistentVolumeClaimTemplate
EvictionResponder name:string priority:integer
ExecAction command:[string]
FCVolumeSource fsType:string lun:integer readOnly:boolean targetWWNs:[string] wwids:[string]
FileKeySelector key:string optional:boolean path:string volumeName:string
FlexVolumeSource driver:string fsType:string options:{string} readOnly:boolean secretRef:LocalObjectReference
FlockerVolumeSource datasetName:string datasetUUID:string
GCEPersistentDiskVolumeSource fsType:string partition:integer pdName:string readOnly:boolean
GRPCAction mode:string port:integer service:string
GitRepoVolumeSource directory:string repository:string revision:string
GlusterfsVolumeSource endpoints:string path:string readOnly:boolean
HTTPGetAction host:string httpHeaders:[HTTPHeader] path:string port:int-or-string protocol:string scheme:string
HTTPHeader name:string value:string
HostAlias hostnames:[string] ip:string
HostPathVolumeSource path:string type:string
ISCSIVolumeSource chapAuthDiscovery:boolean chapAuthSession:boolean fsType:string initiatorName:string iqn:string
    iscsiInterface:string lun:integer portals:[string] readOnly:boolean secretRef:LocalObjectReference
    targetPortal:string
ImageVolumeSource pullPolicy:string reference:string
KeyToPath key:string mode:integer path:string user:integer
LabelSelector matchExpressions:[LabelSelectorRequirement] matchLabels:{string}
LabelSelectorRequirement key:string operator:string values:[string]
Lifecycle postStart:LifecycleHandler preStop:LifecycleHandler stopSignal:string
LifecycleHandler exec:ExecAction httpGet:HTTPGetAction sleep:SleepAction tcpSocket:TCPSocketAction
LocalObjectReference name:string
ManagedFieldsEntry apiVersion:string fieldsType:string fieldsV1:any manager:string operation:string subresource:string
    time:string
NFSVolumeSource path:string readOnly:boolean server:string
NodeAffinity preferredDuringSchedulingIgnoredDuringExecution:[PreferredSchedulingTerm]
    requiredDuringSchedulingIgnoredDuringExecution:NodeSelector
NodeSelector nodeSelectorTerms:[NodeSelectorTerm]
NodeSelectorRequirement key:string operator:string values:[string]
NodeSelectorTerm matchExpressions:[NodeSelectorRequirement] matchFields:[NodeSelectorRequirement]
ObjectFieldSelector apiVersion:string fieldPath:string
ObjectMeta annotations:{string} creationTimestamp:string deletionGracePeriodSeconds:integer deletionTimestamp:string
    finalizers:[string] generateName:string generation:integer labels:{string} managedFields:[ManagedFieldsEntry]
    name:string namespace:string ownerReferences:[OwnerReference] resourceVersion:string selfLink:string uid:string
OwnerReference apiVersion:string blockOwnerDeletion:boolean controller:boolean kind:string name:string uid:string
PersistentVolumeClaimSpec accessModes:[string] dataSource:TypedLocalObjectReference dataSourceRef:TypedObjectReference
    resources:VolumeResourceRequirements selector:LabelSelector storageClassName:string
    volumeAttributesClassName:string volumeMode:string volumeName:string
PersistentVolumeClaimTemplate metadata:ObjectMeta spec:PersistentVolumeClaimSpec
PersistentVolumeClaimVolumeSource claimName:string readOnly:boolean
PhotonPersistentDiskVolumeSource fsType:string pdID:string
PodAffinity preferredDuringSchedulingIgnoredDuringExecution:[WeightedPodAffinityTerm]
    requiredDuringSchedulingIgnoredDuringExecution:[PodAffinityTerm]
PodAffinityTerm labelSelector:LabelSelector matchLabelKeys:[string] mismatchLabelKeys:[string]
    namespaceSelector:LabelSelector namespaces:[string] topologyKey:string
PodAntiAffinity preferredDuringSchedulingIgnoredDuringExecution:[WeightedPodAffinityTerm]
    requiredDuringSchedulingIgnoredDuringExecution:[PodAffinityTerm]
PodCertificateProjection certificateChainPath:string credentialBundlePath:string keyPath:string keyType:string
    maxExpirationSeconds:integer signerName:string user:integer userAnnotations:{string}
PodDNSConfig nameservers:[string] options:[PodDNSConfigOption] searches:[string]
PodDNSConfigOption name:string value:string
PodOS name:string
PodReadinessGate conditionType:string
PodResourceClaim name:string resourceClaimName:string resourceClaimTemplateName:string
PodSchedulingGate name:string
PodSchedulingGroup podGroupName:string
PodSecurityContext appArmorProfile:AppArmorProfile fsGroup:integer fsGroupChangePolicy:string runAsGroup:integer
    runAsNonRoot:boolean runAsUser:integer seLinuxChangePolicy:string seLinuxOptions:SELinuxOptions
    seccompProfile:SeccompProfile supplementalGroups:[integer] supplementalGroupsPolicy:string sysctls:[Sysctl]
    windowsOptions:WindowsSecurityContextOptions
PodSpec activeDeadlineSeconds:integer affinity:Affinity automountServiceAccountToken:boolean containers:[Container]
    dnsConfig:PodDNSConfig dnsPolicy:string enableServiceLinks:boolean ephemeralContainers:[EphemeralContainer]
    evictionResponders:[EvictionResponder] hostAliases:[HostAlias] hostIPC:boolean hostNetwork:boolean hostPID:boolean
    hostUsers:boolean hostname:string hostnameOverride:string imagePullSecrets:[LocalObjectReference]
    initContainers:[Container] nodeName:string nodeSelector:{string} os:PodOS overhead:{quantity}
    preemptionPolicy:string priority:integer priorityClassName:string readinessGates:[PodReadinessGate]
    resourceClaims:[PodResourceClaim] resources:ResourceRequirements restartPolicy:string runtimeClassName:string
    schedulerName:string schedulingGates:[PodSchedulingGate] schedulingGroup:PodSchedulingGroup
    securityContext:PodSecurityContext serviceAccount:string serviceAccountName:string setHostnameAsFQDN:boolean
    shareProcessNamespace:boolean subdomain:string terminationGracePeriodSeconds:integer tolerations:[Toleration]
    topologySpreadConstraints:[TopologySpreadConstraint] volumes:[Volume]
PortworxVolumeSource fsType:string readOnly:boolean volumeID:string
PreferredSchedulingTerm preference:NodeSelectorTerm weight:integer
Probe exec:ExecAction failureThreshold:integer grpc:GRPCAction httpGet:HTTPGetAction initialDelaySeconds:integer
    periodSeconds:integer successThreshold:integer tcpSocket:TCPSocketAction terminationGracePeriodSeconds:integer
    timeoutSeconds:integer
ProjectedVolumeSource defaultMode:integer defaultUser:integer sources:[VolumeProjection]
QuobyteVolumeSource group:string readOnly:boolean registry:string tenant:string user:string volume:string
RBDVolumeSource fsType:string image:string keyring:string monitors:[string] pool:string readOnly:boolean
    secretRef:LocalObjectReference user:string
ResourceClaim name:string request:string
ResourceFieldSelector containerName:string divisor:quantity resource:string
ResourceRequirements claims:[ResourceClaim] limits:{quantity} requests:{quantity}
SELinuxOptions level:string role:string type:string user:string
ScaleIOVolumeSource fsType:string gateway:string protectionDomain:string readOnly:boolean
    secretRef:LocalObjectReference sslEnabled:boolean storageMode:string storagePool:string system:string
    volumeName:string
SeccompProfile localhostProfile:string type:string
SecretEnvSource name:string optional:boolean
SecretKeySelector key:string name:string optional:boolean
SecretProjection items:[KeyToPath] name:string optional:boolean
SecretVolumeSource defaultMode:integer defaultUser:integer items:[KeyToPath] optional:boolean secretName:string
SecurityContext allowPrivilegeEscalation:boolean appArmorProfile:AppArmorProfile capabilities:Capabilities
    privileged:boolean procMount:string readOnlyRootFilesystem:boolean runAsGroup:integer runAsNonRoot:boolean
    runAsUser:integer seLinuxOptions:SELinuxOptions seccompProfile:SeccompProfile
    windowsOptions:WindowsSecurityContextOptions
ServiceAccountTokenProjection audience:string expirationSeconds:integer path:string user:integer
SleepAction seconds:integer
StorageOSVolumeSource fsType:string readOnly:boolean secretRef:LocalObjectReference volumeName:string
    volumeNamespace:string
Sysctl name:string value:string
TCPSocketAction host:string port:int-or-string
Toleration effect:string key:string operator:string tolerationSeconds:integer value:string
TopologySpreadConstraint labelSelector:LabelSelector matchLabelKeys:[string] maxSkew:integer minDomains:integer
    nodeAffinityPolicy:string nodeTaintsPolicy:string topologyKey:string whenUnsatisfiable:string
TypedLocalObjectReference apiGroup:string kind:string name:string
TypedObjectReference apiGroup:string kind:string name:string namespace:string
Volume awsElasticBlockStore:AWSElasticBlockStoreVolumeSource azureDisk:AzureDiskVolumeSource
    azureFile:AzureFileVolumeSource cephfs:CephFSVolumeSource cinder:CinderVolumeSource
    configMap:ConfigMapVolumeSource csi:CSIVolumeSource downwardAPI:DownwardAPIVolumeSource
    emptyDir:EmptyDirVolumeSource ephemeral:EphemeralVolumeSource fc:FCVolumeSource flexVolume:FlexVolumeSource
    flocker:FlockerVolumeSource gcePersistentDisk:GCEPersistentDiskVolumeSource gitRepo:GitRepoVolumeSource
    glusterfs:GlusterfsVolumeSource hostPath:HostPathVolumeSource image:ImageVolumeSource iscsi:ISCSIVolumeSource
    name:string nfs:NFSVolumeSource persistentVolumeClaim:PersistentVolumeClaimVolumeSource
    photonPersistentDisk:PhotonPersistentDiskVolumeSource portworxVolume:PortworxVolumeSource
    projected:ProjectedVolumeSource quobyte:QuobyteVolumeSource rbd:RBDVolumeSource scaleIO:ScaleIOVolumeSource
    secret:SecretVolumeSource storageos:StorageOSVolumeSource vsphereVolume:VsphereVirtualDiskVolumeSource
VolumeDevice devicePath:string name:string
VolumeMount bindMountOptions:[string] mountPath:string mountPropagation:string name:string readOnly:boolean
    recursiveReadOnly:string subPath:string subPathExpr:string
VolumeProjection clusterTrustBundle:ClusterTrustBundleProjection configMap:ConfigMapProjection
    downwardAPI:DownwardAPIProjection podCertificate:PodCertificateProjection secret:SecretProjection
    serviceAccountToken:ServiceAccountTokenProjection
VolumeResourceRequirements limits:{quantity} requests:{quantity}
VsphereVirtualDiskVolumeSource fsType:string storagePolicyID:string storagePolicyName:string volumePath:string
WeightedPodAffinityTerm podAffinityTerm:PodAffinityTerm weight:integer
WindowsSecurityContextOptions gmsaCredentialSpec:string gmsaCredentialSpecName:string hostProcess:boolean
    runAsUserName:string
"""


def _types() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for line in _TABLE.strip().splitlines():
        if line[0] != " ":
            name, _, line = line.partition(" ")
            fields = found[name] = {}
        for pair in line.split():
            member, _, kind = pair.partition(":")
            fields[member] = kind
    return found


TYPES: Final = _types()
_WORDS: Final = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}


#: What may stand between brackets and be taken for nothing else.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,63}")


@dataclass(frozen=True, slots=True)
class Misfit:
    """A value that does not belong where it is. ``path`` names list items as ``name`` has them."""

    path: str
    #: What is there, in words that quote none of it, as ``a number``.
    found: str
    #: What belongs there, as ``text``.
    wanted: str
    fix: str
    value: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.path}: {self.found} stands where {self.wanted} belongs; {self.fix}"


def misfit(part: Any) -> Misfit | None:
    """The first value of a wrong kind in a Pod or a part of one; what the table does not know is not judged."""
    return next(misfits(part), None)


def misfits(part: Any) -> Iterator[Misfit]:
    """All values of a wrong kind. Null and the directives of a strategic merge are no values."""
    if isinstance(part, dict):
        for key, kind in (("metadata", "ObjectMeta"), ("spec", "PodSpec")):
            yield from _of(part.get(key), kind, key)


def misspelt(part: Any) -> Iterator[tuple[str, str]]:
    """Fields that no API knows and that are nearly one: place and the name that was meant.

    A server of 1.25 refuses them; an older one drops them, and says nothing.
    """
    for key, kind in (("metadata", "ObjectMeta"), ("spec", "PodSpec")):
        yield from _misspelt((part or {}).get(key), kind, key)


def _misspelt(value: Any, kind: str, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _misspelt(item, kind.removeprefix("[").removesuffix("]"), item_path(path, number, item))
    elif isinstance(value, dict) and (known := TYPES.get(kind)) is not None:
        for name, item in value.items():
            if name in known:
                yield from _misspelt(item, known[name], f"{path}.{name}")
            elif close := get_close_matches(str(name), known, 1, 0.8):
                yield f"{path}.{name}", close[0]


def _of(value: Any, kind: str, path: str) -> Iterator[Misfit]:
    if value is None or kind == "any":
        return
    inner = kind[1:-1]
    if kind[0] == "[":
        if not isinstance(value, list):
            yield _wrong(value, "a list", path)
            return
        for number, item in enumerate(value):
            yield from _of(item, inner, item_path(path, number, item))
    elif kind[0] == "{" or kind in TYPES:
        if not isinstance(value, dict):
            yield _wrong(value, "an object", path)
            return
        known = TYPES.get(kind)
        for name, item in value.items():
            if not isinstance(name, str):
                yield Misfit(path, f"a key that is {_found(name)}", "text", "write it in quotes", name)
            elif not name.startswith("$"):
                yield from _of(item, known.get(name, "any") if known is not None else inner, f"{path}.{name}")
    elif not _fits(value, kind):
        yield _wrong(value, _wanted(kind), path)


def item_path(path: str, number: int, item: Any) -> str:
    """Of a list item: by its name where it has one."""
    name = item.get("name") if isinstance(item, dict) else None
    is_plain = isinstance(name, str) and _PLAIN_NAME.fullmatch(name)
    return f"{path}[{name}]" if is_plain else f"{path}[{number}]"


def _fits(value: Any, kind: str) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return is_number and float(value).is_integer() if is_number else False
        case "number":
            return is_number
        case "quantity":
            return isinstance(value, str) or is_number
        case "int-or-string":
            return isinstance(value, str) or (is_number and isinstance(value, int))
    return True


def _wanted(kind: str) -> str:
    words = {"quantity": "a quantity", "int-or-string": "a whole number or text"}
    return _WORDS.get(kind) or words.get(kind, "a plain value")


def _wrong(value: Any, wanted: str, path: str) -> Misfit:
    fixes = {
        "text": "write it in quotes" if isinstance(value, bool | int | float) else "write plain text",
        "true or false": "write true or false, without quotes",
        "a whole number": "write it without quotes and fraction",
    }
    return Misfit(path, _found(value), wanted, fixes.get(wanted, f"write {wanted}"), value)


def _found(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    words = {"dict": "an object", "list": "a list", "str": "text"}
    name = type(value).__name__
    return words.get(name, f"a value of type {name}")
