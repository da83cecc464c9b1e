"""What worker, zygote and hosts say to each other, and how it is framed. No torch, no I/O of its own.

Three channels of one worker:

- *control*, worker <-> zygote: a SOCK_SEQPACKET pair, one msgpack map a packet; a Fork carries the host's descriptors.
- *link*, worker <-> host: a stream pair; frames of a 4-byte big-endian length and a msgpack map.
- *board*, host -> worker: a page of shared memory on which the host's threads note what they are doing (``stages``).
"""

from collections.abc import Iterator, Sequence
from struct import Struct as Layout
from typing import Any, Final, Literal, TypeAlias

import msgspec

from config_db.spec import ModelSpec, Source
from workers.weights.setup import WeightsSetup

MAX_FRAME_BYTES: Final = 2**31
NO_ROOM: Final = "no room"
"""Why a hinted load was skipped, in its details: all that could have left is in use."""
_LENGTH: Final = Layout(">I")
_encoder: Final = msgspec.msgpack.Encoder()


class HostSetup(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="setup"):
    """Control, first packet: what the zygote and every host of it need to know. ``budget_bytes`` 0: measure it."""

    preimport: tuple[str, ...]
    extra_families: dict[str, str]
    weights: WeightsSetup
    pass_tokens: int
    torch_threads: int
    budget_bytes: int
    device_fraction: float
    hosts_per_device: int
    log_level: str
    copies_dir: str | None = None
    copies_bytes: int = 0
    host_memory_bytes: int = 0
    growth_bytes: int = 0


class Fork(msgspec.Struct, frozen=True, tag_field="t", tag="fork"):
    """Control, to the zygote: fork a host; its link and its board come along as descriptors."""

    host: int
    device: str


class Kill(msgspec.Struct, frozen=True, tag_field="t", tag="kill"):
    """Control, to the zygote: SIGKILL to this host. The parent does it, so that no other process's pid can be hit."""

    host: int


class Imported(msgspec.Struct, frozen=True, tag_field="t", tag="imported"):
    """Control, from the zygote: the shared modules are imported, or why one is not."""

    seconds: float
    error: str | None = None


class Exited(msgspec.Struct, frozen=True, tag_field="t", tag="exited"):
    """Control, from the zygote: a host is gone; ``status`` is its exit status, negative for a signal's number."""

    host: int
    status: int


class Introduce(msgspec.Struct, frozen=True, tag_field="t", tag="spec"):
    """Link, to the host: a spec that batches name by its digest from now on; ``number`` stands for it on the board.

    Sent again when its placement changes, which the digest does not cover.
    """

    digest: str
    number: int
    spec: ModelSpec


class Batch(msgspec.Struct, frozen=True, tag_field="t", tag="batch"):
    """Link, to the host: one micro-batch; ``parts`` are Celery bodies, ``adapters`` the digests of theirs, if any."""

    id: int
    spec: str
    operation: str
    adapters: Sequence[str | None] | None
    parts: Sequence[bytes]


class Load(msgspec.Struct, frozen=True, tag_field="t", tag="load"):
    """Link, to the host: this model is likely to be wanted next; with ``warm_up``, it also runs once, unasked."""

    spec: str
    warm_up: bool = False


class Evict(msgspec.Struct, frozen=True, tag_field="t", tag="evict"):
    """Link, to the host: this model is not wanted any more, as it was ``replaced`` or ``removed``."""

    spec: str
    reason: str


class Fetch(msgspec.Struct, frozen=True, tag_field="t", tag="fetch"):
    """Link, to the host: bring an adapter's files onto this machine's disk; it says when they are there."""

    adapter: str
    source: Source


class Ready(msgspec.Struct, frozen=True, tag_field="t", tag="ready"):
    """Link, from the host: it can be given work."""

    pid: int
    device: str
    budget_bytes: int


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one part: a msgpack list of item results, or an error."""

    result: bytes | None
    tokens: int
    error: dict[str, Any] | None = None


class Done(msgspec.Struct, frozen=True, tag_field="t", tag="done"):
    """Link, from the host: a micro-batch is answered, part by part, in order."""

    batch: int
    answers: list[Answer]
    tokenization_ms: float
    inference_ms: float
    postprocessing_ms: float
    load_s: float
    tokens: int


class Fetched(msgspec.Struct, frozen=True, tag_field="t", tag="fetched"):
    """Link, from the host: an adapter's files are on this machine's disk, or why they are not."""

    adapter: str
    error: dict[str, Any] | None = None


class Grown(msgspec.Struct, frozen=True, tag_field="t", tag="grown"):
    """Link, from the host: it holds more memory than its models and its start explain; it should be replaced."""

    held_bytes: int
    explained_bytes: int
    bound_bytes: int


class ModelNews(msgspec.Struct, frozen=True, tag_field="t", tag="model"):
    """Link, from the host: residency changed.

    ``skipped``: a hinted load was not begun, for want of memory. ``warm``: what was asked to run once has.
    ``adapter_...``: of an adapter on this base, which the detail names.
    """

    spec: str
    event: Literal[
        "loading",
        "loaded",
        "load_failed",
        "evicted",
        "skipped",
        "warm",
        "adapter_loaded",
        "adapter_failed",
        "adapter_evicted",
    ]
    detail: dict[str, Any] = {}


ToZygote: TypeAlias = HostSetup | Fork | Kill
FromZygote: TypeAlias = Imported | Exited
ToHost: TypeAlias = Introduce | Batch | Load | Evict | Fetch
FromHost: TypeAlias = Ready | Done | ModelNews | Grown | Fetched

to_zygote: Final = msgspec.msgpack.Decoder(ToZygote)
from_zygote: Final = msgspec.msgpack.Decoder(FromZygote)
to_host: Final = msgspec.msgpack.Decoder(ToHost)
from_host: Final = msgspec.msgpack.Decoder(FromHost)


def packet(message: ToZygote | FromZygote) -> bytes:
    """One packet of the control channel."""
    return _encoder.encode(message)


def frame(message: ToHost | FromHost) -> bytearray:
    """One frame of a link: made in one buffer, since results are large."""
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(message, buffer, _LENGTH.size)
    _LENGTH.pack_into(buffer, 0, len(buffer) - _LENGTH.size)
    return buffer


class Unframer:
    """Cuts a stream into frames. Fed whatever came; gives what is complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = _LENGTH.size

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """The frames that ``data`` completes, in order.

        Raises:
            ValueError: a frame claims an impossible length; the stream is damaged.
        """
        self._buffer += data
        while len(self._buffer) >= self._wanted:
            length = _LENGTH.unpack_from(self._buffer)[0]
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                self._wanted = end
                return
            with memoryview(self._buffer) as view:
                body = bytes(view[_LENGTH.size : end])
            del self._buffer[:end]
            self._wanted = _LENGTH.size
            yield body
