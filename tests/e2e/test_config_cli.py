"""``farmhand config`` as an operator types it: the commands as processes, a real PostgreSQL."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from secrets import token_hex

import pytest
import yaml
from jsonschema import Draft202012Validator
from sqlalchemy import make_url, text

from config_db.engine import open_engine
from tests.e2e.farms import ROOT, clean_environment, farmhand
from tests.services import PostgresServer

FIRST = "id: org/first\nfamily: dense\nsource: {hub: org/first}\nmax_length: 256\n"
SECOND = "id: second\nfamily: dense\nsource: {path: /models/second}\nlimits: {max_items: 8}\n"


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "first.yaml").write_text(FIRST)
    (folder / "second.yaml").write_text(SECOND)
    return folder


class Config:
    """``farmhand config`` on one database."""

    def __init__(self, database_url: str) -> None:
        self.environment = {"FARMHAND_DATABASE_URL": database_url}

    def __call__(self, *words: object) -> "subprocess.CompletedProcess[str]":
        return farmhand("config", *map(str, words), **self.environment)

    def says(self, *words: object) -> list[str]:
        done = self(*words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def epoch(self) -> int:
        return int(self.says("history", "--limit", "1")[0].split("\t")[0])


@pytest.fixture
def config(database_url: str) -> Config:
    return Config(database_url)


def test_a_plan_says_what_apply_would_do(config: Config, catalogue: Path) -> None:
    plan = config("plan", catalogue)
    assert (plan.returncode, plan.stdout) == (
        2,
        "+ model org/first (dense, hub:org/first@main)\n"
        "+ model second (dense, /models/second)\n"
        "2 to add, 0 to change, 0 to remove\n",
    )
    assert config.epoch() == 1
    assert config.says("apply", catalogue)[-1] == "epoch 2: 2 added, 0 changed, 0 removed"
    assert config.says("plan", catalogue) == ["0 to add, 0 to change, 0 to remove"]
    (catalogue / "first.yaml").write_text(
        FIRST.replace("256", "512") + 'prompts: {query: "query: "}\nlimits: {max_items: 4}'
    )
    (catalogue / "second.yaml").unlink()
    plan = config("plan", catalogue, "--prune")
    assert (plan.returncode, plan.stdout) == (
        2,
        "~ model org/first\n"
        "    limits.max_items: (unset) -> 4\n"
        "    max_length: 256 -> 512\n"
        '    prompts.query: (unset) -> "query: "\n'
        "- model second\n"
        "0 to add, 1 to change, 1 to remove\n",
    )
    assert config("plan", catalogue).stdout.endswith("0 to add, 1 to change, 0 to remove\n")
    assert config.says("apply", catalogue, "--prune", "--yes")[-1] == "epoch 3: 0 added, 1 changed, 1 removed"
    assert config.says("apply", catalogue, "--prune") == ["epoch 3: 0 added, 0 changed, 0 removed"]


def test_a_plan_says_what_is_in_new_tenants_pools_and_settings(config: Config, catalogue: Path) -> None:
    (catalogue / "rest.yaml").write_text(
        "tenants: {acme: {weight: 2}}\npools: {gold: {machine_profiles: {l4: 2}, tenant: acme}}\n"
        "settings: {catalog.allow: {patterns: ['*']}}\n"
    )
    assert config("plan", catalogue).stdout.splitlines()[2:-1] == [
        "+ pool gold",
        "    machine_profiles.l4: 2",
        '    tenant: "acme"',
        "+ tenant acme",
        "    weight: 2.0",
        "+ setting catalog.allow",
        '    patterns: ["*"]',
    ]


def test_a_plan_warns_of_local_models_where_no_worker_may_look(config: Config, catalogue: Path) -> None:
    config.environment["FARMHAND_MODEL_DIRS"] = "/srv:/models"
    assert config("plan", catalogue).stderr == ""
    config.environment["FARMHAND_MODEL_DIRS"] = "/srv"
    plan = config("plan", catalogue, "--json")
    assert (plan.returncode, plan.stderr.count("\n")) == (2, 1)
    assert plan.stderr.startswith("warning: second: source.path: /models/second lies under none of")
    assert json.loads(plan.stdout)["add"] == 2


def test_a_plan_warns_of_adapters_that_nobody_could_ask_for(config: Config, catalogue: Path) -> None:
    third = "models:\n- id: third\n  family: clip\n  source: {hub: org/m}\n  adapters: {law: {hub: org/law}}\n"
    (catalogue / "third.yaml").write_text(third)
    assert config("plan", catalogue).stderr.startswith("warning: third: adapters: models of the family `clip`")


def test_a_file_in_place_of_its_directory_is_said_so(config: Config, catalogue: Path) -> None:
    refused = config("plan", catalogue / "first.yaml")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "first.yaml is a file: name the directory" in refused.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "{}"),
        ("diff", "1", "{}"),
        ("rollback", "{}"),
        ("history", "--limit", "{}"),
        ("apply", ".", "--expect", "{}"),
    ],
)
def test_numbers_that_no_epoch_can_have_are_refused_before_the_database(words: tuple[str, ...]) -> None:
    away = {"FARMHAND_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x"}
    refused = farmhand("config", *(word.format(2**63) for word in words), **away)
    assert refused.returncode == 2
    assert "Invalid value for" in refused.stderr


def test_a_data_directory_without_a_farm_is_no_default_server(config: Config, catalogue: Path) -> None:
    """A slip in its name must not prune another database."""
    nowhere = catalogue / "no-farm"
    for words in (("apply", catalogue, "--prune"), ("plan", catalogue), ("history",)):
        refused = config(*words, "--data-dir", nowhere)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert f"there is no farm in {nowhere}" in refused.stderr
    assert config.epoch() == 1


def test_a_plan_for_programs(config: Config, catalogue: Path) -> None:
    config.says("apply", catalogue)
    (catalogue / "first.yaml").write_text(FIRST.replace("256", "512"))
    told = config("plan", catalogue, "--json")
    assert told.returncode == 2
    assert json.loads(told.stdout) == {
        "epoch": 2,
        "add": 0,
        "change": 1,
        "remove": 0,
        "changes": [
            {
                "kind": "model",
                "name": "org/first",
                "action": "changed",
                "fields": [{"path": "max_length", "old": 256, "new": 512}],
            }
        ],
    }


@pytest.mark.parametrize("words", [("--bogus",), ("--prune", "second"), ()])
def test_a_plan_that_cannot_be_made_is_status_1(config: Config, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Status 2 says that there are changes, so nothing else may."""
    assert config("plan", *words, *([tmp_path / "nowhere"] if words else ())).returncode == 1


def test_one_broken_file_changes_nothing(config: Config, catalogue: Path) -> None:
    (catalogue / "broken.yaml").write_text(
        "id: third\nfamily: dense\nsource: {hub: a/b}\nmax_lenght: 3\nprecision: fp4\n"
    )
    (catalogue / "worse.yaml").write_text("id: [")
    for command in ("apply", "plan", "validate"):
        refused = config(command, catalogue)
        assert refused.returncode == 1
        assert [line.split(": ")[1] for line in refused.stderr.splitlines()] == [
            "broken.yaml",
            "broken.yaml",
            "worse.yaml",
        ]
        assert "did you mean `max_length`?" in refused.stderr
    assert config.epoch() == 1
    assert farmhand("models", **config.environment).stdout == ""


def test_apply_refuses_another_epoch_than_the_expected_one(config: Config, catalogue: Path) -> None:
    assert config.says("apply", catalogue, "--expect", 1, "--actor", "ann", "--reason", "a\tgood\none")
    refused = config("apply", catalogue, "--expect", 1)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "at epoch 2, not 1" in refused.stderr
    epoch, _, actor, reason, rows = config.says("history")[0].split("\t")
    assert (epoch, actor, reason, rows) == ("2", "ann", "a good one", "+2 ~0 -0")
    assert config.says("history")[1].endswith("\t+0 ~0 -0")
    assert config.says("history", "--prune", "--limit", "1")[0] == "the history begins with epoch 1"


def test_an_empty_directory_is_no_config(config: Config, tmp_path: Path) -> None:
    """``--prune`` with a mistyped directory would otherwise take everything away."""
    (tmp_path / "empty").mkdir()
    for command in ("apply", "plan", "validate"):
        assert "holds no YAML file" in config(command, tmp_path / "empty").stderr


def test_a_rollback_shows_its_plan_and_asks(config: Config, catalogue: Path) -> None:
    config.says("apply", catalogue)
    (catalogue / "first.yaml").write_text(FIRST.replace("256", "512"))
    (catalogue / "second.yaml").write_text(SECOND.replace("id: second", "id: third"))
    config.says("apply", catalogue, "--prune")
    shown = [
        "~ model org/first",
        "    max_length: 512 -> 256",
        "+ model second (dense, /models/second)",
        "- model third",
    ]
    shown += ["1 to add, 1 to change, 1 to remove"]
    unsure = config("rollback", 2)
    assert unsure.returncode == 1
    assert unsure.stdout.splitlines()[: len(shown)] == shown
    assert "nothing was changed" in unsure.stderr
    assert config.epoch() == 3
    assert config.says("rollback", 2, "--yes") == [*shown, "epoch 4"]
    assert config.says("diff", 2, 4) == ["0 to add, 0 to change, 0 to remove"]
    assert config.says("diff", 3) == config.says("diff", 3, 4) == shown
    assert config.says("rollback", 2, "--yes") == ["0 to add, 0 to change, 0 to remove"]
    refused = config("rollback", 99, "--yes")
    assert (refused.returncode, refused.stderr) == (1, "error: the history knows no epoch 99\n")


def test_on_a_terminal_apply_asks(config: Config, catalogue: Path) -> None:
    for answer, status, epoch in ((b"n\n", 1, 1), (b"y\n", 0, 2)):
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        command = [sys.executable, "-m", "cli.main", "config", "apply", str(catalogue)]
        environment = clean_environment() | config.environment
        asked = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=theirs, capture_output=True, timeout=30, check=False
        )
        os.close(theirs)
        os.close(ours)
        assert (asked.returncode, config.epoch()) == (status, epoch), asked.stderr
        assert b"2 to add, 0 to change, 0 to remove" in asked.stdout


def test_the_catalogue_comes_back_as_identical_bytes(
    config: Config, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    config.says("apply", ROOT / "catalog")
    config.says("export", tmp_path / "one")
    other = Config(postgres_server.fresh_database())
    other.says("apply", tmp_path / "one")
    other.says("export", tmp_path / "two")
    one, two = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert len(one) == len(list((ROOT / "catalog").rglob("*.yaml")))
    assert config.says("plan", tmp_path / "two", "--prune") == ["0 to add, 0 to change, 0 to remove"]


def test_an_export_overwrites_nothing_unasked(config: Config, catalogue: Path, tmp_path: Path) -> None:
    config.says("apply", catalogue)
    (catalogue / "README.md").write_text("ours")
    refused = config("export", catalogue)
    assert (refused.returncode, "is not empty" in refused.stderr) == (1, True)
    assert sorted(path.name for path in catalogue.iterdir()) == ["README.md", "first.yaml", "second.yaml"]
    assert config.says("export", catalogue, "--force") == [f"2 files of epoch 2 in {catalogue}"]
    found = {str(path.relative_to(catalogue)) for path in catalogue.rglob("*") if path.is_file()}
    assert found == {"README.md", "dense/org--first.yaml", "dense/second.yaml"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compose.yaml").write_text("services: {}")
    refused = config("export", tmp_path / "other", "--force")
    assert (refused.returncode, "compose.yaml" in refused.stderr) == (1, True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["compose.yaml"]


def test_a_model_is_shown_as_yaml(config: Config, catalogue: Path) -> None:
    (catalogue / "first.yaml").write_text(FIRST + "aliases: [f]\n")
    config.says("apply", catalogue)
    shown = "\n".join(config.says("show", "f"))
    assert yaml.safe_load(shown) == yaml.safe_load((catalogue / "first.yaml").read_text())
    refused = config("show", "org/frist")
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: there is no model 'org/frist'; did you mean org/first?\n",
    )


def test_the_schema_is_what_editors_check_files_with(tmp_path: Path) -> None:
    written = farmhand("config", "schema", str(tmp_path / "model.json"))
    printed = farmhand("config", "schema")
    assert (written.returncode, written.stdout) == (0, "")
    assert (tmp_path / "model.json").read_text() == printed.stdout
    schema = json.loads(printed.stdout)
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema)
    for path in (ROOT / "catalog").rglob("*.yaml"):
        check.validate(yaml.safe_load(path.read_text()))
    assert not check.is_valid({**yaml.safe_load(FIRST), "max_lenght": 3})
    assert not check.is_valid({"id": "a", "family": "dense"})


def test_an_export_may_bring_the_schema_along(config: Config, catalogue: Path, tmp_path: Path) -> None:
    config.says("apply", catalogue)
    folder = tmp_path / "out"
    config.says("export", folder, "--schema")
    named = (
        (folder / "dense" / "org--first.yaml")
        .read_text()
        .splitlines()[0]
        .removeprefix("# yaml-language-server: $schema=")
    )
    assert json.loads((folder / "dense" / named).read_text())["$defs"]["ModelSpec"]
    assert config.says("plan", folder, "--prune") == ["0 to add, 0 to change, 0 to remove"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config.says("export", folder, "--schema", "--force")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_checking_files_needs_no_database(catalogue: Path) -> None:
    away = {"FARMHAND_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x"}
    assert farmhand("config", "validate", str(catalogue), **away).stdout == "2 models in 2 files: no errors\n"
    for words in (("plan", str(catalogue)), ("apply", str(catalogue)), ("history",)):
        refused = farmhand("config", *words, **away)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "does not answer" in refused.stderr


def test_a_role_that_may_only_read_can_plan(config: Config, catalogue: Path, database_url: str) -> None:
    role = f"reader_{token_hex(4)}"
    engine = open_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text(f"create role {role} login password '{role}'"))
        connection.execute(text(f"grant select on all tables in schema public to {role}"))
    engine.dispose()
    reader = Config(make_url(database_url).set(username=role, password=role).render_as_string(hide_password=False))
    assert reader("plan", catalogue).stdout == config("plan", catalogue).stdout
    refused = reader("apply", catalogue)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "permission denied" in refused.stderr
    assert "migrate" not in refused.stderr


def test_a_database_without_a_schema_is_one_line(postgres_server: PostgresServer, catalogue: Path) -> None:
    empty = Config(postgres_server.empty_database())
    for words in (("plan", catalogue), ("apply", catalogue), ("history",)):
        refused = empty(*words)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "farmhand migrate" in refused.stderr
