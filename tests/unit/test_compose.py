"""The compose file renders, and all it names is there. No container is started."""

import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from typer.main import get_command

from cli.main import app as farmhand
from common.settings import WebSettings, WorkerSettings, load_settings, refuse_unknown

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy/compose/compose.yaml"
DURATION = {"type": "string", "pattern": r"^(\d+(ms|s|m|h))+$"}
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
COMMAND = {"oneOf": [{"type": "string"}, TEXTS]}
VALUES = {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}}
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "anyOf": [{"required": ["image"]}, {"required": ["build"]}],
    "properties": {
        "image": {"type": "string"},
        "build": {
            "type": "object",
            "additionalProperties": False,
            "required": ["context"],
            "properties": {"context": {"type": "string"}, "dockerfile": {"type": "string"}, "args": VALUES},
        },
        "command": COMMAND,
        "environment": VALUES,
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["condition"],
                "properties": {
                    "condition": {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}
                },
            },
        },
        "healthcheck": {
            "type": "object",
            "additionalProperties": False,
            "required": ["test"],
            "properties": {
                "test": {
                    "type": "array",
                    "prefixItems": [{"enum": ["CMD", "CMD-SHELL"]}],
                    "items": {"type": "string"},
                    "minItems": 2,
                },
                "interval": DURATION,
                "timeout": DURATION,
                "start_period": DURATION,
                "retries": {"type": "integer"},
            },
        },
        "init": {"type": "boolean"},
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^(\d+(\.\d+){3}:)?\d+:\d+$"}},
        "volumes": {"type": "array", "items": {"type": "string", "pattern": r"^[a-z-]+:/[\w/.-]+(:ro)?$"}},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": DURATION,
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "patternProperties": {"^x-": {}},
    "properties": {
        "services": {"type": "object", "additionalProperties": SERVICE},
        "volumes": {"type": "object", "additionalProperties": {"type": ["object", "null"], "maxProperties": 0}},
    },
}
"""The parts of the compose specification that the file uses; another part is added here when it is used.

``name`` is none of them: docker-compose 1.29, which Debian has, refuses it.
"""

COMPOSE: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-(\w*)\}", r"\1", FILE.read_text()))
"""The file with the defaults of its variables."""
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILES = sorted((ROOT / "deploy/compose").glob("Dockerfile*"), key=str)


def dockerfile_of(service: dict[str, Any]) -> Path:
    build = service["build"]
    return FILE.parent.joinpath(build["context"], build["dockerfile"]).resolve()


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """What a Dockerfile says, its continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def extras(dockerfile: Path) -> set[str]:
    """The extras of the project that an image is made with."""
    named = re.findall(r"\.\[([a-z,]+)\]", dockerfile.read_text())
    return {extra for names in named for extra in names.split(",")}


def words(command: Any) -> list[list[str]]:
    """The commands of a command line, the steps of a shell's one by one."""
    listed = shlex.split(command) if isinstance(command, str) else list(command)
    if listed[:2] == ["sh", "-c"]:
        return [shlex.split(step) for step in listed[2].split("&&")]
    return [listed]


def commands() -> list[tuple[str, list[str]]]:
    """Every command line that a built service runs, with the service's name; health checks included."""
    found = []
    for name, service in BUILT.items():
        said = [body for kind, body in instructions(dockerfile_of(service)) if kind == "CMD"]
        found += [(name, line) for line in words(service.get("command") or yaml.safe_load(said[-1]))]
        kind, *test = service.get("healthcheck", {}).get("test", ["NONE"])
        if kind == "CMD-SHELL":
            found.append((name, shlex.split(test[0].replace("$$", "$"))))
        elif kind == "CMD":
            found.append((name, test))
    return found


def test_it_follows_the_compose_specification() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(COMPOSE, SCHEMA)


def test_a_compose_of_this_machine_renders_it() -> None:
    tool = next((words for words in (["docker", "compose"], ["docker-compose"]) if can_run(words)), None)
    if tool is None:
        pytest.skip("no docker compose on this machine; the schema above stands in for it")
    done = subprocess.run([*tool, "-f", FILE, "config"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)


def can_run(tool: list[str]) -> bool:
    if shutil.which(tool[0]) is None:
        return False
    return subprocess.run([*tool, "version"], capture_output=True, timeout=30, check=False).returncode == 0


def test_what_services_name_of_each_other_is_there() -> None:
    for service in SERVICES.values():
        for other, wanted in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert wanted["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
    mounted = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert mounted == set(COMPOSE["volumes"])


def test_redis_keeps_what_the_promises_rest_on() -> None:
    options = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in options
    assert "--maxmemory-policy noeviction" in options


def test_nothing_is_reachable_from_other_machines() -> None:
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", []))


@pytest.mark.parametrize("name", BUILT)
def test_the_settings_of_a_service_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = BUILT[name].get("environment", {})
    refuse_unknown(environment)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(value))
    load_settings(WorkerSettings if name == "worker" else WebSettings)


def test_web_and_worker_serve_the_same_queue() -> None:
    same = ("FARMHAND_REDIS_URL", "FARMHAND_DATABASE_URL", "FARMHAND_POOL", "FARMHAND_MACHINE_PROFILE")
    web, worker = ({key: SERVICES[name]["environment"].get(key) for key in same} for name in ("web", "worker"))
    assert web == worker


def test_every_dockerfile_is_used_and_there() -> None:
    assert {dockerfile_of(service) for service in BUILT.values()} == set(DOCKERFILES)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_can_have_what_it_copies_and_installs(dockerfile: Path) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for kind, body in instructions(dockerfile):
        if kind == "COPY":
            *sources, _ = [word for word in body.split() if not word.startswith("--")]
            assert [source for source in sources if not (ROOT / source).exists()] == []
            assert set(sources) <= sent
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras(dockerfile)
    assert extras(dockerfile) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_small_locked_and_unprivileged(dockerfile: Path) -> None:
    said = instructions(dockerfile)
    assert dict(said)["FROM"] == "python:3.12-slim"
    assert all("-c constraints.txt" in body for kind, body in said if kind == "RUN" and "pip install" in body)
    users = [body for kind, body in said if kind == "USER"]
    assert users
    assert users[-1] not in ("root", "0")


def test_only_the_workers_image_has_torch() -> None:
    with_torch = {
        name
        for name, service in BUILT.items()
        if "torch" in "".join(b for _, b in instructions(dockerfile_of(service)))
    }
    with_torch |= {name for name, service in BUILT.items() if "worker" in extras(dockerfile_of(service))}
    assert with_torch == {"worker"}


@pytest.mark.parametrize(
    ("service", "command"), [pytest.param(*one, id=f"{at} {one[0]}") for at, one in enumerate(commands())]
)
def test_a_command_names_what_is_there(service: str, command: list[str]) -> None:
    program, *arguments = command
    modules = [arguments[at + 1] for at, word in enumerate(arguments) if word in ("-A", "--app", "-m")]
    modules += [word.removeprefix("python:") for word in arguments if word.startswith("python:")]
    assert [module for module in modules if find_spec(module) is None] == []
    if program == "farmhand":
        known: Any = get_command(farmhand)
        for word in arguments:
            if hasattr(known, "commands"):
                assert word in known.commands
                known = known.commands[word]
            else:
                assert (ROOT / word).is_dir()
    else:
        needs = {"gunicorn": "gunicorn", "celery": "celery", "python": "sys"}
        assert find_spec(needs[program]) is not None, f"{service} runs {program}"
