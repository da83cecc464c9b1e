"""``farmhand keys``, as an operator types it."""

from config_db import keys
from config_db.engine import open_engine, transaction
from tests.e2e.farms import farmhand


def test_a_key_is_made_shown_once_listed_and_revoked(database_url: str) -> None:
    own = {"FARMHAND_DATABASE_URL": database_url}
    made = farmhand(
        "keys", "create", "--scope", "infer", "--scope", "config", "--expires", "90d", "--note", "CI", **own
    )
    key = made.stdout.strip()
    engine = open_engine(database_url)
    with transaction(engine) as session:
        found = keys.find(session, key)
    assert found is not None
    key_id, spec = found
    assert (spec.scopes, spec.note) == (("infer", "config"), "CI")
    listed = farmhand("keys", "list", **own).stdout
    assert key_id in listed
    assert "usable" in listed
    assert key.rpartition("_")[2] not in listed
    assert farmhand("keys", "revoke", key_id, **own).returncode == 0
    assert "revoked" in farmhand("keys", "list", **own).stdout
    with transaction(engine) as session:
        assert keys.find(session, key) is None
    engine.dispose()


def test_what_cannot_be_is_one_line(database_url: str) -> None:
    own = {"FARMHAND_DATABASE_URL": database_url}
    for words, says in (
        (("create", "--tenant", "nobody"), "nobody"),
        (("create", "--scope", "everything"), "scopes"),
        (("create", "--class", "royal"), "latency_class"),
        (("create", "--expires", "soon"), "--expires"),
        (("revoke", "0123456789abcdef"), "no key"),
    ):
        done = farmhand("keys", *words, **own)
        assert done.returncode == 1, words
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
