"""Weights in tests: a Hub that stands in, a bucket that is a real S3 server, searches here and in other processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import shake_256
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest
from moto.server import ThreadedMotoServer

from config_db.spec import Source
from tests.hub import COMMIT, HubStandIn
from tests.services import DYING_WITH_US
from workers.weights.setup import WeightsSetup

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "farm/tiny"
PINNED = Source(hub=REPOSITORY, revision=COMMIT)
PLACE = f"hub/farm%2Ftiny/{COMMIT}"
WEIGHTS = shake_256(b"weights").digest(300_000)
FILES: Mapping[str, Any] = {
    "config.json": {"model_type": "bert"},
    "tokenizer.json": {"version": "1.0"},
    "1_Pooling/config.json": {"pooling_mode": "mean"},
    "model.safetensors": WEIGHTS,
    "onnx/config.json": {},
    "pytorch_model.bin": b"pickled code",
    "modeling_tiny.py": b"raise SystemExit",
}
NEEDED = {"config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors"}
PART_BYTES = 100_000
"""The weights are three parts."""
KEYS = {"AWS_ACCESS_KEY_ID": "farm", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}

RESOLVE = """
import json, sys
import msgspec
from common.errors import ModelLoadError
from common.logs import configure_logs
from config_db.spec import Source
from workers.weights.resolve import resolve, tiers_of
from workers.weights.setup import WeightsSetup
asked = json.loads(sys.argv[1])
exec(asked["first"])
configure_logs(level="WARNING")
source, setup = msgspec.convert(asked["source"], Source), msgspec.convert(asked["setup"], WeightsSetup)
try:
    with resolve(source, setup) as files:
        print(json.dumps({"path": str(files.path)}), flush=True)
        sys.stdin.read()  # uses the files until it is told to end
    tiers_of(setup).wait_written_back()
except ModelLoadError as error:
    print(json.dumps({"error": error.as_dict()}), flush=True)
"""


@dataclass
class Search:
    """A search for weights in a process of its own, which then uses them until ``end``."""

    process: "subprocess.Popen[str]"

    def answer(self) -> dict[str, Any]:
        """What it found, or why not."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait(10)}"
        told: dict[str, Any] = json.loads(line)
        return told

    def end(self) -> None:
        """Have it let the files go and end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0
        self._close()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait(10)
        self._close()

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def begin(source: Source, setup: WeightsSetup, hub: HubStandIn | None = None, *, first: str = "") -> Search:
    """Search in another process; ``first`` is run there before."""
    asked = {"source": msgspec.to_builtins(source), "setup": msgspec.to_builtins(setup), "first": first}
    command = [*DYING_WITH_US, sys.executable, "-c", RESOLVE, json.dumps(asked)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {**kept, **KEYS, "NO_PROXY": "*", "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9"}
    environment |= {"HF_HOME": str(setup.hub_cache)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return Search(process)


def setup_in(machine: Path, **rest: Any) -> WeightsSetup:
    """A machine whose store and Hub cache lie in this directory; parts are small."""
    settings = {"hub_cache": str(machine / "cache"), "part_bytes": PART_BYTES, "timeout_s": 30.0, "silence_s": 5.0}
    return WeightsSetup(**{**settings, **rest})


def store_of(machine: Path) -> Path:
    """Where that machine's store lies."""
    return machine / "cache" / "farmhand"


def ask_here(hub: HubStandIn, patch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub in this process ask the stand-in, without a token."""
    from huggingface_hub import constants

    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setenv("HF_TOKEN", "")
    patch.setenv("NO_PROXY", "*")
    for name, value in KEYS.items():
        patch.setenv(name, value)
    hub.repositories[REPOSITORY] = FILES


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class BucketServer:
    """A real S3 server in this process; ``name`` is a bucket of the test's own on it."""

    server: ThreadedMotoServer
    url: str
    client: Any
    name: str

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/farm"

    def settings(self) -> dict[str, Any]:
        """For a machine that has this bucket."""
        return {"bucket": self.uri, "bucket_endpoint": self.url}

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket."""
        listed = self.client.list_objects_v2(Bucket=self.name).get("Contents", ())
        keys = [one["Key"] for one in listed]
        return {key: self.client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in keys}

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)


@contextmanager
def serving_buckets() -> Iterator[tuple[ThreadedMotoServer, str, Any]]:
    """An S3 server, its URL and a client of it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_DEFAULT_REGION"],
    )
    try:
        yield server, url, client
    finally:
        client.close()
        server.stop()
