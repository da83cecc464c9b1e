"""Which module serves which family name. Modules are imported at first use: a host pays only for what it serves."""

from collections.abc import Mapping
from importlib import import_module
from typing import Final, cast

from common.errors import ModelLoadError
from workers.host.families.protocol import Family, FamilyMaker

BUILT_IN: Final[Mapping[str, str]] = {
    "dense": "workers.host.families.dense:DenseFamily",
    "sparse": "workers.host.families.sparse:SparseFamily",
    "multivector": "workers.host.families.multivector:MultivectorFamily",
    "bge-m3": "workers.host.families.bge_m3:BgeM3Family",
    "cross-encoder": "workers.host.families.cross_encoder:CrossEncoderFamily",
    "causal-reranker": "workers.host.families.causal_reranker:CausalRerankerFamily",
    "token-classification": "workers.host.families.token_classification:TokenClassificationFamily",
    "gliner": "workers.host.families.gliner:GlinerFamily",
    "gliner2": "workers.host.families.gliner2:Gliner2Family",
    "gliclass": "workers.host.families.gliclass:GliclassFamily",
    "nli": "workers.host.families.nli:NliFamily",
    "clip": "workers.host.families.clip:ClipFamily",
    "siglip": "workers.host.families.siglip:SiglipFamily",
}


def find(name: str, extra: Mapping[str, str]) -> Family:
    """Make the family of this name; ``extra`` (name to ``module:Class``) comes before the built-in ones.

    Raises:
        ModelLoadError: there is no such family, or its code cannot be imported.
    """
    place = extra.get(name) or BUILT_IN.get(name)
    if place is None:
        known = ", ".join(sorted({*extra, *BUILT_IN}))
        details = {"error_class": "CONFIG", "permanent": True}
        raise ModelLoadError(f"there is no model family {name!r}; known are {known}", details=details)
    module, _, attribute = place.partition(":")
    try:
        maker = cast("FamilyMaker", getattr(import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        details = {"error_class": "DEPENDENCY", "permanent": True}
        raise ModelLoadError(
            f"the code of model family {name!r} cannot be imported: {error}", details=details
        ) from error
    return maker()
