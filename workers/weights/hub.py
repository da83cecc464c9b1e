"""The Hugging Face Hub as a source of weights: which files a repository has at a revision, and their bytes.

Speaks through huggingface_hub, which knows the endpoint and the token; the token goes to the Hub alone, never along a
redirect to another host and never into a message.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from config_db.spec import WeightsFormat
from workers.weights.failures import PassingError, failure, no_weights, said
from workers.weights.manifest import COMMIT, SAFE, RemoteFile, chosen, has_weights

RATE_LIMITED: Final = 429
WAIT_UNSAID_S: Final = 5.0
"""How long to wait where the Hub asks for patience and does not say how much."""
_PARTIAL_CONTENT: Final = 206


@dataclass(frozen=True, slots=True)
class Listing:
    """The wanted files of a repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


class Hub:
    """One repository of the Hub.

    Args:
        formats: what its weights may be in; none: they are not wanted.
        silence_s: how long one answer may take to begin or go on.
    """

    def __init__(
        self, repository: str, revision: str, *, formats: Sequence[WeightsFormat] = SAFE, silence_s: float
    ) -> None:
        self._formats = formats
        self._repository = repository
        self._revision = revision
        self._silence_s = silence_s
        self._commit = revision

    @property
    def name(self) -> str:
        """As messages call it."""
        from huggingface_hub import constants

        return f"the Hub ({constants.ENDPOINT})"

    def listing(self) -> Listing:
        """Ask once what there is.

        Raises:
            PassingError: the Hub does not answer, or asks for patience.
            ModelLoadError: there is nothing to be had.
        """
        from huggingface_hub import HfApi

        with self._translated(self._repository):
            told = HfApi().model_info(
                self._repository, revision=self._revision, files_metadata=True, timeout=self._silence_s
            )
        there = told.siblings or ()
        names = chosen((one.rfilename for one in there), self._formats)
        if self._formats and not has_weights(names):
            raise no_weights(f"{self._repository}@{self._revision}", self._formats)
        files = tuple(_described(one) for one in there if one.rfilename in names)
        if COMMIT.fullmatch(str(told.sha)) is None:
            raise PassingError(f"it names no commit of {self._repository}@{self._revision}")
        self._commit = str(told.sha)
        return Listing(self._commit, files)

    def read(self, file: RemoteFile, start: int, stop: int) -> Generator[bytes]:
        """The bytes of a file from ``start`` to ``stop``; a server that knows no ranges gives what precedes, too."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, and not marked as exported
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(self._repository, file.name, revision=self._commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with (
            self._translated(file.name),
            get_session().stream("GET", url, headers=headers, timeout=self._silence_s) as response,
        ):
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            skip = 0 if response.status_code == _PARTIAL_CONTENT else start
            yield from _without(response.iter_bytes(), skip)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn what the Hub, and the way to it, raise into errors of ours."""
        from httpx import HTTPError
        from huggingface_hub import errors

        at = f"{self._repository}@{self._revision}"
        try:
            yield
        except errors.GatedRepoError as error:
            raise _gated(f"{self.name} wants a token with the licence of {at} accepted") from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.DisabledRepoError) as error:
            raise failure(
                f"{self.name} knows no such repository or revision as {at}, or does not show it to this farm",
                "NOT_FOUND",
                permanent=True,
                remedy="correct the source; for a private repository set HF_TOKEN",
            ) from error
        except errors.HFValidationError as error:
            raise failure(f"{at}: no repository can have this name", "CONFIG", permanent=True) from error
        except errors.OfflineModeIsEnabled as error:
            raise failure(
                f"{at} is not on this worker, and HF_HUB_OFFLINE keeps it from asking {self.name}",
                "NETWORK",
                permanent=False,
                remedy="unset HF_HUB_OFFLINE, or put the files there",
            ) from error
        except errors.HfHubHTTPError as error:
            raise self._refusal(error.response, what) from error
        except (HTTPError, OSError, ValueError) as error:  # httpx's own: a time-out, a connection that broke off
            raise PassingError(said(error)) from error

    def _refusal(self, response: Any, what: str) -> Exception:
        status = response.status_code
        if status == RATE_LIMITED:
            return PassingError(f"status {status}", wait_s=_asked_wait_s(response.headers))
        if status in (401, 403):
            return _gated(f"{self.name} refuses {self._repository} to this farm's HF_TOKEN, or to it without one")
        if status == 404:  # the repository is there, as it was listed
            return failure(f"{self.name} has no {what} in {self._repository}", "NOT_FOUND", permanent=True)
        return PassingError(f"status {status}")


def _gated(why: str) -> Exception:
    return failure(why, "GATED", permanent=True, remedy="accept the licence on the Hub and set HF_TOKEN on the workers")


def _asked_wait_s(headers: Any) -> float:
    """How long a 429 asks to wait."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # as above

    asked = headers.get("Retry-After", "")
    if asked.isdecimal():
        return float(asked)
    limits = parse_ratelimit_headers(headers)
    return float(limits.reset_in_seconds) if limits is not None else WAIT_UNSAID_S


def _described(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    if lfs is not None:
        return RemoteFile(name=sibling.rfilename, size=int(lfs.size), sha256=str(lfs.sha256))
    return RemoteFile(name=sibling.rfilename, size=int(sibling.size), blob=str(sibling.blob_id))


def _without(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    """What comes after the first ``skip`` bytes."""
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(0, skip - len(chunk))
