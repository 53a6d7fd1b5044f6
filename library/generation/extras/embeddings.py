"""Textual inversion: words of one's own, whose vectors were trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import UserError
from library.files import read_safetensors_header
from library.formats.tensor_file import load_pickled
from library.models.clip import add_word, inner_text_model

if TYPE_CHECKING:
    from library.models.family import Model


def add_embeddings(model: Model, files: list[str]) -> list[str]:
    """Teach tokenizer and text encoder the word that each file is named after; returns the words.

    A file with several vectors needs the word once in a prompt, where it takes as many tokens. Raises UserError, naming the
    file, for a word that the tokenizer has already, and for vectors of another width than the model's.
    """
    table: Any = inner_text_model(model.text_encoders[0]).get_submodule("embeddings.token_embedding")
    words = []
    for file in files:
        path, vectors = Path(file), read_vectors(Path(file))
        word = path.stem
        if vectors.shape[1] != table.weight.shape[1]:
            raise UserError(
                f"{path} has vectors of {vectors.shape[1]} numbers, the model's text encoder {table.weight.shape[1]}; "
                "it is for another Stable Diffusion version"
            )
        if word in model.tokenizers[0].get_vocab() or f"{word.lower()}</w>" in model.tokenizers[0].get_vocab():
            raise UserError(f"{path}: '{word}' is a word of the vocabulary already; give the file another name")
        first = len(table.weight)
        add_word(model.tokenizers[0], word, [first + place for place in range(len(vectors))])
        table.weight = torch.nn.Parameter(torch.cat([table.weight, vectors.to(table.weight)]), requires_grad=False)
        table.num_embeddings = len(table.weight)
        words.append(word)
    return words


def read_vectors(path: Path) -> Tensor:
    """The vectors (N, width) of a file of the web UI, Diffusers or kohya's scripts."""
    if not path.is_file():
        raise UserError(f"--textual_inversion_embeddings {path}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        read_safetensors_header(path)  # says so if the file is damaged
        content: dict[str, Any] = load_file(path)
    else:
        content = load_pickled(path)
    content = content.get("string_to_param", content)  # the web UI's .pt
    tensors = [value for value in content.values() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(tensors) != 1 or tensors[0].dim() > 2:
        raise UserError(f"{path} is no textual inversion: one table of vectors is needed, {len(tensors)} found")
    return tensors[0].detach().reshape(-1, tensors[0].shape[-1])
