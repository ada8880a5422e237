"""export.py: in each form the two encoders give the run's features, and a stranger's program can use them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.export import can_write_onnx
from tests.conftest import load_script
from tests.tiny_run import make_run, missing

needs_onnx = [
    pytest.mark.skipif(not can_write_onnx(), reason="the ONNX form needs PyTorch 2.9 or newer"),
    *(missing(module, module, "requirements-search.txt") for module in ("onnx", "onnxscript", "onnxruntime")),
]
SENTENCES = ["a woman in a red coat", "a man, with a multicoloured rucksack " * 20]


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
    from retrieval.encoders import open_run
    from utils.tool_options import export_args

    return open_run(export_args([str(home / "run"), "--format", "onnx"]))


@pytest.fixture(scope="module")
def exported(home):
    """Folder of a form, exported once: exported("onnx")."""
    script, done = load_script("export"), {}

    def call(kind):
        if kind not in done:
            assert script.main([str(home / "run"), "--format", kind]) == 0
            done[kind] = home / "run" / "export" / kind
        return done[kind]

    return call


@pytest.fixture
def picture(home):
    return sorted((home / "data" / "CUHK-PEDES" / "imgs").rglob("*.jpg"))[0]


def own_features(encoders, picture):
    from datasets.tokenizer import tokenize_all
    from datasets.transforms import normalise

    with torch.no_grad():
        image = encoders.model.encode_image(normalise(encoders.pixels(picture)[None]))
        return image.numpy(), encoders.model.encode_text(tokenize_all(SENTENCES, 77)).numpy()


def test_safetensors_hold_the_runs_weights_by_openais_names(encoders, exported):
    from safetensors.torch import load_file

    weights = load_file(exported("safetensors") / "model.safetensors")
    own = encoders.model.base_model.state_dict()
    assert weights.keys() == own.keys() and "visual.proj" in weights
    assert all(torch.equal(weights[name], own[name]) for name in own)


@pytest.mark.parametrize("kind, name", [("safetensors", "model"), ("open_clip", "open_clip_model")])
def test_the_next_training_starts_from_exactly_these_positions(encoders, exported, kind, name):
    from model.pretrained import image_grid, load_clip, stored_grid

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


def with_onnx(function):
    for mark in needs_onnx:
        function = mark(function)
    return function


@with_onnx
def test_onnx_gives_the_same_features_for_any_batch_size_following_its_own_card(encoders, exported, picture):
    """The model card's example is what is run here: a reader has nothing else."""
    import onnxruntime

    card = (exported("onnx") / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("image_encoder.onnx", str(exported("onnx") / "image_encoder.onnx"))
    values = {}
    exec(code.replace("person.jpg", str(picture)), values)
    own_image, own_text = own_features(encoders, picture)
    own_image /= np.linalg.norm(own_image, axis=1, keepdims=True)
    assert np.abs(values["features"] - own_image).max() < 1e-4

    from datasets.tokenizer import tokenize_all

    session = onnxruntime.InferenceSession(str(exported("onnx") / "text_encoder.onnx"))
    for sentences in (SENTENCES, SENTENCES[:1], SENTENCES * 4):
        (text,) = session.run(None, {"ids": tokenize_all(sentences, 77).numpy()})
        assert np.abs(text[:1] - own_text[:1]).max() < 1e-4 and len(text) == len(sentences)


@pytest.mark.parametrize("kind", ["safetensors", "open_clip"])
def test_the_card_and_the_settings_say_what_a_stranger_needs(exported, kind):
    folder = exported(kind)
    card, settings = (folder / "README.md").read_text(), json.loads((folder / "irra.json").read_text())
    assert "12.345" in card and "CUHK-PEDES" in card and "largest difference" in card
    assert settings["image"]["size"] == [96, 32] and settings["text"]["mask"] == 49405
    assert (folder / settings["text"]["vocabulary"]).stat().st_size > 1_000_000
    assert settings["architecture"]["embed_dim"] == 128


def test_a_form_that_differs_is_not_written(home, tmp_path, monkeypatch, capsys):
    from retrieval import export

    script = load_script("export")
    monkeypatch.setitem(export.WRITERS, "safetensors", lambda *_: 0.01)
    words = [str(home / "run"), "--format", "safetensors", "--output", str(tmp_path / "out")]
    assert script.main(words) == 2
    assert "other features" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_open_clip_cannot_hold_is_refused(tmp_path, capsys):
    run = make_run(tmp_path, "sdm", stride_size=12)
    assert load_script("export").main([str(run), "--format", "open_clip"]) == 2
    assert "do not overlap" in capsys.readouterr().err
    assert load_script("export").main([str(run), "--format", "safetensors"]) == 0


def test_bad_input_is_one_sentence(home, capsys):
    script = load_script("export")
    with pytest.raises(SystemExit):
        script.main([str(home / "run"), "--format", "tensorflow"])
    assert "safetensors, onnx, open_clip" in capsys.readouterr().err
    assert script.main([str(home / "nowhere"), "--format", "onnx"]) == 2
    assert script.main([str(home / "run"), "--format", "onnx", "--output", "/proc/none/x"]) == 2
    assert "cannot make" in capsys.readouterr().err


@needs_onnx[0]
@needs_onnx[1]
def test_a_missing_package_is_a_sentence_with_the_command(home, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert load_script("export").main([str(home / "run"), "--format", "onnx"]) == 2
    err = capsys.readouterr().err
    assert "onnxruntime" in err and "python -m pip install -r requirements-search.txt" in err
