"""Noise: every token of a block is learned exactly once, nothing before it is hidden; masks are functions of seeds."""

from __future__ import annotations

import pytest
import torch

from accel.errors import OptionError
from accel.methods.dparallel.distill import masks


@pytest.mark.parametrize(("length", "canvas", "size"), [(1, 8, 4), (7, 16, 4), (8, 16, 4), (16, 16, 4), (5, 12, 1)])
def test_a_block_is_learned_once_between_clean_and_masked(length, canvas, size):
    chosen = set()
    for step in range(200):
        noise = masks.blocks(length, canvas, size, masks.generator(0, step, 3))
        learned = noise.learned.nonzero()[:, 1]
        start = int(learned.min()) // size * size
        chosen.add(start)
        # each position of one whole block, once
        assert sorted(learned.tolist()) == list(range(start, start + size)) and noise.tokens == size
        for hidden, view in zip(noise.hidden, noise.learned, strict=True):
            assert view.any() and not hidden[:start].any() and hidden[start + size :].all()
            assert torch.equal(hidden[start : start + size], view[start : start + size])
    # every block with a token of the answer, and none behind it
    assert chosen == set(range(0, length, size))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_how_much_the_first_view_hides(share):
    hidden = [masks.response(64, masks.generator(1, step, 0), share).hidden[0].float().mean() for step in range(300)]
    assert abs(float(torch.stack(hidden).mean()) - share) < 0.02


def test_the_whole_response_is_learned_once():
    for step in range(50):
        noise = masks.response(7, masks.generator(0, step, 0))
        assert noise.hidden.sum(0).tolist() == [1] * 7 and torch.equal(noise.hidden, noise.learned)
        assert noise.tokens == 7 and noise.weight == 1


def test_diffusion_hides_each_position_with_its_time():
    times = (0.1, 0.5, 1.0)
    for time in times:
        found = [masks.diffusion(32, time, masks.generator(2, step, 0)) for step in range(200)]
        assert abs(float(torch.stack([each.hidden for each in found]).float().mean()) - time) < 0.02
        assert all(each.weight == 1 / time and each.tokens == 32 for each in found)


def test_maskgit_hides_as_much_and_counts_every_hidden_token_alike():
    for time in (0.1, 0.5, 1.0):
        key = masks.generator(2, 3, 0), masks.generator(2, 3, 0)
        found, weighted = masks.maskgit(32, time, key[0]), masks.diffusion(32, time, key[1])
        assert found.hidden.equal(weighted.hidden) and found.learned.equal(found.hidden)
        assert (found.weight, found.tokens) == (1.0, int(found.hidden.sum()))


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_one_block_hides_its_share_between_clean_and_masked(time):
    shares, starts = [], set()
    for step in range(400):
        noise = masks.block(19, 32, 8, time, masks.generator(4, step, 1))
        (hidden,), (learned,) = noise.hidden, noise.learned
        # what is hidden and not learned stands behind the block: the answer ends in the third of four
        start = int((hidden & ~learned).nonzero()[0, 0]) - 8
        starts.add(start)
        assert not hidden[:start].any() and hidden[start + 8 :].all() and not learned[start + 8 :].any()
        shares.append(float(learned[start : start + 8].float().mean()))
        assert (noise.weight, noise.tokens) == (1.0, int(learned.sum()))
    assert abs(sum(shares) / len(shares) - time) < 0.03
    assert starts == {0, 8, 16}


def test_times_are_uniform_and_spread():
    found = torch.tensor([masks.times(4, 0.01, 5, step) for step in range(400)])
    assert found.min() >= 0.01 and found.max() < 1
    assert (found.mean(0) - 0.505).abs().max() < 0.05
    # one in each quarter
    quarters = ((found - 0.01) / 0.99 * 4).long().sort(-1).values
    assert (quarters == torch.arange(4)).all(-1).float().mean() > 0.99


def test_masks_are_functions_of_seed_step_and_row():
    def draw(*key):
        return masks.blocks(40, 64, 8, masks.generator(*key)).learned.long().argmax(-1).tolist(), torch.rand(
            4, generator=masks.generator(*key)
        )

    first = draw(0, 0, 0)
    assert first[0] == draw(0, 0, 0)[0] and torch.equal(first[1], draw(0, 0, 0)[1])
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first[1], draw(*other)[1])


def test_an_unknown_noise_is_named():
    with pytest.raises(OptionError, match="unknown noise 'blok'"):
        masks.check("blok")
