"""How a sparse encoder's own folder wants to be read. No torch.

A folder is a SparseEncoder of sentence-transformers (``modules.json``) or a plain masked language model
(``config.json`` alone, which means the maximum over tokens). A router sends queries and documents different ways: where
the queries' way is a table of token weights, a query needs no encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from config_db.spec import ModelSpec
from workers.host.families.dense_folder import Folder, read_json, refusal, with_settings

POOLINGS: Final = ("max", "sum")
ACTIVATIONS: Final = ("relu", "log1p_relu")
_ENCODERS: Final = ("Transformer", "MLMTransformer")
_TABLE: Final = "SparseStaticEmbedding"


@dataclass(frozen=True, slots=True)
class SparseFolder:
    """What the files, and over them the spec, say.

    ``text`` says how texts are read and where the masked language model lies; ``activation`` is what stands between
    its logits and a weight, ``pooling`` what makes one weight of those of all tokens. ``table`` is the folder of the
    queries' token weights. ``untold_is_query``: how a text is read of which the request does not say what it is.
    """

    text: Folder
    pooling: str = "max"
    activation: str = "relu"
    table: Path | None = None
    untold_is_query: bool = False
    max_active_dims: int | None = None


def read_sparse_folder(files: Path, spec: ModelSpec) -> SparseFolder:
    """Read the folder of a model.

    Raises:
        ModelLoadError: it asks for something this family does not do.
    """
    folder = _read_ways(files, SparseFolder(Folder(transformer=files)))
    text = with_settings(files, folder.text)
    shared = read_json(files / "config_sentence_transformers.json") or {}
    most = spec.options.get("max_active_dims") or shared.get("max_active_dims")
    if most is not None and type(most) is not int:
        raise refusal(f"max_active_dims is {most!r}, which is no whole number")
    return replace(
        folder,
        text=replace(
            text,
            max_length=spec.max_length or text.max_length,
            prompts={**text.prompts, **spec.prompts},
            default_prompt=spec.default_prompt or text.default_prompt,
        ),
        max_active_dims=most,
    )


def _read_ways(files: Path, folder: SparseFolder) -> SparseFolder:
    modules = read_json(files / "modules.json")
    if modules is None:
        return folder
    chain = [(_kind(module.get("type")), files / str(module.get("path") or "")) for module in modules]
    if [kind for kind, _ in chain] == ["Router"]:
        return _read_router(chain[0][1], folder)
    return _read_encoder(chain, folder)


def _read_router(place: Path, folder: SparseFolder) -> SparseFolder:
    """Documents go through the encoder; queries through it, too, or through the table."""
    config = read_json(place / "router_config.json") or {}
    types, structure = config.get("types") or {}, config.get("structure") or {}
    ways = {name: [(_kind(types.get(part)), place / part) for part in parts] for name, parts in structure.items()}
    if not {"query", "document"} == set(ways):
        raise refusal(f"its router knows {', '.join(ways) or 'nothing'}, not queries and documents")
    folder = _read_encoder(ways["document"], folder)
    default = (config.get("parameters") or {}).get("default_route")
    folder = replace(folder, untold_is_query=default == "query")
    if [kind for kind, _ in ways["query"]] == [_TABLE]:
        return replace(folder, table=ways["query"][0][1])
    if _read_encoder(ways["query"], folder) != folder:
        raise refusal("its router sends queries through another encoder than documents")
    return folder


def _read_encoder(chain: Sequence[tuple[str, Path]], folder: SparseFolder) -> SparseFolder:
    kinds = [kind for kind, _ in chain]
    if len(kinds) != 2 or kinds[0] not in _ENCODERS or kinds[1] != "SpladePooling":
        raise refusal(f"its modules {', '.join(kinds) or 'none'} are none that the sparse family runs")
    config = read_json(chain[1][1] / "config.json") or {}
    pooling, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    if pooling not in POOLINGS or activation not in ACTIVATIONS:
        raise refusal(f"its pooling {pooling!r} with {activation!r} is none that the sparse family runs")
    text = replace(folder.text, transformer=chain[0][1])
    return replace(folder, text=text, pooling=pooling, activation=activation)


def _kind(name: Any) -> str:
    return str(name).rpartition(".")[2]
