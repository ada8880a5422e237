"""Published pairs of configs.yaml and best.pth run in our test.py; what our train.py writes fits the
published code; files that carry code are refused unread."""

import functools
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import transforms

from datasets.tokenizer import SimpleTokenizer, tokenize
from processor.evaluator import RANKS
from tests.recipe import REFERENCE, arguments, bytes8, figures, tiny_clip_file, tiny_model
from tests.test_metrics import by_sorting
from tests.test_pretrained import Payload
from utils.checkpoint import load_checkpoint

STRUCTURE = figures("checkpoint_structure")
GARMENTS = ["coat", "shirt", "dress", "jacket", "hoodie", "blouse", "sweater", "vest"]
COLOURS = ["red", "green", "blue", "white", "black"]


# ---- a small data set ----


def write_dataset(root, name, persons, first_id, seed):
    """A data set in the authors' format: two images a person, two captions each. persons: {split: number}."""
    file, path_key = {
        "CUHK-PEDES": ("reid_raw.json", "file_path"),
        "RSTPReid": ("data_captions.json", "img_path"),
    }[name]
    folder, records, number, person = root / name / "imgs" / "cam_a", [], 0, first_id
    folder.mkdir(parents=True)
    for split, count in persons.items():
        for pid in range(person, person + count):
            words = f"{COLOURS[pid % 5]} {GARMENTS[pid % 8]}"
            for view in range(2):
                coarse = bytes8(seed + number, (7, 3, 3))
                image = Image.fromarray(coarse).resize((40 + view, 110), Image.Resampling.NEAREST)
                image.save(folder / f"{number:03}.png")
                captions = [
                    f"A person in a {words}, view {view}.",
                    f"Somebody wears a {words} number {number}",
                ]
                record = {"split": split, "captions": captions, path_key: f"cam_a/{number:03}.png", "id": pid}
                records.append({**record, "processed_tokens": [caption.split() for caption in captions]})
                number += 1
        person += count
    (root / name / file).write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, "CUHK-PEDES", {"train": 8, "val": 3, "test": 6}, first_id=1, seed=1000)
    write_dataset(root, "RSTPReid", {"train": 2, "val": 1, "test": 7}, first_id=0, seed=2000)
    return root


def evaluated_apart(model, root, name="CUHK-PEDES", split="test"):
    """t2i and i2t figures: one caption or image at a time, torchvision's transforms and a plain sort."""
    records = json.loads(next((root / name).glob("*.json")).read_text())
    records = [record for record in records if record["split"] == split]
    prepare = transforms.Compose(
        [
            transforms.Resize((96, 32)),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    tokenizer, images, texts, image_pids, text_pids = SimpleTokenizer(), [], [], [], []
    model.eval()
    with torch.no_grad():
        for record in records:
            path = root / name / "imgs" / record.get("file_path", record.get("img_path"))
            images.append(model.encode_image(prepare(Image.open(path).convert("RGB"))[None])[0])
            image_pids.append(record["id"])
            for caption in record["captions"]:
                texts.append(model.encode_text(tokenize(caption, tokenizer)[None])[0])
                text_pids.append(record["id"])
    image, text = (torch.stack(x).double().numpy() for x in (images, texts))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    rows = {}
    for task, similarity, q_pids, g_pids in (
        ("t2i", text @ image.T, text_pids, image_pids),
        ("i2t", image @ text.T, image_pids, text_pids),
    ):
        cmc, mAP, mINP, _ = by_sorting(similarity, q_pids, g_pids, max(RANKS))
        rows[task] = {**{f"R{k}": cmc[k - 1] for k in RANKS}, "mAP": mAP, "mINP": mINP}
    return rows


# ---- a published pair ----


def published_configs(**values):
    """reference/configs.yaml, line by line as the published code wrote it, with other values."""
    text = (REFERENCE / "configs.yaml").read_text(encoding="utf-8")
    for key, value in values.items():
        if isinstance(value, tuple):
            old, new = rf"^{key}: !!python/tuple\n(- .*\n)+", f"{key}: !!python/tuple\n"
            new += "".join(f"- {item}\n" for item in value)
        else:
            old, new = rf"^{key}: .*\n", f"{key}: {json.dumps(value)}\n"
        text, replaced = re.subn(old, lambda match, new=new: new, text, flags=re.MULTILINE)
        assert replaced == 1, key
    return text


def published_checkpoint(weights):
    """What the published code saves (checkpoint_structure.json): an optimiser group for each parameter."""
    parameters = [value.float().clone().requires_grad_() for value in weights.values()]
    settings = {key: STRUCTURE["optimizer"]["first_group"][key] for key in ("lr", "weight_decay", "eps")}
    groups = [{"params": [parameter], **settings} for parameter in parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["initial_lr"] = group["lr"]
    lrs = [group["lr"] for group in state["param_groups"]]
    scheduler = {**STRUCTURE["scheduler"], "milestones": (20, 50), "base_lrs": lrs, "_last_lr": lrs}
    return {"model": weights, "optimizer": state, "scheduler": scheduler, **STRUCTURE["scalars"]}


def published_run(folder, root, weights):
    folder.mkdir(parents=True)
    configs = published_configs(
        dataset_name="CUHK-PEDES",
        root_dir=str(root),
        output_dir="logs/CUHK-PEDES/20230301_120000_baseline",  # not here
        pretrain_choice="ViT-B/16",
        loss_names="sdm+mlm+id",
        MLM=True,
        cmt_depth=2,
        img_size=(96, 32),
        milestones=(20, 50),
        num_workers=0,
    )
    assert configs.count("!!python/tuple") == 2
    (folder / "configs.yaml").write_text(configs, encoding="utf-8")
    torch.save(published_checkpoint(weights), folder / "best.pth")
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model("sdm+mlm+id")


@pytest.fixture(scope="module")
def expected(data, model):
    """The figures of a data set and a split, made apart; those of CUHK-PEDES' test split if not named."""
    return functools.cache(functools.partial(evaluated_apart, model, data))


@pytest.fixture(scope="module")
def kept(tmp_path_factory, data, model):
    folder = tmp_path_factory.mktemp("published")
    yield published_run(folder / "run", data, model.state_dict())
    shutil.rmtree(folder)  # pytest would keep it, and it is large


@pytest.fixture
def published(kept, tmp_path):
    """The published pair in a folder of this test. best.pth is one file with many names: see `put`."""
    (tmp_path / "run").mkdir()
    shutil.copy(kept / "configs.yaml", tmp_path / "run")
    os.link(kept / "best.pth", tmp_path / "run" / "best.pth")
    yield tmp_path / "run"
    shutil.rmtree(tmp_path)


def put(path, state):
    path.unlink()
    torch.save(state, path)


@pytest.fixture
def evaluate(test_script):
    """Runs test.py on a run's folder with further arguments; its exit status."""

    def run(folder, *more):
        config_file = folder if folder.suffix == ".yaml" else folder / "configs.yaml"
        return test_script.main(["--config_file", str(config_file), "--device", "cpu", *more])

    return run


def results(path, *tasks):
    stored = json.loads(path.read_text())
    assert {key for key in stored if isinstance(stored[key], dict)} == set(tasks)
    return {task: stored[task] for task in tasks}


def check(found, expected):
    for task, row in found.items():
        assert row == pytest.approx(expected[task], abs=1e-6), task


def test_a_published_pair_gives_the_figures_of_an_evaluation_made_apart(published, evaluate, expected):
    assert 0 < expected()["t2i"]["R1"] < expected()["t2i"]["R10"]  # or the comparison would say little
    assert evaluate(published) == 0
    check(results(published / "results.json", "t2i"), expected())
    stored = json.loads((published / "results.json").read_text())
    assert (stored["dataset_name"], stored["split"], stored["epoch"]) == ("CUHK-PEDES", "test", 2)
    assert (stored["queries"], stored["gallery"]) == (24, 12)
    row = [f"{value:.3f}" for value in expected()["t2i"].values()]
    assert re.search(r"\|\s+t2i\s+\|\s+" + r"\s+\|\s+".join(row), (published / "test_log.txt").read_text())


@pytest.mark.parametrize(
    ("typed", "of", "tasks"),
    [
        ("--i2t", (), ("t2i", "i2t")),
        ("--split val", ("CUHK-PEDES", "val"), ("t2i",)),
        ("--dataset_name RSTPReid", ("RSTPReid", "test"), ("t2i",)),
        ("--test_batch_size 5", (), ("t2i",)),
        ("--test_batch_size 512", (), ("t2i",)),
    ],
)
def test_a_published_pair_in_another_direction_on_other_data_or_in_other_batches(
    typed, of, tasks, published, evaluate, expected
):
    assert evaluate(published, *typed.split()) == 0
    check(results(published / f"{'_'.join(['results', *of])}.json", *tasks), expected(*of))
    assert (published / "results.json").exists() == (not of)


def test_the_options_of_a_published_pair_may_have_any_name(published, evaluate):
    assert evaluate(published) == 0
    expected = results(published / "results.json", "t2i")
    (published / "results.json").unlink()
    (published / "configs.yaml").rename(published / "cuhk_pedes.yaml")
    assert evaluate(published / "cuhk_pedes.yaml") == 0
    check(results(published / "results.json", "t2i"), expected)


def test_a_published_pair_may_be_moved_and_its_data_too(published, evaluate, data, expected, tmp_path):
    moved = shutil.move(published, tmp_path / "elsewhere" / "my pair")
    elsewhere = shutil.copytree(data, tmp_path / "other data")
    assert evaluate(moved, "--root_dir", str(elsewhere)) == 0
    check(results(moved / "results.json", "t2i"), expected())
    assert not published.exists()


def test_a_pair_saved_in_half_precision_is_evaluated_in_fp32_on_a_cpu(tmp_path, kept, evaluate, data):
    halves = tiny_model("sdm+mlm+id", precision="fp16").state_dict()  # the layout that CUDA runs publish
    assert len({value.dtype for value in halves.values()}) == 2
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(kept / "configs.yaml", run)
    torch.save({"model": halves}, run / "best.pth")
    rounded = tiny_model("sdm+mlm+id")
    rounded.load_state_dict({key: value.float() for key, value in halves.items()})
    assert evaluate(run) == 0
    check(results(run / "results.json", "t2i"), evaluated_apart(rounded, data))


def test_a_published_checkpoint_is_not_resumed_and_the_reason_is_given(published, train_script, capsys):
    before = (published / "best.pth").read_bytes()
    status = train_script.main(
        ["--resume", *arguments(resume_ckpt_file=published / "best.pth", device="cpu")]
        + arguments(pretrain_choice=tiny_clip_file(), batch_size=16)
    )
    assert status == 2
    said = capsys.readouterr().err
    assert f"{published / 'best.pth'} cannot be resumed: its optimiser has 103 parameter groups" in said
    assert "the published code makes one of each parameter" in said and "test.py" in said
    assert (published / "best.pth").read_bytes() == before


# ---- checkpoints that do not fit ----


def changed(run, change):
    """Apply a change to the "model" part of a run's best.pth."""
    state = torch.load(run / "best.pth", weights_only=True)
    change(state["model"])
    put(run / "best.pth", {"model": state["model"]})


@pytest.mark.parametrize(
    "key",
    [
        "base_model.visual.transformer.resblocks.1.mlp.c_fc.bias",
        "base_model.visual.class_embedding",
        "base_model.visual.conv1.weight",
        "base_model.visual.positional_embedding",
        "base_model.visual.proj",
        "base_model.token_embedding.weight",
        "base_model.text_projection",
        "classifier.weight",
        "classifier.bias",
        "cross_modal_transformer.resblocks.0.ln_2.weight",
        "ln_post.weight",
        "mlm_head.fc.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_key_is_refused_and_the_key_named(key, published, evaluate, capsys):
    changed(published, lambda weights: weights.pop(key))
    assert evaluate(published) == 2
    assert key.removeprefix("base_model.") in capsys.readouterr().err
    assert not (published / "results.json").exists()


@pytest.mark.parametrize(
    "key",
    [
        "base_model.transformer.resblocks.0.attn.in_proj_weight",
        "base_model.visual.ln_post.weight",
        "base_model.visual.class_embedding",
        "mlm_head.dense.weight",
        "classifier.bias",
    ],
)
def test_a_checkpoint_with_another_shape_is_refused_and_the_key_named(key, published, evaluate, capsys):
    def cut(weights):
        weights[key] = weights[key][:-1]

    changed(published, cut)
    assert evaluate(published) == 2
    assert key in capsys.readouterr().err


def test_a_checkpoint_with_more_than_the_model_is_refused_and_the_key_named(published, evaluate, capsys):
    changed(published, lambda weights: weights.update({"base_model.logit_scale": torch.tensor(1.0)}))
    assert evaluate(published) == 2
    assert "base_model.logit_scale has no place" in capsys.readouterr().err


def test_an_image_size_that_the_weights_do_not_have_is_refused(published, evaluate, capsys):
    configs = (published / "configs.yaml").read_text().replace("- 96\n- 32", "- 96\n- 48")
    (published / "configs.yaml").write_text(configs)
    assert evaluate(published) == 2
    said = capsys.readouterr().err
    assert "12 patches" in said and "18" in said


@pytest.mark.parametrize("left", [0, 1000, 1_000_000])
def test_half_a_checkpoint_is_refused(left, published, evaluate, capsys):
    whole = (published / "best.pth").read_bytes()
    (published / "best.pth").unlink()
    (published / "best.pth").write_bytes(whole[:left])
    assert evaluate(published) == 2
    assert str(published / "best.pth") in capsys.readouterr().err


def test_a_pair_without_its_checkpoint_says_what_lies_there(published, evaluate, capsys):
    (published / "best.pth").rename(published / "bets.pth")
    assert evaluate(published) == 2
    said = capsys.readouterr().err
    assert "best.pth" in said and "bets.pth" in said


@pytest.mark.parametrize(
    "begins, what",
    [(b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"), (b"<html>", "web page")],
)
def test_a_checkpoint_that_is_another_file_is_called_by_its_name(begins, what, published, evaluate, capsys):
    (published / "best.pth").unlink()
    (published / "best.pth").write_bytes(begins)
    assert evaluate(published) == 2
    assert what in capsys.readouterr().err


# ---- files that carry code ----


@pytest.mark.parametrize("where", ["the whole file", "a part", "a weight", "an old pickle"])
def test_a_checkpoint_that_carries_code_is_refused_and_the_code_does_not_run(
    where, published, evaluate, capsys, tmp_path
):
    marker, path = tmp_path / "it ran", published / "best.pth"
    weights = torch.load(path, weights_only=True)["model"]
    bad = {
        "the whole file": Payload(marker),
        "a part": {"model": weights, "epoch": Payload(marker)},
        "a weight": {"model": {**weights, "classifier.bias": Payload(marker)}},
        "an old pickle": {"model": Payload(marker)},
    }[where]
    if where == "an old pickle":
        path.unlink()
        path.write_bytes(pickle.dumps(bad, protocol=2))
    else:
        put(path, bad)
    assert evaluate(published) == 2
    assert f"{path} is refused" in capsys.readouterr().err
    assert not marker.exists()
    with open(path, "rb") as file:  # the trap is a real one
        if where == "an old pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    "line",
    [
        'name: !!python/object/apply:os.mkdir ["{marker}"]',
        'name: !!python/object/new:os.mkdir ["{marker}"]',
        "name: !!python/name:os.system",
        "img_size: !!python/tuple [96, !!python/object/apply:os.mkdir ['{marker}']]",
    ],
)
def test_a_configs_yaml_that_carries_code_is_refused_and_the_code_does_not_run(
    line, published, evaluate, train_script, capsys, tmp_path
):
    marker, path = tmp_path / "it ran", published / "configs.yaml"
    key = line.split(":")[0]
    options = [old for old in path.read_text().splitlines() if not old.startswith((f"{key}:", "- "))]
    path.write_text("\n".join([old for old in options if "tuple" not in old] + [line.format(marker=marker)]))
    assert evaluate(published) == 2
    assert str(path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        train_script.main(["--config_file", str(path)])
    assert stop.value.code == 2
    assert not marker.exists()


# ---- what our train.py writes ----


@pytest.fixture(scope="module")
def own_run(tmp_path_factory, data, train_script):
    """A run of two epochs of the tiny model on the 8 training persons."""
    logs = tmp_path_factory.mktemp("logs")
    status = train_script.main(
        arguments(
            name="tiny",
            pretrain_choice=tiny_clip_file(),
            img_size=(96, 32),
            cmt_depth=2,
            device="cpu",
            MLM=True,
            loss_names="sdm+mlm+id",
            lr=1e-3,
            num_epoch=2,
            warmup_epochs=1,
            batch_size=16,
            num_workers=0,
            root_dir=data,
            output_dir=logs,
        )
    )
    assert status == 0
    (run,) = (logs / "CUHK-PEDES").iterdir()
    assert re.fullmatch(r"\d{8}_\d{6}_tiny", run.name)
    yield run
    shutil.rmtree(logs)


def test_our_checkpoint_has_the_published_structure(own_run):
    state = torch.load(own_run / "best.pth", weights_only=True)
    assert set(state) == set(STRUCTURE["top_level"])
    model = {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in state["model"].items()}
    assert model == STRUCTURE["model_keys"]
    for name, value in STRUCTURE["scalars"].items():
        assert type(state[name]) is type(value)
    assert (state["num_epoch"], state["iteration"]) == (2, 0) and state["epoch"] in (1, 2)
    for group in state["optimizer"]["param_groups"]:
        for name in ("lr", "initial_lr", "weight_decay", "betas", "eps", "params"):
            assert name in STRUCTURE["optimizer"]["first_group"] and name in group
    assert set(state["scheduler"]) <= set(STRUCTURE["scheduler"])


def plain(value):
    if isinstance(value, list):
        return all(plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def test_our_configs_yaml_has_every_published_key_in_plain_types(own_run):
    text = (own_run / "configs.yaml").read_text()
    assert "!!" not in text
    own = yaml.safe_load(text)
    published = yaml.safe_load(published_configs().replace("!!python/tuple", ""))
    assert set(published) <= set(own)
    assert plain(own)
    for key, value in published.items():
        kinds = (int, float) if type(value) in (int, float) else type(value)  # target_lr may be 0 or 0.0
        assert isinstance(own[key], kinds), key
    assert own["img_size"] == [96, 32] and own["milestones"] == [20, 50]
    assert own["output_dir"] == str(own_run)


def test_our_run_tests_with_the_R1_that_training_logged(own_run, evaluate, data):
    logged = re.search(r"best R1: ([\d.]+) at epoch (\d)", (own_run / "train_log.txt").read_text())
    assert evaluate(own_run) == 0
    stored = json.loads((own_run / "results.json").read_text())
    assert stored["t2i"]["R1"] == pytest.approx(float(logged[1]))
    assert stored["epoch"] == int(logged[2])
    model = tiny_model("sdm+mlm+id")
    weights = torch.load(own_run / "best.pth", weights_only=True)["model"]
    encoders = {k: value for k, value in weights.items() if k.startswith("base_model.")}
    assert not model.load_state_dict(encoders, strict=False).unexpected_keys
    check(results(own_run / "results.json", "t2i"), evaluated_apart(model, data))


def test_our_run_writes_the_published_tensorboard_tags(own_run):
    events = EventAccumulator(str(own_run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"lr", "temperature", "loss", "sdm_loss", "id_loss", "mlm_loss"} <= tags
    assert [(point.step, point.value) for point in events.Scalars("lr")] == [
        (1, pytest.approx(1e-4)),
        (2, pytest.approx(1e-3)),
    ]
    assert events.Scalars("temperature")[0].value == pytest.approx(0.02)


def test_a_checkpoint_published_from_several_gpus_is_one(tmp_path):
    """Its keys begin with module., as DistributedDataParallel names them."""
    weights = {"base_model.a": torch.ones(2), "classifier.bias": torch.zeros(3)}
    torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "best.pth")
    found = load_checkpoint(tmp_path / "best.pth")["model"]
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    torch.save({"model": {"module.a": torch.ones(1), "a": torch.zeros(1)}}, tmp_path / "mixed.pth")
    assert set(load_checkpoint(tmp_path / "mixed.pth")["model"]) == {"module.a", "a"}


@pytest.mark.parametrize(
    "wrapped",
    [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w}, lambda w: {"model": {"net": w}}],
)
def test_a_forks_weights_are_found_however_they_were_saved(wrapped, model, tmp_path):
    """The model alone, under another name, and compiled."""
    weights = model.state_dict()
    named = {f"_orig_mod.{key}": value for key, value in weights.items()}
    for number, saved in enumerate((weights, named)):
        torch.save(wrapped(dict(saved)), tmp_path / f"{number}.pth")
        found = load_checkpoint(tmp_path / f"{number}.pth")["model"]
        assert list(found) == list(weights)
        assert all(torch.equal(found[key], value) for key, value in weights.items())


# ---- what programs made of the published one leave ----

RDE = "noise_rate: 0.0\nnoisy_file: null\nkind: once\n"
FOREIGN = {  # what their configs.yaml say otherwise
    "RDE's": (dict(loss_names="TAL+sr0.3_tau0.015_margin0.1_n0.0"), RDE),
    "FMFA's": (dict(loss_names="asdm+id+mlm+efa"), "minmax_loss_weight: 1.0\n"),
    "NAM's": (dict(loss_names="sdm", sampler="triplet"), "pretrain_path: null\nnam: {ratio: [0.15]}\n"),
    "GA-DMS's": (dict(optimizer="Adam", lrscheduler="onecycle"), "mask_ratio: 0.3\nlocal_rank: 0\n"),
}


@pytest.mark.parametrize("whose", FOREIGN)
def test_configs_of_other_programs_are_tested_and_what_they_say_besides_is_noted(
    whose, published, evaluate, expected
):
    values, more = FOREIGN[whose]
    configs = (published / "configs.yaml").read_text().replace("local_rank: 0\n", "")
    for key, value in values.items():
        configs = re.sub(rf"^{key}: .*$", f"{key}: {value}", configs, flags=re.MULTILINE)
    (published / "configs.yaml").write_text(configs + more)
    assert evaluate(published) == 0
    check(results(published / "results.json", "t2i"), expected())
    log = (published / "test_log.txt").read_text()
    (noted,) = [line for line in log.splitlines() if "passed over, since testing does not need it" in line]
    for key in {line.split(":")[0] for line in more.splitlines()} - {"local_rank", "noisy_file"}:  # ours too
        assert f"{key}: " in noted


def test_an_option_that_testing_needs_is_still_checked(published, evaluate, capsys):
    configs = (published / "configs.yaml").read_text()
    (published / "configs.yaml").write_text(configs.replace("text_length: 77", "text_length: long"))
    assert evaluate(published) == 2
    assert "configs.yaml: text_length" in capsys.readouterr().err


def test_train_py_still_refuses_an_option_that_does_not_exist(published, train_script, capsys):
    configs = (published / "configs.yaml").read_text()
    (published / "configs.yaml").write_text(configs + "batchsize: 3\n")
    with pytest.raises(SystemExit):
        train_script.main(["--config_file", str(published / "configs.yaml")])
    assert "batchsize; did you mean batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, tested", [(("best0",), "best0"), (("best0", "best1"), "best0"), (("best1",), "best1")]
)
def test_a_folder_of_numbered_bests_gives_the_one_for_the_data_set(files, tested, published, evaluate):
    """best0.pth is the best on CUHK-PEDES, best1.pth on ICFG-PEDES, best2.pth on RSTPReid."""
    state = torch.load(published / "best.pth", weights_only=True)
    weights = {f"module.{key}": value for key, value in state["model"].items()}
    (published / "best.pth").unlink()
    for name in files:
        torch.save({"model": weights, "epoch": int(name[-1])}, published / f"{name}.pth")
    assert evaluate(published) == 0
    stored = json.loads((published / f"results_{tested}.json").read_text())
    assert stored["epoch"] == int(tested[-1]) and stored["checkpoint"].endswith(f"{tested}.pth")


def test_layers_that_this_code_lacks_are_named(published, evaluate, capsys):
    layers = {"momentum_queue.0.weight": torch.zeros(2, 2), "pooler.linear.bias": torch.zeros(2)}
    changed(published, lambda weights: weights.update(layers))
    assert evaluate(published) == 2
    said = capsys.readouterr().err
    assert "layers that this code lacks: momentum_queue, pooler" in said


def test_a_data_set_without_a_row_here_can_be_replaced(published, evaluate, data, capsys):
    configs = (published / "configs.yaml").read_text()
    (published / "configs.yaml").write_text(configs.replace('"CUHK-PEDES"', "UFine6926"))
    assert evaluate(published) == 2
    assert "dataset_name" in capsys.readouterr().err
    assert evaluate(published, "--dataset_name", "CUHK-PEDES") == 0
    assert (published / "results_CUHK-PEDES_test.json").exists()
