"""The Hugging Face Hub as a place to learn of models: what a repository holds at one commit, as a spec.

Only names and small JSON files are read, into memory; weights are for the workers. Registering is for ``auto``.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from time import monotonic
from typing import Any, Final

import msgspec

from common.errors import CapacityError, FarmError, ModelLoadError, ModelNotFoundError, ModelUnsupportedError
from config_db.detect import describe, named_encoders
from config_db.spec import ModelSpec

MAX_FILE_BYTES: Final = 4 << 20
ANSWER_S: Final = 5.0
"""How long the Hub may stay silent."""
LOOK_UP_S: Final = 20.0
"""How long one model may take in all."""
AWAY_S: Final = 10.0
"""When a Hub that does not answer, or asks for patience without saying how much, is asked again."""
MOST_PATIENCE_S: Final = 3600.0


class Hub:
    """Asks one Hub; ``endpoint`` None is the one that ``HF_ENDPOINT`` names."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def describe(self, model_id: str) -> ModelSpec:
        """The spec of a repository's model, pinned to the commit that its main branch has now.

        Raises:
            ModelNotFoundError: there is no such repository, or not under this very name.
            ModelLoadError: it is gated, and this process has no token that opens it.
            ModelUnsupportedError: no family runs it; says what was seen.
            CapacityError: the Hub does not answer, or asks for patience.
        """
        with _translated(model_id):
            files = _Repository(model_id, self._endpoint)
            if files.id != model_id:
                raise ModelNotFoundError(
                    f"no model {model_id!r} is served here; the Hub calls it {files.id!r}",
                    param="model",
                    details={"nearest": [files.id]},
                )
            encoders = [{"hub": name, "revision": self._commit_of(name)} for name in named_encoders(files)]
            source = {"hub": model_id, "revision": files.commit, **({"encoders": encoders} if encoders else {})}
            return describe(files, model_id=model_id, source=source)

    def _commit_of(self, encoder: str) -> str:
        """The commit that an encoder's main branch has now."""
        try:
            with _translated(encoder):
                return _Repository(encoder, self._endpoint).commit
        except (ModelNotFoundError, ModelLoadError) as error:
            message = f"its files leave its encoder to {encoder!r}, which the Hub does not show to this farm"
            raise ModelUnsupportedError(message) from error


class _Repository:
    """The files of one repository at one commit (``config_db.detect.Files``)."""

    def __init__(self, name: str, endpoint: str | None) -> None:
        from huggingface_hub import HfApi

        self._endpoint = endpoint
        self._give_up_at = monotonic() + LOOK_UP_S
        self._info = HfApi(endpoint=endpoint).model_info(name, timeout=ANSWER_S)
        self.id = str(self._info.id)
        self.commit = str(self._info.sha)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(sibling.rfilename for sibling in self._info.siblings or ())

    def names(self) -> Collection[str]:
        """All of them."""
        return self._names

    def json(self, name: str) -> Any:
        """The content of a JSON file, None if there is none."""
        if name not in self._names:
            return None
        try:
            return msgspec.json.decode(self._fetch(name))
        except msgspec.DecodeError as error:
            raise ModelUnsupportedError(f"its {name} is not JSON that can be read: {error}") from error

    def _fetch(self, name: str) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, and not marked as exported
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(self.id, name, revision=self.commit, endpoint=self._endpoint)
        whole = bytearray()
        with get_session().stream("GET", url, headers=build_hf_headers(), timeout=ANSWER_S) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                whole += chunk
                if len(whole) > MAX_FILE_BYTES:
                    raise ModelUnsupportedError(f"its {name} is larger than {MAX_FILE_BYTES} bytes")
                if monotonic() > self._give_up_at:
                    raise TimeoutError(f"{name} took longer than {LOOK_UP_S:g} s")
        return bytes(whole)


@contextmanager
def _translated(model_id: str) -> Iterator[None]:
    """Turn what the Hub and the way to it raise into errors of ours."""
    from httpx import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(model_id, "its licence must be accepted, and HF_TOKEN set to a token that did") from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError, errors.HFValidationError) as error:
        message = f"no model {model_id!r} is served here, and the Hub has none of this name that is open to this farm"
        raise ModelNotFoundError(message, param="model", details={"nearest": []}) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(model_id, error.response) from error
    except (HTTPError, OSError, ValueError) as error:  # ValueError: an answer that is not the Hub's JSON
        raise _away(error) from error


def _refusal(model_id: str, response: Any) -> FarmError:
    if response.status_code in (401, 403):
        return _gated(model_id, "the Hub refuses this farm's HF_TOKEN")
    if response.status_code == 429:
        asked = response.headers.get("Retry-After", "")
        wait_s = float(asked) if asked.isdecimal() else AWAY_S
        return CapacityError(
            "the Hub, where this model would be looked up, asks for patience",
            retry_after_s=min(wait_s, MOST_PATIENCE_S),
        )
    return _away(f"status {response.status_code}")


def _gated(model_id: str, what: str) -> ModelLoadError:
    return ModelLoadError(
        f"the Hub does not show {model_id!r} to this farm: {what}", details={"error_class": "GATED", "permanent": True}
    )


def _away(why: object) -> CapacityError:
    said = " ".join(str(why).split())[:200]
    return CapacityError(f"the Hub, where this model would be looked up, does not answer: {said}", retry_after_s=AWAY_S)
