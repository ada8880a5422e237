"""A run keeps how its start's weights compute: training, testing, search, exports and resuming follow."""

import copy
import hashlib
import json

import pytest
import torch
import yaml

from datasets.synthetic import make_dataset
from model.build import build_trained_model, facts_to_keep, in_precision, new_model
from tests.conftest import load_script
from tests.recipe import arguments, fill, head_shapes, off, pixels, tiny_args
from tests.test_weights import IDS, put, reference, trained, weights_of, with_config
from tests.tiny_run import missing
from utils.checkpoint import load_checkpoint
from utils.errors import InputError

TALL = (96, 32)
GELU = {"activation": "gelu", "vision_head_width": 32, "transformer_head_width": 32}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data set, and a folder of open_clip's with GELU and heads of 32."""
    folder = tmp_path_factory.mktemp("starts")
    make_dataset(folder / "data", "CUHK-PEDES", 3, 2, 6, 3)
    options = dict(gelu=True, head=32, img_size=TALL)
    with_config(weights_of(reference(**options)), folder / "start", "open_clip_model.safetensors", **options)
    return folder


def words(home, **more):
    options = dict(
        name="gelu",
        pretrain_choice=home / "start",
        img_size=TALL,
        loss_names="sdm",
        device="cpu",
        num_epoch=1,
        batch_size=8,
        num_workers=0,
        root_dir=home / "data",
        output_dir=home / "logs",
    )
    return arguments(**{**options, **more})


@pytest.fixture(scope="module")
def run(home):
    assert load_script("train").main(words(home)) == 0
    (run,) = (home / "logs" / "CUHK-PEDES").iterdir()
    return run


@torch.no_grad()
def theirs(weights):
    """open_clip's model with a run's weights."""
    model = copy.deepcopy(reference(gelu=True, head=32, img_size=TALL))
    own = {key.removeprefix("base_model."): value for key, value in weights.items()}
    model.load_state_dict({**own, "logit_scale": torch.tensor(0.0)})
    return model.encode_image(pixels(3, (2, 3, *TALL))), model.encode_text(IDS)


def test_configs_and_checkpoints_of_a_run_say_it(run):
    assert yaml.safe_load((run / "configs.yaml").read_text())["activation"] == "gelu"
    for name in ("best.pth", "last.pth"):
        assert torch.load(run / name, weights_only=True)["clip"] == GELU


@torch.no_grad()
def test_search_and_exports_compute_as_the_run_did(run):
    from model.pretrained import load_clip
    from retrieval.encoders import fingerprint_of, open_run
    from utils.tool_options import export_args

    encoders = open_run(export_args([str(run), "--format", "safetensors"]))
    weights = load_checkpoint(run / "best.pth")["model"]
    images, text = theirs(weights)
    assert off(encoders.model.encode_image(pixels(3, (2, 3, *TALL))), images) < 1e-5
    assert off(encoders.model.encode_text(IDS), text) < 1e-5
    assert encoders.fingerprint != fingerprint_of(weights, TALL, 16)
    for kind in ("safetensors", "open_clip"):  # each compares with the run before it is written
        assert load_script("export").main([str(run), "--format", kind]) == 0
        settings = json.loads((run / "export" / kind / "irra.json").read_text())
        assert settings["architecture"].items() >= GELU.items()
        again = load_clip(str(run / "export" / kind), TALL, 16)
        assert again.facts == GELU and off(again.encode_image(pixels(3, (2, 3, *TALL)))[:, 0], images) < 1e-5


@missing("tokenizers", "tokenizers")
@missing("transformers", "transformers")
@torch.no_grad()
def test_the_form_for_transformers_computes_as_the_run_did_and_can_be_a_start_again(run):
    from model.pretrained import load_clip

    assert load_script("export").main([str(run), "--format", "transformers"]) == 0
    images, _ = theirs(load_checkpoint(run / "best.pth")["model"])
    again = load_clip(str(run / "export" / "transformers"), TALL, 16)
    assert again.facts == GELU and off(again.encode_image(pixels(3, (2, 3, *TALL)))[:, 0], images) < 1e-5


def test_test_py_finds_what_training_found(run):
    assert load_script("test").main(["--config_file", str(run), "--device", "cpu"]) == 0
    logged = (run / "train_log.txt").read_text().rsplit("best R1: ", 1)[1].split()[0]
    assert json.loads((run / "results.json").read_text())["t2i"]["R1"] == pytest.approx(float(logged))


def test_a_run_goes_on_with_its_activation(run, home, capsys):
    """Also where the weights that it began with are gone, as a job's own disk is."""
    train = load_script("train")
    resumed = ["--resume", "--resume_ckpt_file", str(run), "--num_epoch", "2"]
    (home / "start").rename(home / "gone")
    try:
        assert train.main(resumed) == 0
    finally:
        (home / "gone").rename(home / "start")
    assert torch.load(run / "last.pth", weights_only=True)["clip"] == GELU
    assert train.main([*resumed, "--activation", "quick_gelu"]) == 2
    assert "cannot be resumed" in capsys.readouterr().err


def test_a_run_like_openais_has_the_published_parts_and_its_earlier_fingerprint(tmp_path):
    from retrieval.encoders import fingerprint_of

    model = new_model(tiny_args("sdm"), 5)
    assert facts_to_keep(model) == {}
    weights = {"base_model.visual.proj": torch.arange(6.0).reshape(2, 3)}
    earlier = hashlib.blake2b(b"[4, 2] 1base_model.visual.proj [2, 3]", digest_size=16)
    earlier.update(weights["base_model.visual.proj"].numpy())
    assert fingerprint_of(weights, (4, 2), 1) == earlier.hexdigest()


@pytest.mark.parametrize(
    "said",
    [3, {}, *({**GELU, "activation": word} for word in (1, "relu", ["gelu"]))]
    + [{**GELU, "vision_head_width": width} for width in ("wide", 0, 1.5)],
)
def test_a_checkpoint_that_says_nonsense_is_refused(said, run):
    args = tiny_args("sdm")
    with pytest.raises(InputError, match='best.pth: its part "clip"'):
        build_trained_model(args, load_checkpoint(run / "best.pth")["model"], "best.pth", said)


def test_gelu_computes_in_halves_too(home):
    options = dict(pretrain_choice=home / "start", stride_size=16)
    full, half = (new_model(tiny_args("sdm", **options), 5) for _ in range(2))
    half = in_precision(half, "fp16")
    with torch.no_grad():
        assert off(half.encode_text(IDS), full.encode_text(IDS)) < 0.01


# ---- heads ----


def with_heads(path, cmt_depth=2):
    shapes = head_shapes("mlm+id", 64, 9, cmt_depth)
    heads = {name: fill(name, shape) for name, shape in shapes.items()}
    return trained(weights_of(reference(img_size=TALL)), path, **heads), heads


def test_heads_of_a_file_are_kept_when_asked_for_but_no_classifier(tmp_path):
    path, heads = with_heads(tmp_path / "best.pth")
    options = dict(pretrain_choice=path, loss_names="sdm+mlm+id")
    anew, kept = (new_model(tiny_args(**options, **more), 9) for more in ({}, {"keep_heads": True}))
    for name, value in kept.state_dict().items():
        if not name.startswith("base_model."):
            same = torch.equal(value, heads[name])
            assert same != name.startswith("classifier."), name
    assert not torch.equal(anew.state_dict()["mlm_head.fc.weight"], heads["mlm_head.fc.weight"])


def test_heads_that_cannot_be_kept_are_named(tmp_path):
    path, _ = with_heads(tmp_path / "best.pth", cmt_depth=1)
    with pytest.raises(InputError, match="lacks cross_modal_transformer.resblocks.1"):
        new_model(tiny_args("sdm+mlm", pretrain_choice=path, keep_heads=True), 9)
    with pytest.raises(InputError, match="--keep_heads: no loss of this run has one"):
        new_model(tiny_args("sdm+id", pretrain_choice=path, keep_heads=True), 9)
    with pytest.raises(SystemExit):
        tiny_args("sdm", pretrain_choice="random", keep_heads=True)


def test_long_clip_reads_captions_of_248_tokens_and_others_say_what_they_read(tmp_path):
    path = put(weights_of(reference(context=248, img_size=TALL)), tmp_path / "long.pt")
    args = tiny_args("sdm", pretrain_choice=path, text_length=248, position_grid=(6, 2))
    assert len(new_model(args, 5).base_model.positional_embedding) == 248
    with pytest.raises(InputError, match="--text_length 249: the text encoder has 248 positions"):
        new_model(tiny_args("sdm", pretrain_choice=path, text_length=249), 5)
