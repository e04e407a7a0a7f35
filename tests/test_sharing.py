"""How much of what sets a client apart is kept, measured by halves of its images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from reported_halves import DIM, NUM_CLIENTS, clients, fitted, generated, groups, sketches
from simulated_grid import Answer, SimulatedGrid, received, site, start, weights
from small_task import EPOCHS, IMAGES, LABELS, PLAIN_SGD, RATE, small_task
from torch import Tensor

from client_app.methods import METHODS, Method, Task
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import Config, DiffusionConfig, OnboardingConfig
from pfedgpa_app.diffusion.mixing import mixing_from_halves, share_of
from pfedgpa_app.diffusion.signal import (
    SKETCH,
    agreement,
    centred,
    normalized,
    signal_parts,
    sketched,
)
from pfedgpa_app.diffusion.subspace import Spectrum
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.state import load_state, save_state
from server_app.strategies import PFedGPA


def test_signal_parts_are_those_of_the_formula():
    """With clients that say nothing, contradict themselves, and are far from all others."""
    generator = make_generator(3)
    own = 0.1 * torch.linspace(0, 1, 7)[:, None, None] * torch.randn(7, 1, 50, generator=generator)
    halves = list(own + torch.randn(7, 2, 50, generator=generator))
    halves[2] = torch.zeros(2, 50)
    halves[4][1] = -halves[4][0]
    halves[5] *= 30
    axes = Spectrum.of(list(torch.randn(7, 50, generator=generator))).eigenvectors
    moves = np.stack([pair.double().numpy() for pair in halves])
    known = np.arange(7) != 2
    moves[known] -= moves[known].mean(axis=0)
    lengths = np.sqrt(np.square(moves).sum(axis=2).mean(axis=1))
    # torch's median of six is the third.
    moves *= np.minimum(1, np.sort(lengths[known])[2] / np.maximum(lengths, 1e-9))[:, None, None]
    a, b = moves[:, 0], moves[:, 1]
    expected = [(q @ a @ b.T @ q) / np.square(q @ (a + b) / 2).sum() for q in axes.numpy().T]
    assert min(expected) < 0 < max(expected)
    found = signal_parts(axes, centred(torch.stack(halves).double()))
    np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1e-10)


def reports_of_groups() -> tuple[Spectrum, Tensor]:
    """Return the spectrum of uploads of five groups, and the centred halves of their clients."""
    uploads, halves = clients(groups(5), noise=0.7)
    reports = centred(torch.stack([normalized(sketches(each)) for each in halves]))
    return Spectrum.of(list(uploads)), reports


UNRELATED = torch.randn(2, SKETCH, generator=make_generator(7)) / SKETCH**0.5
HALF_LIES = {
    "opposed": lambda own: torch.stack([own[0], -own[0]]),
    "identical": lambda own: own.mean(0).expand(2, -1),
    "the other way": lambda own: -own,
    "unrelated": lambda own: UNRELATED,
    "only one": lambda own: torch.stack([own[0], torch.zeros(SKETCH)]),
    "a thousand times as long": lambda own: 1000 * UNRELATED,
}


def test_who_contradicts_itself_counts_as_silent():
    spectrum, reports = reports_of_groups()
    silent = reports.clone()
    silent[4] = 0
    reports[4] = HALF_LIES["opposed"](reports[4])
    axes = spectrum.eigenvectors
    torch.testing.assert_close(signal_parts(axes, reports), signal_parts(axes, silent))


@pytest.mark.parametrize("lie", HALF_LIES.values(), ids=HALF_LIES.keys())
def test_one_clients_halves_move_what_is_kept_by_a_tenth_at_most(lie):
    spectrum, reports = reports_of_groups()
    before = share_of(mixing_from_halves(spectrum, reports), spectrum)
    reports[4] = lie(reports[4])
    assert abs(share_of(mixing_from_halves(spectrum, reports), spectrum) - before) < 0.1


def test_nobody_makes_of_any_axis_more_noise_than_its_own():
    """Four that agree with each other let the products between them outweigh all else."""
    generator = make_generator(0)
    axis = torch.zeros(16, 1, dtype=torch.float64)
    axis[:4] = 0.5
    reports = torch.randn(SKETCH, generator=generator) + torch.zeros(16, 2, SKETCH)
    apart = 2 * torch.randn(4, SKETCH, generator=generator)
    reports[:4, 0] += apart
    reports[:4, 1] -= apart[[1, 0, 3, 2]]
    reports[4:] += 0.2 * torch.randn(12, 2, SKETCH, generator=generator)
    a, b = reports.double().numpy().transpose(1, 0, 2)
    lengths = np.sqrt((np.square(a) + np.square(b)).sum(axis=1) / 2)
    scales = np.minimum(1, np.sort(lengths)[7] / lengths)[:, None]  # torch's median of sixteen
    a, b = scales * a, scales * b
    noise = np.square(a - b).sum(axis=1) / 4
    total = np.square((a + b)[:4].sum(axis=0) / 4).sum()
    least = 1 - np.minimum(noise, 4 * np.sort(noise)[7])[:4].sum() / 2 / total
    assert a[:4].sum(axis=0) @ b[:4].sum(axis=0) / 4 / total < 0.1 < least
    assert float(signal_parts(axis, reports)) == pytest.approx(least)


def test_halves_that_hardly_agree_make_nobody_like_anybody():
    generator = make_generator(0)
    one, other = torch.randn(2, SKETCH, generator=generator)
    barely = other - (other @ one - 0.01 * one @ one) / (one @ one) * one
    others = torch.stack([torch.stack([one, one + other]), torch.stack([one, barely])])
    found = agreement(torch.stack([one, one + other]), others)
    assert float(found[0]) > 0.9
    assert float(found[1]) == 0.0
    assert not agreement(torch.stack([one, barely]), others).any()


def test_a_sketch_keeps_inner_products():
    moves = [torch.randn(50_000, generator=make_generator(seed)) for seed in range(5)]
    moves[1] += moves[0]
    moves[2] = moves[0] * (torch.arange(50_000) < 20)  # a few entries have all the length
    exact, found = (
        torch.corrcoef(torch.stack(each)) for each in (moves, [sketched(move) for move in moves])
    )
    assert found.shape == (5, 5)
    assert float((found - exact).abs().max()) < 4 / SKETCH**0.5
    lengths = torch.stack([sketched(move).norm() / move.norm() for move in moves])
    torch.testing.assert_close(lengths, torch.ones(5), atol=0.1, rtol=0)


def test_sketches_are_the_same_in_every_process_and_linear():
    move = torch.randn(1000, generator=make_generator(1))
    assert sketched(torch.eye(1000)[3]).nonzero().tolist() == [[743]]
    torch.testing.assert_close(sketched(3 * move) - sketched(move), sketched(2 * move))


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_signal_is_told_from_noise_whose_strength_nobody_knows(noise: float):
    """Everyone wants something else: of any axis 1 / (1 + noise^2) is signal."""
    own = torch.randn(NUM_CLIENTS, DIM, generator=make_generator(2))
    uploads, halves = clients(own, noise)
    parts = signal_parts(Spectrum.of(list(uploads)).eigenvectors, torch.stack(halves))
    assert parts == pytest.approx(np.full(NUM_CLIENTS - 1, 1 / (1 + noise**2)), abs=0.15)
    assert float(parts.mean()) == pytest.approx(1 / (1 + noise**2), abs=0.03)


def test_of_groups_the_axes_between_them_are_signal_and_nothing_else():
    uploads, halves = clients(groups(5), noise=1.0)
    parts = signal_parts(Spectrum.of(list(uploads)).eigenvectors, torch.stack(halves))
    assert bool((parts[:4] > 0.7).all())
    assert bool((parts[4:] < 0.2).all())


def test_clients_that_are_alike_are_given_their_mean():
    uploads, halves = clients(torch.ones(DIM), noise=1.0)
    models = generated(fitted(uploads, halves))
    assert (models - uploads.mean(0)).norm() < 0.02 * (uploads - uploads.mean(0)).norm()


def test_clients_that_agree_with_themselves_alone_keep_what_they_have():
    own = torch.randn(NUM_CLIENTS, DIM, generator=make_generator(2))
    uploads, halves = clients(own, noise=0.01)
    models = generated(fitted(uploads, halves))
    assert (models - uploads).norm() < 0.01 * uploads.norm()


def test_between_both_everyone_keeps_a_part():
    own = torch.randn(NUM_CLIENTS, DIM, generator=make_generator(2))
    uploads, halves = clients(own, noise=0.5)
    models = generated(fitted(uploads, halves))
    mean = uploads.mean(0)
    kept = ((models - mean) * (uploads - mean)).sum() / (uploads - mean).square().sum()
    assert float(kept) == pytest.approx(0.8**2, abs=0.05)


def test_groups_are_given_what_their_members_have_in_common():
    own = groups(5)
    uploads, halves = clients(own, noise=0.7)
    models = generated(fitted(uploads, halves, train_steps=200))
    before, after = (uploads - own).norm(dim=1), (models - own).norm(dim=1)
    # The exact mean of four would leave half of it; what is kept of an axis is a little less.
    assert float(after.mean() / before.mean()) < 0.65
    assert bool((after < 0.8 * before).all())


@pytest.mark.parametrize("settings", [{}, {"rank": 3}, {"space": "raw", "start": 200}])
def test_coordinates_as_uploaded_are_shrunk_by_the_square_of_their_signal(settings):
    uploads, halves = clients(groups(5), noise=1.0)
    aggregator = fitted(uploads, halves, denoise=False, **settings)
    axes = Spectrum.of(list(uploads)).eigenvectors
    moves = centred(torch.stack([normalized(sketches(each)) for each in halves]))
    kept = signal_parts(axes, moves) ** 2
    deviations = (uploads - uploads.mean(0)).double()
    expected = uploads.mean(0) + (axes * kept) @ (axes.T @ deviations)
    torch.testing.assert_close(generated(aggregator), expected.float(), atol=1e-4, rtol=1e-4)


def test_who_is_away_goes_the_way_of_its_group():
    uploads, halves = clients(groups(2), noise=0.3)
    aggregator = fitted(uploads, halves)
    before = dict(aggregator.bank.members)
    for client, move in ((0, 1.0), (1, -1.0)):
        aggregator.observe(client, before[client] + move)
    aggregator.fit(server_round=2)
    for client, move in ((2, 1.0), (3, -1.0)):
        moved = aggregator.bank.members[client] - before[client]
        torch.testing.assert_close(moved, torch.full((DIM,), move), atol=0.1, rtol=0)


def test_a_newcomer_without_kin_keeps_as_much_of_its_own_as_others():
    own = torch.randn(NUM_CLIENTS, DIM, generator=make_generator(2))
    uploads, halves = clients(own, noise=0.5)
    aggregator = fitted(uploads, halves)
    current = torch.randn(DIM, generator=make_generator(9))
    aggregator.onboard(50, current, torch.zeros(DIM))
    mean = uploads.mean(0)
    kept = (aggregator.personalize(50) - mean).norm() / (current - mean).norm()
    assert float(kept) == pytest.approx(0.8**2, abs=0.05)


def test_agreement_is_that_of_the_formula():
    """With one that has no signal and one that contradicts itself."""
    generator = make_generator(6)
    common = torch.randn(1, 1, 30, generator=generator)
    others = common + 0.5 * torch.randn(6, 2, 30, generator=generator)
    others[2] = 0
    others[3, 1] = -others[3, 0]
    one = torch.randn(2, 30, generator=generator)
    one[1] += one[0]
    mean = others[[0, 1, 3, 4, 5]].double().mean(0).numpy()
    a, b = one.double().numpy() - mean
    expected = []
    for first, second in others.double().numpy() - mean:
        lengths = (a @ b) * (first @ second)
        cosine = (a @ second + b @ first) / 2 / np.sqrt(abs(lengths)) if lengths > 0 else 0.0
        expected.append(np.clip(cosine, -1, 1))
    expected[2] = 0.0
    assert a @ b > 0
    assert expected[3] == 0.0
    found = agreement(one.double() - torch.from_numpy(mean), centred(others.double()))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_noise_does_not_lower_agreement_within_groups(noise: float):
    _, halves = clients(groups(5), noise)
    reports = torch.stack([normalized(sketches(each)) for each in halves])
    found = torch.stack([agreement(each, reports) for each in reports])
    is_alike = (torch.arange(NUM_CLIENTS)[:, None] - torch.arange(NUM_CLIENTS)) % 5 == 0
    itself = torch.eye(NUM_CLIENTS, dtype=torch.bool)
    assert float(found[is_alike & ~itself].mean()) > 0.9
    assert float(found[is_alike & ~itself].min()) > 0.5
    assert float(found[~is_alike].max()) < 0.4


def newcomer(
    own: Tensor, aggregator: GenerativeAggregator, halves: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return what a newcomer uploads that wants ``own``, and what is generated for it.

    All are measured again with it.
    """
    generator = make_generator(9)
    first, second = (own + 0.3 * torch.randn(DIM, generator=generator) for _ in range(2))
    upload = (first + second) / 2
    for client, reports in {**dict(enumerate(halves)), 50: torch.stack([first, second])}.items():
        aggregator.compare(client, sketches(reports))
    aggregator.fit(2)
    aggregator.onboard(50, upload, torch.zeros(DIM))
    return upload, aggregator.personalize(50)


def test_a_newcomer_is_given_what_those_are_given_that_ask_for_the_same():
    uploads, halves = clients(groups(5), noise=0.3)
    aggregator = fitted(uploads, halves)
    _, given = newcomer(groups(5)[3], aggregator, halves)
    alike = torch.stack([aggregator.personalize(client) for client in range(3, NUM_CLIENTS, 5)])
    assert (given - alike.mean(0)).norm() < 0.2 * (alike - alike.mean(0)).norm()


def test_a_newcomer_that_is_like_nobody_keeps_its_own():
    uploads, halves = clients(groups(5), noise=0.3)
    aggregator = fitted(uploads, halves)
    upload, given = newcomer(torch.randn(DIM, generator=make_generator(77)), aggregator, halves)
    assert (given - upload).norm() < 0.3 * (upload - uploads.mean(0)).norm()


def test_a_newcomer_among_clients_that_are_alike_is_given_their_mean():
    uploads, halves = clients(torch.ones(DIM), noise=1.0)
    aggregator = fitted(uploads, halves)
    _, given = newcomer(torch.ones(DIM), aggregator, halves)
    assert (given - uploads.mean(0)).norm() < 0.1 * (uploads - uploads.mean(0)).norm(dim=1).mean()


LIES = {
    "long": lambda moves, noise: 1e9 * moves,
    "agreeing": lambda moves, noise: noise.expand(2, -1),
    "contrary": lambda moves, noise: torch.stack([noise, -noise]),
    "in one layer": lambda moves, noise: torch.where(
        torch.arange(DIM) < 40, 100 * noise, 0.0
    ).expand(2, -1),
    "nothing": lambda moves, noise: 0 * moves,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_about_its_halves_changes_little_for_others(lie: str):
    """Of clients in groups, alike or each for itself, who all move the same way most of all."""
    generator = make_generator(4)
    common, noise = (torch.randn(DIM, generator=generator) for _ in range(2))
    for own in (groups(5), torch.zeros(DIM), torch.randn(NUM_CLIENTS, DIM, generator=generator)):
        uploads, halves = clients(3 * common + own, noise=0.7)
        lied = [LIES[lie](halves[0], noise), *halves[1:]]
        honest, spoiled = (generated(fitted(uploads, each)) for each in (halves, lied))
        wanted = 3 * common + own
        others = slice(1, NUM_CLIENTS)
        errors = [(models - wanted)[others].norm() for models in (honest, spoiled)]
        # One of twenty has its part in the mean of all whatever it says.
        assert errors[1] < 1.2 * errors[0] + 0.1 * (uploads - wanted)[others].norm()


def test_to_report_nothing_is_not_to_agree_with_oneself():
    """Of clients that are alike and move the same way, one has no signal."""
    uploads, halves = clients(torch.full((DIM,), 3.0), noise=1.0)
    halves[7] = torch.zeros(2, DIM)
    models = generated(fitted(uploads, halves))
    assert (models - uploads.mean(0)).norm() < 0.02 * (uploads - uploads.mean(0)).norm()


def test_uploads_that_are_the_same_do_not_throw_others_off():
    own = torch.randn(NUM_CLIENTS, DIM, generator=make_generator(2))
    uploads, halves = clients(own, noise=0.5)
    uploads = uploads + 10
    uploads[1] = uploads[0]
    models = generated(fitted(uploads, halves))
    kept = (models - uploads.mean(0)).norm(dim=1) / (uploads - uploads.mean(0)).norm(dim=1)
    assert bool((kept < 1).all())


def test_a_run_goes_on_from_a_saved_state_as_without_a_break(tmp_path: Path):
    uploads, halves = clients(groups(5), noise=1.0)
    aggregator = fitted(uploads, halves)
    aggregator.onboard(50, uploads[0], uploads[1])
    save_state(tmp_path / "state.safetensors", "state", aggregator.state())
    loaded = GenerativeAggregator(torch.zeros(DIM), aggregator.config, seed=1)
    loaded.restore(load_state(tmp_path / "state.safetensors", "state")[0])
    for each in (aggregator, loaded):
        each.observe(3, uploads[3] + 1)
        each.fit(server_round=2)
    assert torch.equal(generated(loaded), generated(aggregator))
    assert torch.equal(loaded.personalize(50), aggregator.personalize(50))


@pytest.mark.parametrize(("sharing", "first"), [("measured", 10), ("affinity", 0)])
def test_without_reports_of_most_affinities_decide(sharing: str, first: int):
    uploads, halves = clients(groups(5), noise=0.7)
    plain, partly = (
        GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(train_steps=20, sharing=way), seed=1)
        for way in ("affinity", sharing)
    )
    for client, upload in enumerate(uploads):
        for each in (plain, partly):
            each.observe(client, upload)
        if client >= first:
            partly.compare(client, sketches(halves[client]))
    plain.fit(1)
    partly.fit(1)
    assert torch.equal(generated(partly), generated(plain))
    assert ("halves of 10 clients are too few" in partly.describe()) == (sharing == "measured")


def test_a_few_that_do_not_tell_count_as_those_that_tell_nothing():
    uploads, halves = clients(groups(5), noise=0.7)
    aggregator = fitted(uploads, [*halves[:3], None, *halves[4:]])
    nothing = fitted(uploads, [*halves[:3], torch.zeros(2, DIM), *halves[4:]])
    assert torch.equal(generated(aggregator), generated(nothing))


def larger_task(extras: dict[str, Tensor]):
    """Return a task of six images in the order 0, 1, 2, 0, 1, 2; all examples are one batch."""
    task = small_task(Config(client=PLAIN_SGD.model_copy(update={"batch_size": 6})))
    data = task.data._replace(train_inputs=IMAGES.repeat(2, 1, 1, 1), train_labels=LABELS.repeat(2))
    return replace(task, data=data, extras=extras)


def test_a_client_trains_on_both_halves_apart_when_it_is_asked():
    common = torch.tensor([0.5, -0.25, 0.125, 1.0, 0.0, -1.0])
    requested, plain, shuffled = (larger_task(extras) for extras in ({"common": common}, {}, {}))
    uploaded, extras = METHODS["pfedgpa"]().train(requested)
    unasked, nothing = METHODS["pfedgpa"]().train(plain)
    assert nothing == {}
    # What is uploaded, and what the model is afterwards, does not depend on it.
    for state in (unasked, requested.model.state_dict(), Method().train(shuffled).state):
        assert all(torch.equal(uploaded[name], state[name]) for name in uploaded)
    order = torch.randperm(6, generator=shuffled.generator)
    for rows, move in zip((order[:3], order[3:]), extras["halves"], strict=True):
        inputs = requested.data.train_inputs[rows].flatten(1).double()
        targets = torch.eye(2, dtype=torch.float64)[requested.data.train_labels[rows]]
        before = common[:4].view(2, 2).double(), common[4:].double()
        weight, bias = before
        for _ in range(EPOCHS):
            error = (torch.softmax(inputs @ weight.T + bias, dim=1) - targets) / 3
            weight, bias = weight - RATE * error.T @ inputs, bias - RATE * error.sum(dim=0)
        expected = torch.cat([(weight - before[0]).flatten(), bias - before[1]])
        torch.testing.assert_close(move, sketched(expected), atol=1e-6, rtol=1e-5)


def half_moves(task: Task) -> Tensor:
    """Return what a client reports of its halves."""
    return METHODS["pfedgpa"]().train(task).extras["halves"]


def test_halves_start_from_what_was_received_where_nothing_else_came():
    none, same = larger_task({"common": torch.empty(0)}), larger_task({})
    same.extras = {"common": torch.cat([t.flatten() for t in same.received.values()])}
    assert torch.equal(half_moves(none), half_moves(same))
    assert bool(half_moves(larger_task({"common": torch.zeros(6)})).ne(half_moves(same)).any())


def test_halves_that_diverge_say_nothing_and_the_upload_is_used():
    task = larger_task({"common": torch.zeros(6)})
    task.data.train_inputs[0] = 1e30
    diverging = replace(task, config=Config(client=PLAIN_SGD))
    assert torch.equal(half_moves(diverging), torch.zeros(2, SKETCH))


def test_a_client_with_too_few_images_has_no_halves():
    task = small_task(Config(client=PLAIN_SGD))
    task.extras = {"common": torch.zeros(6)}
    _, extras = METHODS["pfedgpa"]().train(task)
    assert torch.equal(extras["halves"], torch.zeros(2, SKETCH))


def test_normalized_moves_have_one_length():
    moves = torch.randn(2, 100, generator=make_generator(0))
    assert float(normalized(7 * moves).square().sum()) == pytest.approx(2)
    assert torch.equal(normalized(torch.zeros(2, 100)), torch.zeros(2, 100))


def half(value: float, halves: Tensor | None) -> Answer:
    """Return a node that uploads weights, and halves if it is asked for them."""
    plain = site(value)

    def answer(message: Message) -> RecordDict | None:
        reply = plain(message)
        assert isinstance(reply, RecordDict)
        is_train = message.metadata.message_type == MessageType.TRAIN
        if is_train and "extras" in message.content and halves is not None:
            reply["extras"] = ArrayRecord({"halves": halves})
        return reply

    return answer


def requested(grid: SimulatedGrid) -> dict[int, set[int]]:
    """Return which nodes were asked for halves, by round; nobody is when models are evaluated."""
    nodes: dict[int, set[int]] = {}
    for message in grid.sent:
        if "extras" in message.content:
            assert message.metadata.message_type == MessageType.TRAIN
            assert list(message.content["extras"]) == ["common"]
            server_round = message.content["config"]["server-round"]
            nodes.setdefault(server_round, set()).add(message.metadata.dst_node_id)
    return nodes


def test_the_server_asks_every_client_again_when_it_is_time():
    # Most have nothing to say, which is no reason to refuse those that have.
    halves = [torch.randn(2, SKETCH, generator=make_generator(0)), *[torch.zeros(2, SKETCH)] * 3]
    bad = [torch.ones(2, SKETCH + 1), torch.full((2, SKETCH), torch.nan)]
    nodes = {number: half(float(number), each) for number, each in enumerate([*halves, *bad])}
    grid = SimulatedGrid(nodes)
    strategy = PFedGPA(diffusion=DiffusionConfig(measure_every=3, guard=False, train_steps=20))
    start(strategy, grid, num_rounds=5)
    # Also those that never report what can be used: nobody has others measure all the time.
    assert requested(grid) == {1: set(range(6)), 4: set(range(6))}
    assert set(strategy.aggregator.bank.members) == set(range(6))
    reports = [
        client for client in range(6) if strategy.aggregator.bank.of(client).halves is not None
    ]
    assert reports == [0, 1, 2, 3]
    assert len(received(grid, "train")) == 5


def test_all_are_asked_after_some_rounds_and_when_somebody_is_new():
    nodes = {number: half(float(number), torch.ones(2, SKETCH)) for number in range(4)}
    grid = SimulatedGrid(nodes)
    strategy = PFedGPA(
        diffusion=DiffusionConfig(measure_every=3, guard=False, train_steps=20),
        onboarding=OnboardingConfig(late_clients=1, join_round=3),
    )
    start(strategy, grid, num_rounds=7)
    assert requested(grid) == {1: {0, 1, 2}, 3: set(range(4)), 6: set(range(4))}


def test_what_is_sent_to_be_measured_from_is_the_members_mean():
    grid = SimulatedGrid({n: half(float(n), torch.zeros(2, SKETCH)) for n in range(4)})
    strategy = PFedGPA(diffusion=DiffusionConfig(measure_every=2, guard=False, train_steps=20))
    start(strategy, grid, num_rounds=3)
    sent = [
        message.content["extras"].to_torch_state_dict()["common"]
        for message in grid.sent
        if "extras" in message.content
    ]
    assert len(sent) == 8
    # In the first round it is what they are sent anyway.
    assert all(common.shape == (0,) for common in sent[:4])
    for common in sent[4:]:
        torch.testing.assert_close(common, strategy.global_model.vector(weights(1.5)))


def test_clients_that_cannot_answer_are_used_as_they_are():
    """Such as those of an app whose clients know of FedAvg alone."""
    grid = SimulatedGrid({1: site(1.0), 2: half(5.0, torch.zeros(2, SKETCH)), 3: site(9.0)})
    strategy = PFedGPA()
    start(strategy, grid, num_rounds=2)
    assert set(strategy.aggregator.bank.members) == {0, 1, 2}
    assert "halves of 0 clients are too few" in strategy.aggregator.describe()


def test_nobody_is_asked_where_kin_is_shared_with():
    grid = SimulatedGrid({1: site(1.0), 2: site(5.0)})
    start(PFedGPA(diffusion=DiffusionConfig(sharing="affinity", train_steps=20)), grid)
    assert requested(grid) == {}
