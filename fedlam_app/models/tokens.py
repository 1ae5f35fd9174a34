"""Texts to token ids, and ids to vectors: the tokeniser and the frozen word embeddings of each backbone.

Both lie beside the backbone's weights (``backbones.locate``), and the word embeddings are the one tensor
that is read of them: a device needs no more of the large model. ``random``, ``random-gpt2`` and ``none`` have
neither; they hash words (K. Weinberger et al., ICML 2009, arXiv:0902.2206) into a keyed random table.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlam_app.base.keys import rng
from fedlam_app.base.store import atomic_file
from fedlam_app.models.backbones import SOURCES, _from_gguf, _quiet, locate

Ids = NDArray[np.int32]  # (S,)


class Tokenizer(Protocol):
    """Splits texts into tokens of a vocabulary."""

    vocabulary: int  # ids are 0 .. vocabulary - 1

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[Ids]:
        """Return the ids of each text, cut to ``max_tokens``, with what the backbone expects around them."""
        ...

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of some ids, without the tokens that only mark something (CLS, end of text)."""
        ...


def tokenizer(backbone: str, weights: str = "") -> Tokenizer:
    """Return the tokeniser of a backbone; ``weights`` is as in ``backbones.load``.

    Raises ``ValueError`` where there are no weights, or no tokeniser beside them.
    """
    path = locate(backbone, weights)
    return Hashing() if path is None else Trained(_tokenizer_file(path))


def embeddings(backbone: str, weights: str = "", seed: int = 0) -> nn.Embedding:
    """Return the frozen float32 word embeddings (V, D) of a backbone.

    ``seed`` draws the table of a backbone without weights, rows of about unit length. Raises ``ValueError``
    where there are no weights, or no word embeddings in them.
    """
    path = locate(backbone, weights)
    if path is None:
        width = SOURCES[backbone].width if backbone in SOURCES else WIDTH
        drawn = rng(seed, "word embeddings").standard_normal((Hashing.vocabulary, width), np.float32)
        return nn.Embedding.from_pretrained(torch.from_numpy(drawn / np.float32(width**0.5)))
    return nn.Embedding.from_pretrained(_word_embeddings(_folder(path)).float())


class Trained:
    """A tokeniser as it was trained with its backbone, from its tokenizer.json."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._inner = tokenizers.Tokenizer.from_file(str(path))
        self._inner.no_padding()  # a file may ask for fixed lengths, which would be tokens to pay for
        self.vocabulary: int = self._inner.get_vocab_size()

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[Ids]:
        self._inner.enable_truncation(max_tokens)  # keeps what the post-processor puts around a text
        return [np.array(found.ids, np.int32) for found in self._inner.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return str(self._inner.decode([int(i) for i in ids]))


class Hashing:
    """Lower-cased words and punctuation marks by their hash, behind one token that every text begins with."""

    vocabulary = 4096

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[Ids]:
        return [np.array([0, *map(self._id, self._words(text))][:max_tokens], np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the ids as #1 .. #4095: a hash has no way back to the word."""
        return " ".join(f"#{i}" for i in ids if i)

    def _words(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def _id(self, word: str) -> int:
        return 1 + zlib.crc32(word.encode()) % (self.vocabulary - 1)


def _folder(path: Path) -> Path:
    """Return the folder of a backbone's safetensors; a GGUF file is converted once, as for its weights."""
    return _from_gguf(path) if path.suffix == ".gguf" else path


def _tokenizer_file(path: Path) -> Path:
    """Return the tokenizer.json beside the weights; out of a GGUF file it is converted once (5 s)."""
    file = _folder(path) / "tokenizer.json"
    if file.is_file():
        return file
    if path.suffix != ".gguf":
        raise ValueError(
            f"there is no tokenizer.json in {path}; copy it there from the model's repository, "
            "or delete the folder if the hub's client made it"
        )
    _quiet()
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with atomic_file(file) as temporary:
        converted.backend_tokenizer.save(str(temporary))
    return file


def _word_embeddings(folder: Path) -> torch.Tensor:
    """Read the one tensor that maps ids to vectors (V, D) from a folder of safetensors."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.endswith(TABLES)]  # noqa: SIM118 (no mapping)
            if names:
                return cast(torch.Tensor, file.get_tensor(names[0]))
    raise ValueError(f"{folder} holds no .safetensors file with word embeddings ({', '.join(TABLES)})")


WIDTH = 384  # of the table where there is no backbone to say it
TABLES = ("word_embeddings.weight", "wte.weight", "embed_tokens.weight")  # BERT, GPT-2, Llama
