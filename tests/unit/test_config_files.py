"""A directory of YAML files: what it says, and everything that is wrong with it."""

from pathlib import Path

import pytest

from common.errors import SetupError
from config_db.config_files import ConfigFiles, read_files

MODEL = "family: dense\nsource: {hub: a/b}\n"


def read(directory: Path, **files: str) -> ConfigFiles:
    for name, content in files.items():
        path = directory / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return read_files(directory)


def test_a_directory_holds_models_and_what_goes_with_them(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        one=f"id: a\n{MODEL}",
        deep__two="models: [{id: b, family: dense, source: {path: /b}}]\ntenants: {acme: {weight: 2}, plain: }",
        rest="pools: {gold: {machine_profiles: {cpu: 1}}}\nsettings: {catalog.allow: {patterns: [x]}}",
    )
    assert found.faults == []
    assert {(put.kind, put.name) for put in found.puts} == {
        ("model", "a"),
        ("model", "b"),
        ("tenant", "acme"),
        ("tenant", "plain"),
        ("pool", "gold"),
        ("setting", "catalog.allow"),
    }
    assert found.spoken_of == {"model", "tenant", "pool", "setting"}
    assert [spec.id for spec in found.specs] == ["b", "a"]


def test_hidden_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    found = read(tmp_path, one=f"id: a\n{MODEL}", **{".github__workflows__ci": "jobs: {}", ".hidden": "["})
    assert (found.faults, len(found.puts), len(found.files)) == ([], 1, 1)


def test_every_fault_of_every_file_is_found(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        a="id: a\nfamily: denes\nsource: {hub: a/b, revisoin: x}\nmax_length: 0\n"
        "limits: {max_items: 0, queue_limt: 3}\nprofiles: {fast: {max_length: x, poolin: mean}}\n"
        "aliases: [ok, 'a b']\n",
        b="id: [",
        c="models: [{id: c, family: dense, source: {path: /c}}, 5, {id: d, family: dense}]\npolls: {}\npools: []",
        d=f"id: c\n{MODEL}",
        e="pools: {A: {machine_profiles: {cpu: 1}}, b: {machine_profiles: {cpu: 0}, x: 1}, "
        "c: {machine_profiles: {cpu: 1}, expires_at: '2030-01-01T00:00:00Z'}}\n"
        "tenants: {t: {weight: 0}}\nsettings: {'a b': {}, x: 5}",
    )
    assert {(fault.file, fault.param) for fault in found.faults} == {
        ("a.yaml", "family"),
        ("a.yaml", "source.revisoin"),
        ("a.yaml", "max_length"),
        ("a.yaml", "limits.max_items"),
        ("a.yaml", "limits.queue_limt"),
        ("a.yaml", "profiles.fast.max_length"),
        ("a.yaml", "profiles.fast.poolin"),
        ("a.yaml", "aliases[1]"),
        ("b.yaml", None),
        ("c.yaml", "models[1]"),
        ("c.yaml", "models[2].source"),
        ("c.yaml", "polls"),
        ("c.yaml", "pools"),
        ("d.yaml", None),
        ("e.yaml", "pools.A.name"),
        ("e.yaml", "pools.b.machine_profiles.cpu"),
        ("e.yaml", "pools.b.x"),
        ("e.yaml", "pools.c.expires_at"),
        ("e.yaml", "tenants.t.weight"),
        ("e.yaml", "settings.a b"),
        ("e.yaml", "settings.x"),
    }
    assert "d.yaml: model c stands in c.yaml, too" in map(str, found.faults)
    assert any("did you mean `dense`?" in str(fault) for fault in found.faults)


def test_what_a_model_of_an_unknown_family_does_is_held_against_none(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        a="id: a\nfamily: cros-encoder\nsource: {hub: a}\noperations: [score]\noutputs: [score]\nmax_length: 0\n",
        b="id: b\nsource: {hub: a}\noperations: [extract]\noutputs: [json]\ndims: {sparse: 3}\n",
    )
    assert {(fault.file, fault.param) for fault in found.faults} == {
        ("a.yaml", "family"),
        ("a.yaml", "max_length"),
        ("b.yaml", "family"),
    }


def test_a_fault_in_a_list_says_which_model(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        a="models: [{id: a, family: x, source: {hub: a}, max_length: 0}, 5]\ntenants: {t: {quotas: {queud: 1}}}",
    )
    assert [str(fault).split(":")[1].strip() for fault in found.faults] == [
        "models[0].max_length",
        "models[0].family",
        "models[1]",
        "tenants.t.quotas.queud",
    ]


def test_an_alias_is_nobody_elses_name(tmp_path: Path) -> None:
    found = read(tmp_path, a=f"id: a\n{MODEL}aliases: [x, b]", b=f"id: b\n{MODEL}", c=f"id: c\n{MODEL}aliases: [x]")
    assert [str(fault) for fault in found.faults] == [
        "a.yaml: model a: the alias 'b' is a name of model b, too",
        "c.yaml: model c: the alias 'x' is a name of model a, too",
    ]


def test_a_setting_that_is_read_here_is_checked(tmp_path: Path) -> None:
    """Its readers make do without a broken one: a slip would turn a feature off and tell nobody."""
    found = read(
        tmp_path,
        a="settings: {catalog.allow: {pattern: [x], most: 0}, history.keep: {days: 0}, of.another.release: {x: 1}}",
    )
    assert [fault.param for fault in found.faults] == [
        "settings.catalog.allow.pattern",
        "settings.catalog.allow.most",
        "settings.history.keep.days",
    ]
    assert "did you mean `patterns`?" in str(found.faults[0])
    assert [put.name for put in found.puts] == ["of.another.release"]


def test_a_model_of_the_operators_own_family_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("id: a\nfamily: ours\nsource: {path: /a}")
    assert [fault.param for fault in read_files(tmp_path).faults] == ["family"]
    assert read_files(tmp_path, families=["ours"]).faults == []


@pytest.mark.parametrize("content", ["", "- 1", "5", "id: 5"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: str) -> None:
    found = read(tmp_path, bad=content)
    assert {fault.file for fault in found.faults} == {"bad.yaml"}


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="nowhere"):
        read_files(tmp_path / "nowhere")
