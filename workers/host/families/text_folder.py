"""What the families of text encoders share of a folder: its identity, its tokenizer, the length it may have.

Reading what a folder asks for is each family's own affair.
"""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from config_db.spec import ModelSpec
from workers.host.families.dense_folder import refusal


def content_key(spec: ModelSpec, files: Path) -> tuple[str, str]:
    """Names a folder's content, as far as its files' sizes and dates tell, as this spec reads it."""
    stamp = hashlib.sha256(str(files).encode())
    for path in sorted(files.rglob("*")):
        if path.is_file():
            found = path.stat()
            stamp.update(f"{path.name}:{found.st_size}:{found.st_mtime_ns}".encode())
    return spec.digest, stamp.hexdigest()


def load_tokenizer(folder: Path, longest: int | None) -> Tokenizer:
    """The folder's fast tokenizer, without padding, truncating to ``longest`` tokens; None: not truncating."""
    path = folder / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        slow: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not getattr(slow, "is_fast", False):
            raise refusal("it has no fast tokenizer (tokenizer.json)")
        tokenizer = slow.backend_tokenizer
    tokenizer.no_padding()
    if longest is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(longest)
    return tokenizer


def longest_text(folder: Path, wanted: int | None) -> int | None:
    """The most tokens of one text: what is wanted, within the positions the encoder has; None: no bound is known."""
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise refusal(f"its config.json cannot be read ({error})") from error
    positions = config.get("max_position_embeddings")
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions = positions and positions - int(config.get("pad_token_id") or 1) - 1
    known = [one for one in (wanted, positions) if isinstance(one, int) and one > 0]
    return min(known) if known else None
