"""Textual inversion: words of one's own, whose vectors were trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import UserError, counted
from library.formats.tensor_file import load_pickled, read_safetensors
from library.models.clip import add_word, inner_text_model

if TYPE_CHECKING:
    from library.models.family import Model

IN_TWO = ("clip_l", "clip_g")  # in files for models with two text encoders: the table of each


def add_embeddings(model: Model, files: list[str]) -> list[str]:
    """Teach tokenizers and text encoders the word that each file is named after; returns the words.

    A file with several vectors needs the word once in a prompt, where it takes as many tokens. Raises UserError, naming the
    file, for a word that the tokenizer has already, and for vectors of another width than the model's.
    """
    words = []
    for path in map(Path, files):
        word, tables = path.stem, _tables_for(model, path)
        vocabulary = model.tokenizers[0].get_vocab()
        if word in vocabulary or f"{word.lower()}</w>" in vocabulary:
            raise UserError(f"{path}: '{word}' is a word of the vocabulary already; give the file another name")
        for tokenizer, encoder, vectors in zip(model.tokenizers, model.text_encoders, tables, strict=True):
            table = _token_table(encoder)
            first = len(table.weight)
            add_word(tokenizer, word, [first + index for index in range(len(vectors))])
            table.weight = torch.nn.Parameter(torch.cat([table.weight, vectors.to(table.weight)]), requires_grad=False)
            table.num_embeddings = len(table.weight)
        words.append(word)
    return words


def _token_table(text_encoder: Any) -> Any:
    return inner_text_model(text_encoder).get_submodule("embeddings.token_embedding")


def _tables_for(model: Model, path: Path) -> list[Tensor]:
    """The vectors (N, width) for each text encoder. UserError if they are for other ones."""
    found, title = read_vectors(path), model.family.title
    count, wanted = len(found), len(model.text_encoders)
    if count != wanted:
        raise UserError(
            f"{path} is made for {counted(count, 'text encoder')}, {title} has {wanted}; it is for another kind of model"
        )
    tables = [found[name] for name in IN_TWO] if wanted == len(IN_TWO) else list(found.values())
    if len({len(table) for table in tables}) > 1:
        raise UserError(f"{path}: the text encoders have different numbers of vectors; the file is damaged")
    for table, encoder in zip(tables, model.text_encoders, strict=True):
        width = _token_table(encoder).weight.shape[1]
        if table.shape[1] != width:
            raise UserError(
                f"{path} has vectors of {table.shape[1]} numbers, the model's text encoder {width}; "
                "it is for another Stable Diffusion version"
            )
    return tables


def read_vectors(path: Path) -> dict[str, Tensor]:
    """The tables of vectors (N, width) of a file of the web UI, Diffusers or kohya's scripts: one, or those named in `IN_TWO`."""
    if not path.is_file():
        raise UserError(f"--textual_inversion_embeddings {path}: there is no such file")
    if path.suffix.lower() == ".safetensors":
        content: dict[str, Any] = read_safetensors(path)
    else:
        content = load_pickled(path)
    content = content.get("string_to_param", content) if isinstance(content, dict) else {}  # the web UI's .pt
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if len(tensors) != 1 and set(tensors) != set(IN_TWO):
        raise UserError(f"{path} is no textual inversion: one table of vectors is needed, {len(tensors)} found")
    for value in tensors.values():
        if value.dim() not in (1, 2) or value.numel() == 0:
            shape = " x ".join(map(str, value.shape)) or "a single number"
            raise UserError(f"{path} is no textual inversion: a table of vectors is needed, its shape is {shape}")
        if not value.isfinite().all():
            raise UserError(f"{path} holds NaN or infinity, which would make every image black; get another file")
    return {name: value.detach().reshape(-1, value.shape[-1]) for name, value in tensors.items()}
