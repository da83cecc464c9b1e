"""Random models, as hypothesis makes them: what a person, or somebody's program, may write into a spec."""

from typing import Any

from hypothesis import strategies as st

from config_db.families import FAMILIES
from config_db.spec import FieldError, Limits, ModelSpec, Placement, Profile, Source

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
names = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,12}", fullmatch=True)
ids = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,12}(/[a-zA-Z0-9._-]{1,12}){0,2}", fullmatch=True)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(-(2.0**62), 2.0**62)
contents: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
options = st.dictionaries(texts, contents, max_size=3)
sources = st.one_of(
    st.builds(Source, hub=names, revision=st.none() | st.from_regex(r"[0-9a-f]{7,40}", fullmatch=True)),
    st.builds(Source, path=texts.filter(bool)),
)
positive = st.none() | st.integers(1, 10**9)
templates = st.dictionaries(st.sampled_from(["query", "document"]), texts.map(lambda text: f"{{text}}{text}"))
profiles = st.builds(
    Profile,
    max_length=positive,
    normalize=st.none() | st.booleans(),
    prompts=st.none() | st.dictionaries(texts, texts, max_size=2),
    templates=st.none() | templates,
    options=st.none() | options,
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """One model that a document could say."""
    while True:
        name, family = draw(st.sampled_from(sorted(FAMILIES.items())))
        try:
            return ModelSpec(
                id=draw(ids),
                family=name,
                source=draw(sources),
                description=draw(st.none() | texts),
                operations=family.operations,
                outputs=family.outputs,
                inputs=draw(st.sampled_from([family.inputs, family.inputs[:1]])),
                dims=draw(st.dictionaries(st.sampled_from(family.outputs), st.integers(1, 10**6))),
                max_length=draw(positive),
                normalize=draw(st.none() | st.booleans()),
                prompts=draw(st.dictionaries(texts, texts, max_size=3)),
                templates=draw(templates),
                options=draw(options),
                profiles=draw(st.dictionaries(names.filter(lambda name: name != "default"), profiles, max_size=2)),
                adapters=draw(st.dictionaries(names, sources, max_size=2)),
                limits=Limits(max_items=draw(positive), timeout_s=draw(st.none() | st.floats(0.001, 1e6))),
                placement=Placement(pinned=draw(st.booleans()), tenants=tuple(draw(st.lists(names, max_size=2)))),
            )
        except FieldError:  # as an id with '..' in it
            continue


catalogues = st.lists(specs(), max_size=5, unique_by=lambda spec: spec.id)
