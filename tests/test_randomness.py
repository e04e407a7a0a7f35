"""Streams of random numbers that depend on their purpose alone, devices and threads."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pfedgpa_app.randomness import drawing_from, make_generator, repeatable, resolve_device

Stream = tuple[int | str, ...]
STREAMS: list[Stream] = [
    (),
    ("a",),
    ("a", 1),
    ("a1",),
    (1, "a"),
    (1, 2),
    (2, 1),
    (12,),
    ("a", "b"),
    ("ab",),
    ("1",),
    (1,),
    ("local", 3, 1),
    ("local", 1, 3),
]


def numbers(seed: int, *stream: int | str) -> list[float]:
    return torch.rand(4, generator=make_generator(seed, *stream)).tolist()


def test_streams_do_not_depend_on_the_order_they_are_asked_for():
    forwards = {stream: numbers(7, *stream) for stream in STREAMS}
    backwards = {stream: numbers(7, *stream) for stream in reversed(STREAMS)}
    assert forwards == backwards


def test_streams_and_seeds_are_distinct():
    drawn = {tuple(numbers(seed, *stream)) for seed in (0, 1, 7) for stream in STREAMS}
    assert len(drawn) == 3 * len(STREAMS)


def test_the_global_generator_draws_as_the_given_one_and_goes_on_afterwards():
    before = torch.get_rng_state()
    with drawing_from(make_generator(7, "a")):
        assert torch.rand(4).tolist() == numbers(7, "a")
    assert torch.equal(torch.get_rng_state(), before)


parts = st.one_of(st.integers(0, 2**63), st.text())


@given(a=st.lists(parts, max_size=4), b=st.lists(parts, max_size=4))
def test_different_streams_have_different_generators(a: list[int | str], b: list[int | str]):
    assume(a != b)
    assert make_generator(0, *a).initial_seed() != make_generator(0, *b).initial_seed()


@pytest.mark.parametrize(
    ("a", "b"), [((), (0,)), (("a",), ("a\0",)), ((2**32,), (0, "")), (("a", 1), ("a\0\1",))]
)
def test_streams_that_differ_by_zeros_are_distinct(a: Stream, b: Stream):
    """SeedSequence pads short entropy with zeros and cuts numbers into words of 32 bits."""
    assert make_generator(5, *a).initial_seed() != make_generator(5, *b).initial_seed()


def test_streams_are_uncorrelated():
    rows = torch.stack(
        [
            torch.randn(4000, generator=make_generator(0, "local", client, server_round))
            for client in range(5)
            for server_round in range(3)
        ]
    )
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max() < 5 / 4000**0.5


def test_a_stream_is_the_same_in_every_process_and_version():
    assert make_generator(7, "local", 3, 1).initial_seed() == 10802789412861879631
    assert make_generator(0, "a").initial_seed() == 1478547043893985542


def test_making_a_generator_leaves_the_global_random_state_as_it_was():
    before = torch.get_rng_state()
    numbers(0, "a")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("cpu", False, "cpu"),
        ("cpu", True, "cpu"),
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cuda", True, "cuda"),
    ],
)
def test_auto_is_cuda_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, available: bool, expected: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device(name) == torch.device(expected)


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match='finds no CUDA device here; right would be "auto"'):
        resolve_device("cuda")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def kept() -> tuple[int, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("num_threads", "inside"), [(1, 1), (None, 3)])
def test_what_is_set_for_the_same_digits_lasts_as_long_as_the_block(
    num_threads: int | None, inside: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with repeatable(num_threads):
        assert kept() == (inside, True, False)
    assert kept() == (3, False, True)
    with pytest.raises(ZeroDivisionError), repeatable(num_threads):
        raise ZeroDivisionError
    assert kept() == (3, False, True)
