"""Every form of CLIP weights gives the features of the library that wrote it; others are refused by name.

open_clip's models are another implementation of the same ones: with the same random weights they have to give
the same features as ours.
"""

import copy
import functools
import json
import pickle
import struct
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import PurePosixPath
from types import SimpleNamespace

import open_clip
import pytest
import torch
from easydict import EasyDict
from safetensors.torch import save_file

from model.irra import at_eot, pooled
from model.pretrained import arithmetic, known_grids, load_clip, resize_positions
from model.weights import FAMILIES, FORMS, read_start
from tests.recipe import off, pixels
from tests.tiny_run import missing
from utils.errors import InputError
from utils.plain_load import OPTIONS

TOLERANCE = 1e-5
SQUARE, TALL = (64, 64), (96, 32)  # pixels; patches of 16
IDS = torch.zeros(3, 77, dtype=torch.long)  # captions of three lengths, the last one full
for row, length in enumerate((1, 11, 75)):
    IDS[row, : length + 2] = torch.tensor([49406, *range(5 + row, 5 + row + length), 49407])


# ---- a small model of open_clip's ----


def sizes(img_size=SQUARE, gelu=False, head=64, context=77, resnet=False):
    """An open_clip model_cfg."""
    vision = dict(image_size=list(img_size), layers=2, width=128, head_width=head, patch_size=16)
    if resnet:
        vision = dict(image_size=64, layers=[1, 2, 1, 1], width=16, head_width=64, patch_size=None)
    text = dict(context_length=context, vocab_size=49408, width=64, heads=64 // head, layers=2)
    return dict(embed_dim=64, quick_gelu=not gelu, vision_cfg=vision, text_cfg=text)


@functools.cache
def reference(**options):
    """open_clip's model of these sizes, not to be changed; no parameter or running statistic is at its
    starting value."""
    cfg = sizes(**options)
    torch.manual_seed(0)
    model = open_clip.model.CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"], cfg["quick_gelu"])
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                value.normal_(std=0.1)
            elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
    return model.eval()


def weights_of(model):
    return {key: value.clone().contiguous() for key, value in model.state_dict().items()}


# ---- a row for each form: the model whose features are expected, and how its file is written ----


def put(weights, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


def with_config(weights, folder, name, **options):
    put(weights, folder / name)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes(**options)}))
    return folder


def text_tower(weights):
    """As open_clip's CustomTextCLIP has them."""
    return {k if k.startswith(("visual.", "logit")) else f"text.{k}": value for k, value in weights.items()}


THEIRS = {  # OpenAI's names, or beginnings and parts of them, in transformers
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn": "self_attn", "c_fc": "fc1", "c_proj": "fc2"}


def as_transformers(weights):
    found = {}
    for key, value in weights.items():
        begin = max((name for name in THEIRS if key.startswith(name)), key=len, default=None)
        if key in ("visual.proj", "text_projection"):
            found[f"{key.split('.')[0].split('_')[0]}_projection.weight"] = value.T.contiguous()
        elif begin is None:
            found[key] = value
        else:
            name = THEIRS[begin] + key[len(begin) :]
            for ours, theirs in PARTS.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            if "in_proj" in name:
                stem, kind = name.split(".in_proj_")
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    found[f"{stem}.{part}_proj.{kind}"] = third.contiguous()
            else:
                found[name] = value
    return found


def transformers_config(gelu=False, head=64):
    act = "gelu" if gelu else "quick_gelu"
    text = {"hidden_size": 64, "num_attention_heads": 64 // head, "hidden_act": act}
    vision = {"hidden_size": 128, "num_attention_heads": 128 // head, "hidden_act": act}
    vision |= {"image_size": 64, "patch_size": 16}
    return {"model_type": "clip", "projection_dim": 64, "text_config": text, "vision_config": vision}


def transformers_folder(weights, folder, files=1, **options):
    weights = as_transformers(weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(transformers_config(**options)))
    if files == 1:
        put(weights, folder / "model.safetensors")
        return folder
    names = {key: f"model-{n % files + 1:05}-of-{files:05}.safetensors" for n, key in enumerate(weights)}
    for name in set(names.values()):
        put({key: weights[key] for key in weights if names[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def old_transformers(weights, folder):
    places = {f"{part}_model.embeddings.position_ids": torch.arange(77)[None] for part in ("text", "vision")}
    put({**as_transformers(weights), **places}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(transformers_config()))
    return folder / "pytorch_model.bin"


def trained(weights, path, before="base_model.", **more):
    """As IRRA's family saves a run, with its optimiser and numbers."""
    heads = {"classifier.weight": torch.zeros(7, 64), "cross_attn.in_proj_bias": torch.zeros(192)}
    own = {f"base_model.{key}": value for key, value in weights.items() if not key.startswith("logit")}
    model = {
        before.removesuffix("base_model.") + key: value for key, value in {**own, **heads, **more}.items()
    }
    return put({"model": model, "optimizer": {"state": {}}, "epoch": 3, "scheduler": {}}, path)


def long_clip(weights, path):
    """Theirs adds positional_embedding · mask1 + positional_embedding_res · mask2."""
    whole = weights.pop("positional_embedding")
    first, rest = torch.randn_like(whole), torch.randn_like(whole)
    first[:20], rest[20:] = whole[:20], whole[20:]
    return put({**weights, "positional_embedding": first, "positional_embedding_res": rest}, path)


def archive(weights, path):
    from tests.test_pretrained import module_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = {**weights, "input_resolution": torch.tensor(64), "vocab_size": torch.tensor(49408)}
        torch.jit.save(torch.jit.trace(module_of(whole), torch.zeros(1)), path)
    return path


def training(weights, path):
    """A checkpoint of open_clip's training."""
    state = {f"module.{key}": value for key, value in weights.items()}
    return put({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)


def tbps_clip(weights, path):
    model = {key.replace("text.", "encode_text."): value for key, value in text_tower(weights).items()}
    return put({"model": model, "config": EasyDict(experiment=EasyDict(ss=True))}, path)


ST, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
INDEX = "model.safetensors.index.json"
BIAS = {"logit_bias": torch.zeros(())}
RDE = {"visul_emb_layer.fc.weight": torch.zeros(2, 2), "texual_emb_layer.linear.bias": torch.zeros(2)}
OPENAI, TOWER = "OpenAI's names", "open_clip's, a text tower"
CLIPMODEL, RUN = "transformers' CLIPModel", "a person retrieval training"
GELU, RESNET, OF_RUN = {"gelu": True}, {"resnet": True}, {"img_size": TALL}
ROWS = {  # form, the model's options, how its file is written into a folder
    "OpenAI's archive": ("OpenAI's archive", {}, lambda w, f: archive(w, f / "ViT.pt")),
    "a state dict": (OPENAI, {}, lambda w, f: put(w, f / "clip.pt")),
    "safetensors by another name": (OPENAI, {}, lambda w, f: put(w, f / "a.safetensors").rename(f / "a.pt")),
    "open_clip's folder": (OPENAI, {}, lambda w, f: with_config(w, f, ST)),
    "open_clip's folder, GELU": (OPENAI, GELU, lambda w, f: with_config(w, f, ST, gelu=True)),
    "open_clip's file, GELU": (OPENAI, GELU, lambda w, f: with_config(w, f, BIN, gelu=True) / BIN),
    "open_clip's, heads of 32": (OPENAI, {"head": 32}, lambda w, f: with_config(w, f, ST, head=32)),
    "open_clip's ResNet": (OPENAI, RESNET, lambda w, f: put(w, f / "clip.safetensors")),
    "open_clip's folder of a ResNet": (OPENAI, RESNET, lambda w, f: with_config(w, f, ST, resnet=True)),
    "open_clip's training": (OPENAI, {}, lambda w, f: training(w, f / "epoch_3.pt")),
    "open_clip's text tower": (TOWER, {}, lambda w, f: put(text_tower(w), f / "clip.pt")),
    "open_clip's with a bias of its logits": (
        OPENAI,
        {},
        lambda w, f: put({**w, **BIAS}, f / "a.safetensors"),
    ),
    "transformers' folder": (CLIPMODEL, {}, transformers_folder),
    "transformers' folder, GELU": (CLIPMODEL, GELU, lambda w, f: transformers_folder(w, f, gelu=True)),
    "transformers', heads of 32": (CLIPMODEL, {"head": 32}, lambda w, f: transformers_folder(w, f, head=32)),
    "transformers' in three files": (CLIPMODEL, {}, lambda w, f: transformers_folder(w, f, files=3)),
    "transformers', an index": (CLIPMODEL, {}, lambda w, f: transformers_folder(w, f, files=2) / INDEX),
    "transformers', old": (CLIPMODEL, {}, old_transformers),
    "IRRA's": (RUN, OF_RUN, lambda w, f: trained(w, f / "best.pth")),
    "IRRA's, a folder": (RUN, OF_RUN, lambda w, f: trained(w, f / "best.pth").parent),
    "NAM's, FMFA's": (RUN, OF_RUN, lambda w, f: trained(w, f / "best0.pth", "module.base_model.")),
    "RDE's, ICL's": (RUN, OF_RUN, lambda w, f: trained(w, f / "best.pth", **RDE)),
    "TBPS-CLIP's": ("TBPS-CLIP", {}, lambda w, f: tbps_clip(w, f / "checkpoint_best.pth")),
    "Long-CLIP's": ("Long-CLIP", {"context": 248}, lambda w, f: long_clip(w, f / "longclip-B.pt")),
}


@torch.no_grad()
def compare(choice, model, img_size, ids=IDS, **told):
    clip = load_clip(str(choice), img_size, 16, **told).eval()
    images = pixels(7, (3, 3, *img_size))
    assert off(pooled(clip.encode_image(images)), model.encode_image(images)) < TOLERANCE
    assert off(at_eot(clip.encode_text(ids), ids), model.encode_text(ids)) < TOLERANCE
    assert {value.dtype for value in clip.parameters()} == {torch.float32}
    return clip


@pytest.mark.parametrize("name", ROWS)
def test_features_are_those_of_the_model_that_the_file_holds(name, tmp_path, caplog):
    form, options, write = ROWS[name]
    model = reference(**options)
    ids = torch.nn.functional.pad(IDS, (0, options.get("context", 77) - 77))
    with caplog.at_level("INFO"):
        compare(write(weights_of(model), tmp_path), model, options.get("img_size", SQUARE), ids)
    assert form in caplog.text


def under(prefix):
    return lambda w: {f"{prefix}{key}": value for key, value in w.items()}


WRAPPED = {  # what trainings make of a state dict
    "under state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "under net, beside an average": lambda w: {"net": w, "ema": under("x.")(w)},
    "under a name of one's own": lambda w: {"student": w, "optimizer": {"state": {0: {"m": IDS}}}},
    "an average of torch's": lambda w: {"n_averaged": torch.tensor(3), **under("module.")(w)},
    "DataParallel and compile": under("_orig_mod.module."),
    "parts that are compiled": lambda w: {
        key.replace("visual.", "visual._orig_mod.").replace(".mlp.", ".module.mlp."): value
        for key, value in w.items()
    },
    "a part of a model": under("retriever.backbone."),
    "beside a head": lambda w: {**under("clip_model.")(w), "prompt_learner.ctx": IDS},
    "transformers', beside a loss": lambda w: {**under("net.")(as_transformers(w)), "loss.scale": IDS},
    "IRRA's, compiled": lambda w: {**under("_orig_mod.base_model.")(w), "_orig_mod.classifier.bias": IDS},
    "options of argparse": lambda w: {"model": w, "args": Namespace(lr=1, at=PurePosixPath("a/b"))},
    "options of types": lambda w: {"model": w, "args": SimpleNamespace(lr=1)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_weights_are_found_in_what_trainings_wrap_them_in(name, zipped, tmp_path):
    model = reference(img_size=TALL)
    path = tmp_path / "clip.pth"
    torch.save(WRAPPED[name](weights_of(model)), path, _use_new_zipfile_serialization=zipped)
    compare(path, model, TALL)


def test_what_lies_beside_the_weights_and_is_left_out_is_named(tmp_path, caplog):
    put({**under("clip_model.")(weights_of(reference())), "adapter.weight": IDS}, tmp_path / "clip.pth")
    with caplog.at_level("INFO"):
        read_start(tmp_path / "clip.pth")
    assert caplog.messages[0].endswith("; left out: logit_scale; left out beside it: adapter")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_other_programs_beside_the_weights_are_passed_over(name, tmp_path):
    """The file names the class, whose program need not be there."""
    module, _, kind = name.rpartition(".")
    data = pickle.dumps(OrderedDict(lr=1), protocol=2)
    data = data.replace(b"ccollections\nOrderedDict", f"c{module}\n{kind}".encode())
    assert b"OrderedDict" not in data
    torch.save({"model": weights_of(reference())}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for entry in old.namelist():
            own = old.read(entry)
            if entry.endswith("/data.pkl"):  # {"model": …} and one more pair, before the last opcodes
                assert own.endswith(b"s.")
                own = own[:-2] + b"sX\x04\x00\x00\x00args" + data[2:-1] + b"s."
            new.writestr(entry, own)
    compare(tmp_path / "b.pth", reference(), SQUARE)


def test_every_form_has_a_row():
    assert {form for form, *_ in ROWS.values()} == {form.name.split(" (")[0] for form in FORMS}


def test_a_state_dict_in_halves_is_computed_in_fp32(tmp_path):
    model = copy.deepcopy(reference())
    weights = {key: value.half() for key, value in weights_of(model).items()}
    model.load_state_dict(weights)
    compare(put(weights, tmp_path / "clip.pt"), model, SQUARE)


@torch.no_grad()
def test_the_comparison_would_notice_another_activation_or_other_heads(tmp_path):
    images = pixels(7, (3, 3, *SQUARE))
    expected = reference().encode_image(images)
    path = put(weights_of(reference()), tmp_path / "clip.pt")
    gelu = compare(path, reference(gelu=True), SQUARE, activation="gelu")
    assert off(gelu.encode_image(images)[:, 0], expected) > 100 * TOLERANCE
    assert off(gelu.encode_text(IDS), load_clip(str(path), SQUARE, 16).encode_text(IDS)) > 100 * TOLERANCE
    assert off(reference(head=32).encode_image(images), expected) > 100 * TOLERANCE


# ---- transformers itself ----


@missing("transformers", "transformers", "requirements-dev.txt")
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["safetensors", "in files of a megabyte", "as long as Long-CLIP's"])
@torch.no_grad()
def test_what_transformers_saves_gives_the_features_that_transformers_computes(act, kind, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    cfg = transformers_config(gelu=act == "gelu", head=32)
    own = {"num_hidden_layers": 2, "bos_token_id": 49406, "eos_token_id": 49407}
    places = {"max_position_embeddings": 248} if "long" in kind else {}
    text = {**cfg["text_config"], **own, **places, "intermediate_size": 256}
    vision = {**cfg["vision_config"], "num_hidden_layers": 3, "intermediate_size": 512}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, max_shard_size="1MB" if "files" in kind else "1GB")
    clip = load_clip(str(tmp_path), SQUARE, 16).eval()
    images, ids = pixels(7, (3, 3, *SQUARE)), IDS.clone()
    image = model.visual_projection(model.vision_model(images).pooler_output)
    text = model.text_projection(model.text_model(ids).pooler_output)
    assert off(clip.encode_image(images)[:, 0], image) < TOLERANCE
    assert off(at_eot(clip.encode_text(ids), ids), text) < TOLERANCE


# ---- what a file leaves open ----


def test_where_nothing_says_the_activation_quickgelu_is_assumed_with_a_warning(tmp_path, caplog):
    path = put(weights_of(reference()), tmp_path / "clip.pt")
    assert load_clip(str(path), SQUARE, 16).facts["activation"] == "quick_gelu"
    assert "QuickGELU is assumed" in caplog.text
    for row in ("OpenAI's archive", "open_clip's folder", "IRRA's", "transformers' folder", "Long-CLIP's"):
        caplog.clear()
        _, options, write = ROWS[row]
        (tmp_path / row).mkdir()
        path = write(weights_of(reference(**options)), tmp_path / row)
        load_clip(str(path), options.get("img_size", SQUARE), 16)
        assert not [record for record in caplog.records if record.levelname == "WARNING"], row


def test_an_activation_against_what_the_file_says_is_used_with_a_warning(tmp_path, caplog):
    path = with_config(weights_of(reference()), tmp_path, "open_clip_model.safetensors")
    assert load_clip(str(path), SQUARE, 16, activation="gelu").facts["activation"] == "gelu"
    assert "was trained with quick_gelu" in caplog.text


def test_a_config_of_other_weights_beside_a_file_counts_nothing(tmp_path, caplog):
    with_config(weights_of(reference()), tmp_path, "open_clip_model.safetensors", gelu=True)
    config = {"model_cfg": {**sizes(gelu=True), "embed_dim": 512}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO"):
        clip = load_clip(str(tmp_path / "open_clip_model.safetensors"), SQUARE, 16)
    assert clip.facts["activation"] == "quick_gelu" and "is assumed" in caplog.text
    assert "open_clip_config.json beside it is of another model" in caplog.text


def head_widths(path, vision_width):
    """What is found of a wide model's facts where nothing lies beside its file."""
    wide = {"vision_width": vision_width, "vision_patch_size": 14}
    return arithmetic(read_start(path).form.facts, wide, "auto", path)


def test_a_wide_run_that_says_nothing_has_heads_of_64_as_it_was_trained(tmp_path):
    path = trained({"token_embedding.weight": torch.zeros(9, 1)}, tmp_path / "best.pth")
    assert head_widths(path, 1280)["vision_head_width"] == 64


def test_wide_open_clip_models_have_the_heads_of_their_width(tmp_path):
    """ViT-H's are 80 wide, which its file alone does not say."""
    path = put({"token_embedding.weight": torch.zeros(9, 1)}, tmp_path / "clip.pt")
    found = head_widths(path, 1280)
    assert (found["vision_head_width"], found["transformer_head_width"]) == (80, 64)


# ---- positions ----

GRIDS = [  # number, --img_size's grid, stored, of a training: the grid that is taken, or None
    (196, (24, 8), None, False, (14, 14)),
    (192, (24, 8), None, False, (24, 8)),
    (192, (24, 8), None, True, (24, 8)),
    (192, (16, 8), None, True, (24, 8)),
    (192, (16, 8), None, False, (24, 8)),
    (192, (16, 12), None, True, (24, 8)),
    (192, (16, 12), (16, 12), True, (16, 12)),
    (48, (24, 8), None, False, (12, 4)),
    (64, (16, 4), None, False, (8, 8)),
    (64, (16, 4), None, True, (16, 4)),
    (64, (16, 4), (32, 2), True, (32, 2)),
    (50, (24, 8), None, False, None),
]


@pytest.mark.parametrize("number, grid, stored, trained, expected", GRIDS)
def test_the_grid_of_image_positions(number, grid, stored, trained, expected):
    known = known_grids(number, grid, stored, trained)
    assert (known[0][0] if known else None) == expected


def test_positions_of_24_by_8_are_taken_as_they_are_or_resized_from_24_by_8(tmp_path, caplog):
    weights = weights_of(reference(img_size=(384, 128)))
    path = trained(weights, tmp_path / "best0.pth", "module.base_model.")
    own = weights["visual.positional_embedding"]
    clip = load_clip(str(path), (384, 128), 16)
    assert torch.equal(clip.visual.positional_embedding, own)
    clip = load_clip(str(path), (256, 128), 16)
    expected = resize_positions(own, (16, 8), stored=(24, 8))
    assert torch.equal(clip.visual.positional_embedding, expected)
    plane = own[1:].T.reshape(1, -1, 24, 8)
    again = torch.nn.functional.interpolate(plane, (16, 8), mode="bilinear")[0].flatten(1).T
    assert torch.equal(expected[1:], again)


def test_a_runs_own_options_beside_it_say_its_grid(tmp_path):
    """16 x 4 and 8 x 8 are both 64 positions."""
    weights = weights_of(reference(img_size=(128, 128)))
    path = trained(weights, tmp_path / "best.pth")
    (tmp_path / "configs.yaml").write_text("img_size: !!python/tuple\n- 128\n- 128\nstride_size: 16\n")
    clip = load_clip(str(path), (256, 64), 16)
    expected = resize_positions(weights["visual.positional_embedding"], (16, 4), stored=(8, 8))
    assert torch.equal(clip.visual.positional_embedding, expected)


def test_position_grid_says_what_cannot_be_told(tmp_path):
    weights = weights_of(reference(img_size=(80, 160)))
    path = str(put(weights, tmp_path / "clip.pt"))
    with pytest.raises(InputError, match="--position_grid H W"):
        load_clip(path, TALL, 16)
    clip = load_clip(path, TALL, 16, position_grid=(5, 10))
    expected = resize_positions(weights["visual.positional_embedding"], (6, 2), stored=(5, 10))
    assert torch.equal(clip.visual.positional_embedding, expected)
    with pytest.raises(InputError, match="--position_grid 5 5 are 25 image positions, but .* has 50"):
        load_clip(path, TALL, 16, position_grid=(5, 5))


# ---- what is refused, and by which name ----


def keys(*names):
    return lambda path: put({name: torch.zeros(2, 2) for name in names}, path / "clip.pt")


def begins(contents, name="clip.pt"):
    def write(path):
        (path / name).write_bytes(contents)
        return path / name

    return write


def configured(vision=None, text=None, **model):
    """Weights like OpenAI's beside an open_clip_config.json that says that they compute otherwise."""

    def write(path):
        cfg = sizes()
        cfg = {**cfg, "vision_cfg": {**cfg["vision_cfg"], **(vision or {})}, **model}
        cfg["text_cfg"] = {**cfg["text_cfg"], **(text or {})}
        put(weights_of(reference()), path / "clip.pt")
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
        return path / "clip.pt"

    return write


def configured_transformers(text=None, **top):
    def write(path):
        folder = transformers_folder(weights_of(reference()), path)
        said = {**transformers_config(), **top}
        said["text_config"] = {**said["text_config"], **(text or {})}
        (folder / "config.json").write_text(json.dumps(said))
        return folder

    return write


def index_alone(path):
    for file in transformers_folder(weights_of(reference()), path, files=3).glob("*-00002-of-*"):
        file.unlink()
    return path


def changed(tensors):
    """Weights like OpenAI's, but for these."""
    return lambda path: put({**weights_of(reference()), **tensors}, path / "clip.pt")


def no_norm_before(path):
    own = {key: value for key, value in weights_of(reference()).items() if "ln_pre" not in key}
    return put(own, path / "clip.pt")


QUERY = "text_model.encoder.layers.0.self_attn.q_proj.weight"
LAYER, TRUNK = "resblocks.0.ls_1.gamma", "visual.trunk."
REFUSED = {  # what is in the sentence, and who writes the file
    "SigLIP": keys(f"{TRUNK}attn_pool.latent", "text.token_embedding.weight", "logit_bias"),
    "SigLIP'": keys("vision_model.head.probe", "text_model.head.weight"),
    "SigLIP''": keys(f"clip.model.{TRUNK}attn_pool.latent", "clip.model.logit_bias"),
    "Perception Encoder": keys(f"{TRUNK}attn_pool.latent", f"{TRUNK}cls_token", "text.text_projection"),
    "EVA-CLIP": keys(f"{TRUNK}cls_token", f"{TRUNK}blocks.0.attn.q_bias", "text.token_embedding.weight"),
    "EVA-CLIP'": keys(f"{TRUNK}cls_token", f"{TRUNK}blocks.0.mlp.fc1_g.weight", "text.ln_final.weight"),
    "EVA-CLIP''": keys("visual.blocks.0.attn.q_bias", "visual.cls_token", "text.token_embedding.weight"),
    "MobileCLIP": keys("image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight", "text_encoder.x"),
    "MobileCLIP'": keys(f"{TRUNK}stem.0.conv_kxk.0.conv.weight", "text.token_embedding.weight"),
    "MobileCLIP''": keys(f"{TRUNK}patch_embed.backbone.0.conv.weight", "text.token_embedding.weight"),
    "an image tower of timm": keys(f"{TRUNK}stem.0.weight", "token_embedding.weight"),
    "CoCa": keys("visual.attn_pool.query", "text_decoder.ln_final.weight", "text.token_embedding.weight"),
    "BLIP or ALBEF": keys("visual_encoder.cls_token", "text_encoder.embeddings.word_embeddings.weight"),
    "a text encoder of transformers": keys("text.transformer.embeddings.position_ids", "visual.proj"),
    "Chinese-CLIP": keys("bert.embeddings.word_embeddings.weight", "visual.conv1.weight"),
    "AltCLIP": keys("text_model.roberta.embeddings.word_embeddings.weight", "vision_model.x"),
    "LayerScale": keys(f"visual.transformer.{LAYER}", "token_embedding.weight"),
    "LoRA adapters'": changed({"transformer.resblocks.0.attn.q_lora_A": IDS}),
    "LoRA adapters": keys("base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"),
    "an image encoder alone": keys("vision_model.embeddings.class_embedding", "visual_projection.weight"),
    "an image encoder alone'": keys("visual.conv1.weight", "visual.proj"),
    "a text encoder alone": keys("text_model.embeddings.token_embedding.weight", "text_projection.weight"),
    "timm": keys("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    "CLIPA": no_norm_before,
    "bias in its text projection": keys("text.text_projection.bias", "text.token_embedding.weight"),
    "pool_type: avg": configured(dict(pool_type="avg")),
    "no_causal_mask: True": configured(text=dict(no_causal_mask=True)),
    "attentional_pool: True": configured(dict(attentional_pool=True)),
    "ls_init_value: 0.0001": configured(dict(ls_init_value=1e-4)),
    "no_ln_pre: True": configured(dict(no_ln_pre=True)),
    "final_ln_after_pool": configured(dict(final_ln_after_pool=True)),
    "norm_kwargs": configured(dict(norm_kwargs={"eps": 1e-6})),
    "a kind of the future": configured(dict(kind="a kind of the future")),
    "another vocabulary": configured(text=dict(vocab_size=32000)),
    "another vocabulary'": configured_transformers({"vocab_size": 901629}),
    "another vocabulary''": changed({"token_embedding.weight": torch.zeros(32000, 64)}),
    "gelu_new": configured_transformers({"hidden_act": "gelu_new"}),
    "eps of 1e-06": configured_transformers({"layer_norm_eps": 1e-6}),
    "MLPs are 300 wide": changed({"visual.transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(300, 128)}),
    "Git LFS pointer": begins(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "Git LFS pointer'": begins(b"version https://git-lfs.github.com/spec/v1\n", "clip.safetensors"),
    "web page": begins(b"\n <!DOCTYPE html><html>not found</html>"),
    "web page'": begins(b"<html>", "clip.safetensors"),
    "HDF5": begins(b"\x89HDF\r\n\x1a\n"),
    "GGUF": begins(b"GGUF\x03"),
    "gzip": begins(b"\x1f\x8b\x08"),
    "packed by tar": begins(bytes([0x70]) * 100 + bytes(157) + b"ustar\x0000"),
    "empty": begins(b""),
    "begins with zeros": begins(bytes(5000)),
    "cut short": begins(b"PK\x03\x04" + bytes(range(256))),
    'begins with "Quota exceeded': begins(b"Quota exceeded\nTry later.\n"),
    "several models (student., teacher.)": lambda path: put(
        {**under("student.")(weights_of(reference())), **under("teacher.")(weights_of(reference()))},
        path / "clip.pt",
    ),
    "no named tensors, but weights": lambda path: put({"weights": {"layer_0": {"q": IDS}}}, path / "lora.pt"),
    "NaN": changed({"ln_final.bias": torch.full((64,), torch.nan)}),
    "ln_final.bias is int8": changed({"ln_final.bias": torch.ones(64, dtype=torch.int8)}),
    "damaged": lambda path: put({"positional_embedding_res": torch.zeros(248, 64)}, path / "long.pt"),
    "damaged'": lambda path: put(
        {**as_transformers(weights_of(reference())), QUERY: torch.zeros(3, 3)}, path / "clip.pt"
    ),
    "text_projection is [64]": changed({"text_projection": torch.zeros(64)}),
    "index alone": index_alone,
    "one of 3 files": lambda path: next(iter(index_alone(path).glob("*-00001-of-*"))),
    "no weight_map": begins(b'{"weight_map": 3}', "model.safetensors.index.json"),
    "no weight_map'": begins(b'{"weight_map": {"a": "../x"}}', "model.safetensors.index.json"),
    "not a config of CLIP weights": lambda path: (
        begins(b"[", "config.json")(transformers_folder(weights_of(reference()), path)).parent
    ),
    "cannot be read": begins(struct.pack("<Q", 10**6) + b"{", "clip.safetensors"),
    "name the one": lambda path: (
        [trained(weights_of(reference()), path / f"best{n}.pth") for n in (0, 1)] and path
    ),
    "name the file": lambda path: begins(b"x", "readme.txt")(path).parent,
    "big_vision": lambda path: npz(path),
}


def npz(path):
    import numpy

    numpy.savez(path / "siglip.npz", **{"params/img/embedding/kernel": numpy.zeros((2, 2))})
    return path / "siglip.npz"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_clip_is_refused_by_its_name_in_one_sentence(name, tmp_path):
    choice = REFUSED[name](tmp_path)
    with pytest.raises(InputError) as refusal:
        load_clip(str(choice), SQUARE, 16)
    said = str(refusal.value)
    assert name.rstrip("'") in said and str(tmp_path) in said and "\n" not in said


def test_every_family_has_a_row():
    assert {f.name for f in FAMILIES} == {
        f.name for f in FAMILIES for row in REFUSED if row.rstrip("'").split(" (")[0] in f.name
    }
