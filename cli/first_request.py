"""Steps of ``farmhand up``: wait until the farm would answer, then ask it once. Each prints JSON.

Processes of their own, so that the supervisor stays free to see to signals and children.
"""

import http.client
import json
import sys
from time import monotonic, sleep
from typing import Any, Final
from urllib.parse import urlsplit

LOOK_S: Final = 0.03
TIMEOUT_S: Final = 600.0
"""A first load may take as long as the host is given for it."""
TEXT: Final = "Farmhand serves embeddings."


def await_ready(url: str, epoch: int) -> dict[str, Any]:
    """What ``/readyz`` says once the API is ready and has seen this epoch; stderr tells what it waits for."""
    told = ""
    while True:
        said = _call_readyz(url)
        if said["status"] != "not_ready" and said["epoch"] >= epoch:
            return said
        waits_for = "; ".join(said["reasons"]) or f"the API has not read epoch {epoch} yet"
        if waits_for != told:
            told = waits_for
            sys.stderr.write(json.dumps({"event": "farm_not_ready", "reason": waits_for}) + "\n")
            sys.stderr.flush()
        sleep(LOOK_S)


def ask(url: str, model: str) -> dict[str, Any]:
    """Status, answer and milliseconds of one request."""
    body = json.dumps({"items": [{"text": TEXT}]})
    started_at = monotonic()
    status, answer = _call(url, "POST", f"/v1/encode/{model}", body=body, timeout_s=TIMEOUT_S)
    return {"status": status, "answer": answer, "ms": (monotonic() - started_at) * 1e3}


def curl_line(url: str, model: str) -> str:
    """The same request for a shell."""
    body = json.dumps({"items": [{"text": TEXT}]})
    return f"curl -s {url}/v1/encode/{model} -H 'Content-Type: application/json' -d '{body}'"


def _call_readyz(url: str) -> dict[str, Any]:
    try:
        return _call(url, "GET", "/readyz", timeout_s=5)[1]
    except (OSError, http.client.HTTPException, ValueError) as error:  # not there yet
        return {"status": "not_ready", "reasons": [f"the API does not answer: {error}"]}


def _call(url: str, method: str, path: str, *, timeout_s: float, body: str | None = None) -> tuple[int, dict[str, Any]]:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
    headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body else {})
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def main(step: str, url: str, argument: str) -> None:
    """Do one of the steps and print what came of it."""
    said = await_ready(url, int(argument)) if step == "ready" else ask(url, argument)
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
