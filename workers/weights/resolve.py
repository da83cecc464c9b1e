"""Finds the directory that holds a model's files: a local one, this machine's store, the Hub cache, a bucket, the Hub.

The tiers are tried in this order, and an error names those that were. What is fetched is pinned to its commit, holds
weights in the formats that the spec trusts only, is verified by digest and published whole; one process of a machine
fetches it, and of a cluster that has a bucket, one worker. No torch; boto3 and huggingface_hub are imported by those
who need them.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Event, Lock
from time import monotonic
from typing import TYPE_CHECKING, Final

from common.errors import ModelLoadError
from common.logs import get_logger
from config_db.spec import Source, WeightsFormat
from workers.weights import parts
from workers.weights.bring import Bringer, Search, Target
from workers.weights.failures import DamagedError, PassingError, failure, said, storage_failure, tried
from workers.weights.hub import Hub, Listing
from workers.weights.hub_cache import cached, default_directory
from workers.weights.leases import Files
from workers.weights.manifest import COMMIT, SAFE, RemoteFile
from workers.weights.parts import OnProgress, Remote
from workers.weights.setup import WeightsSetup
from workers.weights.store import FILES, MANIFEST, Store
from workers.weights.wanted import Joined, Wanted

if TYPE_CHECKING:
    from workers.weights.bucket import Bucket
    from workers.weights.cluster_lease import ClusterLease
    from workers.weights.write_back import WriteBacks

log = get_logger("host")

DISK: Final = "this worker's disk"
LATER: Final = "try again later, or fetch it with `farmhand models prefetch`"
POLL_S: Final = 1.0
"""How often one who waits for another worker's fetch looks into the bucket."""
BUCKET_USELESS: Final = ("NETWORK", "GATED", "NOT_FOUND")
"""Classes of errors of the bucket with which the Hub is asked instead; others are this machine's."""
AWAY_S: Final = 30.0
"""A bucket that did not answer is not asked again for so long."""


def resolve(
    source: Source,
    setup: WeightsSetup,
    *,
    formats: tuple[WeightsFormat, ...] = SAFE,
    on_progress: OnProgress | None = None,
) -> Files:
    """The folder of a model's files, leased: to be used as a block, or kept for what maps the files.

    Args:
        source: where they come from.
        setup: of this machine's tiers.
        formats: what weights may be in that are fetched.
        on_progress: told how much of a fetch is here.

    Raises:
        ModelLoadError: no tier has it; ``details`` say the class, whether trying again helps, the remedy and the tiers.
    """
    if source.path is not None:
        return Files(_local(Path(source.path), setup.model_dirs))
    if source.hub is None and source.bucket is None:
        raise failure("its source names neither a path nor a Hub repository nor a bucket", "CONFIG", permanent=True)
    tiers, wanted = tiers_of(setup), Wanted(source, formats)
    try:
        return tiers.from_bucket(wanted, on_progress) if source.bucket else tiers.from_hub(wanted, on_progress)
    except OSError as error:
        raise tried(storage_failure(error, tiers.store.directory), [DISK]) from error


def is_here(source: Source, setup: WeightsSetup, *, formats: tuple[WeightsFormat, ...] = SAFE) -> bool:
    """Whether this machine has the files, or never will: whether finding them takes no time."""
    if source.path is not None or (source.hub is None and source.bucket is None):
        return True
    try:
        return tiers_of(setup).is_here(Wanted(source, formats))
    except OSError:
        return True  # finding them will say what is wrong with the disk


@cache
def tiers_of(setup: WeightsSetup) -> "Tiers":
    """The tiers of this process."""
    return Tiers(setup)


class Tiers:
    """Store, bucket and Hub of one process, for its threads. Owns the clients and whether the bucket is away."""

    def __init__(self, setup: WeightsSetup) -> None:
        self._setup = setup
        directory = Path(setup.directory) if setup.directory else default_directory(setup.hub_cache)
        self.store = Store(directory, fill=setup.fill, max_bytes=setup.max_bytes)
        self._bringer = Bringer(self.store, setup)
        self._buckets: dict[str, Bucket] = {}
        self._write_backs: WriteBacks | None = None
        self._bucket_away_until = 0.0
        self._lock = Lock()

    # -- a repository of the Hub -------------------------------------------------------------------------------------

    def from_hub(self, wanted: Wanted, on_progress: OnProgress | None) -> Files:
        """A repository at a revision, from the nearest tier that has it."""
        here = self._stored(wanted) or cached(wanted, self._setup.hub_cache)
        if here is not None:
            return here
        search = Search(monotonic() + self._setup.timeout_s, on_progress, [DISK, "the Hub cache"])
        try:
            with self.store.fetching(wanted.repository, deadline=search.deadline):
                return self._stored(wanted) or self._fetch(wanted, search)
        except TimeoutError as error:
            raise tried(_other_fetches(wanted.repository), search.tiers) from error
        except ModelLoadError as error:
            raise tried(error, search.tiers) from error

    def is_here(self, wanted: Wanted) -> bool:
        """Whether the store or the Hub cache has it, as far as is seen without a lease."""
        if wanted.source.bucket is not None:
            return self.store.has(wanted.bucket_place())
        commit = self._known_commit(wanted)
        is_stored = commit is not None and self.store.has(wanted.place(commit))
        return is_stored or cached(wanted, self._setup.hub_cache) is not None

    def _stored(self, wanted: Wanted) -> Files | None:
        commit = self._known_commit(wanted)
        files = self.store.find(wanted.place(commit)) if commit else None
        if files is not None and commit and self._setup.bucket:
            self._written_back_by().begin_owed(wanted.place(commit), wanted.folder(commit))
        return files

    def _known_commit(self, wanted: Wanted) -> str | None:
        """The commit that is meant, as far as this machine knows without asking."""
        is_pinned = COMMIT.fullmatch(wanted.revision)
        return wanted.revision if is_pinned else self.store.ref(wanted.repository, wanted.revision)

    def _fetch(self, wanted: Wanted, search: Search) -> Files:
        """From the bucket if it has it, else from the Hub. By the one process of this machine that fetches it."""
        hub = Hub(wanted.repository, wanted.revision, formats=wanted.formats, silence_s=self._setup.silence_s)
        listing = None if COMMIT.fullmatch(wanted.revision) else self._listing(hub, search)
        commit = listing.commit if listing else wanted.revision
        if listing:
            self.store.set_ref(wanted.repository, wanted.revision, commit)
            here = self.store.find(wanted.place(commit))
            if here is not None:
                return here
        search.owed = self._setup.bucket is not None
        bucket = self._own_bucket(search)
        if bucket is None:
            return self._from_the_hub(hub, listing, wanted, search)
        turn = self._turn(bucket, wanted, commit, search)
        if isinstance(turn, Files):
            return turn
        try:
            files = self._from_the_hub(hub, listing, wanted, search)
        except BaseException:
            if turn is not None:
                turn.release()
            raise
        self._written_back_by().begin(wanted.place(commit), wanted.folder(commit), turn)  # its thread ends the lease
        return files

    def _from_the_hub(self, hub: Hub, listing: Listing | None, wanted: Wanted, search: Search) -> Files:
        listing = listing or self._listing(hub, search)
        source = f"hub:{wanted.repository}@{listing.commit}"
        target = Target(wanted.place(listing.commit), source, wanted.repository)
        search.note(hub.name)
        remote, files = self._with_encoders(hub, listing.files, wanted, search)
        return self._bringer.bring_or_refuse(target, remote, files, search)

    def _with_encoders(
        self, remote: Remote, files: tuple[RemoteFile, ...], wanted: Wanted, search: Search
    ) -> tuple[Remote, tuple[RemoteFile, ...]]:
        """A remote and its files, and with them config and tokenizer of the encoders that lie in other repositories."""
        if wanted.is_plain:
            return remote, files
        hubs = {
            one.hub: Hub(one.hub, one.revision, formats=(), silence_s=self._setup.silence_s)
            for one in wanted.source.encoders
        }
        joined = Joined(remote, hubs)
        return joined, joined.files(files, {name: self._listing(hub, search).files for name, hub in hubs.items()})

    def _listing(self, hub: Hub, search: Search) -> Listing:
        """What the Hub has; where it asks for patience, asked again within the deadline."""
        search.note(hub.name)
        while True:
            try:
                return hub.listing()
            except PassingError as error:
                if error.wait_s is None or monotonic() + error.wait_s > search.deadline:
                    raise parts.refusal(hub.name, error, what="its list of files") from error
                Event().wait(error.wait_s)

    # -- the farm's bucket -------------------------------------------------------------------------------------------

    def _own_bucket(self, search: Search) -> "Bucket | None":
        """The bucket between this machine and the Hub, if there is one and it answered lately."""
        if self._setup.bucket is None:
            return None
        if monotonic() < self._bucket_away_until:
            search.note(f"the bucket {self._setup.bucket} (it did not answer a moment ago)")
            return None
        bucket = self._bucket(self._setup.bucket)
        search.note(bucket.name)
        return bucket

    def _turn(self, bucket: "Bucket", wanted: Wanted, commit: str, search: Search) -> "Files | ClusterLease | None":
        """The files, as soon as the bucket has them; or the right to fetch them for all; None: it is of no use now."""
        from workers.weights.cluster_lease import ClusterLease

        folder = wanted.folder(commit)
        try:
            while monotonic() < search.deadline:
                files = self._from_own_bucket(bucket, wanted, commit, search)
                if files is not None:
                    return files
                lease = ClusterLease(bucket, f"{folder}lease", life_s=self._setup.lease_s)
                if lease.acquire():
                    if bucket.get(f"{folder}{MANIFEST}") is None:
                        return lease
                    lease.release()  # whoever held it before finished in between
                else:
                    Event().wait(POLL_S)
        except (PassingError, ModelLoadError) as error:
            if isinstance(error, ModelLoadError) and error.details["error_class"] not in BUCKET_USELESS:
                raise
            self._do_without(bucket, error, search)
            return None
        raise failure(
            f"another worker was still fetching {wanted.repository} for the bucket",
            "TIMEOUT",
            permanent=False,
            remedy=LATER,
        )

    def _from_own_bucket(self, bucket: "Bucket", wanted: Wanted, commit: str, search: Search) -> Files | None:
        folder, place = wanted.folder(commit), wanted.place(commit)
        try:
            manifest = bucket.manifest(folder, wanted.formats)
            if manifest is None:
                return None
            target = Target(place, manifest.source, wanted.repository)
            return self._bringer.bring(target, bucket.folder(f"{folder}{FILES}/"), manifest.files, search)
        except DamagedError as error:
            log.warning("weights_damaged_in_bucket", place=place, error=str(error))
            bucket.delete(f"{folder}{MANIFEST}")
            return None

    def _do_without(self, bucket: "Bucket", error: Exception, search: Search) -> None:
        log.warning("weights_bucket_away", bucket=bucket.uri, error=said(error), again_in_s=AWAY_S)
        search.note(f"{bucket.name} ({said(error)})")
        self._bucket_away_until = monotonic() + AWAY_S

    # -- a bucket's folder as a source -------------------------------------------------------------------------------

    def from_bucket(self, wanted: Wanted, on_progress: OnProgress | None) -> Files:
        """The files under an allowed ``s3://`` URI."""
        uri, place = str(wanted.source.bucket), wanted.bucket_place()
        self._check_allowed(uri)
        here = self.store.find(place)
        if here is not None:
            return here
        search = Search(monotonic() + self._setup.timeout_s, on_progress, [DISK])
        try:
            with self.store.fetching(place, deadline=search.deadline):
                return self.store.find(place) or self._fetch_folder(wanted, search)
        except TimeoutError as error:
            raise tried(_other_fetches(uri), search.tiers) from error
        except ModelLoadError as error:
            raise tried(error, search.tiers) from error

    def _fetch_folder(self, wanted: Wanted, search: Search) -> Files:
        uri, place = str(wanted.source.bucket), wanted.bucket_place()
        bucket = self._bucket(uri.rstrip("/"))
        search.note(bucket.name)
        try:
            manifest = bucket.manifest("", wanted.formats)
            if manifest is not None:
                files, remote = manifest.files, bucket.folder(f"{FILES}/")
            else:
                files, remote = bucket.listing(wanted.formats), bucket.folder("")
        except PassingError as error:
            raise parts.refusal(bucket.name, error, what="its list of files") from error
        except DamagedError as error:
            raise failure(
                f"{uri}: {error}", "CONFIG", permanent=True, remedy="write the folder anew, or delete its manifest"
            ) from error
        whole, named = self._with_encoders(remote, files, wanted, search)
        return self._bringer.bring_or_refuse(Target(place, uri, place), whole, named, search)

    def _check_allowed(self, uri: str) -> None:
        allowed = [one for one in (self._setup.bucket, *self._setup.bucket_sources) if one]
        if not any(uri == one or uri.startswith(f"{one.rstrip('/')}/") for one in allowed):
            raise failure(
                f"{uri} lies in no bucket that models may come from",
                "CONFIG",
                permanent=True,
                remedy="name it in FARMHAND_BUCKET_SOURCES",
            )

    # -- clients -----------------------------------------------------------------------------------------------------

    def _bucket(self, uri: str) -> "Bucket":
        from workers.weights.bucket import Bucket

        with self._lock:
            if uri not in self._buckets:
                self._buckets[uri] = Bucket(
                    uri,
                    endpoint=self._setup.bucket_endpoint,
                    silence_s=self._setup.silence_s,
                    connections=self._setup.connections,
                )
            return self._buckets[uri]

    def _written_back_by(self) -> "WriteBacks":
        from workers.weights.write_back import WriteBacks

        bucket = self._bucket(str(self._setup.bucket))
        with self._lock:
            self._write_backs = self._write_backs or WriteBacks(self.store, bucket, lease_s=self._setup.lease_s)
            return self._write_backs

    def wait_written_back(self) -> None:
        """Until the bucket has what this process owes it, or could not be given it."""
        if self._write_backs is not None:
            self._write_backs.wait()


def _local(path: Path, roots: Sequence[str]) -> Path:
    """A local directory; links are followed before the roots are compared."""
    place = path.resolve()
    if not any(place.is_relative_to(Path(root).resolve()) for root in roots):
        raise failure(
            f"{path} lies under none of the allowed model directories",
            "CONFIG",
            permanent=True,
            remedy="name its root in FARMHAND_MODEL_DIRS",
        )
    if not place.is_dir():
        raise failure(
            f"there is no directory {path} on this worker", "NOT_FOUND", permanent=True, remedy="put it there"
        )
    return place


def _other_fetches(what: str) -> ModelLoadError:
    return failure(
        f"another process of this machine was still fetching {what}", "TIMEOUT", permanent=False, remedy=LATER
    )
