"""The compose file, the Dockerfile, Prometheus and Grafana agree with the code and each other."""

import json
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from worker.config import Settings
from worker.connections import ENV_PREFIX
from worker.flags import load
from worker.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"\bdedup_\w+")


def compose_text() -> str:
    """The compose file with its variables at their defaults, as compose itself reads it."""
    text = (ROOT / "docker-compose.yml").read_text()
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")


def compose() -> Any:
    return yaml.safe_load(compose_text())


def services() -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"]
    return found


def read_yaml(*path: str) -> Any:
    return yaml.safe_load(DEPLOY.joinpath(*path).read_text())


def validate(text: str) -> PyCompose:
    """Parse by the compose specification; its parser knows no merge keys, so YAML's goes first."""
    return PyCompose.from_yaml(yaml.safe_dump(yaml.safe_load(text)))


def test_the_compose_file_follows_the_specification() -> None:
    assert set(validate(compose_text()).service_names()) == set(services())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("restart: unless-stopped", "restrat: unless-stopped"),
        ("condition: service_healthy", "condition: healthy"),
        ("interval: 5s", "interval: 5 parsecs"),
        ("127.0.0.1:9090:9090", "127.0.0.1:nine:9090"),
        ("profiles: [producer]", "profiles: 7"),
    ],
)
def test_the_check_against_the_specification_can_fail(right: str, wrong: str) -> None:
    assert right in compose_text()
    with pytest.raises(ValueError, match=r"."):
        validate(compose_text().replace(right, wrong, 1))


def test_what_services_refer_to_exists() -> None:
    for name, service in services().items():
        assert set(service.get("depends_on", ())) <= set(services()), name
        for volume in service.get("volumes", ()):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./deploy"):
                assert (ROOT / source).exists(), source
            elif not source.startswith("."):
                assert source in compose()["volumes"], source
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [port for service in services().values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("service", ["worker", "producer"])
def test_settings_of_the_containers_exist_and_are_valid(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = services()[service]["environment"]
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert set(environment) <= known
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    load(Settings)


def test_two_workers_run_and_may_finish_what_they_began() -> None:
    worker = services()["worker"]
    assert worker["deploy"]["replicas"] == 2
    grace = float(worker["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["shutdown_timeout_seconds"].default


def test_the_topics_created_are_the_topics_used() -> None:
    script = services()["topics"]["command"][0]
    created = re.findall(r"--topic (\S+)", script)
    environment = services()["worker"]["environment"]
    used = {value for name, value in environment.items() if name.endswith("TOPIC")}
    assert sorted(created) == sorted(used)
    assert len(used) == 3


def test_workers_reach_kafka_and_redis_where_they_listen() -> None:
    environment = services()["worker"]["environment"]
    kafka = services()["kafka"]["environment"]
    advertised = kafka["KAFKA_ADVERTISED_LISTENERS"].split(",")
    assert f"PLAINTEXT://{environment['DEDUP_BOOTSTRAP_SERVERS']}" in advertised
    assert environment["DEDUP_REDIS_URL"] == "redis://redis:6379/0"


def test_kafka_takes_the_largest_message_a_producer_sends() -> None:
    limit = int(services()["kafka"]["environment"]["KAFKA_MESSAGE_MAX_BYTES"])
    assert limit > Settings.model_fields["max_message_bytes"].default


def test_redis_keeps_what_it_is_told() -> None:
    command = services()["redis"]["command"]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_the_worker_port_is_the_same_everywhere() -> None:
    port = services()["worker"]["environment"]["DEDUP_HTTP_PORT"]
    (target,) = read_yaml("prometheus", "prometheus.yml")["scrape_configs"][0]["dns_sd_configs"]
    assert str(target["port"]) == port
    assert set(target["names"]) <= set(services())
    assert f"localhost:{port}/readyz" in " ".join(services()["worker"]["healthcheck"]["test"])
    image = (DEPLOY / "Dockerfile").read_text()
    assert f"EXPOSE {port}" in image
    assert "DEDUP_HTTP_HOST=0.0.0.0" in image


def test_compiled_networks_outlive_a_container_in_a_folder_of_the_user() -> None:
    """Docker makes a volume's folder as the image has it, and as root's where it has none."""
    default = Settings.model_fields["compiled_folder"].default
    folder = str(default).replace("~", "/home/dedup")
    assert f"compiled:{folder}" in services()["worker"]["volumes"]
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert lines.index("USER dedup") < lines.index(
        f"RUN mkdir -p -m 700 /home/dedup/.cache {folder}"
    )


def test_the_image_brings_extras_that_exist() -> None:
    (brought,) = re.findall(r"^ARG EXTRAS=(.+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(brought.split(",")) <= set(extras["optional-dependencies"])


def test_grafana_reads_this_prometheus() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dashboards.yml").read_text())[
        "providers"
    ]
    folder = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{folder}:ro" in services()["grafana"]["volumes"]
    uids = {p["datasource"]["uid"] for p in dashboard()["panels"] if p["type"] != "row"}
    assert uids == {source["uid"]}


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "dedup.json").read_text())


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (place["x"] + column, place["y"] + line)
            for column in range(place["w"])
            for line in range(place["h"])
        }
        assert not cells & taken
        assert all(column < 24 for column, _ in cells)
        taken |= cells


def sample_labels() -> dict[str, set[str]]:
    """Every time series name the worker can show, and the labels it has."""
    found: dict[str, set[str]] = {}
    for metric in vars(Metrics()).values():
        for family in metric.describe() if hasattr(metric, "describe") else ():
            labels = set(getattr(metric, "_labelnames", ()))
            if family.type == "histogram":
                found |= {
                    f"{family.name}_{end}": labels | {"le"} for end in ("bucket", "sum", "count")
                }
            else:
                end = {"counter": "_total", "info": "_info"}.get(family.type, "")
                found[family.name + end] = labels
    return found


def expressions() -> list[str]:
    panels = [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]
    (group,) = read_yaml("prometheus", "alerts.yml")["groups"]
    return panels + [rule["expr"] for rule in group["rules"]]


@pytest.mark.parametrize("expression", expressions())
def test_dashboards_and_alerts_use_metrics_and_labels_that_exist(expression: str) -> None:
    known = sample_labels()
    used = set(METRIC.findall(expression))
    assert used <= set(known)
    labels = {label for name in used for label in known[name]} | {"instance", "job", "le"}
    if "dedup_build_info" in used:
        labels |= {"version", "model_id", "threshold", "device", "embed_mode"}
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= labels


@pytest.mark.parametrize("arguments", [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_prometheus_accepts_its_files(arguments: tuple[str, str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    kind, file = arguments
    command = ["promtool", "check", kind, str(DEPLOY / "prometheus" / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_image_runs_as_nobody_special_and_holds_every_package() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER dedup"]
    copied = {
        source
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    patterns = (ROOT / ".dockerignore").read_text().split()
    sent = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    assert copied == sent
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    for package in packages:
        init = f"{package.replace('.', '/')}/__init__.py"
        assert any(fnmatch(init, source) or init.startswith(f"{source}/") for source in copied)


def test_an_environment_that_could_not_be_made_is_not_taken_for_one(tmp_path: Path) -> None:
    """As on a Debian without python3-venv, which leaves half of one."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    halfway = tmp_path / "python"
    halfway.write_text(
        '#!/bin/sh\n[ "$2" = venv ] || exit 0\nmkdir -p "$3/bin"; touch "$3/bin/python"; exit 1\n'
    )
    halfway.chmod(0o700)
    made = [
        subprocess.run(
            ["make", "venv", f"PYTHON={halfway}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        for _ in range(2)
    ]
    assert [done.returncode for done in made] == [2, 2]
    assert made[0].stdout == made[1].stdout
    assert not (tmp_path / ".venv").exists()
