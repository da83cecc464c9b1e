"""The catalogue of the house: what its files say fits the families, the code and what docs/catalog.md tells of it."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cli.export_folder import SCHEMA_FILE
from config_db.catalog import read_catalog
from config_db.export import EDITOR_LINE
from config_db.families import FAMILIES, why_unsupported
from config_db.json_schema import schema_text
from config_db.spec import ModelSpec
from workers.host.families.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
CATALOG = ROOT / "catalog"
FILES = sorted(CATALOG.rglob("*.yaml"))
DOCS = (ROOT / "docs" / "catalog.md").read_text()
COMMIT = re.compile(r"[0-9a-f]{40}")


@pytest.fixture(scope="module")
def specs() -> list[ModelSpec]:
    return read_catalog(CATALOG)


def test_every_file_is_one_model(specs: list[ModelSpec]) -> None:
    assert len(specs) == len(FILES)


def test_the_schema_beside_the_files_is_this_releases() -> None:
    assert (CATALOG / SCHEMA_FILE).read_text() == schema_text(), "farmhand config schema writes it"


def test_no_two_models_share_a_name_however_it_is_written(specs: list[ModelSpec]) -> None:
    names = [name.lower() for spec in specs for name in (spec.id, *spec.aliases)]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_each_model_does_what_its_family_does(specs: list[ModelSpec]) -> None:
    for spec in specs:
        family = FAMILIES.get(spec.family)
        if family is None:
            assert spec.unsupported, spec.id
            continue
        assert (spec.operations, spec.outputs, spec.inputs) == (family.operations, family.outputs, family.inputs), spec
        vectors = {"dense", "sparse", "multivector"} & set(spec.outputs)
        assert set(spec.dims) == vectors, spec.id


def test_a_template_that_takes_an_instruction_has_one_to_take(specs: list[ModelSpec]) -> None:
    wanting = [
        spec.id
        for spec in specs
        if why_unsupported(spec) is None
        and any("{instruction}" in template for template in spec.templates.values())
        and not spec.default_instruction
    ]
    assert wanting == []
    assert not any("\\n" in text for spec in specs for text in (*spec.templates.values(), *spec.prompts.values()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_where_its_facts_come_from_and_pins_its_weights(path: Path) -> None:
    editors, first, *rest = path.read_text().splitlines()
    content = yaml.safe_load(path.read_text())
    source = content["source"]
    assert editors == f"{EDITOR_LINE}../{SCHEMA_FILE}"
    assert first.startswith(tuple(f"# Facts: https://huggingface.co/{name}" for name in (content["id"], source["hub"])))
    if "revision" in source:
        assert COMMIT.fullmatch(source["revision"])
        assert not re.search(r"revision: [0-9]+(e[0-9]*)?$", path.read_text(), re.MULTILINE), "quote it"
    else:
        assert any("main branch is served" in line for line in rest)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fields_stand_in_the_order_of_the_spec(path: Path) -> None:
    fields = list(yaml.safe_load(path.read_text()))
    assert fields == sorted(fields, key=ModelSpec.__struct_fields__.index)


def rows(*, columns: int) -> Iterator[list[str]]:
    """Rows of the tables in the document that have so many columns."""
    for line in DOCS.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == columns and not set(line) <= set("|- "):
            yield cells


def folders() -> dict[str, str]:
    """The folder of each family, by the document."""
    served = {family: folder for family, _, _, folder in list(rows(columns=4))[1:]}
    others = {name: folder for names, _, folder in list(rows(columns=3))[1:] for name in re.findall(r"[\w-]+", names)}
    return served | others


def test_the_document_counts_rightly(specs: list[ModelSpec]) -> None:
    served = {family: (int(models), int(own_code)) for family, models, own_code, _ in list(rows(columns=4))[1:]}
    others = {folder: int(models) for _, models, folder in list(rows(columns=3))[1:]}
    of_family, in_folder = defaultdict(list), Counter[str]()
    for spec in specs:
        if spec.family in FAMILIES:
            of_family[spec.family].append("code of its own repository" in (spec.unsupported or ""))
        else:
            in_folder[folders()[spec.family]] += 1
    assert served == {family: (len(those), sum(those)) for family, those in of_family.items()}
    assert others == in_folder
    runs = sum(map(len, of_family.values()))
    assert f"holds {len(specs)} public models, one YAML file each: {runs} of kinds that a family\nhere runs" in DOCS
    assert f"and {in_folder.total()} that nothing here runs yet" in DOCS
    assert f"{sum(spec.source.revision is None for spec in specs)}\n  files here have none" in DOCS


def test_a_model_stands_in_the_folder_of_its_family() -> None:
    folder_of = folders()
    for path in FILES:
        family = yaml.safe_load(path.read_text())["family"]
        assert path.relative_to(CATALOG).as_posix() == f"{folder_of[family]}{path.name}"


def test_every_family_has_code() -> None:
    assert BUILT_IN.keys() == FAMILIES.keys()


def test_what_cannot_be_served_says_why(specs: list[ModelSpec]) -> None:
    by_id = {spec.id: spec for spec in specs}
    assert "trust_remote_code" in str(why_unsupported(by_id["jinaai/jina-embeddings-v2-base-en"]))
    assert why_unsupported(by_id["intfloat/e5-base-v2"]) is None
    for spec in specs:
        assert spec.family in FAMILIES or "no family of this release" in str(why_unsupported(spec)), spec.id
