"""``python -m webapp.openapi docs/openapi.json``: write the document of the API to a file."""

import sys
from pathlib import Path

from webapp.app import bare_app
from webapp.openapi.document import document_text

Path(sys.argv[1]).write_text(document_text(bare_app()), encoding="utf-8")
