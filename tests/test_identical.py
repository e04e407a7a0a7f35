"""Uploads that do not differ, as of layers that are frozen or clients that do not move."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.raw import RawSpace
from pfedgpa_app.diffusion.signal import SKETCH
from pfedgpa_app.guard import Guard, Move
from pfedgpa_app.parameters import ParameterLayout
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.trace import trace_of

DIM, NEWCOMER = 24, 9
KINDS = [(space, denoise) for space in ("subspace", "raw") for denoise in (True, False)]


def aggregator_of(space: str, denoise: bool, sharing: str, **others) -> GenerativeAggregator:
    start = 200 if space == "raw" else "auto"
    config = DiffusionConfig(
        space=space,
        denoise=denoise,
        sharing=sharing,
        start=start,
        train_steps=3,
        hidden_size=8,
        num_blocks=1,
        num_draws=1,
        min_contributors=1,
        **others,
    )
    return GenerativeAggregator(torch.zeros(DIM), config, seed=1)


def halves_of(kind: str, client: int) -> Tensor | None:
    match kind:
        case "none":
            return None
        case "zero":
            return torch.zeros(2, SKETCH)
        case "same":
            return torch.ones(2, SKETCH)
        case _:
            return torch.randn(2, SKETCH, generator=make_generator(client))


@given(
    kind=st.sampled_from(KINDS),
    sharing=st.sampled_from(["measured", "affinity", "none"]),
    rank=st.sampled_from(["auto", 3]),
    value=st.sampled_from([0.0, 0.1, -1e-30, 1e6]),
    is_flat=st.booleans(),
    num_clients=st.integers(2, 5),
    halves=st.sampled_from(["none", "zero", "same", "drawn"]),
)
def test_who_uploads_the_same_is_given_the_same(
    kind, sharing, rank, value, is_flat, num_clients, halves
):
    common = torch.full((DIM,), value)
    if not is_flat:
        common = common * torch.randn(DIM, generator=make_generator(3))
    aggregator = aggregator_of(*kind, sharing, rank=rank)
    for server_round in (1, 2):
        for client in range(num_clients):
            aggregator.observe(client, common.clone())
            if (reported := halves_of(halves, client)) is not None:
                aggregator.compare(client, reported)
        aggregator.fit(server_round)
    if (reported := halves_of(halves, NEWCOMER)) is not None:
        aggregator.compare(NEWCOMER, reported)
    aggregator.onboard(NEWCOMER, common.clone(), common.clone())
    given_back = [*aggregator.personalize_each([*range(num_clients), NEWCOMER])]
    for vector in (*given_back, aggregator.default_model()):
        torch.testing.assert_close(vector, common, rtol=1e-5, atol=0)
    assert "nan" not in str(trace_of(aggregator)) + aggregator.describe()


@given(
    kind=st.sampled_from(KINDS),
    sharing=st.sampled_from(["measured", "affinity", "none"]),
    size=st.sampled_from([1e-30, 1.0, 1e6]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    halves=st.sampled_from(["none", "zero", "same", "drawn"]),
)
def test_what_two_groups_have_in_common_stays_and_nothing_is_nan(
    kind, sharing, size, sizes, halves
):
    common = torch.linspace(-1, 1, DIM) * size
    own = torch.zeros(DIM)
    own[: DIM // 2] = torch.randn(DIM // 2, generator=make_generator(3)) * size
    uploads = [common + own] * sizes[0] + [common - own] * sizes[1]
    aggregator = aggregator_of(*kind, sharing)
    for client, upload in enumerate(uploads):
        aggregator.observe(client, upload.clone())
        if (reported := halves_of(halves, client)) is not None:
            aggregator.compare(client, reported)
    aggregator.fit(1)
    if (reported := halves_of(halves, NEWCOMER)) is not None:
        aggregator.compare(NEWCOMER, reported)
    aggregator.onboard(NEWCOMER, uploads[0].clone(), common.clone())
    for vector in aggregator.personalize_each([*range(len(uploads)), NEWCOMER]):
        assert bool(vector.isfinite().all())
        torch.testing.assert_close(
            vector[DIM // 2 :], common[DIM // 2 :], rtol=1e-3, atol=1e-4 * size
        )
    assert "nan" not in str(trace_of(aggregator)) + aggregator.describe()


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_clients_that_do_not_move_are_usual(moved: int):
    sent = {"weight": torch.zeros(DIM)}
    layout = ParameterLayout.of(sent)
    moves = {
        row: Move.of(layout, sent, {"weight": torch.full((DIM,), float(row >= 5))})
        for row in range(5 + moved)
    }
    positions = {row: move.generated for row, move in moves.items()}
    assert Guard().find_outliers(moves, positions, torch.zeros(DIM), len(moves)) == {}


def test_parameters_that_differ_by_less_than_float32_tells_do_not_differ():
    vectors = [torch.zeros(4) for _ in range(100)]
    vectors[0][0] = 2.0**-149  # the smallest float32; its deviation over all is less
    assert float(vectors[0][0]) > 0
    space = RawSpace.fit(vectors, multiple=1)
    assert bool(space.project(vectors).isfinite().all())
