"""What the README shows works as it is pasted."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cli.demo import demo_directory
from common.errors import SetupError
from tests.e2e.farms import ROOT, UpFarm

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
ASKING = [
    block for block in BLOCKS if "127.0.0.1:8080" in block and block.startswith((".venv/bin/python", "curl", "TASK="))
]
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
    pasted = block.replace("127.0.0.1:8080", f"127.0.0.1:{farm.port}").replace(".venv/bin/python", sys.executable)
    done = subprocess.run(["bash", "-ec", pasted], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error":{' not in done.stdout


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
