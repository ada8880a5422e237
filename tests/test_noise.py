"""RDE's answer to wrong pairs (arXiv 2308.09911): their division, captions augmented or exchanged."""

import functools
import json
import random
import signal
import sys

import numpy as np
import pytest
import torch

from datasets import build_dataloader
from datasets.tokenizer import EOT, MASK, SOT, augment_tokens
from processor.division import careful, clean, sample_losses, split
from tests import processes
from tests.children import differ, draw, only_run, run, words
from tests.conftest import load_script
from tests.processes import together
from tests.recipe import arrays, figures, pixels
from tests.tiny_run import missing
from utils.batch import Batch
from utils.errors import InputError
from utils.options import get_args

CCD, AUGMENT = figures("methods/rde_ccd"), figures("methods/rde_textaug")
RDE = arrays("methods/rde")


def mixture():
    from sklearn.mixture import GaussianMixture

    return GaussianMixture


needs_sklearn = missing("sklearn", "scikit-learn", "requirements-methods.txt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


# ---- division ----


def losses_of(which):
    """Every fifth sample is noisy."""
    recipe = CCD[which]
    drawn = pixels(recipe["seed"], (CCD["n"],)).numpy()
    noisy = np.arange(CCD["n"]) % 5 == 4
    usual = np.float32(recipe["lo"]) + np.float32(recipe["spread"]) * drawn
    return np.where(noisy, np.float32(recipe["blo"]) + np.float32(recipe["bspread"]) * drawn, usual)


@needs_sklearn
@pytest.mark.parametrize("which", ["A", "B"])
@pytest.mark.parametrize("published", CCD["runs"], ids=lambda run: run["dataset_name"])
def test_samples_that_the_published_division_is_sure_of_are_divided_so(published, which):
    strict = published["dataset_name"] == "RSTPReid"
    steady = RDE[f"ccd_{published['dataset_name']}_{which}_steady"].numpy()
    (recorded,) = [row for row in published["gmm"] if row["name"] == which]
    for seed in range(8):
        found = clean(losses_of(which).astype(np.float64), seed, strict, mixture())
        assert found[steady == 1].all() and not found[steady == 0].any()
        low, high = recorded["clean_range"]
        assert low <= found.sum() <= high


def noted(made, *args, **kwargs):
    made.append(mixture()(*args, **kwargs))
    return made[-1]


def fit_of(fitted):
    """What the figures say of a mixture."""
    low, high = fitted.means_[:, 0].argsort()
    found = {"low_mean": fitted.means_[low, 0], "high_mean": fitted.means_[high, 0]}
    found.update(low_var=fitted.covariances_[low, 0, 0], high_var=fitted.covariances_[high, 0, 0])
    return {**found, "low_weight": fitted.weights_[low], "n_iter": fitted.n_iter_}


def assert_fit(fitted, recorded):
    """recorded: what the published mixture was asked for and found from NumPy's seed 0."""
    settings = {name: recorded[name] for name in ("max_iter", "tol", "reg_covar")}
    assert {name: fitted.get_params()[name] for name in settings} == settings
    expected = {name: pytest.approx(value, rel=1e-4) for name, value in recorded["seed_0"].items()}
    assert fit_of(fitted) == expected and fitted.converged_ == recorded["converged"]


@needs_sklearn
@pytest.mark.parametrize("published", CCD["runs"], ids=lambda run: run["dataset_name"])
def test_over_seeds_divisions_vary_as_the_published_ones(published):
    divisions, made = [], []
    for seed in range(published["numpy_seeds"]):
        stream, strict = np.random.RandomState(seed), published["dataset_name"] == "RSTPReid"
        fit = functools.partial(noted, made)
        divisions.append([clean(losses_of(w).astype(np.float64), stream, strict, fit) for w in ("A", "B")])
    divisions = np.array(divisions)  # (seeds, votes, N)
    assert (divisions == divisions[0]).all((1, 2)).sum() == published["same_division_as_seed_0"]
    for vote, recorded in enumerate(published["gmm"]):
        counts, fits = divisions[:, vote].sum(1), [fit_of(one) for one in made[vote::2]]
        assert [counts.min(), counts.max()] == recorded["clean_range"]
        for name, limits in recorded["range_over_seeds"].items():
            values = [fit[name] for fit in fits]
            assert [min(values), max(values)] == pytest.approx(limits, rel=1e-4), name


@needs_sklearn
@pytest.mark.parametrize("published", CCD["runs"], ids=lambda run: run["dataset_name"])
def test_from_the_published_start_the_division_is_the_published_one(published):
    """Both mixtures start from one stream of numbers, that of NumPy's seed 0."""
    name, stream, votes = published["dataset_name"], np.random.RandomState(0), []
    for which, recorded in zip(("A", "B"), published["gmm"], strict=True):
        made = []  # the mixture
        losses = losses_of(which).astype(np.float64)
        votes.append(clean(losses, stream, name == "RSTPReid", functools.partial(noted, made)))
        probability = RDE[f"ccd_{name}_{which}_prob_seed_0"].numpy()
        assert (votes[-1] == split(probability)).all() and votes[-1].sum() == recorded["clean_seed_0"]
        assert_fit(made[0], recorded)
        scaled = (losses - losses.min()) / (losses.max() - losses.min())
        found = made[0].predict_proba(scaled[:, None])[:, made[0].means_.argmin()]
        assert np.abs(found - probability).max() < 1e-4
        steady = RDE[f"ccd_{name}_{which}_steady"].numpy()
        assert (steady == -1).sum() == recorded["undecided"]
    agreed = sum(vote.astype(int) for vote in votes)
    found = {key: int((agreed == n).sum()) for n, key in enumerate(("none_clean", "one_clean", "both_clean"))}
    assert found == {key: published[key] for key in found}


@pytest.mark.parametrize("case", CCD["split_prob"], ids=["some", "all above a half"])
def test_the_threshold_is_a_half_or_leaves_one_in_a_hundred(case):
    probability = (pixels(143, (203,)).double().numpy() + 2) / 4
    if "0.6" in case["prob"]:
        probability = 0.6 + 0.4 * probability
    found = split(probability)
    assert found.sum() == case["ones"]
    if "zeros_at" in case:
        assert np.flatnonzero(~found).tolist() == case["zeros_at"]


class Overflowing(torch.nn.Module):
    """Losses as an overflow in fp16 leaves them."""

    selects = False

    def losses_of_samples(self, batch):
        return batch.indices, torch.tensor([[0.5, torch.nan, torch.inf, 2.0]])


class FourSamples(list):
    dataset = range(5)  # one of them is not drawn


def test_a_loss_that_is_no_number_is_not_taken_for_the_smallest():
    ids = torch.ones(4, 8, dtype=torch.long)
    batch = Batch(pids=torch.arange(4), caption_ids=ids, indices=torch.arange(4))
    (losses,) = sample_losses(Overflowing(), FourSamples([batch]), torch.device("cpu"))
    assert np.isfinite(losses).tolist() == [True, False, False, True, False]


@needs_sklearn
def test_too_few_samples_are_a_sentence_and_equal_ones_are_clean():
    with pytest.raises(InputError, match="--division needs at least 4 training samples, and there are 3"):
        clean(np.array([1.0, np.nan, 2.0, 3.0]), 0, False, mixture())
    assert clean(np.ones(9), 0, False, mixture()).all()


@needs_sklearn
@pytest.mark.parametrize("lacks", ["captions", "scikit-learn"])
def test_what_a_division_lacks_is_said_before_anything_is_written(lacks, data, tmp_path, monkeypatch, capsys):
    argv = [*words(data, tmp_path / "logs", "--division", loss_names="tal"), "--batch_size", "2"]
    if lacks == "captions":
        records = json.loads((data / "CUHK-PEDES" / "reid_raw.json").read_text())
        first = next(record for record in records if record["split"] == "train")
        others = [record for record in records if record["split"] != "train"]
        (tmp_path / "few.json").write_text(json.dumps([first, *others]))
        images = data / "CUHK-PEDES" / "imgs"
        argv += ["--annotations", str(tmp_path / "few.json"), "--images", str(images)]
    else:
        monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    assert load_script("train").main(argv) == 2
    error = capsys.readouterr().err
    said = {"captions": "at least 4 training samples, and there are 2", "scikit-learn": "-methods.txt"}
    assert said[lacks] in error and error.count("\n") == 1 and not (tmp_path / "logs").exists()


@needs_sklearn
def test_samples_that_are_not_seen_are_clean_and_change_nothing_for_the_others():
    """The identity sampler leaves some out; a third at one loss would be a mixture of its own."""
    losses = losses_of("A").astype(np.float64)
    with_gaps = np.insert(losses, np.arange(0, 600, 2), np.nan)
    found, unseen = clean(with_gaps, 3, False, mixture()), np.isnan(with_gaps)
    assert found[unseen].all() and (found[~unseen] == clean(losses, 3, False, mixture())).all()


@needs_sklearn
def test_a_division_that_a_resume_switches_on_within_an_epoch_is_made_then(data, tmp_path):
    argv = [*words(data, tmp_path, loss_names="tal", epochs=1), "--log_period", "1"]
    assert run(argv, tmp_path / "output", ("Iteration[2/6]", signal.SIGTERM)) == 3
    resume = ["--resume", "--resume_ckpt_file", only_run(tmp_path), "--division"]
    assert run(resume, tmp_path / "more") == 0
    assert "clean pairs: " in (tmp_path / "more").read_text()


@pytest.mark.parametrize(
    ("typed", "moved", "strict"),
    [
        ("", 0.0, False),
        ("--dataset_name RSTPReid", 0.0, True),
        ("--dataset_name RSTPReid --annotations mine.csv", 0.0, False),
        ("", 0.5, True),
        ("", 0.2, False),
    ],
)
def test_the_mixture_goes_by_the_data_set_and_by_the_captions_that_moved(typed, moved, strict):
    assert careful(get_args(typed.split()), moved) is strict


NOISY = ("--division", "--token_selection", "--noisy_rate", "0.3")


@needs_sklearn
def test_a_run_that_divides_goes_on_within_an_epoch_as_if_it_had_not_been_stopped(data, tmp_path):
    argv = [*words(data, tmp_path / "a", *NOISY, loss_names="tal", epochs=2), "--log_period", "1"]
    assert run(argv, tmp_path / "output") == 0
    said = (tmp_path / "output").read_text()
    assert said.count("clean pairs: ") == 2 and "of 48 training captions are another sample's" in said
    whole = only_run(tmp_path / "a")
    argv += ["--output_dir", tmp_path / "b"]
    assert run(argv, tmp_path / "output", ("Epoch[2] Iteration[2/6]", signal.SIGTERM)) == 3
    stopped = only_run(tmp_path / "b")
    state = torch.load(stopped / "last.pth", weights_only=True)
    assert state["iteration"] == 2 and set(state["label_hat"].tolist()) <= {0, 1}
    assert run(["--resume", "--resume_ckpt_file", stopped], tmp_path / "more") == 0
    assert "clean pairs" not in (tmp_path / "more").read_text()
    assert differ(stopped / "last.pth", whole / "last.pth") == []


@needs_sklearn
def test_processes_divide_as_one_does(data):
    argv = words(data, data, *NOISY, "--batch_size", "10", loss_names="tal")  # 10, …, 8
    ((weights, counts),), two = (together(n, processes.divided, argv) for n in (1, 2))
    assert sum(counts) == len(weights) == 48
    for others, other_counts in two:
        assert other_counts == counts and torch.equal(others, weights)


# ---- captions ----


def test_words_are_masked_exchanged_and_dropped_as_published():
    for seed, expected in zip(RDE["aug_seeds"].tolist(), RDE["aug_out"], strict=True):
        rng = random.Random(seed)
        found = torch.stack([augment_tokens(ids, rng) for ids in RDE["aug_ids"]])
        assert torch.equal(found, expected)
        assert bool(((found == EOT).sum(1) == 1).all()) is AUGMENT["eot_kept"]


def test_as_many_words_are_masked_and_dropped_as_by_the_published_code():
    published, rng, ids = AUGMENT["statistics"], random.Random(0), RDE["aug_ids"]
    words, masked, removed = 0, 0, 0
    while words < published["words"]:
        for row in ids:
            found = augment_tokens(row, rng)
            words += int(((row > 0) & (row < MASK)).sum())
            masked += int((found == MASK).sum() - (row == MASK).sum())
            removed += int((found == 0).sum() - (row == 0).sum())
    for found, name in ((masked / words, "mask"), (removed / words, "removed")):
        rate = published["expected"][name]
        spread = (rate * (1 - rate) / words) ** 0.5
        assert abs(found - rate) < 4 * spread and abs(published[f"{name}_rate"] - rate) < 4 * spread


def test_augmented_captions_are_a_function_of_seed_epoch_and_sample(data):
    def epoch_of(number, *more):
        typed = words(data, data, *more, "--division", loss_names="tal")
        loader, *_ = build_dataloader(get_args(typed))
        loader.set_epoch(number)
        batches = list(loader)
        ids, at = (torch.cat([batch[key] for batch in batches]) for key in ("caption_ids", "indices"))
        return ids[at.argsort()]

    options = ("--text_aug", "--MLM", "--clean_captions")
    first = epoch_of(1, *options)
    assert torch.equal(first, epoch_of(1, *options, "--batch_size", "5"))
    assert not torch.equal(first, epoch_of(2, *options))
    plain = epoch_of(1, "--clean_captions")
    assert (first != plain).any() and (first == MASK).any() and not (plain == MASK).any()
    assert (first[:, 0] == SOT).all() and ((first == EOT).sum(1) == 1).all()


def captions(data, *more):
    loader, *_ = build_dataloader(get_args(words(data, data, *map(str, more), loss_names="tal")))
    return [sample.caption for sample in loader.dataset.samples], loader.dataset.samples


def test_a_drawn_share_of_captions_is_permuted_and_everything_else_stays(data):
    plain, before = captions(data)
    noisy, after = captions(data, "--noisy_rate", "0.5")
    moved = [n for n, (a, b) in enumerate(zip(plain, noisy, strict=True)) if a != b]
    assert 12 <= len(moved) <= 24 and sorted(plain) == sorted(noisy)
    assert [one._replace(caption="") for one in before] == [one._replace(caption="") for one in after]
    assert noisy == captions(data, "--noisy_rate", "0.5")[0]


def test_sample_i_has_the_caption_of_sample_file_i(data, tmp_path):
    plain, _ = captions(data)
    places = np.random.RandomState(0).permutation(len(plain))
    np.save(tmp_path / "noise.npy", places)
    noisy, _ = captions(data, "--noisy_file", tmp_path / "noise.npy")
    assert noisy == [plain[place] for place in places]


def several(path):
    with path.open("wb") as file:
        np.savez(file, a=np.arange(48))


WRONG = {
    "of another length": (
        lambda path: np.save(path, np.arange(7)),
        r"\[7\] of int64, and must hold 48 whole",
    ),
    "of places that are not there": (
        lambda path: np.save(path, np.arange(48) + 1),
        "from 1 to 48, and must hold 48 whole numbers from 0 to 47",
    ),
    "of fractions": (lambda path: np.save(path, np.zeros(48)), "of float64, and must hold 48 whole numbers"),
    "of several arrays": (lambda path: several(path), "holds several arrays, and must hold 48 whole numbers"),
    "of objects": (lambda path: np.save(path, np.array([{}] * 48), allow_pickle=True), "is not an .npy file"),
    "of text": (lambda path: path.write_text("0 1 2"), "is not an .npy file"),
    "that is not there": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_noise_file_is_one_sentence(kind, data, tmp_path):
    make, said = WRONG[kind]
    make(path := tmp_path / "noise.npy")
    with pytest.raises(InputError, match=said) as error:
        captions(data, "--noisy_file", path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("typed", ["--division --loss_names cmpm+id", "--noisy_rate 1.5", "--noisy_rate -1"])
def test_what_cannot_be_divided_is_one_sentence(typed, capsys):
    with pytest.raises(SystemExit):
        get_args(typed.split())
    err = capsys.readouterr().err
    assert typed.split()[0] in err and err.count("\n") == 1
