"""What people and tools write as documents: hostile ones are refused at once, wrong ones by the path of the field."""

import json
import time
from datetime import UTC, date, datetime
from typing import Any
from uuid import uuid4

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import BodyTooLargeError, ConfigError, DocumentError
from config_db.access import KeySpec, PoolSpec, TenantSpec
from config_db.documents import MAX_DEPTH, MAX_DOCUMENT_BYTES, convert, parse, read_model
from config_db.export import model_yaml
from config_db.snapshot import Snapshot
from config_db.spec import Limits, ModelSpec, Placement, Profile, Source, Trust

GOOD: dict[str, Any] = {"id": "org/m", "family": "dense", "source": {"hub": "org/m"}}
KEY = {"tenant": "a", "secret_sha256": "0" * 64, "prefix": "fh_1", "created_at": "2026-01-01T00:00:00Z"}
BOMB = b"".join(
    [b'a: &a ["x"]\n', *(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefgh")]
)
SLOW_S = 1.0
"""Far above what any refusal takes, far below what these documents took a reader that does not look first."""


def refused(raw: bytes) -> DocumentError:
    started = time.monotonic()
    with pytest.raises(DocumentError) as caught:
        parse(raw)
    assert time.monotonic() - started < SLOW_S
    assert len(caught.value.message) < 1000
    return caught.value


def wrong(**fields: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_model({**GOOD, **fields})
    assert len(caught.value.message) < 1000
    assert caught.value.param is None or caught.value.message.startswith(caught.value.param)
    return caught.value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (BOMB, "line 1: anchors and aliases"),
        (b"a: &x 1", "line 1: anchors and aliases"),
        (b"a: 1\nb: *x", "line 2: anchors and aliases"),
        (b"[" * 50_000, "line 1: nested deeper"),
        (b'{"a":' * 50_000, "nested deeper"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "nested deeper"),
        (b"\n".join(b" " * n + b"a:" for n in range(200)), "line 33: nested deeper"),
        (b"[" + b"[]," * 300_000 + b"]", "more than 131072 values"),
        (b"{" + b"".join(b"k%d: 1," % n for n in range(80_000)) + b"}", "more than 131072 values"),
        (b'{"a": [' + b"1," * 480_000 + b"1]}", "more than 131072 values"),
        (b"a: 1" + b":1" * 300_000, "a: a number of more than 100 digits"),
        (b"a: 1" + b":1" * 500 + b".5", "a: a number of more than 100 digits"),
        (b"a: " + b"9" * 900_000, "a: a number of more than 100 digits"),
        (b'{"a": ' + b"9" * 900_000 + b"}", "not a number that JSON knows"),
        (b"a: !!python/object/apply:os.system [true]", "line 1: tags are not taken"),
        (b"a: !!binary aGk=", "line 1: tags are not taken"),
        (b"a: !!int ''", "line 1: tags are not taken"),
        (b"a: !!set {b}", "line 1: tags are not taken"),
        (b"<<: {b: 1}", "'<<' is not text"),
        (b"1: 1", "line 1: the key '1' is not text"),
        (b"a:\n  yes: 1", "line 2: the key 'yes' is not text"),
        (b"? [a]\n: 1", "is not text"),
        (b"a: 1\n---\nb: 2", "not YAML that can be read"),
        (b"a: [", "not YAML that can be read"),
        (b"a: 9999-99-99", "not YAML that can be read"),
        (b'a: "\xff"', "not UTF-8: byte 4"),
        (b'a: "\0"', "not YAML that can be read"),
    ],
)
def test_a_hostile_document_is_refused_at_once(raw: bytes, message: str) -> None:
    assert message in refused(raw).message


def test_a_document_has_a_bounded_size() -> None:
    with pytest.raises(BodyTooLargeError, match=str(MAX_DOCUMENT_BYTES)):
        parse(b"a: " + b"x" * (2 << 20))
    assert len(parse(b"a: " + b"x" * (MAX_DOCUMENT_BYTES - 3))["a"]) == MAX_DOCUMENT_BYTES - 3
    assert parse(b"a: [" + b"1," * 200_000 + b"]", max_bytes=16 << 20)["a"][-1] == 1


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"a: 1\nb: 2\na: 3", "a"),
        (b'{"a": 1, "a": 1}', "a"),
        (b"limits:\n  max_items: 1\n  'max_items': 2", "limits.max_items"),
        (b'{"limits": {"max_items": 1, "max_items": 2}}', "limits.max_items"),
        (b"models: [{id: a}, {id: b, id: c}]", "models[1].id"),
        (b'{"models": [{"id": "a"}, {"id": "b", "id": "c"}]}', "models[1].id"),
        (b"options: {a: 2024-01-01}", "options.a"),
        (b"options: {a: 2024-01-01T00:00:00Z}", "options.a"),
        (b"options: {a: .nan}", "options.a"),
        (b"options: {a: [1, -.inf]}", "options.a[1]"),
        (b'{"options": {"a": NaN}}', "options.a"),
        (b'{"options": {"a": [1, 1e999]}}', "options.a[1]"),
        (b"options: {a: 9223372036854775808}", "options.a"),
        (b"options: {a: 1.0e+30}", "options.a"),
        (b'{"options": {"a b": "\\u0000"}}', "options['a b']"),
        (b'{"options": {"a": "\\ud800"}}', "options.a"),
        (b'{"options": {"\\u0000": 1}}', "options"),
        (b"prompts: {query: " + b"9" * 101 + b"}", "prompts.query"),
    ],
)
def test_what_a_row_cannot_hold_is_refused_by_its_field(raw: bytes, param: str) -> None:
    assert refused(raw).param == param


@pytest.mark.parametrize("value", [date(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC), b"\0", {1, 2}, {1: 2}, object()])
def test_content_from_elsewhere_is_held_to_the_same(value: Any) -> None:
    error = wrong(options={"deep": [{"x": value}]})
    assert error.param == ("options.deep[0].x")


def test_deep_content_from_elsewhere_is_refused() -> None:
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    assert "nested deeper" in wrong(options={"a": deep}).message


def largest(profiles: int = 100) -> dict[str, Any]:
    """As much of everything as one document may have."""
    prompts = {f"task-{n}": "x" * 600 for n in range(100)}
    options = {f"o{n}": list(range(9)) for n in range(200)}
    variants = {f"p{n}": {"options": options, "dims": {"dense": n + 1}} for n in range(profiles)}
    adapters = {f"a{n}": {"hub": f"org/a{n}"} for n in range(100)}
    return {**GOOD, "prompts": prompts, "options": options, "profiles": variants, "adapters": adapters}


def test_the_largest_document_is_read_and_looked_up_quickly() -> None:
    """Every process reads it on the thread that serves requests."""
    raw = json.dumps(largest(profiles=8)).encode()
    shared = json.dumps({**largest(0), "profiles": {f"p{n}": {"normalize": True} for n in range(100)}}).encode()
    for document in (raw, shared):
        content = parse(document)
        started = time.process_time()
        spec = read_model(content)
        snapshot = Snapshot(1, uuid4(), models={spec.id: spec})
        snapshot.prepare()
        assert time.process_time() - started < 0.25
        assert snapshot.spec_count() == 1 + len(spec.profiles)
        started = time.process_time()
        assert model_yaml(spec)
        assert time.process_time() - started < SLOW_S


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": {"x": [1] * 480_000}}, None),
        ({"options": {"x": "y" * 9_000}}, "options"),
        ({"prompts": {f"p{n}": "x" * 10_000 for n in range(7)}}, "prompts"),
        ({"profiles": {"a": {"options": {"x": [1] * 9_000}}}}, "profiles.a.options"),
        ({"profiles": {"a": {"prompts": {f"p{n}": "x" * 10_000 for n in range(7)}}}}, "profiles.a.prompts"),
        ({"outputs": ["dense"] * 101}, "outputs"),
        ({"matryoshka": [1] * 101}, "matryoshka"),
        ({"dims": {f"d{n}": 1 for n in range(101)}}, "dims"),
    ],
)
def test_what_every_reader_would_look_at_for_long_is_refused(fields: dict[str, Any], param: str | None) -> None:
    started = time.process_time()
    assert wrong(**fields).param == param
    assert time.process_time() - started < 0.25


def test_json_is_read_as_json_says() -> None:
    content = {"a": 1e-5, "b": "\U0001f404", "c": "a/b", "d": [True, None, -1], "e": {"f": "no"}}
    for text in (json.dumps(content), json.dumps(content).replace("/", "\\/"), json.dumps(content, indent="\t")):
        assert parse(text.encode()) == content
    assert parse(b"\xef\xbb\xbf" + json.dumps(content).encode()) == content


def test_yaml_is_read_as_yaml_says() -> None:
    text = "id: org/m # a comment\nprompts:\n  query: |\n    two\n    lines\nnote: 'it''s'\nempty:\n"
    assert parse(text.encode()) == {
        "id": "org/m",
        "prompts": {"query": "two\nlines\n"},
        "note": "it's",
        "empty": None,
    }
    assert parse(b"{id: org/m, list: [a, b]}") == {"id": "org/m", "list": ["a", "b"]}
    assert parse(b"") is None
    nested: Any = yaml.safe_load("x: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    assert parse(yaml.safe_dump(nested).encode()) == nested


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"poling": "mean"}, "poling", "did you mean `pooling`?"),
        ({"preload": True}, "preload", "did you mean `placement.preload`?"),
        ({"max_concurrency": 3}, "max_concurrency", "did you mean `limits.max_concurrency`?"),
        ({"limits": {"max_item": 3}}, "limits.max_item", "did you mean `max_items`?"),
        ({"source": {"hug": "a/b"}}, "source.hug", "did you mean `hub`?"),
        ({"placement": {"teir": "disk"}}, "placement.teir", "did you mean `tier`?"),
        ({"trust": {"zzzzzz": 1}}, "trust.zzzzzz", "known are remote_code, formats"),
        ({"profiles": {"fast": {"poling": "cls"}}}, "profiles.fast.poling", "did you mean `pooling`?"),
        ({"adapters": {"law": {"hubb": "a/b"}}}, "adapters.law.hubb", "did you mean `hub`?"),
        ({"x" * 500_000: 1}, f"['{'x' * 100}...']", "there is no field"),
        ({"pooling": "maen"}, "pooling", "did you mean `mean`?"),
        ({"pooling": "zzz"}, "pooling", "known are cls, last, max, mean"),
        ({"operations": ["encode", "scoer"]}, "operations[1]", "did you mean `score`?"),
        ({"profiles": {"v1.5": {"precision": "float23"}}}, "profiles['v1.5'].precision", "did you mean `float32`?"),
        ({"templates": {"querry": "{text}"}}, "templates", "did you mean `query`?"),
        ({"pooling": "x" * 500_000}, "pooling", "is no choice"),
        ({"family": "dens"}, "family", "did you mean `dense`?"),
    ],
)
def test_a_wrong_word_is_told_with_the_nearest_right_one(fields: dict[str, Any], param: str, hint: str) -> None:
    error = wrong(**fields)
    assert error.param == param
    assert hint in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": 3}, "id"),
        ({"id": ""}, "id"),
        ({"id": "a" * 500}, "id"),
        ({"id": "a:b"}, "id"),
        ({"id": "a\n"}, "id"),
        ({"id": "a b"}, "id"),
        ({"id": "ä"}, "id"),
        ({"id": "../../etc/passwd"}, "id"),
        ({"id": "a/../b"}, "id"),
        ({"id": "/a"}, "id"),
        ({"id": "a//b"}, "id"),
        ({"id": "a/"}, "id"),
        ({"id": "a\\b"}, "id"),
        ({"id": "a%2e"}, "id"),
        ({"id": "status"}, "id"),
        ({"id": "org/status"}, "id"),
        ({"aliases": ["ok", "a/../b"]}, "aliases[1]"),
        ({"aliases": ["a\n"]}, "aliases[0]"),
        ({"aliases": ["a:b"]}, "aliases[0]"),
        ({"aliases": ["x", "y", "x"]}, "aliases[2]"),
        ({"aliases": ["org/m"]}, "aliases[0]"),
        ({"aliases": "x"}, "aliases"),
        ({"family": "no-such"}, "family"),
        ({"family": "../x"}, "family"),
        ({"source": {}}, "source"),
        ({"source": {"hub": "a/b", "path": "/x"}}, "source"),
        ({"source": {"path": "/x", "revision": "main"}}, "source.revision"),
        ({"source": {"hub": "a/../b"}}, "source.hub"),
        ({"source": {"hub": "a/b\n"}}, "source.hub"),
        ({"source": {"hub": "a/b", "revision": "../x"}}, "source.revision"),
        ({"source": {"bucket": "https://x/y"}}, "source.bucket"),
        ({"source": {"bucket": "s3://x/../y"}}, "source.bucket"),
        ({"source": {"bucket": "s3://KEY:SECRET@x/y"}}, "source.bucket"),
        ({"source": {"bucket": "s3://x/y\nz"}}, "source.bucket"),
        ({"source": {"path": ""}}, "source.path"),
        ({"source": "a/b"}, "source"),
        ({"operations": []}, "operations"),
        ({"dims": {"dense": 8, "sparse": 0}}, "dims.sparse"),
        ({"dims": {"dense": True}}, "dims.dense"),
        ({"dims": []}, "dims"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": "512"}, "max_length"),
        ({"max_length": 1.5}, "max_length"),
        ({"max_length": 10**30}, "max_length"),
        ({"normalize": "yes"}, "normalize"),
        ({"prompts": {"my query": 3}}, "prompts['my query']"),
        ({"prompts": {"q": "x" * 10_001}}, "prompts.q"),
        ({"default_prompt": "x" * 10_001}, "default_prompt"),
        ({"description": "x" * 10_001}, "description"),
        ({"description": "half \ud800"}, "description"),
        ({"description": None, "unsupported": 1}, "unsupported"),
        ({"templates": {"query": "no text"}}, "templates.query"),
        ({"options": [1]}, "options"),
        ({"options": {"x": float("nan")}}, "options.x"),
        ({"limits": {"timeout_s": 0}}, "limits.timeout_s"),
        ({"limits": {"timeout_s": float("inf")}}, "limits.timeout_s"),
        ({"limits": {"timeout_s": float("nan")}}, "limits.timeout_s"),
        ({"limits": {"max_items": -1}}, "limits.max_items"),
        ({"limits": None}, "limits"),
        ({"placement": {"idle_unload_s": -1}}, "placement.idle_unload_s"),
        ({"placement": {"machine_profiles": ["cpu", "L4"]}}, "placement.machine_profiles[1]"),
        ({"placement": {"tenants": ["a", "b c"]}}, "placement.tenants[1]"),
        ({"access": {"tenants": ["x\n"]}}, "access.tenants[0]"),
        ({"trust": {"formats": ["tar"]}}, "trust.formats[0]"),
        ({"trust": {"remote_code": True}}, "trust.remote_code"),
        ({"placement": {"sharing": False}}, "placement.sharing"),
        ({"profiles": {"default": {}}}, "profiles.default"),
        ({"profiles": {"a b": {}}}, "profiles"),
        ({"profiles": {"a": 3}}, "profiles.a"),
        ({"profiles": {"ok": {}, "bad": {"max_length": 0}}}, "profiles.bad.max_length"),
        ({"profiles": {"ok": {}, "bad": {"dims": {"a": 1, "b": 0}}}}, "profiles.bad.dims.b"),
        ({"profiles": {"ok": {}, "bad": {"templates": {"document": "x"}}}}, "profiles.bad.templates.document"),
        ({"profiles": {"a": {"extends": "b"}}}, "profiles.a.extends"),
        ({"profiles": {"a": {"extends": "b"}, "b": {"extends": "a"}}}, "profiles.b.extends"),
        ({"profiles": {"v1.5": {"extends": "v1.5"}}}, "profiles['v1.5'].extends"),
        ({"adapters": {"ok": {"hub": "a/b"}, "bad": {}}}, "adapters.bad"),
        ({"adapters": {"bad": {"hub": "a/b", "bucket": "s3://x/y"}}}, "adapters.bad"),
        ({"adapters": {"bad": {"path": "/x", "revision": "y"}}}, "adapters.bad.revision"),
    ],
)
def test_every_refusal_names_its_field(fields: dict[str, Any], param: str) -> None:
    assert wrong(**fields).param == param


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing}: this field is required") as caught:
        read_model({name: value for name, value in GOOD.items() if name != missing})
    assert caught.value.param == missing


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"profiles": {f"p{n}": {"extends": f"p{n - 1}"} for n in range(9_000)}}, "profiles"),
        ({"aliases": [f"a{n}" for n in range(19_000)]}, "aliases"),
        ({"adapters": {f"a{n}": {"path": "/x"} for n in range(9_000)}}, "adapters"),
        ({"max_length": 0, "prompts": {f"p{n}": "" for n in range(19_000)}}, "max_length"),
    ],
)
def test_many_small_things_are_refused_at_once(fields: dict[str, Any], param: str) -> None:
    started = time.monotonic()
    assert wrong(**fields).param == param
    assert time.monotonic() - started < SLOW_S


@pytest.mark.parametrize("document", [None, [], "x", 3])
def test_a_model_is_a_mapping(document: Any) -> None:
    with pytest.raises(ConfigError, match="a model is a mapping"):
        read_model(document)


def test_a_family_of_the_operators_own_is_known() -> None:
    assert read_model({**GOOD, "family": "mine"}, families=["mine"]).family == "mine"
    with pytest.raises(ConfigError, match="did you mean `mine`"):
        read_model({**GOOD, "family": "mien"}, families=["mine"])


@pytest.mark.parametrize(
    ("kind", "content", "param"),
    [
        (PoolSpec, {}, "machine_profiles"),
        (PoolSpec, {"machine_profiles": {}}, "machine_profiles"),
        (PoolSpec, {"machine_profiles": {"cpu": 1, "l4": 0}}, "machine_profiles.l4"),
        (PoolSpec, {"machine_profiles": {"L4": 1}}, "machine_profiles"),
        (PoolSpec, {"machine_profiles": {"l4": 1}, "lease_s": 0}, "lease_s"),
        (PoolSpec, {"machine_profiles": {"l4": 1}, "lease_s": 1e12}, "lease_s"),
        (PoolSpec, {"machine_profiles": {"l4": 1}, "expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        (PoolSpec, {"machine_profiles": {"l4": 1}, "expires_at": "tomorrow"}, "expires_at"),
        (PoolSpec, {"machine_profiles": {"l4": 1}, "tennant": "a"}, "tennant"),
        (TenantSpec, {"weight": 0}, "weight"),
        (TenantSpec, {"weight": float("inf")}, "weight"),
        (TenantSpec, {"weight": 1e9}, "weight"),
        (TenantSpec, {"quotas": {"in_flight": 0}}, "quotas.in_flight"),
        (TenantSpec, {"quotas": {"token_per_minute": 1}}, "quotas.token_per_minute"),
        (TenantSpec, {"in_flight": 1}, "in_flight"),
        (TenantSpec, {"latency_classes": []}, "latency_classes"),
        (TenantSpec, {"latency_classes": ["batch", "fast"]}, "latency_classes[1]"),
        (KeySpec, {"tenant": "a", "secret_sha256": "ab", "prefix": "fh_1"}, "secret_sha256"),
        (KeySpec, {"tenant": "a\n", "secret_sha256": "0" * 64, "prefix": "fh_1"}, "tenant"),
        (KeySpec, {**KEY, "scopes": []}, "scopes"),
        (KeySpec, {**KEY, "scopes": ["infer", "root"]}, "scopes[1]"),
        (KeySpec, {**KEY, "latency_class": "fast"}, "latency_class"),
        (KeySpec, {**KEY, "note": "x" * 10_001}, "note"),
    ],
)
def test_pools_tenants_and_keys_name_their_fields_too(kind: type[Any], content: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(content, kind)
    assert caught.value.param == param
    with pytest.raises(ConfigError) as caught:
        convert(content, kind, at="here")
    assert caught.value.param == f"here.{param}"


WORDS = sorted(
    {word for part in (ModelSpec, Source, Limits, Placement, Profile, Trust) for word in part.__struct_fields__}
)
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["default", "dense", "query", *WORDS]), inner, max_size=3
        )
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), CONTENT, max_size=4))
@example({"profiles": {"default": {"x": 1}, "a": {"extends": "default", "templates": {"query": ""}}}})
def test_whatever_a_document_says_it_is_read_or_refused(document: dict[str, Any]) -> None:
    for content in (document, GOOD | document):
        try:
            read_model(content)
        except ConfigError as refused:
            assert refused.param is None or refused.message.startswith(refused.param)  # noqa: PT017 - or it is read


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text("{}[]:,-?&*!|>'\"%@`# \n\ta1.e~", max_size=60).map(str.encode))
def test_whatever_the_bytes_are_they_are_read_or_refused(raw: bytes) -> None:
    try:
        content = parse(raw)
    except DocumentError:
        return
    assert json.loads(json.dumps(content, allow_nan=False)) == content


@pytest.mark.parametrize("field", ["id", "aliases[0]", "source.hub"])
def test_a_bad_id_is_refused_in_words(field: str) -> None:
    bad = {"id": {"id": "a b"}, "aliases[0]": {"aliases": ["a b"]}, "source.hub": {"source": {"hub": "a b"}}}[field]
    error = wrong(**bad)
    assert (error.param, "regex" in error.message) == (field, False)
    assert error.message.startswith(f"{field}: expected letters and digits of ASCII")
