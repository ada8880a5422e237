"""CLIP's tokeniser and the masking against published ids, open_clip's tokeniser and Python's `random`."""

import gzip
import json
import math
import random
from pathlib import Path

import numpy as np
import open_clip.tokenizer
import pytest
import torch

from datasets.tokenizer import EOT, MASK, SOT, SimpleTokenizer, mask_tokens, tokenize, tokenize_all
from utils.errors import InputError

REFERENCE = Path(__file__).parent / "reference"
TEXTS = json.loads((REFERENCE / "tokenizer.json").read_text(encoding="utf-8"))
MLM = json.loads((REFERENCE / "mlm.json").read_text(encoding="utf-8"))
SPECIAL_WORDS = ("<|startoftext|>", "<|mask|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def clip_tokenizer():
    return open_clip.tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def published_masking():
    return np.load(REFERENCE / "mlm.npz")


# ---- ids ----


@pytest.mark.parametrize("text_length", [77, 64])
def test_captions_get_the_published_ids(tokenizer, text_length):
    published = np.load(REFERENCE / "tokenizer.npz")[f"ids{text_length}"]
    assert len(published) == len(TEXTS["captions"]) == 163
    for caption, ids in zip(TEXTS["captions"], published, strict=True):
        assert tokenize(caption, tokenizer, text_length).tolist() == ids.tolist(), repr(caption)


def test_captions_encoded_together_are_the_same_as_one_by_one(tokenizer):
    captions = TEXTS["captions"][:40] * 2
    together = tokenize_all(captions, 64)
    assert torch.equal(together, torch.stack([tokenize(caption, tokenizer, 64) for caption in captions]))
    assert tokenize_all([], 64).shape == (0, 64)


def test_the_vocabulary_is_read_once_and_another_file_has_its_own(tokenizer, tmp_path):
    assert SimpleTokenizer().encoder is tokenizer.encoder
    path = tmp_path / "merges.gz"
    path.write_bytes(gzip.compress(b"#version\nh e\nhe y</w>\na b"))  # the last one's place is <|mask|>'s
    other = SimpleTokenizer(path)
    assert len(other.encoder) == 2 * 256 + 2 + 3 and other.encode("hey") == [513]
    assert SimpleTokenizer().encode("hey") == tokenizer.encode("hey") != [513]


def test_vocabulary_keeps_its_size_and_the_last_three_places_are_special(tokenizer):
    assert sorted(tokenizer.encoder.values()) == list(range(49408))
    assert (MASK, SOT, EOT) == (49405, 49406, 49407)
    assert tokenizer.encoder["<|mask|>"] == MASK
    assert tokenizer.encoder["<|startoftext|>"] == SOT
    assert tokenizer.encoder["<|endoftext|>"] == EOT
    assert "jekyll</w>" not in tokenizer.encoder


def test_every_other_entry_of_the_vocabulary_is_that_of_open_clip(tokenizer, clip_tokenizer):
    own = {piece: i for piece, i in tokenizer.encoder.items() if i < MASK}
    assert own == {piece: i for piece, i in clip_tokenizer.encoder.items() if i < MASK}


def seeded_sentences():
    """Words, punctuation, digits and other alphabets in disorder, the same on every machine."""
    rng = random.Random(0)
    words = "a man's THE Trousers café Übergröße don't 2024 red-and-blue куртка 外套 !! ?! ... & % @x _y"
    letters = "abcdefghijklmnopqrstuvwxyz'-.,;!0123456789éßñ漢字ё"
    for _ in range(400):
        sentence = [rng.choice(words.split()) for _ in range(rng.randrange(12))]
        sentence += ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 15))) for _ in range(6)]
        rng.shuffle(sentence)
        yield rng.choice([" ", "  ", "\n", "\t"]).join(sentence)


def test_other_sentences_get_the_ids_of_open_clip(tokenizer, clip_tokenizer):
    plain = [c for c in TEXTS["captions"] if not any(word in c.lower() for word in SPECIAL_WORDS)]
    rare = ["<b>black &amp;amp; white</b> &amp;lt;tag", "it'ſ hiſ", "\u212a \u0130 \x85 \x1c line"]
    for sentence in [*plain, *rare, *MLM["statistics_captions"], *seeded_sentences()]:
        if "jekyll" not in sentence.lower():
            assert tokenizer.encode(sentence) == clip_tokenizer.encode(sentence), repr(sentence)


# ---- the word whose place <|mask|> takes ----


CRASHES = [crash["text"] for crash in TEXTS["crashes"]]  # the published code, by a KeyError


@pytest.mark.parametrize("text", CRASHES)
def test_the_exchanged_word_is_the_two_pieces_that_it_was_merged_from(tokenizer, clip_tokenizer, text):
    last_merge = max(clip_tokenizer.bpe_ranks, key=clip_tokenizer.bpe_ranks.get)
    assert "".join(last_merge) == "jekyll</w>"
    pieces = [clip_tokenizer.encoder[piece] for piece in last_merge]
    expected = []
    for i in clip_tokenizer.encode(text):
        expected += pieces if i == clip_tokenizer.encoder["jekyll</w>"] else [i]
    assert tokenizer.encode(text) == expected
    assert MASK not in expected and expected != clip_tokenizer.encode(text)


def squeezed(text):
    return "".join(text.split())


@pytest.mark.parametrize("text", CRASHES)
def test_the_exchanged_word_reads_the_same_after_decoding(tokenizer, text):
    assert squeezed(tokenizer.decode(tokenizer.encode(text))) == squeezed(text.lower())


# ---- special tokens typed in a caption ----


@pytest.mark.parametrize(("word", "special"), list(zip(SPECIAL_WORDS, (SOT, MASK, EOT), strict=True)))
def test_a_typed_special_token_is_its_special_id(tokenizer, word, special):
    assert tokenizer.encode(word) == [special]
    assert tokenizer.encode(word.upper()) == [special]
    hat, red = tokenizer.encode("hat"), tokenizer.encode("red")
    assert tokenizer.encode(f"red {word} hat") == [*red, special, *hat]
    assert tokenizer.encode(f"red{word}hat") == [*red, special, *hat]


# ---- decoding ----


def test_plain_words_come_back_from_their_ids(tokenizer):
    sentence = "a woman with a café au lait jacket , walking 2 dogs near the übergröße 漢字 sign "
    assert tokenizer.decode(tokenizer.encode("a man in a red coat")) == "a man in a red coat "
    assert squeezed(tokenizer.decode(tokenizer.encode(sentence))) == squeezed(sentence)


def test_every_caption_decodes_to_what_open_clip_reads_in_it(tokenizer):
    for caption in TEXTS["captions"]:
        wanted = open_clip.tokenizer.get_clean_fn("lower")(caption)
        assert squeezed(tokenizer.decode(tokenizer.encode(caption))) == squeezed(wanted), repr(caption)


def test_decoding_takes_a_tensor_and_survives_ids_that_cut_a_character(tokenizer):
    ids = tokenizer.encode("漢")
    assert len(ids) > 1
    assert isinstance(tokenizer.decode(ids[:1]), str)
    assert tokenizer.decode(torch.tensor(tokenizer.encode("red hat"))) == "red hat "


# ---- length ----


def test_a_caption_is_sot_ids_eot_and_zeros(tokenizer):
    red, hat = tokenizer.encode("red hat")
    ids = tokenize("red hat", tokenizer, 7)
    assert ids.tolist() == [SOT, red, hat, EOT, 0, 0, 0]
    assert ids.dtype == torch.long
    assert tokenize("", tokenizer, 4).tolist() == [SOT, EOT, 0, 0]


def test_a_longer_caption_is_cut_and_ends_in_eot(tokenizer):
    red = tokenizer.encode("red")
    assert tokenize("red " * 9, tokenizer, 5).tolist() == [SOT, *(red * 3), EOT]
    assert tokenize("red " * 3, tokenizer, 5).tolist() == [SOT, *(red * 3), EOT]


def test_without_truncation_a_longer_caption_is_an_error_that_counts_its_tokens(tokenizer):
    assert tokenize("red " * 3, tokenizer, 5, truncate=False)[-1] == EOT
    with pytest.raises(InputError, match="red red.* 6 tokens, more than 5"):
        tokenize("red " * 4, tokenizer, 5, truncate=False)


# ---- masking ----


def replayed_noise(caption_ids, seed):
    """The draws of the published loop over Python's `random`, laid out as mask_tokens takes them."""
    rng = random.Random(seed)
    noise = torch.full((len(caption_ids), 2, len(caption_ids[0])), 0.5, dtype=torch.float64)
    for row, ids in enumerate(caption_ids):
        for position, i in enumerate(ids):
            if 0 < i < 49405:
                probability = rng.random()
                noise[row, 0, position] = probability
                if probability < 0.15 and 0.9 > probability / 0.15 >= 0.8:
                    noise[row, 1, position] = (rng.choice(range(1, 49405)) - 1 + 0.5) / 49404
    return noise


@pytest.mark.parametrize("number", range(4))
def test_masks_and_labels_are_the_published_ones_under_the_same_draws(published_masking, number):
    caption_ids = published_masking["caption_ids"]
    noise = replayed_noise(caption_ids.tolist(), int(published_masking["seeds"][number]))
    ids, labels = mask_tokens(torch.from_numpy(caption_ids).long(), noise)
    assert ids.tolist() == published_masking["mlm_ids"][number].tolist()
    assert labels.tolist() == published_masking["mlm_labels"][number].tolist()


def test_the_captions_of_the_published_masking_have_the_published_ids(tokenizer, published_masking):
    ids = [tokenize(caption, tokenizer).tolist() for caption in MLM["captions"]]
    assert ids == published_masking["caption_ids"].tolist()


def test_masking_leaves_its_input_alone():
    ids = torch.tensor([[SOT, 320, 736, EOT, 0]])
    mask_tokens(ids, torch.zeros(1, 2, 5))
    assert ids.tolist() == [[SOT, 320, 736, EOT, 0]]


def test_sot_eot_mask_and_padding_are_never_chosen():
    ids = torch.tensor([[SOT, 320, MASK, 0, EOT, 0]])
    masked, labels = mask_tokens(ids, torch.zeros(1, 2, 6))
    assert masked.tolist() == [[SOT, MASK, MASK, 0, EOT, 0]]
    assert labels.tolist() == [[0, 320, 0, 0, 0, 0]]


def test_a_caption_with_nothing_chosen_gets_position_1_masked():
    ids = torch.tensor([[SOT, 320, 736, EOT, 0], [SOT, 736, 320, EOT, 0]])
    noise = torch.full((2, 2, 5), 0.99)
    noise[1, 0, 2] = 0.01
    masked, labels = mask_tokens(ids, noise)
    assert masked.tolist() == [[SOT, MASK, 736, EOT, 0], [SOT, 736, MASK, EOT, 0]]
    assert labels.tolist() == [[0, 320, 0, 0, 0], [0, 0, 320, 0, 0]]


def test_the_forced_mask_of_an_empty_caption_replaces_eot_so_that_argmax_reads_sot(tokenizer):
    ids = tokenize("", tokenizer)[None]
    masked, labels = mask_tokens(ids, torch.rand(1, 2, 77))
    assert masked[0, :3].tolist() == [SOT, MASK, 0]
    assert labels[0].nonzero().flatten().tolist() == [1] and labels[0, 1] == 49407
    assert ids.argmax() == 1 and masked.argmax() == 0


def test_the_forced_mask_of_a_caption_that_starts_with_id_0_has_no_label():
    masked, labels = mask_tokens(torch.tensor([[SOT, 0, 256, EOT]]), torch.full((1, 2, 4), 0.5))
    assert masked.tolist() == [[SOT, MASK, 256, EOT]]
    assert labels.tolist() == [[0, 0, 0, 0]]


def test_random_ids_reach_from_1_to_49404():
    ids = torch.tensor([[SOT, 320, 320, 320, EOT]])
    noise = torch.full((1, 2, 5), 0.15 * 0.85)  # chosen, to become random
    # from the least to the largest that fp32 draws
    noise[0, 1] = torch.tensor([0.0, 0.0, 0.5, 1 - 2**-24, 0.0])
    masked, _ = mask_tokens(ids, noise)
    assert masked.tolist() == [[SOT, 1, 1 + 24702, 49404, EOT]]


@pytest.mark.parametrize(
    ("mask_rate", "unchanged_rate", "fates"),
    [
        (1.0, 0.0, "mmmmm"),
        (0.0, 1.0, "kkkkk"),
        (0.0, 0.0, "rrrrr"),
        (0.5, 0.25, "mmrkk"),
        (0.8, 0.1, "mmmrk"),
        (0.25, 0.5, "mrkkk"),
    ],
)
def test_the_two_rates_decide_what_becomes_of_a_chosen_token(mask_rate, unchanged_rate, fates):
    ids = torch.tensor([[SOT, 320, 320, 320, 320, 320, EOT]])
    noise = torch.full((1, 2, 7), 0.5)
    noise[0, 0, 1:6] = 0.15 * torch.tensor([0.2, 0.4, 0.6, 0.85, 0.95])
    masked, labels = mask_tokens(ids, noise, mask_rate, unchanged_rate)
    became = {MASK: "m", 320: "k", 1 + 24702: "r"}
    assert "".join(became[i] for i in masked[0, 1:6].tolist()) == fates
    assert labels[0].tolist() == [0, *[320] * 5, 0]


# ---- masking: rates ----


@pytest.fixture(scope="module")
def many(tokenizer):
    """60 000 captions masked with drawn noise, as the loader draws it (fp32)."""
    captions = [tokenize(caption, tokenizer) for caption in MLM["statistics_captions"]]
    ids = torch.stack(captions).repeat(1500, 1)
    noise = torch.rand(len(ids), 2, 77, generator=torch.Generator().manual_seed(0))
    return ids, *mask_tokens(ids, noise)


def within(count, n, p, deviations=5):
    """Whether a binomial count is as near to its mean as all but one in a million would be."""
    return abs(count - n * p) <= deviations * math.sqrt(n * p * (1 - p)) + 1e-9


def test_as_many_tokens_are_labelled_as_published(many):
    ids, _, labels = many
    published, eligible = MLM["statistics"], ((ids > 0) & (ids < 49405)).sum(1)
    assert len(ids) == published["samples"] and eligible.sum() == published["eligible"]
    without = (0.85 ** eligible.double()).mean().item()  # the share of captions in which none is chosen
    assert without == pytest.approx(published["expected_forced_rate"], rel=1e-9)
    labelled, n = int((labels != 0).sum()), published["eligible"]
    forced = without * len(ids)  # these come on top of 15 %
    spread = math.sqrt(n * 0.15 * 0.85)  # forced labels go with captions that have none: the sum varies less
    assert abs(labelled - 0.15 * n - forced) < 5 * spread
    assert abs(labelled - published["labelled"]) < 5 * math.sqrt(2) * spread
    only_first = int(((labels != 0).sum(1) == 1)[labels[:, 1] != 0].sum())
    assert abs(only_first - published["labelled_first"]) < 5 * math.sqrt(2 * published["labelled_first"])


def test_labelled_tokens_split_into_80_percent_mask_10_random_10_kept(many):
    ids, masked, labels = many
    chosen = labels != 0
    # captions with a label at position 1 alone are left out: their mask may be a forced one
    only_first = (chosen.sum(1) == 1) & chosen[:, 1]
    chosen = chosen & ~only_first[:, None]
    n = int(chosen.sum())
    to_mask = int((masked[chosen] == MASK).sum())
    kept = int((masked[chosen] == ids[chosen]).sum())
    assert within(to_mask, n, 0.8)
    assert within(kept, n, 0.1 + 0.1 / 49404)  # a random id may happen to be the old one
    assert within(n - to_mask - kept, n, 0.1 - 0.1 / 49404)
    assert torch.equal(masked[labels == 0], ids[labels == 0])
    assert torch.equal(labels[labels != 0], ids[labels != 0])


def test_random_ids_are_uniform_over_1_to_49404(many):
    ids, masked, labels = many
    drawn = masked[(labels != 0) & (masked != MASK) & (masked != ids)]
    n = len(drawn)
    assert 1 <= drawn.min() <= 49404 * 20 / n and 49404 * (1 - 20 / n) <= drawn.max() <= 49404
    counts = torch.bincount((drawn - 1) * 100 // 49404, minlength=100).double()
    chi_square = ((counts - n / 100) ** 2 / (n / 100)).sum().item()
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)  # 99 degrees of freedom


@pytest.mark.parametrize("caption", ["hat", "a red hat"])
def test_short_captions_are_labelled_at_the_published_rates(tokenizer, caption):
    published, n = MLM["short"][caption], 40000
    ids = tokenize(caption, tokenizer, 8).repeat(n, 1)
    masked, labels = mask_tokens(ids, torch.rand(n, 2, 8, generator=torch.Generator().manual_seed(1)))
    words = published["eligible"]
    by_chance = [0.0, 0.15 + 0.85**words, *[0.15] * (words - 1), *[0.0] * (7 - words)]
    rates = (labels != 0).double().mean(0).tolist()
    for rate, p, seen in zip(rates, by_chance, published["labelled_rate_by_position"], strict=True):
        assert within(rate * n, n, p)
        assert abs(rate - seen) <= 5 * math.sqrt(2 * p * (1 - p) / n)
    only_first = ((masked == MASK).sum(1) == 1) & ((labels != 0).sum(1) == 1) & (masked[:, 1] == MASK)
    p = 0.85**words + 0.15 * 0.8 * 0.85 ** (words - 1)
    assert within(int(only_first.sum()), n, p)
    assert abs(only_first.double().mean() - published["only_position1_masked_rate"]) < 5 * math.sqrt(0.5 / n)
