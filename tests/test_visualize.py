"""visualize.py: the queries, curves and word maps that it draws are those of the run."""

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.synthetic import make_dataset
from datasets.transforms import normalise
from model import build_model
from model.build import in_precision
from processor.evaluator import Features
from retrieval.contact_sheet import retrieval_picture, spread
from retrieval.curves import draw_curves, labelled, read_scalars
from retrieval.encoders import Encoders, open_picture, open_run
from retrieval.queries import choose, outcomes
from retrieval.relevance import WAYS, WordMap, draw_word_maps, heat, word_maps, words_of
from tests import recipe
from tests.conftest import load_script
from tests.tiny_run import make_run, missing
from utils.metrics import rank_features
from utils.options import WORDS_BY, parser_of, tool_args

needs_matplotlib = missing("matplotlib", "matplotlib")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visualize")
    make_run(folder)
    return folder


@pytest.fixture
def visualize(home, tmp_path, capsys):
    script = load_script("visualize")

    def call(*words, run=home / "run"):
        words = [*map(str, words), "--output", str(tmp_path / "out")]
        status = script.main([*(["--config_file", str(run), "--device", "cpu"] if run else []), *words])
        out, err = capsys.readouterr()
        return status, [line for line in out.splitlines() if line.endswith(".png")], err

    return call


def image_of(home, number=0):
    return sorted((home / "data" / "CUHK-PEDES" / "imgs").rglob("*.jpg"))[number]


@pytest.fixture(scope="module")
def encoders(home):
    argv = ["--config_file", str(home / "run"), "--device", "cpu"]
    return open_run(tool_args(parser_of("visualize"), argv))


@pytest.fixture(scope="module")
def picture(home):
    return open_picture(image_of(home))


# ---- single queries ----


def hand_made():
    """Three queries over four images of persons 1, 1, 2, 3; the similarities stand in the features."""
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.5, 0.2],  # person 1: first
            [0.8, 0.1, 0.3, 0.7],  # person 2: third
            [0.1, 0.2, 0.3, 0.9],  # person 3: first, with the larger margin
            [0.1, 0.2, 0.3, 0.4],  # person 9: not there
        ]
    )
    return Features(similarity, torch.tensor([1, 2, 3, 9]), torch.eye(4), torch.tensor([1, 1, 2, 3]))


def test_outcomes_of_a_hand_made_split():
    outcome = outcomes(hand_made())
    assert outcome.first_rank.tolist() == [1, 3, 1, 5]
    assert outcome.margin[:3].tolist() == pytest.approx([0.4, -0.5, 0.6])


def test_the_worst_the_best_and_the_random_ones_are_chosen_each_once():
    outcome = outcomes(hand_made())
    assert choose(outcome, best=2) == [2, 0]
    assert choose(outcome, worst=2) == [3, 1]
    assert sorted(choose(outcome, best=4, worst=4, random=4)) == [0, 1, 2, 3]
    assert choose(outcome, random=2, seed=5) == choose(outcome, random=2, seed=5)


def test_first_ranks_give_the_cmc_of_the_table():
    torch.manual_seed(0)
    text, image = torch.randn(40, 8), torch.randn(30, 8)
    pids = torch.randint(0, 6, (40,)), torch.randint(0, 6, (30,))
    cmc = rank_features(text, image, *pids, 10).cmc
    ranks = outcomes(Features(text, pids[0], image, pids[1])).first_rank
    assert cmc.tolist() == pytest.approx([100 * float((ranks <= k).double().mean()) for k in range(1, 11)])


def test_one_picture_for_each_asked_query(visualize):
    status, written, _ = visualize("--queries", "0,3", "--best", 1, "--worst", 1)
    assert status == 0 and 2 <= len(written) <= 4
    names = [path.rsplit("/")[-1] for path in written]
    assert names[:2] == ["query_test_00000.png", "query_test_00003.png"]
    for path in written:
        width, height = Image.open(path).size
        assert width > 1000 and height > 500  # ten images side by side, two rows of them


def test_pictures_of_another_checkpoint_or_data_set_take_no_others_place(home, tmp_path, capsys):
    run = shutil.copytree(home / "run", tmp_path / "run")
    shutil.copy(run / "best.pth", run / "last.pth")
    make_dataset(tmp_path / "data", "RSTPReid", 3, 2, 6, 3)
    words = ["--config_file", str(run), "--device", "cpu", "--queries", "0"]
    more = [[], *(["--checkpoint", str(run / name)] for name in ("best.pth", "last.pth"))]
    more.append(["--dataset_name", "RSTPReid", "--root_dir", str(tmp_path / "data")])
    for each in more:
        assert load_script("visualize").main([*words, *each]) == 0, capsys.readouterr().err
    drawn = [str(path.parent.name) for path in run.rglob("query_test_00000.png")]
    assert sorted(drawn) == ["pictures", "pictures_RSTPReid", "pictures_last"]


def test_the_board_gets_a_picture_of_the_same_queries_each_time(home):
    paths, sentences = [str(image_of(home, n)) for n in range(4)], ["one", "two", "three", "four"]
    features = hand_made()
    indices = (features.text @ features.image.t()).argsort(dim=1, descending=True)
    picture = retrieval_picture(features, indices, paths, sentences, number=2)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert np.array_equal(picture, retrieval_picture(features, indices, paths, sentences, number=2))
    assert spread(100, 4) == [0, 25, 50, 75] and spread(2, 4) == [0, 1]


# ---- curves ----


@needs_matplotlib
def test_cmc_curve_is_drawn_and_matplotlib_is_needed_only_then(visualize, monkeypatch):
    status, written, _ = visualize("--cmc")
    assert status == 0 and written[0].endswith("cmc_test.png") and Image.open(written[0]).size[0] > 300
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, written, err = visualize("--cmc")
    assert status == 2 and "matplotlib" in err and "requirements-search.txt" in err
    assert visualize("--queries", "0")[0] == 0


def write_events(folder, values, tag="loss"):
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder)
    for epoch, value in enumerate(values, start=1):
        board.add_scalar(tag, value, epoch)
    board.close()


def test_curves_hold_what_the_event_files_hold(tmp_path):
    write_events(tmp_path / "run", [3.0, 2.0, 1.5])
    write_events(tmp_path / "run", [10.0, 40.0], "t2i/R1")  # a second file, as a resumed run has
    scalars = read_scalars(tmp_path / "run")
    assert scalars["loss"] == ([1, 2, 3], [3.0, 2.0, 1.5])
    assert scalars["t2i/R1"] == ([1, 2], [10.0, 40.0])


@needs_matplotlib
def test_several_runs_share_one_plot(visualize, tmp_path):
    runs = [tmp_path / name / "run" for name in ("a", "b")]
    for run, values in zip(runs, ([3.0, 2.0], [4.0, 1.0]), strict=True):
        write_events(run, values)
    assert list(labelled(runs)) == [str(run) for run in runs]
    assert draw_curves(runs, tmp_path / "c.png") == ["loss"]
    status, written, _ = visualize("--curves", *runs, run=None)
    assert status == 0 and written[0].endswith("curves.png")


# ---- where the words look ----


def test_words_keep_their_tokens(encoders):
    words = words_of("A woman in a T-shirt,  brown trousers.", encoders.tokenizer, 77)
    ids = encoders.tokens("A woman in a T-shirt,  brown trousers.")[0].tolist()
    said = [(word, encoders.tokenizer.decode([ids[p] for p in places])) for word, places in words]
    assert [word for word, _ in said] == ["a", "woman", "in", "a", "t-shirt,", "brown", "trousers."]
    assert said[4][1].split() == ["t", "shirt"] and said[6][1].strip() == "trousers"
    assert words_of("a woman & a man", encoders.tokenizer, 77)[2][0] == "&"
    assert [word for word, _ in words_of("one two three four", encoders.tokenizer, 5)] == [
        "one",
        "two",
        "three",
    ]


def test_maps_are_the_cross_attention_that_pytorch_computes(home, encoders, picture):
    path, sentence = image_of(home), "a man with a multicoloured rucksack"
    maps = word_maps(encoders, sentence, picture, "attention")
    model = encoders.model
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[:, : encoders.tokens(sentence).shape[1]] = encoders.tokens(sentence)
    with torch.no_grad():
        text = model.ln_pre_t(model.base_model.encode_text(ids))
        image = model.ln_pre_i(model.base_model.encode_image(normalise(encoders.pixels(path)[None])))
        _, weights = model.cross_attn(text, image, image)  # (1, L, N), PyTorch's own, mean over heads
    pieces = [len(encoders.tokenizer.encode(word)) for word in sentence.split()]
    assert max(pieces) > 1  # a word of several pieces is among them
    start = 1
    for (word, found), number, said in zip(maps, pieces, sentence.split(), strict=True):
        expected = weights[0, start : start + number, 1:].mean(0)
        assert word == said and found.shape == (6, 2)  # 96x32 pixels, patches of 16
        assert np.allclose(found.flatten(), expected, atol=1e-6)
        start += number


def rolled_out_by_hand(clip, pixels, direction):
    """(N,): the class token's row of Chefer et al.'s whole matrix, from the encoder written out once more."""
    visual, kept = clip.visual, []
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)[0]
    x = visual.ln_pre(torch.cat([visual.class_embedding[None], x]) + visual.positional_embedding)  # (N, W)
    for block in visual.transformer.resblocks:
        attn, y = block.attn, block.ln_1(x)
        q, k, v = (y @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, dim=1)
        heads = zip(*(part.chunk(attn.num_heads, dim=1) for part in (q, k, v)), strict=True)
        weights, outputs = [], []
        for q, k, v in heads:
            weights.append((q @ k.T / q.shape[1] ** 0.5).softmax(dim=1))
            weights[-1].retain_grad()
            outputs.append(weights[-1] @ v)
        kept.append(weights)
        x = x + attn.out_proj(torch.cat(outputs, dim=1))
        x = x + block.mlp(block.ln_2(x))
    feature = visual.ln_post(x)[0] @ visual.proj
    (feature @ direction / feature.norm()).backward()
    rolled = torch.eye(len(x))
    for weights in kept:
        positive = [(weight.grad * weight.detach()).clamp(min=0) for weight in weights]
        rolled = rolled + sum(positive) / len(positive) @ rolled
    clip.zero_grad()
    return rolled[0]


@torch.no_grad()
def text_without(clip, ids, left_out):
    """(D,): a sentence's feature, normalised, where nothing looks at these positions: PyTorch's own attention
    with a mask."""
    x = clip.token_embedding(ids) + clip.positional_embedding[: len(ids)]
    unseen = torch.ones(len(ids), len(ids)).triu(1).bool()
    unseen[:, left_out] = True
    for block in clip.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, attn_mask=unseen, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    feature = clip.ln_final(x)[-1] @ clip.text_projection  # the sentence ends with EOT
    return feature / feature.norm()


def test_relevance_is_the_rollout_of_what_a_word_adds_to_the_similarity(home, encoders, picture):
    """The words after it stay in their places."""
    words = "a man with a multicoloured rucksack".split()
    pixels, clip = normalise(encoders.pixels(image_of(home))[None]), encoders.model.base_model
    (ids,) = encoders.tokens(" ".join(words))
    maps = word_maps(encoders, " ".join(words), picture)
    assert [word for word, _ in maps] == words
    start = 1
    for word, found in maps:
        places = range(start, start + len(encoders.tokenizer.encode(word)))
        start = places.stop
        added = text_without(clip, ids, []) - text_without(clip, ids, list(places))
        row = rolled_out_by_hand(clip, pixels, added)[1:].numpy()
        assert np.allclose(found.flatten(), row, rtol=1e-3, atol=1e-5 * row.sum())
        assert not np.allclose(found, found.mean(), rtol=0.1)
    (fourth,) = word_maps(encoders, " ".join(words), picture, numbers=[4])
    assert fourth.word == "multicoloured" and np.allclose(fourth.map, maps[4].map, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_words_in_half_precision_look_where_those_of_the_same_weights_in_fp32_do(picture, precision):
    """By relevance, which is computed in fp32, to the last bit."""

    def encoders_of(model):
        return Encoders(model, (96, 32), 77, torch.device("cpu"), "")

    half = in_precision(recipe.tiny_model("sdm+mlm+id"), precision)
    whole = recipe.tiny_model("sdm+mlm+id")
    with torch.no_grad():
        for weight, rounded in zip(whole.parameters(), half.parameters(), strict=True):
            weight.copy_(rounded)
    for way, most in (("relevance", 0), ("attention", 0.02)):
        pairs = (word_maps(encoders_of(model), "a man", picture, way) for model in (half, whole))
        for found, expected in zip(*pairs, strict=True):
            assert np.allclose(found.map, expected.map, rtol=most, atol=0)
    assert any(weight.dtype == torch.float16 for weight in half.parameters()) == (precision == "fp16")


def test_a_word_that_is_not_read_looks_nowhere(encoders, picture):
    maps = word_maps(encoders, "a man <|endoftext|> coat", picture)
    assert [word for word, _ in maps] == ["a", "man", "<|endoftext|>", "coat"]
    assert not maps[3].map.any() and maps[1].map.any()


def test_relevance_needs_no_interaction_module_and_goes_with_every_image_encoder(picture, tmp_path):
    sizes = dict(embed_dim=64, grid=2, width=8, layers=(1, 2, 1, 1), text_width=64, text_layers=1)
    torch.save(recipe.resnet_weights(**sizes), tmp_path / "resnet.pt")
    resnet = build_model(recipe.tiny_args("sdm", pretrain_choice=tmp_path / "resnet.pt"), 3)
    selected = build_model(recipe.tiny_args("tal", token_selection=True), 3)
    strided = recipe.tiny_model("sdm", stride_size=8)
    for model, grid in ((resnet, (3, 1)), (selected, (6, 2)), (strided, (11, 3))):
        encoders = Encoders(model, (96, 32), 77, torch.device("cpu"), "")
        for _, found in word_maps(encoders, "a man in a red coat", picture):
            assert found.shape == grid and found.min() >= 0 and found.any()


def test_a_heat_map_is_light_where_the_weight_is(picture):
    weights = np.full((6, 2), 0.01)
    weights[4, 1] = 1
    drawn = np.asarray(heat(picture, weights), float).sum(axis=2)
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert 4 / 6 <= y / drawn.shape[0] <= 5 / 6 and x / drawn.shape[1] >= 0.5


def test_a_word_that_adds_little_is_dark_beside_one_that_adds_much_and_so_are_even_maps():
    much, even = np.full((6, 2), 1e-6), np.full((6, 2), 0.1)
    much[4, 1] = 1
    grey = Image.new("RGB", (128, 384), (128, 128, 128))
    maps = [WordMap("coat", much), WordMap("a", 1e-4 * much), WordMap("of", 0 * much)]
    reds = np.asarray(draw_word_maps(grey, maps).crop((0, 12, 1000, 268)))[..., 0]  # without the words
    tiles = np.split(reds[:, 12:], range(97, 400, 97), axis=1)  # 85 wide, 12 apart
    brightest = [int(tile[:, :85].max()) for tile in tiles[1:4]]
    assert brightest[0] > 180 and max(brightest[1:]) < 110
    assert brightest[2] == np.asarray(heat(grey, 0 * much))[..., 0].max()  # no number is divided by 0
    assert np.asarray(heat(grey, even))[..., 0].max() < 110


@pytest.mark.parametrize(
    "size, drawn",
    [((128, 384), (128, 384)), ((20, 4000), (48, 384)), ((4000, 20), (1536, 48)), ((2, 1), (768, 384))],
)
def test_a_heat_map_is_as_small_as_its_box_whatever_the_pictures_shape(size, drawn):
    assert heat(Image.new("RGB", size), np.ones((6, 2)), 384).size == drawn


def test_words_over_an_image_are_drawn_in_each_way(visualize, home):
    assert set(WAYS) == set(WORDS_BY)
    pictures = set()
    for way in WORDS_BY:
        words = "--words", "a woman in a red coat", "--image", image_of(home), "--words_by", way
        status, written, _ = visualize(*words)
        assert status == 0 and Image.open(written[0]).size[0] > 300
        pictures.add(Image.open(written[0]).tobytes())
    assert len(pictures) == len(WORDS_BY)


def test_a_model_without_the_interaction_module_says_so(visualize, home, tmp_path):
    run = make_run(tmp_path, "sdm+id")
    words = "--words", "a woman", "--image", image_of(home)
    status, _, err = visualize(*words, "--words_by", "attention", run=run)
    assert status == 2 and "without mlm" in err and len(err.strip().splitlines()) == 1
    assert visualize(*words, run=run)[0] == 0  # by relevance


@pytest.mark.parametrize(
    "run, words, said",
    [
        ("run", (), "nothing to draw"),
        ("run", ("--queries", "0,9999"), "no query 9999"),
        ("run", ("--words", "a woman"), "go together"),
        ("run", ("--words", " ", "--image", "IMAGE"), "--words is empty"),
        ("run", ("--words", "a woman", "--image", "none.jpg"), "no picture at none.jpg"),
        (None, ("--cmc",), "--config_file RUN is missing"),  # without a run only curves can be drawn
        (None, ("--curves", "FOLDER"), "no event files"),
        (None, ("--curves", "none"), "no run folder"),
    ],
)
def test_bad_input_is_one_sentence(visualize, home, run, words, said):
    paths = {"IMAGE": image_of(home), "FOLDER": home / "data"}
    status, _, err = visualize(*(paths.get(word, word) for word in words), run=run and home / run)
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1
