"""Everything the config DB says, as of one epoch: an immutable value that a process reads for each request.

How it is read and kept current is for ``reader``.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

import msgspec

from common.errors import ModelNotFoundError
from config_db.access import KeySpec, PoolSpec, TenantSpec
from config_db.likeness import Likeness, remember
from config_db.spec import DEFAULT_PROFILE, ModelSpec

NEAREST: Final = 3
PROFILES_SHOWN: Final = 20
NAME_SHOWN: Final = 200
"""No model's id is longer; of a longer name that is asked for, so much is compared and repeated."""
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Snapshot(msgspec.Struct, frozen=True, dict=True):
    """One epoch; ``epoch_id`` tells epochs of equal number apart after a restored backup.

    All mappings are by name. ``models`` holds the models themselves; their profiles are found by ``find`` and
    ``all_specs``. ``settings`` holds plain JSON content, ``origins`` how each model came here.
    """

    epoch: int
    epoch_id: UUID
    models: Mapping[str, ModelSpec] = _NOTHING
    pools: Mapping[str, PoolSpec] = _NOTHING
    tenants: Mapping[str, TenantSpec] = _NOTHING
    keys: Mapping[str, KeySpec] = _NOTHING
    settings: Mapping[str, dict[str, Any]] = _NOTHING
    origins: Mapping[str, str] = _NOTHING

    def model(self, name: str) -> ModelSpec:
        """The spec of a model, by its id, one of its aliases, or ``<either>:<profile>``.

        Raises:
            ModelNotFoundError: not served; ``details["nearest"]`` lists similar ids.
        """
        spec = self.find(name)
        if spec is None:
            nearest = self._nearest(name)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
            hint += self._profiles_hint(name)
            message = f"no model {name[:NAME_SHOWN]!r} is served here{hint}"
            raise ModelNotFoundError(message, param="model", details={"nearest": nearest})
        return spec

    def find(self, name: str) -> ModelSpec | None:
        """As ``model``, None if it is not served."""
        return self._names.get(name) or self._by_alias_and_profile(name)

    def by_digest(self, digest: str) -> ModelSpec | None:
        """The spec with this digest, of a model or of a profile, if it is of this epoch."""
        return self._digests.get(digest)

    def all_specs(self) -> Iterator[ModelSpec]:
        """Every model, each followed by its profiles."""
        for spec in self.models.values():
            yield spec
            yield from spec.profile_specs

    def machine_profiles(self) -> frozenset[str]:
        """Those that models' placements and the operator's pools name."""
        return frozenset(
            {profile for model in self.models.values() for profile in model.placement.machine_profiles}
            | {profile for pool in self.pools.values() if not pool.is_leased for profile in pool.machine_profiles}
        )

    def prepare(self, held: "Snapshot | None" = None) -> None:
        """Make what looking up needs, which the first request would wait for otherwise.

        Args:
            held: the snapshot before this one, prepared.
        """
        _ = self._names, self._digests
        before = held.models if held is not None else _NOTHING
        for name, spec in self.models.items():
            if before.get(name) is not spec:
                remember((name, *spec.aliases))

    def spec_count(self) -> int:
        """How many specs there are, those of profiles included."""
        return len(self._digests)

    def _by_alias_and_profile(self, name: str) -> ModelSpec | None:
        model, colon, profile = name.rpartition(":")
        spec = self._names.get(model) if colon else None
        if spec is None or profile == DEFAULT_PROFILE:
            return spec
        return self._names.get(f"{spec.id}:{profile}")

    @cached_property
    def _names(self) -> Mapping[str, ModelSpec]:
        """What requests may name: aliases, and before them ids, should a row of another release claim a taken one."""
        named = [spec for spec in self.models.values() if spec.aliases]
        named.sort(key=attrgetter("id"), reverse=True)
        names = {alias: spec for spec in named for alias in spec.aliases}
        names.update(self.models)
        names.update((profile.id, profile) for profile in self._profile_specs)
        return names

    @cached_property
    def _digests(self) -> Mapping[str, ModelSpec]:
        return {spec.digest: spec for spec in (*self.models.values(), *self._profile_specs)}

    @cached_property
    def _profile_specs(self) -> list[ModelSpec]:
        return [profile for spec in self.models.values() if spec.profiles for profile in spec.profile_specs]

    @cached_property
    def _likeness(self) -> Likeness:
        return Likeness((name, spec.id) for spec in self.models.values() for name in (spec.id, *spec.aliases))

    def _nearest(self, name: str) -> list[str]:
        """Ids like this name, the most similar first; of a model's profile where a profile is asked for."""
        model, colon, profile = name[:NAME_SHOWN].partition(":")
        spec = self._names.get(model)
        if colon and spec is not None:
            alike = Likeness((one, f"{spec.id}:{one}") for one in spec.profiles).nearest(profile, NEAREST)
            return alike or [spec.id]
        return self._likeness.nearest(model, NEAREST)

    def _profiles_hint(self, name: str) -> str:
        """Which profiles there are, for who asks for another one of a known model."""
        model, colon, _ = name[:NAME_SHOWN].partition(":")
        spec = self._names.get(model) if colon else None
        if spec is None:
            return ""
        return f" The profiles of {spec.id} are {', '.join((DEFAULT_PROFILE, *islice(spec.profiles, PROFILES_SHOWN)))}"


EMPTY: Final = Snapshot(0, UUID(int=0))
