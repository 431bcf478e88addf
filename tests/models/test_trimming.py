"""A cut tokenizer: same tokens wherever all are kept, every text encodable, exact sizes."""

import json

import numpy as np
import pytest
import tiny_models as tiny
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

from fisher_jax._support.errors import InputError
from fisher_jax.models import Tokenizer
from fisher_jax.models.beside_weights import Origin
from fisher_jax.models.trimming import cut_tokenizer, kept_tokens, read_vocabulary

PROSE = (
    "the river runs past the old mills, where the miller's mother mills the thinnest bread; then thinner than that. "
)


@pytest.fixture(scope="module")
def trained():
    """A real byte-level BPE of 400 tokens, with a special token before every text."""
    backend = Backend(kinds.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = [PROSE + "".join(np.random.default_rng(i).permutation(list(PROSE))) for i in range(20)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return Tokenizer(backend)


def orders(size):
    return [np.random.default_rng(seed).permutation(size) for seed in range(3)]


@pytest.mark.parametrize("keep", [258, 259, 300, 350, 399])
def test_a_cut_tokenizer_has_exactly_so_many_tokens_and_makes_each_of_them(trained, keep):
    vocabulary = read_vocabulary(trained)
    for order in orders(vocabulary.size):
        kept = kept_tokens(vocabulary, order, keep)
        cut = cut_tokenizer(trained, kept)
        assert len(kept) == cut.vocab_size == len(cut.backend.get_vocab()) == keep
        for new, old in enumerate(kept):
            assert cut.token_text(new) == trained.token_text(int(old))
        merges = json.loads(cut.to_json())["model"]["merges"]
        made = {"".join(pair) for pair in merges}
        assert all(token in made for token in cut.backend.get_vocab() if len(token) > 1 and "s>" not in token)


def test_texts_of_kept_tokens_are_cut_as_before_and_all_others_come_back(trained):
    vocabulary = read_vocabulary(trained)
    rng = np.random.default_rng(1)
    pieces = PROSE.split(" ")
    same = 0
    for order in orders(vocabulary.size):
        kept = kept_tokens(vocabulary, order, 340)
        cut = cut_tokenizer(trained, kept)
        for _ in range(40):
            text = " ".join(rng.choice(pieces, 3)) + rng.choice(["", " ßé漢🙂\n\t\x00", "\u2028\u0301"])
            before, after = trained.encode(text), cut.encode(text)
            assert cut.decode(cut.encode(text, special=False)) == text
            assert after[0] == list(kept).index(1)  # the template's token under its new number
            if np.isin(before, kept).all():
                same += 1
                assert kept[after].tolist() == before
    assert same > 5


def test_more_important_tokens_stay_with_the_tokens_that_they_are_made_from(trained):
    vocabulary = read_vocabulary(trained)
    longest = max(range(vocabulary.size), key=lambda id: len(vocabulary.parts[id]))
    order = [longest, *(i for i in range(vocabulary.size) if i != longest)]
    needed = len(set(vocabulary.parts[longest]) - vocabulary.required) + 1
    size = len(vocabulary.required)
    assert longest in kept_tokens(vocabulary, order, size + needed)
    assert longest not in kept_tokens(vocabulary, order, size + needed - 1)


def test_sentencepiece_with_byte_fallback(trained):
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab", "é"]
    merges = [("a", "b"), ("\u2581", "ab")]
    model = kinds.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    vocabulary = read_vocabulary(tokenizer)
    kept = kept_tokens(vocabulary, [tokens.index("ab"), *range(len(tokens))], 261)
    cut = cut_tokenizer(tokenizer, kept)
    assert {tokens[i] for i in kept} - {t for t in tokens if t.startswith("<0x")} == {
        "<unk>",
        "\u2581",
        "a",
        "b",
        "ab",
    }
    for text in ["ab é ab", "日本 \n"]:
        assert cut.decode(cut.encode(text)) == text


def test_other_kinds_are_refused():
    words = Tokenizer(Backend(kinds.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(InputError, match="WordLevel"):
        read_vocabulary(words)
    no_bytes = Tokenizer(Backend(kinds.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    with pytest.raises(InputError, match="no token for each byte"):
        read_vocabulary(no_bytes)


def test_the_size_must_be_possible():
    vocabulary = read_vocabulary(Tokenizer(tiny.tokenizer()))
    for keep in (len(vocabulary.required) - 1, vocabulary.size):
        with pytest.raises(InputError, match="give a number from"):
            kept_tokens(vocabulary, range(vocabulary.size), keep)


def test_token_ids_in_settings_are_renumbered():
    origin = Origin(
        {"bos_token_id": 4, "eos_token_id": [4, 9], "pad_token_id": 5, "width": 4}, {}, {"eos_token_id": 9}
    )
    renumbered = origin.renumbered(np.array([1, 4, 9]))
    assert renumbered.settings == {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": None, "width": 4}
    assert renumbered.generation == {"eos_token_id": 2}
