"""benchmarks/step_model.py: the calculated time of a training step."""

from pathlib import Path

import pytest

from benchmarks.step_model import DEVICES, Part, Step, dense_parts, encoder, fired, sparse_parts, table, total

H100 = DEVICES["H100"]


def test_a_part_takes_the_longer_of_computing_and_moving():
    assert Part("product", flops=600e12).milliseconds(H100) == pytest.approx(1e3)
    assert Part("copy", flops=1.0, dram=3.0e9).milliseconds(H100) == pytest.approx(1.0)


def test_gathered_rows_come_from_the_cache_while_a_block_of_columns_fits():
    assert Part("gather", gathered=5.5e9, rows=16384).milliseconds(H100) == pytest.approx(1.0)
    assert Part("gather", gathered=3.0e9, rows=262144).milliseconds(H100) == pytest.approx(1.0)


def test_the_number_of_features_that_fire():
    assert fired(Step(k=100, A=100, N=1)) == pytest.approx(100)
    assert fired(Step(k=1000, A=10, N=1)) == pytest.approx(10)
    assert 0.99 < fired(Step(k=65536)) / 65536 < 1.0


def test_only_the_encoder_is_a_dense_product_on_lists():
    step = Step(k=16384)
    product = 2 * step.N * step.d * step.k
    assert sum(part.flops for part in sparse_parts(step)) == product
    assert sum(part.flops for part in dense_parts(step)) == 5 * product


def test_the_encoder_dominates_as_the_dictionary_grows():
    shares = [total(sparse_parts(Step(k=k)), H100) / encoder(sparse_parts(Step(k=k)), H100) for k in (16384, 65536)]
    assert shares[0] > shares[1] > 1.0


def test_the_page_shows_what_the_model_gives():
    page = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
    assert table([16384, 65536, 262144], H100) in page.read_text()
