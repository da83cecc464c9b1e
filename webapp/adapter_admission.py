"""Which adapter a request asks for: found by its name here, known by the digest of its source from here on."""

from typing import Any

from config_db.adapters import name_adapter
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec
from tasks.names import Operation


def choose_adapter(
    served: Snapshot, spec: ModelSpec, operation: Operation, options: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The digest of the adapter that a request names, and its options as the model's host reads them.

    Raises:
        RequestError: there is none of this name, or the model takes none.
    """
    if "lora" not in options and "lora_id" not in options:
        return None, options
    param = "options" if operation is Operation.SCORE else "params.options"
    return name_adapter(spec, served.settings, options, param=param)
