"""What is read of a text is chosen by what it says, and new texts get rows like those of similar trained ones."""

from __future__ import annotations

import numpy as np

from cllm4rec.extension.text_kernels import StateKernel, Texts, WordKernel
from cllm4rec.extension.text_regression import Reading, fit, readings

NUM = 60
KIND = np.arange(NUM) % 2
GENERATOR = np.random.default_rng(0)
ROWS = np.where(KIND[:, None], 1.0, -1.0) * np.ones((NUM, 4)) + 0.1 * GENERATOR.standard_normal((NUM, 4))
COUNTS = GENERATOR.integers(1, 9, NUM)
TELLING_WORDS = [f"{'calm sea' if kind else 'loud city'} number{row % 7}" for row, kind in enumerate(KIND)]
SILENT_WORDS = [f"number{GENERATOR.integers(7)} edition{GENERATOR.integers(5)}" for _ in range(NUM)]


def states(telling: bool, kind: np.ndarray = KIND) -> np.ndarray:
    """One layer of states, in which a dimension tells the kind or none does."""
    states = GENERATOR.standard_normal((1, len(kind), 6)).astype(np.float32)
    states[0, :, 2] += 5.0 * kind * telling
    return states


def test_the_reading_that_tells_items_apart_is_chosen() -> None:
    words = fit(Texts(TELLING_WORDS, (3,), states(False)), ROWS, COUNTS, list(readings((3,))))
    layer = fit(Texts(SILENT_WORDS, (3,), states(True)), ROWS, COUNTS, list(readings((3,))))
    assert words.reading == Reading()
    assert words.solution.r2 > 0.9
    assert layer.reading == Reading(3, 1.0)
    assert layer.solution.r2 > 0.5


def test_texts_that_say_nothing_have_no_r2() -> None:
    nothing = fit(Texts(SILENT_WORDS, (3,), states(False)), ROWS, COUNTS, list(readings((3,))))
    assert nothing.solution.r2 < 0.1


def test_new_texts_get_the_rows_of_their_kind() -> None:
    regression = fit(Texts(TELLING_WORDS), ROWS, COUNTS, [Reading()])
    predicted = regression.predict(Texts(["a calm sea of words", "LOUD city", "nothing known"]))
    np.testing.assert_allclose(predicted[:2].mean(axis=1), [1.0, -1.0], atol=0.35)
    longest = np.linalg.norm(ROWS, axis=1).max()
    assert np.linalg.norm(predicted, axis=1).max() <= 1.001 * longest, "though these texts are purer than all others"
    assert abs(predicted[2].mean()) < 0.2, "the mean row"


def test_a_mixture_needs_both_of_its_parts() -> None:
    """Words tell one half of a row, states the other."""
    half = GENERATOR.integers(0, 2, NUM)
    rows = np.column_stack([ROWS[:, :2], np.where(half[:, None], 1.0, -1.0) * np.ones((NUM, 2))])
    texts = Texts(TELLING_WORDS, (1,), states(True, half))
    assert 0 < fit(texts, rows, COUNTS, list(readings((1,)))).reading.share < 1


def test_the_reader_restricts_what_is_compared() -> None:
    assert list(readings((2, 5), "words")) == [Reading()]
    assert list(readings((2, 5), "language_model")) == [Reading(2, 1.0), Reading(5, 1.0)]


def test_kernels_are_cosines_after_centering() -> None:
    fitted = Texts(TELLING_WORDS, (0,), states(True))
    for kernel in (WordKernel(fitted), StateKernel(fitted, 0)):
        gram = kernel(fitted)
        np.testing.assert_allclose(np.diag(gram), 1.0, atol=1e-5)
        assert np.linalg.eigvalsh(gram).min() > -1e-4
        assert np.abs(gram).max() < 1.0 + 1e-5
        np.testing.assert_allclose(kernel(fitted.take(np.arange(3, 9))), gram[3:9], atol=1e-6)
    words = WordKernel(fitted)(Texts(["calm sea", "loud city"]))
    np.testing.assert_array_equal(words > 0, np.stack([KIND == 1, KIND == 0]))
