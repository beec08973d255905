"""Batches of text and of examples."""

import numpy as np
import pytest
import torch

from data.dataset import (
    Examples,
    bucketed_epoch,
    collate,
    fixed_batches,
    padded_length,
    prefetch,
    sample_batch,
)

TOKENS = np.arange(1000, dtype=np.uint16)

# ------------------------------------------------------------------------------------- text


def test_targets_are_the_next_tokens():
    inputs, targets = sample_batch(TOKENS, block_size=16, batch_size=4, seed=0, step=1)
    assert inputs.shape == targets.shape == (4, 16) and inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_batches_depend_on_seed_and_step_alone():
    inputs = {(seed, step): sample_batch(TOKENS, 16, 8, seed, step)[0] for seed, step in ((1, 5), (1, 6), (2, 5))}
    assert torch.equal(inputs[1, 5], sample_batch(TOKENS, 16, 8, 1, 5)[0])
    assert not torch.equal(inputs[1, 5], inputs[1, 6])
    assert not torch.equal(inputs[1, 5], inputs[2, 5])


def test_ranks_share_the_batch_of_one_process():
    whole = sample_batch(TOKENS, 16, 8, seed=3, step=7)[0]
    shares = [sample_batch(TOKENS, 16, 8, 3, 7, rank, world_size=2)[0] for rank in (0, 1)]
    assert all(len(share) == 4 for share in shares)
    assert sorted(whole.tolist()) == sorted(torch.cat(shares).tolist())


def test_windows_reach_both_ends_of_the_text():
    short = TOKENS[:18]
    starts = torch.cat([sample_batch(short, 16, 32, 0, step)[0][:, 0] for step in range(5)])
    assert set(starts.tolist()) == {0, 1}


@pytest.mark.parametrize("length, max_windows, rows", [(1000, 100, 62), (1000, 5, 5), (17, 8, 1), (33, 8, 2)])
def test_fixed_batches_are_disjoint_and_filled_up(length, max_windows, rows):
    batches = list(fixed_batches(TOKENS[:length], block_size=16, batch_size=4, max_windows=max_windows))
    assert all(inputs.shape == targets.shape == (4, 16) for inputs, targets in batches)
    inputs, targets = (torch.cat(tensors) for tensors in zip(*batches))
    counted = targets[:, 0] != -100
    assert counted.sum() == rows and counted[:rows].all()
    assert (targets[~counted] == -100).all()
    assert torch.equal(targets[counted], inputs[counted] + 1)
    assert len(inputs[counted].unique()) == rows * 16
    again = list(fixed_batches(TOKENS[:length], 16, 4, max_windows))
    assert all(torch.equal(a, b) for x, y in zip(batches, again) for a, b in zip(x, y))


# ------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize(
    "length, size", [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (1025, 1536), (1600, 2000)]
)
def test_padded_lengths_are_few(length, size):
    assert padded_length(length, 2000) == size


def test_every_example_comes_once_an_epoch():
    lengths = np.random.default_rng(0).integers(10, 1000, 1000)
    batches = bucketed_epoch(lengths, 16, seed=3, epoch=0)
    assert batches.shape == (62, 16) and len(set(batches.ravel())) == 62 * 16
    assert np.array_equal(batches, bucketed_epoch(lengths, 16, seed=3, epoch=0))
    for other in (bucketed_epoch(lengths, 16, 4, 0), bucketed_epoch(lengths, 16, 3, 1)):
        assert not np.array_equal(batches, other)
    left_out = [set(range(1000)) - set(bucketed_epoch(lengths, 16, 3, epoch).ravel()) for epoch in (0, 1)]
    assert left_out[0] != left_out[1]


def test_examples_of_a_batch_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(10, 1000, 5000)
    longest = lengths[bucketed_epoch(lengths, 16, 0, 0)].max(axis=1)
    assert lengths.mean() / longest.mean() > 0.95  # unsorted batches: about 0.53
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2  # and their order is random


def examples_of(rows, group=1):
    """Examples made of rows of (ids, mask)."""
    ids, mask = (np.concatenate(arrays) for arrays in zip(*rows))
    offsets = np.cumsum([0] + [len(ids) for ids, _ in rows])
    return Examples(ids.astype(np.uint16), mask.astype(np.uint8), offsets, group)


def random_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 259, length), rng.integers(0, 2, length)) for length in lengths]


def test_micro_batches_hold_what_is_learned():
    rows = random_rows(range(60, 90))
    indices = np.array([3, 17, 1])
    idx, positions, targets = collate(examples_of(rows), indices, 128)
    assert idx.dtype == positions.dtype == targets.dtype == torch.int64
    assert idx.shape == (3, 96) and len(positions) == len(targets) and len(positions) % (3 * 96 // 4) == 0
    assert len(set(positions.tolist())) == len(positions)
    learned = dict(zip(positions.tolist(), targets.tolist()))
    for r, index in enumerate(indices):
        ids, mask = (array.tolist() for array in rows[index])
        assert idx[r].tolist() == ids + [0] * (96 - len(ids))
        for t in range(96):
            expected = ids[t + 1] if t + 1 < len(ids) and mask[t + 1] else -100
            assert learned.pop(r * 96 + t, -100) == expected
    assert not learned


def test_pairs_are_collated_chosen_first():
    rows = random_rows(range(10, 20))
    idx, _, _ = collate(examples_of(rows, group=2), np.array([2, 0]), 64)
    expected = [rows[r][0].tolist() for r in (4, 0, 5, 1)]
    assert [row[: len(ids)] for row, ids in zip(idx.tolist(), expected)] == expected


def test_a_batch_in_which_all_is_learned():
    """There are never more positions than ids, even where a quarter of the ids is no whole number."""
    rows = [(np.full(69, 7), np.ones(69, int))] * 3
    idx, positions, targets = collate(examples_of(rows), np.array([0, 1, 2]), 69)
    assert idx.shape == (3, 69) and len(positions) == 3 * 69 and (targets == 7).sum() == 3 * 68


# ------------------------------------------------------------------------------------- prefetch


def test_prefetch_keeps_the_order_and_passes_errors_on():
    batches = prefetch(lambda step: (10 * step, [(torch.tensor(step),)]), range(3, 9), torch.device("cpu"))
    assert [(count, tensors[0].item()) for count, (tensors,) in batches] == [(10 * step, step) for step in range(3, 9)]

    def fail(step):
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(prefetch(fail, range(1, 3), torch.device("cpu")))
