"""Tiny random models of texts and images, of the real architectures, and what transformers itself says of them.

``python -m tests.tiny_images OUT`` makes the folders; it reads ``OUT/texts.json`` and ``OUT/files/``, and writes
``texts.npy`` and ``images.npy`` beside each model. It uses transformers alone, nothing of Farmhand.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def clip(eos: int | None = None) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor; ``eos`` is the token that the model takes for the last one."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = [("a", "n"), ("o", "w</w>"), ("t", "h"), ("th", "e</w>")]
    words = [*letters, *(one + "</w>" for one in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={one: n for n, one in enumerate(words)}, merges=merges, model_max_length=20)
    text = {
        **SIDE,
        "vocab_size": len(words),
        "max_position_embeddings": 20,
        "pad_token_id": 1,
        "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos or tokenizer.eos_token_id,
    }
    vision = {**SIDE, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    size = {"height": 32, "width": 32}
    return model, tokenizer, CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)


def siglip(out: Path) -> tuple[Any, Any, Any]:
    """The same; the tokenizer's own file lies in a directory."""
    import sentencepiece
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTokenizer

    lines = [
        "the cow and an owl sit on a barn roof",
        "quick brown foxes jump over lazy dogs",
        "abcdefghijklmnopqrstuvwxyz 0123456789",
    ] * 50
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        vocab_size=80,
        pad_id=-1,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (out / "spiece.model").write_bytes(made.getvalue())
    tokenizer = SiglipTokenizer(str(out / "spiece.model"), model_max_length=16, model_input_names=["input_ids"])
    text = {**SIDE, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = {**SIDE, "image_size": 32, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    return model, tokenizer, SiglipImageProcessorPil(size={"height": 32, "width": 32})


def siglip2() -> tuple[Any, Any, Any]:
    """The same, of the second version."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model
    from transformers.models.siglip2 import Siglip2Tokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *map(chr, range(33, 127))]
    words += [f"<0x{n:02X}>" for n in range(256)]
    tokenizer = Siglip2Tokenizer(vocab={one: n for n, one in enumerate(words)}, merges=[], model_max_length=16)
    text = {**SIDE, "vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 32}
    vision = {**SIDE, "patch_size": 8, "num_patches": 16}
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    return model, tokenizer, Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)


def save(parts: tuple[Any, Any, Any], here: Path) -> None:
    """Save a model with weights as trained ones are: no two tokens or places alike."""
    import torch

    for part in parts:
        part.save_pretrained(here)
    for value in parts[0].parameters():
        torch.nn.init.normal_(value, mean=float(value.std() == 0) * float(value.mean()), std=0.3)
    parts[0].save_pretrained(here)


def say(parts: tuple[Any, Any, Any], here: Path, texts: list[str], files: list[Path], *, padding: bool | str) -> None:
    """Write what a saved model says of texts and of image files."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps
    from transformers import AutoTokenizer

    model = type(parts[0]).from_pretrained(here, dtype=torch.float32).eval()
    processor = type(parts[2]).from_pretrained(here)
    tokenizer = AutoTokenizer.from_pretrained(here)
    images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    with torch.inference_mode():
        inputs = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
        np.save(here / "texts.npy", model.get_text_features(**inputs).pooler_output)
        inputs = processor(images=images, return_tensors="pt")
        np.save(here / "images.npy", model.get_image_features(**inputs).pooler_output)


def main(out: Path) -> None:
    import torch

    texts, files = json.loads((out / "texts.json").read_text()), sorted((out / "files").iterdir())
    makers: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
        "clip": clip,
        "clip-legacy": lambda: clip(2),
        "siglip": lambda: siglip(out),
        "siglip2": siglip2,
    }
    for seed, (name, make) in enumerate(makers.items()):
        torch.manual_seed(seed)
        parts = make()
        save(parts, out / name)
        say(parts, out / name, texts, files, padding=True if "clip" in name else "max_length")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
