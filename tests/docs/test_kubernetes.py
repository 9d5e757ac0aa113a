"""deploy/kubernetes: rendered by kubectl, valid to Kubernetes' schemas, true to the server and its image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from documents import DOCS, ROOT
from manifests import KUBERNETES, Manifest, Manifests, render
from metric_catalog import FAMILIES, LABELS

from nann.service.access import Access, ApiKey, Role
from nann.service.http_api.access import role_of
from nann.service.settings import ENV_PREFIX, Settings

INSTALLATIONS = {
    "cpu": ("cpu",),
    "gpu": ("gpu",),
    "monitoring": ("monitoring",),
    "gpu, watched": ("gpu", "monitoring"),
    "one pod": ("cpu", "sqlite"),
    "with keys": ("monitoring", "access"),
}
# The oldest that has everything used here, and the newest whose schemas the validator has.
VERSIONS = ("1.27", "1.37")
# Kinds of the Prometheus operator: their schemas are its own, and no part of Kubernetes.
OPERATOR_KINDS = {"ServiceMonitor", "PrometheusRule"}
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(params=INSTALLATIONS.values(), ids=INSTALLATIONS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return render(*request.param)


def settings_of(manifests: Manifests) -> Settings:
    values = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in manifests.environment.items()
        if value is not None
    }
    return Settings.model_validate({"repository": "/models", **values})


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_every_field(manifests: Manifests, version: str) -> None:
    for manifest in manifests.all:
        if manifest["kind"] not in OPERATOR_KINDS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validation_can_fail() -> None:
    deployment = yaml.safe_load((KUBERNETES / "base" / "deployment.yaml").read_text(encoding="utf-8"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_every_kustomization_file_is_part_of_an_installation() -> None:
    used = {
        path for kustomization in KUBERNETES.rglob("kustomization.yaml") for path in _files(kustomization)
    }
    assert set(KUBERNETES.rglob("*.yaml")) == used | set(KUBERNETES.rglob("kustomization.yaml"))
    assert {path.name for path in (KUBERNETES / "overlays").iterdir()} <= {
        w[0] for w in INSTALLATIONS.values()
    }
    assert {path.name for path in (KUBERNETES / "components").iterdir()} <= {
        name for words in INSTALLATIONS.values() for name in words
    }


def _files(kustomization: Path) -> list[Path]:
    content = yaml.safe_load(kustomization.read_text(encoding="utf-8"))
    names = content.get("resources", []) + [patch.get("path") for patch in content.get("patches", [])]
    for generator in content.get("configMapGenerator", []):
        names += [name.rpartition("=")[2] for name in generator["files"]]
    return [kustomization.parent / name for name in names if name and name.endswith(".yaml")]


# The server and its image


def test_every_variable_is_a_setting_with_a_value_that_it_takes(manifests: Manifests) -> None:
    names = set(manifests.environment)
    assert {name for name in names if not name.startswith(ENV_PREFIX)} == set()
    assert {name.removeprefix(ENV_PREFIX).lower() for name in names} <= set(Settings.model_fields)
    settings_of(manifests)


def test_the_image_is_a_target_of_the_dockerfile(manifests: Manifests) -> None:
    image = manifests.container["image"]
    targets = re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.M)
    assert image.removeprefix("nann:") in targets
    assert image in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert settings_of(manifests).device == {"nann:cpu": "cpu", "nann:gpu": "cuda:0"}[image]
    assert manifests.container["args"] == json.loads(re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.M)[-1])


def test_ports_are_those_of_the_server(manifests: Manifests) -> None:
    settings = settings_of(manifests)
    ports = {port["name"]: port["containerPort"] for port in manifests.container["ports"]}
    assert ports == {"http": settings.rest_port, "grpc": settings.grpc_port}
    for service in manifests.of_kind("Service"):
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
    assert settings_of(manifests).host == "127.0.0.1"  # said by the image, for every interface
    assert "NANN_HOST=0.0.0.0" in DOCKERFILE


def test_probes_ask_paths_that_need_no_key(manifests: Manifests) -> None:
    probes = {name: manifests.container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    locked = Access(keys=(ApiKey("name", Role.READ, b""),))
    for probe in probes.values():
        assert probe["httpGet"]["port"] == "http"
        assert role_of("GET", probe["httpGet"]["path"], locked) is None
    assert probes["readiness"]["httpGet"]["path"] == "/readyz"
    # Neither may kill a pod that loads, is impaired or drains.
    assert {probes[name]["httpGet"]["path"] for name in ("startup", "liveness")} == {"/livez"}


def test_there_is_time_to_drain(manifests: Manifests) -> None:
    (_, pre_stop_s) = manifests.container["lifecycle"]["preStop"]["exec"]["command"]
    needed_s = int(pre_stop_s) + settings_of(manifests).drain_grace_s
    assert manifests.pod["spec"]["terminationGracePeriodSeconds"] >= needed_s + 5
    readiness = manifests.container["readinessProbe"]
    assert int(pre_stop_s) >= readiness["periodSeconds"] * readiness["failureThreshold"]


def test_it_may_write_where_the_image_says_and_nowhere_else(manifests: Manifests) -> None:
    (declared,) = re.findall(r"^VOLUME (\[.*\])$", DOCKERFILE, re.M)
    mounts = {mount["mountPath"]: mount for mount in manifests.container["volumeMounts"]}
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == {*json.loads(declared), "/tmp"}
    assert "/models" in mounts
    names = {volume["name"] for volume in manifests.pod["spec"]["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == names
    for volume in manifests.pod["spec"]["volumes"]:
        assert len(volume) == 2, f"{volume['name']} has several sources"


# Safety: the "restricted" level of the Pod Security Standards, and more.


def test_it_runs_with_as_few_rights_as_it_can(manifests: Manifests) -> None:
    pod, container = manifests.pod["spec"], manifests.container
    (user,) = re.findall(r"^USER (\d+:\d+)$", DOCKERFILE, re.M)
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == manifests.find("ServiceAccount")["metadata"]["name"]
    assert pod["enableServiceLinks"] is False
    assert {"memory"} <= set(container["resources"]["limits"])


def test_what_selects_pods_selects_the_servers(manifests: Manifests) -> None:
    labels = manifests.pod["metadata"]["labels"]
    selectors = [service["spec"]["selector"] for service in manifests.of_kind("Service")]
    selectors += [
        policy["spec"]["podSelector"]["matchLabels"] for policy in manifests.of_kind("NetworkPolicy")
    ]
    for kind in ("Deployment", "PodDisruptionBudget"):
        selectors += [manifest["spec"]["selector"]["matchLabels"] for manifest in manifests.of_kind(kind)]
    assert len(selectors) >= 4
    for selector in selectors:
        assert selector.items() <= labels.items()


def test_policies_open_ports_that_exist(manifests: Manifests) -> None:
    ports = {port["name"] for port in manifests.container["ports"]}
    for policy in manifests.of_kind("NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= ports


# Machines


def test_the_processors_are_shared_out_between_the_lanes() -> None:
    manifests = render("cpu")
    settings = settings_of(manifests)
    assert settings.lanes * (settings.intra_op_threads or 0) == int(
        manifests.container["resources"]["limits"]["cpu"]
    )


def test_a_pod_on_a_gpu_asks_for_as_many_as_it_uses() -> None:
    manifests = render("gpu")
    limits = manifests.container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == len(settings_of(manifests).device.split(","))
    assert "nvidia.com/gpu" not in manifests.container["resources"]["requests"]
    assert manifests.find("Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    (toleration,) = manifests.pod["spec"]["tolerations"]
    assert toleration["key"] == "nvidia.com/gpu"


def test_several_pods_share_a_user_store_and_one_pod_needs_none() -> None:
    many, one = render("cpu"), render("cpu", "sqlite")
    assert many.environment["NANN_USER_STORE"] is None  # in a Secret, for it may hold a password
    assert many.find("Deployment")["spec"]["replicas"] > 1
    assert one.find("Deployment")["spec"]["replicas"] == 1
    assert one.find("Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert not one.of_kind("PodDisruptionBudget")
    (image_default,) = re.findall(r"NANN_USER_STORE=(\S+)", DOCKERFILE)
    assert one.environment["NANN_USER_STORE"] == image_default
    claims = {claim["metadata"]["name"] for claim in one.of_kind("PersistentVolumeClaim")}
    (state,) = [volume for volume in one.pod["spec"]["volumes"] if volume["name"] == "state"]
    assert state["persistentVolumeClaim"]["claimName"] in claims
    # The pod that serves must not be able to change what it serves.
    (models,) = [volume for volume in one.pod["spec"]["volumes"] if volume["name"] == "models"]
    assert models["persistentVolumeClaim"] == {"claimName": "nann-models", "readOnly": True}


def test_keys_are_where_the_setting_says() -> None:
    manifests = render("monitoring", "access")
    path = Path(manifests.environment["NANN_API_KEYS_FILE"] or "")
    mounts = {mount["mountPath"]: mount["name"] for mount in manifests.container["volumeMounts"]}
    (secret,) = [v for v in manifests.pod["spec"]["volumes"] if v["name"] == mounts[str(path.parent)]]
    assert secret["secret"]["defaultMode"] & 0o007 == 0
    assert f"--from-file={path.name}=" in (DOCS / "operations.md").read_text(encoding="utf-8")


# Monitoring


def test_the_operator_gets_the_alerts_that_promtool_tested() -> None:
    alerts = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    assert render("monitoring").find("PrometheusRule")["spec"] == alerts


def test_the_dashboard_reaches_grafanas_sidecar() -> None:
    dashboard = render("monitoring").find("ConfigMap", "nann-dashboard")
    assert dashboard["metadata"]["labels"] == {"grafana_dashboard": "1"}
    file = ROOT / "deploy" / "grafana" / "dashboards" / "nann.json"
    assert dashboard["data"]["nann.json"] == file.read_text(encoding="utf-8")


def test_each_pod_is_scraped_once_and_under_the_job_of_the_alerts() -> None:
    manifests = render("monitoring")
    monitor = manifests.find("ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    (service,) = [s for s in manifests.of_kind("Service") if wanted.items() <= _labels(s).items()]
    assert service["metadata"]["name"] == "nann"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


def _labels(manifest: Manifest) -> dict[str, Any]:
    labels: dict[str, Any] = manifest["metadata"]["labels"]
    return labels


def test_the_autoscaler_reads_a_metric_that_the_adapter_offers() -> None:
    manifests = render("monitoring")
    autoscaler = manifests.find("HorizontalPodAutoscaler")["spec"]
    (metric,) = autoscaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert FAMILIES[name].type == "gauge"
    assert LABELS[name] == ()  # one series a pod, so the adapter need not add up
    rule = yaml.safe_load(manifests.find("ConfigMap", "nann-adapter-rule")["data"]["config.yaml"])
    assert rule["rules"][0]["seriesQuery"].startswith(f"{name}{{")
    target = autoscaler["scaleTargetRef"]
    assert manifests.find(target["kind"], target["name"])["apiVersion"] == target["apiVersion"]
    assert "replicas" not in manifests.find("Deployment")["spec"]
    assert int(metric["pods"]["target"]["averageValue"]) < settings_of(manifests).queue_limit
