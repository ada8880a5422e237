"""export.py: in each form the two encoders give the run's features, and a stranger's program can use them."""

import functools
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.tokenizer import EOT, SOT, SimpleTokenizer, tokenize_all
from datasets.transforms import STD, normalise, read_image, resize
from model.pretrained import image_grid, load_clip
from model.weights_file import stored_grid
from retrieval import export
from retrieval.cards import TEXTS, UNREAD, model_card
from retrieval.encoders import open_run
from retrieval.export import can_write_onnx, check_plain_vit
from retrieval.transformers_clip import square_positions
from tests.conftest import ROOT, load_script
from tests.full_disk import limited
from tests.tiny_run import make_run, missing
from utils.errors import InputError
from utils.options import FORMATS
from utils.tool_options import export_args

needs_onnx = [
    pytest.mark.skipif(not can_write_onnx(), reason="the ONNX form needs PyTorch 2.9 or newer"),
    *(missing(module, module) for module in ("onnx", "onnxscript", "onnxruntime", "tokenizers")),
]
needs_transformers = missing("transformers", "transformers")
ONNX = pytest.param("onnx", marks=needs_onnx)
KINDS = ["safetensors", ONNX, "open_clip", pytest.param("transformers", marks=needs_transformers)]
SENTENCES = ["a woman in a red coat", "a man, with a multicoloured rucksack " * 20]


def another_run(home, folder, loss_names="sdm", **options):
    """A run on the same data set."""
    os.symlink(home / "data", folder / "data")
    return make_run(folder, loss_names, **options)


def exports(run, kind="safetensors", *more):
    """The status of export.py."""
    return load_script("export").main([str(run), "--format", kind, *map(str, more)])


def encoders_of(run):
    return open_run(export_args([str(run), "--format", "onnx"]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_run(folder)
    (folder / "run" / "results.json").write_text(
        json.dumps({"split": "test", "queries": 36, "gallery": 18, "t2i": {"R1": 12.345, "mAP": 6.789}})
    )
    return folder


@pytest.fixture(scope="module")
def encoders(home):
    return encoders_of(home / "run")


def exported_once(run):
    @functools.cache
    def folder(kind):
        assert exports(run, kind) == 0
        return run / "export" / kind

    return folder


@pytest.fixture(scope="module")
def exported(home):
    """Folder of a form, exported once: exported("onnx")."""
    return exported_once(home / "run")


@pytest.fixture(scope="module")
def plain_run(home, tmp_path_factory):
    """It reads sentences without punctuation."""
    return another_run(home, tmp_path_factory.mktemp("plain"), plain_captions=True)


@pytest.fixture(scope="module")
def plain(plain_run):
    """Folder of a form of that run."""
    return exported_once(plain_run)


@pytest.fixture
def picture(home):
    return sorted((home / "data" / "CUHK-PEDES" / "imgs").rglob("*.jpg"))[0]


def own_features(encoders, picture):
    with torch.no_grad():
        image = encoders.model.encode_image(normalise(encoders.pixels(picture)[None]))
        return image.numpy(), encoders.model.encode_text(tokenize_all(SENTENCES, 77)).numpy()


def example_of(folder, kind, picture, old="", new=""):
    """[[similarity, sentence], …]: what the example of a card prints, in which the old words are new ones."""
    (folder / "person.jpg").write_bytes(picture.read_bytes())
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace(old, new)
    path = [str(ROOT)] * (kind == "safetensors") + [os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split("  ", 1) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_each_card_runs_as_it_stands_and_ranks_as_the_run(kind, encoders, exported, picture):
    """A reader has nothing else. Only the safetensors form needs this repository's code."""
    shown = example_of(exported(kind), kind, picture)
    assert len(shown) == 2
    image = encoders.image_features([encoders.pixels(picture)])
    own = encoders.text_features([sentence for _, sentence in shown]) @ image.T
    assert [float(value) for value, _ in shown] == pytest.approx(own[:, 0].tolist(), abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_in_each_form_of_a_run_that_leaves_punctuation_out_the_example_does_too(
    kind, plain_run, plain, picture
):
    folder, encoders = plain(kind), encoders_of(plain_run)
    shown = example_of(folder, kind, picture, "a woman in", "A *woman* (30): in!")
    assert shown[0][1].startswith("A *woman* (30): in! a red coat")
    image = encoders.image_features([encoders.pixels(picture)])
    own = encoders.text_features(["a woman 30 in a red coat with a black bag", shown[1][1]]) @ image.T
    assert [float(value) for value, _ in shown] == pytest.approx(own[:, 0].tolist(), abs=2e-4)
    card, settings = (folder / "README.md").read_text(), json.loads((folder / "irra.json").read_text())
    assert """without `. ! " ( ) * # : ; ~`""" in card and "to a space" in settings["text"]["cleaning"]


def test_each_form_has_a_writer_and_a_card():
    assert tuple(export.WRITERS) == tuple(UNREAD) == FORMATS
    assert {path.stem for path in TEXTS.iterdir()} == {*FORMATS, "card"}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_hub_reads_the_cards_front_matter(kind, home, encoders):
    from huggingface_hub import ModelCard

    args = export_args([str(home / "run"), "--format", kind])
    card = ModelCard(model_card(args, export.described(encoders, args), kind, 1e-6))
    read = card.data.to_dict()
    assert read["library_name"] == ("pytorch" if kind == "safetensors" else kind)
    assert read["pipeline_tag"] == "zero-shot-image-classification" and "clip" in read["tags"]
    assert (read["license"], read["license_name"]) == ("other", "to-be-filled-in")
    assert card.text.lstrip().startswith("# ")


def test_safetensors_hold_the_runs_weights_by_openais_names(encoders, exported):
    from safetensors.torch import load_file

    weights = load_file(exported("safetensors") / "model.safetensors")
    own = encoders.model.base_model.state_dict()
    assert weights.keys() == own.keys() and "visual.proj" in weights
    assert all(torch.equal(weights[name], own[name]) for name in own)


@pytest.mark.parametrize("kind, name", [("safetensors", "model"), ("open_clip", "open_clip_model")])
def test_the_next_training_starts_from_exactly_these_positions(encoders, exported, kind, name):
    path = exported(kind) / f"{name}.safetensors"
    sizes = {"vision_patch_size": 16}
    assert stored_grid(path) == image_grid(sizes, encoders.img_size, 16)
    key = "visual.positional_embedding"
    clip = load_clip(str(path), encoders.img_size, 16)
    assert torch.equal(clip.state_dict()[key], encoders.model.base_model.state_dict()[key])


def test_open_clip_loads_the_folder_and_gives_the_same_features(encoders, exported, picture):
    import open_clip

    name = f"local-dir:{exported('open_clip')}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    ids = open_clip.get_tokenizer(name)(SENTENCES)
    model.eval()
    with torch.no_grad():
        image = model.encode_image(preprocess(Image.open(picture))[None]).numpy()
        text = model.encode_text(ids).numpy()
    own_image, own_text = own_features(encoders, picture)
    assert np.abs(image - own_image).max() < 1e-4
    assert np.abs(text - own_text).max() < 1e-4
    assert float(model.logit_scale.detach().exp()) == pytest.approx(1 / 0.02)


@pytest.mark.parametrize("kind", [ONNX])
def test_onnx_gives_the_same_features_for_any_batch_size(kind, encoders, exported, picture):
    import onnxruntime
    from tokenizers import Tokenizer

    own_image, own_text = own_features(encoders, picture)
    session = onnxruntime.InferenceSession(str(exported(kind) / "image_encoder.onnx"))
    (image,) = session.run(None, {"images": normalise(encoders.pixels(picture)[None]).numpy()})
    assert np.abs(image - own_image).max() < 1e-4
    session = onnxruntime.InferenceSession(str(exported(kind) / "text_encoder.onnx"))
    tokenizer = Tokenizer.from_file(str(exported(kind) / "tokenizer.json"))
    for sentences in (SENTENCES, SENTENCES[:1], SENTENCES * 4):
        ids = np.array([each.ids for each in tokenizer.encode_batch(sentences)])
        (text,) = session.run(None, {"ids": ids})
        assert np.abs(text[:1] - own_text[:1]).max() < 1e-4 and len(text) == len(sentences)


# ---- transformers ----


def loaded(folder):
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder, backend="pil")


@torch.no_grad()
def their_features(folder, picture, sentences):
    """What transformers alone makes of the folder: features, L2-normalised, and the scale of the scores."""
    model, processor = loaded(folder)
    inputs = processor(
        text=sentences, images=Image.open(picture), return_tensors="pt", padding=True, truncation=True
    )
    found = model(**inputs, interpolate_pos_encoding=True)
    return found.image_embeds.numpy(), found.text_embeds.numpy(), float(model.logit_scale.exp())


@needs_transformers
def test_transformers_loads_the_folder_and_gives_the_same_features(encoders, exported, picture):
    image, text, scale = their_features(exported("transformers"), picture, SENTENCES)
    assert np.abs(image - encoders.image_features([encoders.pixels(picture)])).max() < 1e-5
    assert np.abs(text - encoders.text_features(SENTENCES)).max() < 1e-5
    assert scale == pytest.approx(1 / 0.02)


@needs_transformers
@pytest.mark.parametrize(
    "size, most",
    [((384, 128), 1e-5), ((192, 96), 1e-4), ((48, 80), 1e-4), ((64, 64), 1e-5), ((70, 40), 1e-4)],
)
def test_transformers_gives_the_same_features_at_any_image_size(size, most, home, tmp_path, picture):
    """Grids of 24 x 8, 12 x 6, 3 x 5, a square one, and sides that are no multiples of a patch."""
    run = another_run(home, tmp_path, img_size=list(size))
    own = encoders_of(run).image_features([resize(read_image(picture), size)])
    image, _, _ = their_features(exported_once(run)("transformers"), picture, SENTENCES)
    assert np.abs(image - own).max() < most


@needs_transformers
@pytest.mark.parametrize(
    "grid, most", [((24, 8), 0), ((6, 2), 0), ((8, 24), 0), ((14, 14), 0), ((12, 6), 1e-6), ((16, 5), 1e-6)]
)
def test_transformers_own_interpolation_gives_our_positions_back(grid, most):
    from transformers.models.clip.modeling_clip import CLIPVisionConfig, CLIPVisionEmbeddings

    positions = torch.randn(1 + grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
    square = square_positions(positions, grid)
    config = CLIPVisionConfig(hidden_size=8, num_attention_heads=1, image_size=max(grid) * 16, patch_size=16)
    embeddings = CLIPVisionEmbeddings(config)
    embeddings.position_embedding.weight.data = square
    tokens = torch.zeros(1, len(positions), 8)
    with torch.no_grad():
        found = embeddings.interpolate_pos_encoding(tokens, grid[0] * 16, grid[1] * 16)
    assert (found.squeeze(0) - positions).abs().max() <= most


def test_of_24_x_8_positions_each_column_stands_three_times():
    positions = torch.randn(1 + 24 * 8, 4)
    square = square_positions(positions, (24, 8))
    columns = positions[1:].reshape(24, 8, 4).repeat_interleave(3, dim=1)
    assert torch.equal(square[1:].reshape(24, 24, 4), columns) and torch.equal(square[0], positions[0])


CAPTIONS = [
    *SENTENCES,
    "",
    "!",
    "!! what a coat!",  # "!" is the padding's piece
    "a <|mask|> and a <|MASK|>, no,<|mask|>",
    "the end <|endoftext|> and more <|startoftext|>",
    "Jekyll and Hyde",  # the word whose place the mask takes
    "don't they're it's 'S",
    " \u201ccurly\u201d man\u2019s  cafe\u0301 \ufb01ne \uff21 &amp; &lt;b&gt; &quot;q&quot;\n\t\ufeffx\x0by",
    "T-shirt (15% off) snake_case 3.14 \U0001f600 \u65e5\u672c",
]


@needs_transformers
@pytest.mark.parametrize("leaves_out", [False, True])
def test_transformers_tokeniser_gives_our_ids_padding_included(leaves_out, exported, plain):
    _, processor = loaded((plain if leaves_out else exported)("transformers"))
    ids = processor(text=CAPTIONS, return_tensors="pt", padding="max_length", truncation=True).input_ids
    for caption, found, own in zip(CAPTIONS, ids, tokenize_all(CAPTIONS, 77, leaves_out), strict=True):
        assert found.tolist() == own.tolist(), caption
    assert len(processor.tokenizer) == 49408


@needs_transformers
@pytest.mark.parametrize("leaves_out", [False, True])
def test_transformers_tokeniser_gives_our_ids_for_whatever_is_typed(leaves_out, exported, plain):
    from tokenizers import Tokenizer

    own, folder = SimpleTokenizer(plain=leaves_out), (plain if leaves_out else exported)("transformers")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    letters = string.printable.replace("&", "")  # entities need html's list
    pieces = [*letters, "<|mask|> ", ",<|Mask|> ", " <|endoftext|>", "jekyll", "'s", "n't"]
    drawn = random.Random(0)
    for _ in range(2000):
        text = "".join(drawn.choices(pieces, k=drawn.randrange(12)))
        assert theirs.encode(text).ids == [SOT, *own.encode(text), EOT], text


@needs_transformers
@pytest.mark.parametrize("backend, most", [("pil", 1e-6), (None, 1.01 / 255 / min(STD))])
def test_transformers_processor_gives_our_pixels(backend, most, encoders, exported, picture):
    """By torchvision's resizing, its choice where it is asked for none, up to a grey level."""
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(exported("transformers"), backend=backend)
    pixels = processor(images=Image.open(picture), return_tensors="pt")["pixel_values"]
    assert (pixels - normalise(encoders.pixels(picture)[None])).abs().max() < most


# ---- whatever the form ----


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not ONNX])
def test_the_card_and_the_settings_say_what_a_stranger_needs(exported, kind):
    folder = exported(kind)
    card, settings = (folder / "README.md").read_text(), json.loads((folder / "irra.json").read_text())
    assert "12.345" in card and "CUHK-PEDES" in card and "largest difference" in card
    assert settings["image"]["size"] == [96, 32] and settings["text"]["mask"] == 49405
    assert (folder / settings["text"]["vocabulary"]).stat().st_size > 1_000_000
    assert settings["architecture"]["embed_dim"] == 128


def test_a_card_has_no_figures_of_the_weights_that_were_best_before_training_went_on(
    home, encoders, tmp_path
):
    run = shutil.copytree(home / "run", tmp_path / "run")
    args, epoch = export_args([str(run), "--format", "safetensors"]), encoders.epoch
    assert epoch == torch.load(run / "best.pth")["epoch"]
    results = json.loads((run / "results.json").read_text())
    for tested, of_these in ((epoch, True), (epoch - 1, False)):
        (run / "results.json").write_text(json.dumps({**results, "epoch": tested}))
        card = model_card(args, export.described(encoders, args), "safetensors", 1e-6)
        assert ("12.345" in card) == of_these and ("has not been tested" in card) != of_these


def test_a_form_that_differs_is_not_written(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(export.WRITERS, "safetensors", lambda *_: 0.01)
    assert exports(home / "run", "safetensors", "--output", tmp_path / "out") == 2
    assert "other features" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not ONNX])
@pytest.mark.parametrize("room", [1 << 10, 1 << 20])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(room, kind, home, tmp_path, capsys):
    with limited(room):
        assert exports(home / "run", kind, "--output", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "File too large" in err and "not complete" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(home, tmp_path, capsys):
    def run(folder):
        return exports(home / "run", "safetensors", "--output", folder), capsys.readouterr().err

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    status, err = run(tmp_path / "mine")
    said = "holds other files than an earlier export's (README.md): give another --output"
    assert status == 2 and said in err
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    (tmp_path / "clone" / ".git").mkdir(parents=True)  # of a repository on the hub
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    left = tmp_path / f".clone.{ended.stdout.strip()}"  # by an export that was killed
    left.mkdir()
    for _ in range(2):
        assert run(tmp_path / "clone") == (0, "")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "mine"]
    assert "irra.json" in os.listdir(tmp_path / "clone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_a_signal_ends_leaves_nothing(number, home, tmp_path, monkeypatch):
    def stopped(*_):
        os.kill(os.getpid(), number)

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setitem(export.WRITERS, "safetensors", stopped)
    try:
        assert exports(home / "run", "safetensors", "--output", tmp_path / "out") == 130
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_features_are_no_numbers_is_not_written(home, tmp_path, capsys):
    state = torch.load(home / "run" / "best.pth")
    state["model"]["base_model.text_projection"] *= float("nan")
    torch.save(state, tmp_path / "nan.pth")
    words = "--checkpoint", tmp_path / "nan.pth", "--output", tmp_path / "out"
    assert exports(home / "run", "safetensors", *words) == 2
    assert "not numbers" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pth"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_that_was_made_smaller_is_exported(dtype, home, tmp_path):
    state = torch.load(home / "run" / "best.pth")
    state["model"] = {name: value.to(dtype) for name, value in state["model"].items()}
    torch.save(state, tmp_path / "small.pth")
    words = "--checkpoint", tmp_path / "small.pth", "--output", tmp_path / "out"
    assert exports(home / "run", "safetensors", *words) == 0


def test_whoever_may_read_a_new_file_may_read_an_export(exported, tmp_path):
    (tmp_path / "plain").touch()
    for path in exported("safetensors").iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, path


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_what_another_programs_clip_cannot_be_is_refused(kind, home, tmp_path, capsys):
    run = another_run(home, tmp_path, stride_size=12)
    assert exports(run, kind) == 2
    err = capsys.readouterr().err
    said = f"{kind}'s patches do not overlap (--stride_size 12, patches of 16): choose"
    assert said in err and err.count("\n") == 1
    assert exports(run, "safetensors") == 0
    with pytest.raises(InputError, match="ResNet"):
        check_plain_vit({"architecture": {"vision_patch_size": None, "stride_size": 16}}, kind)


def test_bad_input_is_one_sentence(home, capsys):
    with pytest.raises(SystemExit):
        exports(home / "run", "tensorflow")
    assert "safetensors, onnx, open_clip, transformers" in capsys.readouterr().err
    assert exports(home / "nowhere", "onnx") == 2
    assert exports(home / "run", "onnx", "--output", "/proc/none/x") == 2
    assert "cannot make the folder /proc/none: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, module",
    [pytest.param("onnx", "onnxruntime", marks=needs_onnx), ("transformers", "transformers")],
)
def test_a_missing_package_is_a_sentence_with_the_command(kind, module, home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert exports(home / "run", kind) == 2
    err = capsys.readouterr().err
    assert module in err and "python -m pip install -r requirements-search.txt" in err
