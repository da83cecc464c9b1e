"""``farmhand up``: a whole farm on one machine, from nothing to a real answer, until a signal ends it."""

from pathlib import Path
from time import monotonic
from typing import Any, Final

from cli import data_dir, farm, first_request
from cli.data_dir import DataDir
from cli.farm import FarmOptions, FarmPlan
from cli.screen import Screen
from cli.supervisor import Supervisor
from common.errors import SetupError
from common.settings import WebSettings, WorkerSettings, load_settings

SHOWN_NUMBERS: Final = 5


def up(options: FarmOptions, directory: Path, screen: Screen) -> None:
    """Start the farm and serve until SIGINT or SIGTERM.

    Raises:
        SetupError: it cannot start; nothing is left running.
    """
    started_at = monotonic()
    # refused here in one line, not in the log of a child
    settings = load_settings(WorkerSettings, machine_profile=options.machine_profile)
    load_settings(WebSettings)
    farm.check_installed(flower=options.has_flower)
    farm.check_ports_differ(options)
    with DataDir(directory) as data:
        data.take(url=options.url)
        data.await_orphans()
        data_dir.check_port(options.host, options.port, flag="--port")
        if options.has_flower:
            data_dir.check_port("127.0.0.1", options.flower_port, flag="--flower-port or --no-flower")
        plan = FarmPlan(options, data, settings)
        with Supervisor(data, screen) as supervisor:
            _bring_up(plan, supervisor, screen)
            if not supervisor.is_asked_to_stop:
                screen.say(f"ready after {monotonic() - started_at:.1f} s; Ctrl-C ends it", style="bold")
                supervisor.run(until=lambda: False)
            screen.say("stopping ... (once more: at once)")
    screen.say("stopped; the data stay in " + str(directory))


def _bring_up(plan: FarmPlan, supervisor: Supervisor, screen: Screen) -> None:
    """Until one real request was answered, or a signal came."""
    for unit in plan.units():
        supervisor.add(unit)
    supervisor.add(
        plan.step("ready", "the API and a worker", ("schema",), lambda: str(supervisor.answer("schema")["epoch"]))
    )
    supervisor.run(until=lambda: supervisor.is_ready("ready"))
    if supervisor.is_asked_to_stop:
        return
    model = supervisor.answer("schema")["first"]
    if model is not None:
        _ask(plan, supervisor, screen, model)
    if supervisor.is_asked_to_stop:
        return
    supervisor.be_up()
    screen.say(f"API     {plan.options.url}/v1/models")
    if plan.options.has_flower:
        supervisor.add(plan.flower_unit())
        screen.say(f"Flower  {plan.options.flower_url}")


def _ask(plan: FarmPlan, supervisor: Supervisor, screen: Screen, model: str) -> None:
    """One real request, its answer, and how to repeat it. A model that fails does not end the farm of the others."""
    supervisor.add(plan.step("answer", f"the first answer of {model}", (), lambda: model))
    supervisor.run(until=lambda: supervisor.is_ready("answer") or supervisor.has_failed("answer"))
    if supervisor.is_asked_to_stop:
        return
    if supervisor.has_failed("answer"):
        screen.trouble(f"the first request failed: {supervisor.cause('answer')}")
        return
    said = supervisor.answer("answer")
    screen.say()
    if said["status"] == 200:
        screen.say(f"{model} says of {first_request.TEXT!r}: {_shown(said['answer'])} in {said['ms']:.0f} ms")
    else:
        screen.trouble(f"the first request failed: {_error_line(said['answer'])}")
    screen.say("again:  " + first_request.curl_line(plan.options.url, model))


def _shown(answer: dict[str, Any]) -> str:
    """The first numbers of the first vector, and how many there are."""
    try:
        vector = answer["items"][0]["dense"]
    except (KeyError, IndexError):
        raise SetupError(f"the API's answer holds no vector: {str(answer)[:200]}") from None
    values = vector["values"] if isinstance(vector, dict) else vector
    numbers = ", ".join(f"{number:.4f}" for number in values[:SHOWN_NUMBERS])
    return f"[{numbers}, ...] ({len(values)} numbers)"


def _error_line(answer: dict[str, Any]) -> str:
    error = answer.get("error", {})
    return f"{error.get('code', 'unknown')}: {error.get('message', str(answer)[:200])}"
