"""From captions and prompts to embeddings: tokens, chunks of 75, weights, CLIP text encoders."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.imports import import_model_libraries
from library.models.family import Conditioning
from library.models.modules import count_indices
from library.models.prompt_weights import parse_weights, split_at_breaks
from library.safe_text import as_unicode

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from library.models.family import Config, Model, Shapes, Tokens

CLIP_BPE = Path(__file__).resolve().parents[2] / "assets" / "clip-bpe"
VOCABULARY = 49408
CHUNK = 75  # tokens of text in one chunk
END_TOKEN = 49407
CHUNK_WITH_ENDS = CHUNK + 2  # the input length of the text encoder: begin token, text, end token

WORD = re.compile(r"[A-Za-z]+|\S")  # no token crosses their borders; letters of other scripts have tokens of their own

ADDED_WORDS = "words_of_several_tokens"  # attribute of a tokenizer: id of an added word -> all its ids

Chunk = list[tuple[int, float]]  # (token id, weight), at most CHUNK of them


def load_tokenizer(padding: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer from `assets/clip-bpe`, offline; `padding` is the token that fills chunks."""
    import_model_libraries()
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(CLIP_BPE), pad_token=padding, model_max_length=CHUNK_WITH_ENDS)


def text_config(
    width: int, layers: int, *, activation: str = "quick_gelu", inner_width: int | None = None, vocabulary: int = VOCABULARY,
    positions: int = CHUNK_WITH_ENDS, projection: int | None = None,
) -> Config:  # fmt: skip
    """transformers' configuration of a CLIP text encoder: one head for each 64 channels; OpenCLIP's activation is `gelu`.

    `projection`: width of the pooled vector, where there is one.
    """
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner_width or 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "hidden_act": activation,
        "projection_dim": projection or width,
        "bos_token_id": 49406,
        "eos_token_id": END_TOKEN,
        "pad_token_id": 1,  # transformers' own value; padding is done by the tokenizer
    }


def read_text_config(shapes: Shapes, *, activation: str = "quick_gelu") -> Config:
    """The configuration of the text encoder whose weights have these names (without `text_model.`) and shapes."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    return text_config(
        width,
        count_indices(shapes, r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight"),
        activation=activation,
        inner_width=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        vocabulary=vocabulary,
        positions=shapes["embeddings.position_embedding.weight"][0],
        projection=projection[0] if projection else None,
    )


def empty_text_encoder(config: Mapping[str, Any]) -> CLIPTextModel:
    """A CLIP text encoder of this transformers configuration on the meta device."""
    import_model_libraries()
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def empty_pooling_text_encoder(config: Mapping[str, Any]) -> CLIPTextModelWithProjection:
    """The same with a projection of the pooled vector."""
    import_model_libraries()
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))


def path_in_files(path: str) -> str:
    """The path of a text encoder's layer in files, which have the level `text_model` for every version of transformers."""
    return path if path == "text_model" or path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def add_word(tokenizer: CLIPTokenizer, word: str, ids: list[int]) -> None:
    """Make the tokenizer turn the whole word `word` into these ids. The first must be the tokenizer's next free id."""
    from transformers import AddedToken

    if tokenizer.add_tokens(AddedToken(word, single_word=True)) != 1 or tokenizer.convert_tokens_to_ids(word) != ids[0]:
        raise UserError(f"'{word}' cannot be added to the tokenizer; give its file another name")
    # Reserve the other ids, so that the next added word does not get them.
    tokenizer.add_tokens([AddedToken(f"<{word}, vector {number}>", normalized=False) for number in range(2, len(ids) + 1)])
    setattr(tokenizer, ADDED_WORDS, {**getattr(tokenizer, ADDED_WORDS, {}), ids[0]: ids})


def tokenize(
    tokenizers: Sequence[CLIPTokenizer], texts: Sequence[str], max_token_length: int | None = None, weighted: bool = False
) -> Tokens:
    """Captions for every text encoder: `ids` (B, chunks, 77), int64, and with `weighted` `weights` of that shape, float32.

    The second encoder's are `ids_2` and `weights_2`. `max_token_length` is 75 (None), 150 or 225; longer text is truncated. A
    chunk is begin token, up to 75 tokens, end token, padding; the text encoder encodes each chunk separately.
    """
    return _by_encoder(tokenizers, texts, _chunks_of(max_token_length), weighted, keeps_weights=weighted)


def tokenize_prompts(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str], chunks: int) -> Tokens:
    """As `tokenize` for prompts: weights are always read, and left out of the result if all are 1."""
    return _by_encoder(tokenizers, prompts, chunks, weighted=True, keeps_weights=False)


def _by_encoder(
    tokenizers: Sequence[CLIPTokenizer], texts: Sequence[str], chunks: int, weighted: bool, keeps_weights: bool
) -> Tokens:
    tokens: Tokens = {}
    for number, tokenizer in enumerate(tokenizers, 1):
        end = "" if number == 1 else f"_{number}"
        ids, weights = token_chunks(tokenizer, texts, chunks, weighted)
        tokens[f"ids{end}"] = ids
        if keeps_weights or bool((weights != 1).any()):
            tokens[f"weights{end}"] = weights
    return tokens


def token_chunks(
    tokenizer: CLIPTokenizer, texts: Sequence[str], chunks: int | None, weighted: bool = True
) -> tuple[Tensor, Tensor]:
    """Ids and weights (B, chunks, 77); `chunks` None: as many as the longest text needs.

    With weights such as `(word:1.2)`, pieces of different weight are tokenised separately; BREAK fills the rest of its chunk with
    padding.
    """
    if weighted:
        filled = [_weighted_chunks(tokenizer, text) for text in texts]
    else:
        filled = [_fill([[(token, 1.0) for token in ids]]) for ids in _token_ids(tokenizer, list(texts))]
    return _to_tensors(tokenizer, filled, chunks or max(map(len, filled), default=1))


def count_tokens(tokenizer: CLIPTokenizer, caption: str, weighted: bool = False) -> int:
    """The number of tokens without begin and end token."""
    if weighted:
        return sum(map(len, _weighted_chunks(tokenizer, caption)))
    return len(_token_ids(tokenizer, [caption])[0])


def whole_words_within(tokenizer: CLIPTokenizer, caption: str, limit: int, weighted: bool = False) -> str:
    """The longest beginning of a caption, in whole words, that has at most `limit` tokens."""
    ends = [found.end() for found in WORD.finditer(caption)]
    if not ends or count_tokens(tokenizer, caption, weighted) <= limit:
        return caption
    kept = bisect_right(ends, limit, key=lambda end: count_tokens(tokenizer, caption[:end], weighted))
    return caption[: ends[kept - 1]] if kept else ""


def count_chunks(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """The number of chunks of 75 tokens that the weighted prompt needs, at least 1."""
    return len(_weighted_chunks(tokenizer, prompt))


def encode_text(
    text_encoder: CLIPTextModel, input_ids: Tensor, clip_skip: int | None = None, weights: Tensor | None = None
) -> Tensor:
    """Embeddings (B, chunks * 75 + 2, width) of ids (B, chunks, 77), differentiable in the encoder's weights.

    `clip_skip` N takes the output of the Nth layer from the end (1 or None: the last) and then the final layer norm. SD 2
    encoders hold 23 of OpenCLIP's 24 layers, so there None is what OpenCLIP calls the penultimate layer.
    `weights`, of the same shape as the ids, multiply the embedding of each token; see `apply_weights`.
    """
    batch, chunks, length = input_ids.shape
    hidden = _hidden_states(text_encoder, input_ids.reshape(batch * chunks, length), clip_skip)
    joined = _join_chunks(hidden.reshape(batch, chunks, length, -1))
    if weights is None:
        return joined
    return apply_weights(joined, _join_chunks(weights.to(joined.device).unsqueeze(-1)))


def last_layer_conditioning(model: Model, tokens: Tokens, clip_skip: int | None = None) -> Conditioning:
    """SD 1 and 2: `context` is the output of the layer that clip_skip chooses, after the final layer norm."""
    (encoder,) = model.text_encoders
    return Conditioning({"context": encode_text(encoder, tokens["ids"], clip_skip, tokens.get("weights"))})


def layers_behind(clip_skip: int | None) -> tuple[int, ...]:
    """The number of layers after the one that `last_layer_conditioning` reads."""
    return ((clip_skip or 1) - 1,)


def encode_layers(text_encoder: nn.Module, input_ids: Tensor) -> Any:
    """The encoder's output for ids (B, chunks, 77): `hidden_states` of all layers, `last_hidden_state` after the norm.

    Each is (B * chunks, 77, width); see `join_states`.
    """
    return text_encoder(input_ids.flatten(0, 1), output_hidden_states=True)


def join_states(hidden: Tensor, input_ids: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B * chunks, 77, width) -> (B, chunks * 75 + 2, width), each token's state multiplied by its weight.

    Unlike `apply_weights` this does not rescale to the mean, which is near zero without a norm.
    """
    joined = _join_chunks(hidden.reshape(*input_ids.shape, -1))
    if weights is None:
        return joined
    return (joined.float() * _join_chunks(weights.to(joined.device).unsqueeze(-1))).to(joined.dtype)


def pooled_state(text_encoder: CLIPTextModelWithProjection, last_hidden: Tensor, input_ids: Tensor) -> Tensor:
    """The projection (B, width) of the first end token of the first chunk; added words have larger ids than the end token."""
    first = last_hidden.reshape(*input_ids.shape, -1)[:, 0]
    ends = (input_ids[:, 0] == END_TOKEN).int().argmax(dim=1)
    return text_encoder.text_projection(first[torch.arange(len(first), device=first.device), ends])


def apply_weights(embeddings: Tensor, weights: Tensor) -> Tensor:
    """Multiply embeddings (B, N, width) by weights (B, N, 1), then rescale each prompt to its mean before that.

    A prompt whose weights are all equal is not changed, bit for bit.
    """
    plain = embeddings.float()
    weighted = plain * weights
    before, after = (values.mean(dim=(1, 2), keepdim=True) for values in (plain, weighted))
    rescalable = after.abs() > 1e-6  # a mean near zero cannot be restored; then only the weights apply
    ratio = torch.where(rescalable, before / torch.where(rescalable, after, 1.0), 1.0)
    equal = (weights == weights[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, plain, weighted * ratio).to(embeddings.dtype)


def inner_text_model(text_encoder: nn.Module) -> Any:
    """The module that holds `embeddings`, `encoder` and `final_layer_norm`.

    Up to transformers 5.5 that is `CLIPTextModel.text_model`, later `CLIPTextModel` itself.
    """
    return getattr(text_encoder, "text_model", text_encoder)


def _hidden_states(text_encoder: nn.Module, ids: Tensor, clip_skip: int | None) -> Tensor:
    """Output (B, 77, width) of the layer that clip_skip chooses, after the final layer norm."""
    if clip_skip is None or clip_skip == 1:
        return text_encoder(ids).last_hidden_state
    inner = inner_text_model(text_encoder)
    layers = len(inner.encoder.layers)
    if not 1 <= clip_skip <= layers:
        raise UserError(f"clip_skip {clip_skip} is out of range: the text encoder has {layers} layers; give 1 to {layers}")
    hidden = text_encoder(ids, output_hidden_states=True).hidden_states[-clip_skip]
    norm = inner.final_layer_norm
    return norm(hidden.to(norm.weight.dtype))


def _join_chunks(values: Tensor) -> Tensor:
    """(B, chunks, 77, width) -> (B, chunks * 75 + 2, width): the first begin token, all text, the last end token."""
    return torch.cat([values[:, 0, :1], values[:, :, 1:-1].flatten(1, 2), values[:, -1, -1:]], dim=1)


def _chunks_of(max_token_length: int | None) -> int:
    if max_token_length is None:
        return 1
    if max_token_length < CHUNK or max_token_length % CHUNK:
        raise UserError(f"max_token_length {max_token_length} is not possible; give 75, 150 or 225")
    return max_token_length // CHUNK


def _token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without begin and end.

    `split_special_tokens` treats all text as text: otherwise an exclamation mark in a caption would become padding with SD 2's
    padding token "!". Lone surrogates (half an emoji) are left out.
    """
    if not texts:
        return []
    ids = tokenizer(
        [as_unicode(text, instead="") for text in texts], add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    words = getattr(tokenizer, ADDED_WORDS, None)
    return [[part for token in text for part in words.get(token, [token])] for text in ids] if words else ids


def _weighted_chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[Chunk]:
    runs = []
    for run in split_at_breaks(parse_weights(prompt)):
        ids = _token_ids(tokenizer, [text for text, _ in run])
        runs.append([(token, weight) for (_, weight), tokens in zip(run, ids, strict=True) for token in tokens])
    return _fill(runs)


def _fill(runs: list[Chunk]) -> list[Chunk]:
    """Split each run of tokens into chunks of 75. Every run begins a new chunk, also an empty run."""
    return [run[start : start + CHUNK] for run in runs for start in range(0, max(len(run), 1), CHUNK)]


def _to_tensors(tokenizer: CLIPTokenizer, prompts: list[list[Chunk]], chunks: int) -> tuple[Tensor, Tensor]:
    """Ids and weights (B, chunks, 77): chunks beyond that number are dropped, missing ones are empty."""
    ids = torch.full((len(prompts), chunks, CHUNK_WITH_ENDS), tokenizer.pad_token_id, dtype=torch.int64)
    weights = torch.ones(ids.shape, dtype=torch.float32)
    ids[:, :, 0] = tokenizer.bos_token_id
    for row, prompt in enumerate(prompts):
        for column in range(chunks):
            chunk = prompt[column] if column < len(prompt) else []
            end = len(chunk) + 1
            ids[row, column, 1:end] = torch.tensor([token for token, _ in chunk], dtype=torch.int64)
            weights[row, column, 1:end] = torch.tensor([weight for _, weight in chunk])
            ids[row, column, end] = tokenizer.eos_token_id
    return ids, weights
