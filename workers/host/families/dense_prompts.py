"""What goes round a text before it is tokenised: a template, an instruction or a prompt. No torch.

A request whose ``options.is_query`` is true asks for queries, every other for documents. The model's template for that
kind comes first; where it takes an instruction, that is the request's own, else the model's. Without a template, the
request's instruction is put before the text as it stands, else the model's prompt for the kind.
"""

from collections.abc import Callable
from typing import Final

from common.errors import RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.dense_folder import Folder

TEXT: Final = "{text}"
INSTRUCTION: Final = "{instruction}"
DOCUMENT_PROMPTS: Final = ("document", "passage", "corpus")


def wording(request: Request, spec: ModelSpec, folder: Folder) -> Callable[[str], str]:
    """How a text of this request is worded.

    Raises:
        RequestError: it names an instruction, and the model takes one for the other kind of text only.
    """
    is_query = request.options.get("is_query")
    instruction = _instruction(request)
    template = spec.templates.get("query" if is_query else "document")
    if template is not None and INSTRUCTION in template:
        return _filled(template, spec.default_instruction or "" if instruction is None else instruction)
    if instruction is not None:
        _check_none_takes_it(spec)
        return _prefixed(instruction)
    if template is not None:
        return _filled(template, "")
    return _prefixed(_prompt(folder, is_query=is_query))


def _instruction(request: Request) -> str | None:
    """What the request itself names, if anything."""
    named = request.instruction or request.options.get("instruction")
    return named if isinstance(named, str) and named else None


def _check_none_takes_it(spec: ModelSpec) -> None:
    takers = [kind for kind, template in spec.templates.items() if INSTRUCTION in template]
    if takers:
        raise RequestError(
            f"{spec.id} takes an instruction with a {takers[0]} only: set options.is_query, or name none",
            param="params.instruction",
        )


def _prompt(folder: Folder, *, is_query: object) -> str:
    """The prefix for a kind of text; for a kind that was not named, the model's default one."""
    if is_query is not None:
        names = ("query",) if is_query else DOCUMENT_PROMPTS
        for name in names:
            if name in folder.prompts:
                return folder.prompts[name]
    return folder.prompt(folder.default_prompt or "")


def _prefixed(prefix: str) -> Callable[[str], str]:
    return prefix.__add__


def _filled(template: str, instruction: str) -> Callable[[str], str]:
    """The template with its instruction; an instruction that spells a slot stays as it is."""
    return _between([part.replace(INSTRUCTION, instruction) for part in template.split(TEXT)])


def _between(parts: list[str]) -> Callable[[str], str]:
    return lambda text: text.join(parts)
