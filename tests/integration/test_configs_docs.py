"""What docs/config-api.md shows works as it is pasted, and is answered in the shapes it shows."""

import json
import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.services import ROOT
from tests.standin import build_web
from tests.web import Web

PAGE = (ROOT / "docs/config-api.md").read_text()
SHOWN = re.findall(r"^```sh\n(.*?)^```\n```(json|yaml)\n(.*?)^```", PAGE, re.M | re.S)
FREE = ("$defs", "model_config", "fields")
"""What is shown in short, or is named by the contents and not by us."""


@pytest.fixture(scope="module")
def web(config_web: Web) -> Web:
    return config_web


def shape(value: Any) -> Any:
    """Names all the way down; of a list of mappings, those of its first."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items() if name not in FREE}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1] if isinstance(inner, dict)]
    return None


def test_what_is_shown_is_answered(web: Web) -> None:
    """In the order of the page, since each builds on what was written before."""
    for command, kind, shown in SHOWN:
        pasted = command.replace("127.0.0.1:8080", f"127.0.0.1:{web.port}")
        done = subprocess.run(["bash", "-ec", pasted], capture_output=True, text=True, timeout=30, check=True)
        read = json.loads if kind == "json" else yaml.safe_load
        assert shape(read(done.stdout)) == shape(read(shown)), f"{command}{done.stdout}"


def method_of(command: str) -> str:
    named = re.search(r"-X (\w+)", command)
    if named is not None:
        return named[1]
    return "POST" if re.search(r" (-d|--data-binary) ", command) else "GET"


def test_every_route_is_shown() -> None:
    routes = [rule for rule in build_web().url_map.iter_rules() if rule.rule.startswith("/v1/configs")]
    asked = [(method_of(command), command) for command, _, _ in SHOWN]
    assert len(routes) >= 16
    for rule in routes:
        address = re.compile(rf"127\.0\.0\.1:8080{re.sub('<path:[a-z]+>', '[a-z/]+', rule.rule)}[ ?'\n]")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            assert any(method == used and address.search(command) for used, command in asked), (method, rule.rule)
