"""A batch: named in one place, read like the published dict, cut, planned and moved by itself."""

import pytest
import torch

from benchmarks.step import batch_of
from tests.recipe import CLASSES, tiny_model
from utils.batch import Batch

IDS = ("pids", "image_ids", "caption_ids")


def sample(size=5, **more):
    return {**batch_of(size, (8, 4)), **more}


def test_it_reads_like_the_dict_that_it_is_made_of():
    held = sample()
    batch = Batch.of(held)
    assert set(batch) == set(held) == set(batch.keys()) and len(batch) == len(held)
    assert all(batch[key] is held[key] for key in held)
    assert {**batch}.keys() == held.keys() and "pids" in batch and "boxes" not in batch
    assert batch.get("boxes") is None and Batch.of(batch) is batch
    with pytest.raises(KeyError, match="boxes"):
        batch["boxes"]


def test_a_key_of_ones_own_is_kept_cut_and_moved():
    batch = Batch.of(sample(label_hat=torch.arange(5.0)))
    assert batch["label_hat"].tolist() == [0, 1, 2, 3, 4]
    assert [part["label_hat"].tolist() for part in batch.parts(2)] == [[0, 1], [2, 3], [4]]
    assert batch.planned().to(torch.device("cpu"))["label_hat"].tolist() == [0, 1, 2, 3, 4]
    sentences = Batch.of(sample(sentences=list("abcde")))
    assert [part.planned()["sentences"] for part in sentences.parts(2)] == [["a", "b"], ["c", "d"], ["e"]]
    assert sentences.parts()[0].to(torch.device("cpu"))["sentences"] == list("abcde")


@pytest.mark.parametrize("size", [None, 1, 2, 5, 9])
def test_parts_hold_each_sample_once_and_are_planned_anew(size):
    batch = Batch.of(sample()).planned()
    parts = batch.parts(size)
    assert [len(part.pids) for part in parts] == {None: [5], 1: [1] * 5, 2: [2, 2, 1], 5: [5], 9: [5]}[size]
    for key in (*IDS, "images", "mlm_ids", "mlm_labels"):
        assert torch.equal(torch.cat([part[key] for part in parts]), batch[key]), key
    assert all(part.text_length is None and part.mlm_at is None for part in parts)


def test_an_empty_share_is_one_part():
    empty = Batch.of({key: value[:0] for key, value in sample().items()})
    (part,) = empty.parts(3)
    planned = part.planned()
    assert len(part.pids) == 0 and planned.text_length >= 1 and len(planned.mlm_rows) == 0


def test_a_plan_names_the_labelled_positions_and_nothing_else():
    """By hand: two captions, of which the first has two masked words and the second one."""
    labels = torch.tensor([[0, 7, 0, 9, 0], [0, 0, 5, 0, 0]])
    ids = torch.tensor([[1, 2, 2, 2, 49407], [1, 2, 2, 49407, 0]])
    batch = Batch(
        pids=torch.tensor([0, 1]), caption_ids=ids, mlm_ids=ids.clone(), mlm_labels=labels
    ).planned()
    found = labels.gather(1, batch.mlm_at).flatten()[batch.mlm_rows]
    assert sorted(found.tolist()) == [5, 7, 9] and batch.mlm_at.shape == (2, 2)
    assert batch.text_length == 5 and batch.same_caption is True
    other = Batch(pids=batch.pids, caption_ids=ids, mlm_ids=ids + 1, mlm_labels=labels).planned()
    assert other.same_caption is False
    assert Batch(pids=batch.pids, caption_ids=ids).planned().same_caption is None


def test_a_dict_that_is_planned_and_moved_by_hand_serves_forward():
    model, batch = tiny_model(), batch_of(4, (96, 32))
    batch["pids"] %= CLASSES
    by_hand = model({**batch, **model.plan(batch)})
    assert {name: value.item() for name, value in by_hand.items()} == {
        name: value.item() for name, value in model(batch).items()
    }


def test_samples_are_those_of_all_processes():
    assert Batch.of(sample()).samples == 5
    assert Batch.of(sample(batch_size=20)).samples == 20


def test_ids_are_what_tells_the_samples_and_nothing_large():
    assert set(Batch.of(sample()).ids()) == set(IDS)
    assert set(Batch(pids=torch.arange(2)).ids()) == {"pids"}
