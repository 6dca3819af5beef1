"""The one vocabulary: where its segments lie, and what it refuses."""

import numpy as np
import pytest
import torch

from lapa.policy.vocabulary import SEGMENTS, Vocabulary

VOCABULARY = Vocabulary(text=10, vision=3, latent=4, bins=6, state=2, query=5)


def test_segments_follow_one_another_without_gaps():
    rows = [VOCABULARY.rows(segment) for segment in SEGMENTS]
    assert rows == [range(10), range(10, 13), range(13, 17), range(17, 23), range(23, 25), range(25, 30)]
    assert VOCABULARY.size == 30
    assert Vocabulary(text=10, latent=4).rows("latent") == range(10, 14), "what is not there takes no rows"


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_every_code_comes_back(segment, make):
    codes = make(len(VOCABULARY.rows(segment)))
    tokens = VOCABULARY.tokens(segment, codes)
    assert tokens.tolist() == list(VOCABULARY.rows(segment))
    assert VOCABULARY.codes(segment, tokens).tolist() == codes.tolist()


def test_adding_bins_moves_no_other_row():
    before = Vocabulary(text=10, vision=3, latent=4)
    assert all(before.rows(segment) == VOCABULARY.rows(segment) for segment in ("text", "latent"))


@pytest.mark.parametrize("code", [-1, 4])
def test_a_code_outside_its_segment_is_refused(code):
    with pytest.raises(ValueError, match=r"latent segment lie in \[0, 4\)"):
        VOCABULARY.tokens("latent", np.array([0, code]))


@pytest.mark.parametrize("token", [12, 17])
def test_a_token_of_another_segment_is_refused(token):
    with pytest.raises(ValueError, match=r"latent segment lie in \[13, 17\)"):
        VOCABULARY.codes("latent", torch.tensor([token]))


def test_no_codes_are_no_error():
    assert VOCABULARY.tokens("bins", np.zeros((0, 3), np.int64)).shape == (0, 3)


def test_a_vocabulary_without_text_is_refused():
    with pytest.raises(ValueError, match="text rows"):
        Vocabulary(text=0, latent=8)
