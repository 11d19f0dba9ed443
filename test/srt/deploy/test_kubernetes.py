"""The Kubernetes files: by Kubernetes' own schemas, and whether what one of them names is there in another.

This does not reproduce a cluster. The router finds pods with these labels, by a stand-in for Kubernetes' API, in
e2e/test_two_hosts.py.
"""

from __future__ import annotations

import copy
import subprocess
from pathlib import PurePosixPath
from typing import Any

import kubernetes_validate
import pytest

from embedding_relay.config import SECRET_FILE, RelayConfig
from support import deployment
from support.command_lines import check_command
from support.deployment import INSTANCES, KUBERNETES, OF_A_POD, container, deployments, kustomization, objects
from support.served import paths_of_an_instance, paths_of_the_router

FILES = sorted(path.name for path in KUBERNETES.glob("*.yaml"))


@pytest.mark.parametrize("file", [file for file in FILES if file != "kustomization.yaml"])
def test_kubernetes_knows_every_field(file: str) -> None:
    versions = kubernetes_validate.latest_version(), "1.29"
    for document in deployment.documents(file):
        for version in versions:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_notice_what_is_wrong() -> None:
    (right,) = (it for it in deployment.documents("encode.yaml") if it["kind"] == "PodDisruptionBudget")
    wrong = copy.deepcopy(right)
    wrong["spec"]["maxUnavailible"] = wrong["spec"].pop("maxUnavailable")
    with pytest.raises(kubernetes_validate.ValidationError, match="maxUnavailible"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_all_files_but_the_autoscaler_are_applied() -> None:
    assert set(kustomization()["resources"]) == set(FILES) - {"kustomization.yaml", "autoscaling.yaml"}
    assert kustomization()["namespace"] == OF_A_POD["metadata.namespace"]
    assert [it["metadata"]["name"] for it in objects()["Namespace"]] == [kustomization()["namespace"]]
    images = {container(one)["image"] for one in deployments().values()}
    assert images == {image["name"] for image in kustomization()["images"]}


def test_there_is_a_deployment_a_service_and_a_budget_for_each_part() -> None:
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        assert {it["metadata"]["name"] for it in objects()[kind]} == {*INSTANCES, "router"}, kind


def test_selectors_find_the_pods_that_they_are_for() -> None:
    for name, one in deployments().items():
        assert pods(one["spec"]["selector"]) == {name}
    for service in objects()["Service"]:
        assert pods({"matchLabels": service["spec"]["selector"]}) == {service["metadata"]["name"]}
    for budget in objects()["PodDisruptionBudget"]:
        assert pods(budget["spec"]["selector"]) == {budget["metadata"]["name"]}
    router = check_command(part("router").words)
    assert pods({"matchLabels": router.prefill_selector}) == {"encode"}
    assert pods({"matchLabels": router.decode_selector}) == {"language"}


def pods(selector: dict[str, Any]) -> set[str]:
    """The deployments whose pods it selects."""
    found = set()
    for name, one in deployments().items():
        labels = one["spec"]["template"]["metadata"]["labels"]
        equal = selector.get("matchLabels", {}).items() <= labels.items()
        expressions = selector.get("matchExpressions", [])
        assert {expression["operator"] for expression in expressions} <= {"In"}
        if equal and all(labels.get(each["key"]) in each["values"] for each in expressions):
            found.add(name)
    return found


def part(name: str) -> deployment.Part:
    (only,) = (part for part in deployment.kubernetes_parts() if part.name == name)
    return only


# ---- ports and paths


def ports(name: str) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(deployments()[name])["ports"]}


def test_ports_are_those_that_the_programs_listen_on() -> None:
    encode, language, router = (check_command(part(name).words) for name in (*INSTANCES, "router"))
    assert ports("encode") == {"http": encode.port, "bootstrap": encode.disaggregation_bootstrap_port}
    assert ports("language") == {"http": language.port}
    assert ports("router") == {"http": router.port, "metrics": router.prometheus_port}
    assert router.service_discovery_port == encode.port == language.port
    assert encode.host == language.host == OF_A_POD["status.podIP"]
    # The router has the bootstrap port from the annotation that it was compiled to look for.
    annotations = {name: one["spec"]["template"]["metadata"]["annotations"] for name, one in deployments().items()}
    assert annotations["encode"][router.bootstrap_port_annotation] == str(encode.disaggregation_bootstrap_port)
    assert router.bootstrap_port_annotation not in annotations["language"]
    scraped = {name: int(annotation["prometheus.io/port"]) for name, annotation in annotations.items()}
    assert scraped == {"encode": encode.port, "language": language.port, "router": router.prometheus_port}


def test_services_lead_to_ports_that_are_there() -> None:
    for service in objects()["Service"]:
        there = ports(service["metadata"]["name"])
        for port in service["spec"]["ports"]:
            assert there[port["targetPort"]] == port["port"]


def test_probes_ask_for_what_is_served() -> None:
    for name, one in deployments().items():
        served = paths_of_the_router() if name == "router" else paths_of_an_instance()
        probes = {key: value["httpGet"] for key, value in container(one).items() if key.endswith("Probe")}
        assert {"readinessProbe", "livenessProbe"} <= set(probes)
        for probe in probes.values():
            assert probe["port"] in ports(name)
            assert probe["path"] in served


def test_policies_name_ports_and_pods_that_are_there() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in objects()["NetworkPolicy"]}
    instances, router = policies["instances"], policies["router"]
    assert pods(instances["podSelector"]) == set(INSTANCES)
    assert pods(router["podSelector"]) == {"router"}
    each_other, http = instances["ingress"]
    assert [pods(peer["podSelector"]) for peer in each_other["from"]] == [set(INSTANCES)]
    assert "ports" not in each_other
    assert pods(http["from"][0]["podSelector"]) == {"router"}
    assert {port["port"] for port in http["ports"]} == {"http"}
    for rule in router["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= set(ports("router"))


# ---- what pods are given


def test_volumes_and_what_is_in_them_are_there() -> None:
    for name, one in deployments().items():
        volumes = {volume["name"]: volume for volume in one["spec"]["template"]["spec"].get("volumes", [])}
        assert {mount["name"] for mount in container(one).get("volumeMounts", [])} == set(volumes), name
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in {it["metadata"]["name"] for it in objects()["PersistentVolumeClaim"]}
            if secret := volume.get("secret"):
                assert secret["secretName"] in {it["name"] for it in kustomization()["secretGenerator"]}
        for source in container(one).get("envFrom", []):
            assert source["configMapRef"]["name"] in {it["name"] for it in kustomization()["configMapGenerator"]}


@pytest.mark.parametrize("name", INSTANCES)
def test_the_secret_is_where_the_setting_says_and_is_nobody_elses(name: str) -> None:
    (generated,) = kustomization()["secretGenerator"]
    pod = deployments()[name]["spec"]["template"]["spec"]
    (volume,) = (volume for volume in pod["volumes"] if volume.get("secret", {}).get("secretName") == generated["name"])
    (mount,) = (mount for mount in container(deployments()[name])["volumeMounts"] if mount["name"] == volume["name"])
    assert volume["secret"]["defaultMode"] == 0o400
    assert "fsGroup" not in pod.get("securityContext", {})
    where = PurePosixPath(part(name).environ[SECRET_FILE])
    assert (str(where.parent), [where.name]) == (mount["mountPath"], generated["files"])


def test_the_secret_cannot_be_committed() -> None:
    (generated,) = kustomization()["secretGenerator"]
    secrets = [KUBERNETES / generated["files"][0], deployment.DEPLOY / "relay.secret"]
    ignored = subprocess.run(["git", "check-ignore", *secrets], cwd=KUBERNETES, capture_output=True, text=True)
    assert ignored.stdout.split() == [str(secret) for secret in secrets]


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_has_the_time_to_finish_its_requests(name: str) -> None:
    grace = deployments()[name]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > RelayConfig.from_environment(deployment.settings()).waiting_timeout


def test_the_router_may_list_pods_and_instances_may_nothing() -> None:
    (account,), (role,), (binding,) = (objects()[kind] for kind in ("ServiceAccount", "Role", "RoleBinding"))
    assert deployments()["router"]["spec"]["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [account["metadata"]["name"]]
    for name in INSTANCES:
        assert deployments()[name]["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_what_is_scaled_is_there() -> None:
    for scaler in objects()["HorizontalPodAutoscaler"]:
        target = scaler["spec"]["scaleTargetRef"]
        scaled = deployments()[target["name"]]
        assert (target["kind"], target["apiVersion"]) == (scaled["kind"], scaled["apiVersion"])
        assert "replicas" not in scaled["spec"]
    assert {it["metadata"]["name"] for it in objects()["HorizontalPodAutoscaler"]} == set(INSTANCES)
