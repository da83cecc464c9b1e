"""What each field of a model's document means, in the words that an editor shows beside it."""

from collections.abc import Mapping
from typing import Final

_VARIANT: Final[Mapping[str, str]] = {
    "outputs": "What it can give.",
    "dims": "Width of each output, in numbers.",
    "max_length": "Longest input, in tokens; as the model's files say unless set.",
    "precision": "Number format on the device; auto: the best that the device and the model have.",
    "pooling": "How token vectors become one; as the model's files say unless set.",
    "normalize": "Whether vectors have length 1; as the model's files say unless set.",
    "prompts": "Texts that are put before an input, by name.",
    "default_prompt": "Name of the prompt of requests that name none.",
    "templates": "How queries and documents are written: {text}, and perhaps {instruction}, stand for the request's.",
    "default_instruction": "The instruction of requests that name none.",
    "options": "Load-time options of the family.",
}

MEANINGS: Final[Mapping[str, Mapping[str, str]]] = {
    "ModelSpec": {
        "id": "The name that requests use, as org/name.",
        "family": "The kind of model: names the code that runs it.",
        "source": "Where the weights are: exactly one of hub, bucket and path.",
        "aliases": "Further names; none may be a name of another model.",
        "description": "For people.",
        "operations": "What it can be asked for; what its family does unless set, encode if that is a choice.",
        "inputs": "What it can be given.",
        "matryoshka": "Smaller widths that its dense vectors were trained to be cut to.",
        "profiles": "Named variants, each served as <id>:<name>.",
        "adapters": "LoRA adapters that requests may name.",
        "limits": "Bounds of this model.",
        "placement": "Where it may run, and how close its weights are kept.",
        "access": "Who may use it.",
        "trust": "What may come with the weights.",
        "unsupported": "Why it cannot be served though it is known; requests for it are refused with these words.",
        **_VARIANT,
    },
    "Profile": {"extends": "The profile it varies; default is the model itself.", **_VARIANT},
    "Source": {
        "hub": "A repository of the Hugging Face Hub.",
        "revision": "A commit, tag or branch of the repository; a commit stays what it is.",
        "bucket": "An object-store prefix, as s3://bucket/prefix.",
        "path": "A directory on the workers, below one of their FARMHAND_MODEL_DIRS.",
        "encoders": "Repositories of the Hub that its files leave config and tokenizer of an encoder to.",
    },
    "EncoderSource": {
        "hub": "A repository of the Hugging Face Hub, by the name that the model's files give it.",
        "revision": "A commit, tag or branch of the repository; a commit stays what it is.",
    },
    "Limits": {
        "max_concurrency": "Micro-batches at once in one worker.",
        "queue_limit": "Requests that may wait on the whole farm; max_concurrency is added for those that run.",
        "timeout_s": "Deadline of a synchronous request that names none, in seconds.",
        "max_items": "Items in one request.",
        "max_batch_tokens": "Tokens in one micro-batch.",
    },
    "Placement": {
        "tier": "Furthest place the weights fall back to when the device needs room.",
        "latency_class": "The lane of requests that name none.",
        "sharing": "Always true: models share devices. Workers are set aside with a pool.",
        "tenants": "Only these tenants may use it, and only their pools run it; none named: all.",
        "machine_profiles": "Only workers of these run it; none named: all.",
        "pinned": "Never evicted once loaded.",
        "preload": "Loaded before anyone asks.",
        "idle_unload_s": "Unloaded after so many seconds without a request.",
    },
    "Access": {"tenants": "Only these tenants may use it; none named: everyone."},
    "Trust": {
        "remote_code": "Always false: no code of a repository is run.",
        "formats": "Formats the weights may have; pickle can run code.",
    },
}
"""By struct and field."""
