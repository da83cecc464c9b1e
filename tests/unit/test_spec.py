"""What a model is: its profiles, its digest, and that nothing gets lost between spec and JSON."""

import json
from typing import Any, cast, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from config_db.access import PoolSpec, Quotas, TenantSpec
from config_db.documents import read_model
from config_db.rows import read_row, read_row_as, read_rows
from config_db.spec import (
    MAX_PARTS,
    Access,
    FieldError,
    Input,
    Limits,
    ModelSpec,
    Operation,
    Output,
    Placement,
    Pooling,
    Precision,
    Profile,
    Source,
    Trust,
    WeightsFormat,
    plain,
)

SPEC = ModelSpec(id="org/m", family="dense", source=Source(hub="org/m", revision="abc"))
DECIDES: dict[str, list[Any]] = {
    "id": ["org/n"],
    "family": ["sparse"],
    "source": [Source(hub="org/m", revision="abd"), Source(hub="org/n", revision="abc"), Source(path="/m")],
    "operations": [("score",), ("encode", "score")],
    "outputs": [("sparse",)],
    "inputs": [("image",)],
    "dims": [{"dense": 8}],
    "matryoshka": [(4,)],
    "max_length": [512],
    "precision": ["float32"],
    "pooling": ["cls"],
    "normalize": [True, False],
    "prompts": [{"query": "q: "}],
    "default_prompt": ["query"],
    "templates": [{"query": "Q {text}"}],
    "default_instruction": ["Find it"],
    "options": [{"x": 1}, {"x": True}, {"x": 1.5}, {"x": None}],
    "trust": [Trust(remote_code=True), Trust(formats=("safetensors", "pickle"))],
}
"""Fields that decide how a model loads or what it answers, with other values for each."""
DECIDES_NOT: dict[str, Any] = {
    "aliases": ("other",),
    "description": "A model.",
    "profiles": {"fast": Profile(max_length=8)},
    "adapters": {"law": Source(hub="org/law")},
    "limits": Limits(max_items=3, timeout_s=1.0),
    "placement": Placement(pinned=True, preload=True, tier="device"),
    "access": Access(tenants=("a",)),
    "unsupported": "no code",
}
VARIES: dict[str, Any] = {name: values[-1] for name, values in DECIDES.items() if name in Profile.__struct_fields__}
"""What a profile can say, field by field."""


def test_every_field_is_known_to_decide_or_not() -> None:
    """Who adds a field says here whether models are loaded anew when it changes."""
    assert {*DECIDES, *DECIDES_NOT} == set(ModelSpec.__struct_fields__)
    assert {*VARIES, "extends"} == set(Profile.__struct_fields__)


def test_the_digest_changes_with_all_that_decides_and_nothing_else() -> None:
    others = [msgspec.structs.replace(SPEC, **{name: value}) for name, values in DECIDES.items() for value in values]
    digests = {other.digest for other in others}
    assert len(digests) == len(others)
    assert SPEC.digest not in digests
    for name, value in DECIDES_NOT.items():
        assert msgspec.structs.replace(SPEC, **{name: value}).digest == SPEC.digest, name


def test_the_digest_is_the_same_in_every_release_and_process() -> None:
    """Messages name specs by it: it may change only with what it stands for."""
    assert SPEC.digest == "f0f25d7ff32d6774"
    assert len(SPEC.digest) == 16


def test_defaults_written_out_make_no_other_spec() -> None:
    short = {"id": "org/m", "family": "dense", "source": {"hub": "org/m"}, "profiles": {"p": {}}}
    defaults = msgspec.to_builtins(msgspec.convert(short, ModelSpec), order="deterministic")
    long: dict[str, Any] = {"profiles": {"p": {"extends": "default", "pooling": None}}}
    for field in msgspec.structs.fields(ModelSpec):
        if field.name not in {**short, **defaults}:
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            long[field.name] = msgspec.to_builtins(default)
    long |= {"limits": {}, "trust": {"remote_code": False, "formats": ["safetensors"]}, "placement": {"tier": "disk"}}
    one, other = read_model(short), read_model({**short, **long})
    assert one == other
    assert one.digest == other.digest
    assert plain(one) == plain(other) == short


def test_a_profile_lays_itself_over_what_it_extends() -> None:
    spec = read_model(
        {
            **plain(SPEC),
            "aliases": ["m"],
            "max_length": 512,
            "pooling": "mean",
            "prompts": {"query": "q: ", "passage": "p: "},
            "options": {"a": 1, "b": 2},
            "limits": {"max_items": 3},
            "profiles": {
                "short": {"max_length": 128, "prompts": {"query": "s: "}},
                "cls": {"extends": "short", "pooling": "cls"},
                "all": {"extends": "cls", "max_length": 64, "options": {}, "normalize": False},
            },
        }
    )
    derived = spec.with_profile("all")
    assert (derived.id, derived.max_length, derived.pooling, derived.normalize) == ("org/m:all", 64, "cls", False)
    assert (derived.prompts, derived.options) == ({"query": "s: "}, {})
    assert (derived.limits, derived.source, derived.profiles, derived.aliases) == (spec.limits, spec.source, {}, ())
    assert spec.with_profile("default") is spec
    with pytest.raises(KeyError):
        spec.with_profile("none")
    assert len({spec.digest, *(one.digest for one in spec.profile_specs)}) == 4


@pytest.mark.parametrize("name", VARIES)
def test_each_field_of_a_profile_counts(name: str) -> None:
    spec = msgspec.structs.replace(SPEC, profiles={"p": Profile(**{name: VARIES[name]}), "q": Profile(extends="p")})
    for profile in ("p", "q"):
        assert getattr(spec.with_profile(profile), name) == VARIES[name]
        assert spec.with_profile(profile).digest != msgspec.structs.replace(SPEC, id=f"org/m:{profile}").digest


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ({"a": "a"}, "in a circle: a -> a"),
        ({"a": "b", "b": "a"}, "in a circle: a -> b -> a"),
        ({"x": "a", "a": "b", "b": "c", "c": "a"}, "in a circle: a -> b -> c -> a"),
        ({"a": "gone"}, "`a` extends `gone`, which there is none of"),
    ],
)
def test_profiles_that_lead_nowhere_are_refused(extends: dict[str, str], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        msgspec.structs.replace(SPEC, profiles={name: Profile(extends=other) for name, other in extends.items()})


def test_a_long_chain_of_profiles_is_no_harm() -> None:
    profiles = {"p0": Profile(max_length=7)} | {f"p{n}": Profile(extends=f"p{n - 1}") for n in range(1, MAX_PARTS)}
    spec = msgspec.structs.replace(SPEC, profiles=profiles)
    assert spec.with_profile(f"p{MAX_PARTS - 1}").max_length == 7


def test_templates_hold_the_text() -> None:
    for bad in ("", "text", "{ text }", "{instruction}"):
        with pytest.raises(FieldError, match=r"has no \{text\}"):
            Profile(templates={"query": bad})
        with pytest.raises(FieldError, match=r"has no \{text\}"):
            msgspec.structs.replace(SPEC, templates={"document": bad})


def test_a_source_says_where_it_is() -> None:
    assert str(Source(hub="org/m")) == "hub:org/m@main"
    assert str(Source(hub="org/m", revision="abc")) == "hub:org/m@abc"
    assert str(Source(path="/m")) == "/m"
    assert str(Source(bucket="s3://b/m")) == "s3://b/m"


def newer(content: dict[str, Any], *fields: str) -> dict[str, Any]:
    """The content as a release writes it that knows more fields."""
    copy: dict[str, Any] = json.loads(json.dumps(content))
    for path in fields:
        *parts, field = path.split(".")
        part = copy
        for name in parts:
            part = part.setdefault(name, {})
        part[field] = {"anything": [1]}
    return copy


def test_what_a_newer_release_has_added_is_left_out_of_a_row_however_deep() -> None:
    content: dict[str, Any] = {
        "id": "org/m",
        "family": "dense",
        "source": {"hub": "org/m"},
        "options": {"free": {"form": 1}},
        "profiles": {"fast": {"max_length": 8}},
        "adapters": {"law": {"hub": "org/law"}},
        "limits": {"max_items": 3},
    }
    added = [
        "future",
        "source.mirror",
        "placement.zone",
        "limits.burst",
        "profiles.fast.x",
        "adapters.law.y",
        "trust.z",
    ]
    with capture_logs() as logs:
        read = read_row("org/m", newer(content, *added))
    assert read == read_model(content)
    assert read.options == {"free": {"form": 1}}
    assert [(log["event"], log["row"], sorted(log["left_out"])) for log in logs] == [
        ("row_newer", "org/m", sorted(added))
    ]
    with capture_logs() as logs:
        assert read_row("org/m", content) == read
    assert logs == []


class Optional(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quotas: Quotas | None = None


def test_rows_of_pools_and_tenants_are_read_so_too() -> None:
    assert read_row_as(Optional, "o", newer({}, "quotas.gpus")) == Optional(quotas=Quotas())
    pool, tenant = {"machine_profiles": {"l4": 1}}, {"quotas": {"queued": 2}}
    assert read_row_as(PoolSpec, "p", newer(pool, "zone")) == read_row_as(PoolSpec, "p", pool)
    assert read_row_as(TenantSpec, "t", newer(tenant, "quotas.gpus", "x")) == read_row_as(TenantSpec, "t", tenant)
    with capture_logs() as logs:
        rows = read_rows(PoolSpec, {"good": pool, "bad": {"machine_profiles": {"l4": "many"}}})
    assert rows == {"good": read_row_as(PoolSpec, "p", pool)}
    assert [(log["event"], log["row"]) for log in logs] == [("row_unreadable", "bad")]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"id": "m", "future": 1},
        {"id": "m", "family": "dense", "source": {"path": "/"}, "operations": ["dream"]},
        {"id": "m", "family": "dense", "source": {"path": "/"}, "limits": 3, "future": 1},
        {"id": "m", "family": "dense", "source": {"mirror": "x"}},
    ],
)
def test_a_row_that_makes_no_spec_even_so_is_told(content: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        read_row("m", content)


def test_a_row_of_the_release_before_has_its_placement_at_the_top() -> None:
    content = {"id": "m", "family": "dense", "source": {"path": "/"}, "pinned": True, "machine_profiles": ["l4"]}
    assert read_row("m", content).placement == Placement(pinned=True, machine_profiles=("l4",))
    for broken in ({**content, "placement": None}, None, []):
        with pytest.raises(msgspec.ValidationError):
            read_row("m", cast("Any", broken))
    both = content | {"placement": {"pinned": False, "tier": "device"}}
    assert read_row("m", both).placement == Placement(tier="device", machine_profiles=("l4",))


NAMES = st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True).filter(lambda name: ".." not in name)
IDS = st.lists(NAMES, min_size=1, max_size=3).map("/".join).filter(lambda name: not name.endswith("status"))
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(-1e18, 1e18, allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OPTIONS = st.dictionaries(TEXTS, PLAIN, max_size=3)
COUNTS = st.integers(1, 2**40)
TEMPLATES = st.dictionaries(st.sampled_from(["query", "document"]), TEXTS.map(lambda text: text + "{text}"))
SOURCES = (
    st.builds(Source, hub=IDS, revision=st.none() | NAMES)
    | st.builds(Source, path=TEXTS.filter(lambda text: ".." not in text).map("/{}".format))
    | st.builds(Source, bucket=IDS.map("s3://b/{}".format))
)


def some(values: Any) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(get_args(values)), min_size=1, max_size=3, unique=True).map(tuple)


def one_of(values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(get_args(values))


VARIANTS: dict[str, st.SearchStrategy[Any]] = {
    "outputs": some(Output),
    "dims": st.dictionaries(one_of(Output), COUNTS, max_size=3),
    "max_length": COUNTS,
    "precision": one_of(Precision),
    "pooling": one_of(Pooling),
    "normalize": st.booleans(),
    "prompts": st.dictionaries(TEXTS, TEXTS, max_size=3),
    "default_prompt": TEXTS,
    "templates": TEMPLATES,
    "default_instruction": TEXTS,
    "options": OPTIONS,
}
PROFILES = st.dictionaries(
    NAMES.filter(lambda name: name != "default"),
    st.fixed_dictionaries({}, optional=VARIANTS).map(lambda fields: Profile(**fields)),
    max_size=3,
)


def spec_of(fields: dict[str, Any]) -> ModelSpec:
    return ModelSpec(**fields)


SPECS = st.fixed_dictionaries(
    {"id": IDS, "family": st.just("mine"), "source": SOURCES},
    optional={
        **VARIANTS,
        "description": TEXTS,
        "matryoshka": st.lists(COUNTS, max_size=3).map(tuple),
        "operations": some(Operation),
        "inputs": some(Input),
        "profiles": PROFILES,
        "adapters": st.dictionaries(NAMES, SOURCES, max_size=2),
        "limits": st.builds(Limits, max_items=st.none() | COUNTS, timeout_s=st.none() | st.floats(1e-6, 1e9)),
        "placement": st.builds(Placement, preload=st.booleans(), tenants=st.lists(NAMES, max_size=2).map(tuple)),
        "access": st.builds(Access, tenants=st.lists(NAMES, max_size=2).map(tuple)),
        "trust": st.builds(Trust, formats=some(WeightsFormat)),
        "unsupported": TEXTS,
    },
).map(spec_of)


@settings(deadline=None)
@given(SPECS)
def test_a_spec_and_its_json_are_one(spec: ModelSpec) -> None:
    written = json.loads(json.dumps(plain(spec), allow_nan=False))
    for again in (
        read_model(written, families=["mine"]),
        read_row(spec.id, written),
        msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec),
    ):
        assert again == spec
        assert again.digest == spec.digest
        assert plain(again) == written
        assert [one.digest for one in again.profile_specs] == [one.digest for one in spec.profile_specs]
