"""What the README shows works as it is pasted."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.demo import demo_directory
from common.errors import SetupError
from tests.e2e.farms import ROOT, UpFarm, clean_environment
from tests.services import wait_until

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
ASKING = [
    block
    for block in BLOCKS
    if "127.0.0.1:8080" in block
    and block.startswith((".venv/bin/python", "curl", "TASK="))
    and "/v1/configs/" not in block
]
ADDING = {
    "acme/search": next(block for block in BLOCKS if "/v1/configs/models" in block),
    "acme/minilm": next(block for block in BLOCKS if "farmhand config apply" in block),
}
"""What adds a model, by the model's id."""
SHOWN = next(block for block in BLOCKS if "ready after" in block)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFarm]:
    try:
        demo_directory()
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    up = UpFarm(tmp_path_factory.mktemp("farm"), "--no-flower")
    try:
        yield up.wait_ready()
        up.stop()
    finally:
        up.close()


@pytest.mark.parametrize("block", ASKING, ids=lambda block: " ".join(block.split()[:3]))
def test_a_command_of_the_readme_works(farm: UpFarm, block: str) -> None:
    """Each prints an answer, and none of them an error."""
    paste(farm, block, ROOT)


@pytest.mark.parametrize("model", ADDING)
def test_a_model_is_added_as_the_readme_says(farm: UpFarm, tmp_path: Path, model: str) -> None:
    """With one request, and with one file, beside a farm that runs in this directory."""
    (tmp_path / ".farmhand").symlink_to(farm.data)
    answer = paste(farm, ADDING[model], tmp_path)
    wait_until(lambda: farm.call("GET", f"/v1/models/{model}")[0] == 200, 10, f"the API to serve {model}")
    if "/v1/encode/" in ADDING[model]:
        assert len(json.loads(answer.splitlines()[-1])["items"][0]["dense"]["values"]) == 384


def paste(farm: UpFarm, block: str, directory: Path) -> str:
    """What the commands print; they succeed, and none of them prints an error."""
    pasted = block.replace("127.0.0.1:8080", f"127.0.0.1:{farm.port}").replace(".venv/bin/python", sys.executable)
    pasted = pasted.replace(".venv/bin/farmhand", f"{sys.executable} -m cli.main")
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", pasted],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error":{' not in done.stdout
    return done.stdout


def test_the_readme_shows_what_is_printed(farm: UpFarm) -> None:
    """Numbers, times and ports apart."""

    def plain(text: str) -> list[str]:
        return [re.sub(r"-?[\d.]+", "0", " ".join(line.split())) for line in text.splitlines() if line.strip()]

    said = plain(farm.said())
    wanted = [line for line in plain(SHOWN) if not line.startswith("Flower")]
    assert [line for line in wanted if line not in said] == []


def test_the_readme_has_commands() -> None:
    """So that an edit which hides them from the tests above is noticed."""
    assert len(ASKING) >= 4
    assert {"make run\n", "make test\n"} <= set(BLOCKS)
