"""Who is beyond the members that others learn from: kept in memory or on disk, and brought back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pfedgpa_app import aggregation, vault
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.bank import Bank, Standing
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.signal import sketched
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.state import WriteError, load_state, save_state
from pfedgpa_app.vault import DiskVault, MemoryVault, Vault

DIM = 300
CLIENTS = 12


def vector(value: float) -> Tensor:
    return torch.full((3,), value)


@pytest.fixture(params=["memory", "disk"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Vault:
    return MemoryVault() if request.param == "memory" else DiskVault(tmp_path / "bank")


def test_a_vault_is_a_dictionary(kept: Vault):
    kept[7], kept[2] = vector(7), vector(2)
    kept[7] = vector(8)
    assert (sorted(kept), len(kept), 7 in kept, 3 in kept) == ([2, 7], 2, True, False)
    assert torch.equal(kept[7], vector(8))
    assert torch.equal(kept.pop(2), vector(2))
    assert kept.pop(2, None) is None
    with pytest.raises(KeyError):
        kept[2]
    kept.prune()
    assert torch.equal(kept[7], vector(8))


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_files_that_the_last_checkpoint_counts_on_stay_until_the_next(tmp_path: Path):
    kept = DiskVault(tmp_path)
    kept[1], kept[2] = vector(1), vector(2)
    checkpoint = kept.state()
    kept[1] = vector(3)
    del kept[2]
    then = DiskVault(tmp_path)
    then.restore(checkpoint)
    assert torch.equal(then[1], vector(1))
    assert torch.equal(then[2], vector(2))
    assert len(files(tmp_path)) == 3
    kept.prune()
    assert files(tmp_path) == {kept.file(1).name}
    assert torch.equal(kept[1], vector(3))


def test_another_run_goes_on_with_files_of_its_own(tmp_path: Path):
    first = DiskVault(tmp_path / "first")
    first[1], first[2] = vector(1), vector(2)
    second = DiskVault(tmp_path / "second", earlier=tmp_path / "first")
    second.restore(first.state())
    second[1] = vector(5)
    del second[2]
    second.prune()
    assert torch.equal(first[1], vector(1))
    assert torch.equal(first[2], vector(2))
    assert torch.equal(second[1], vector(5))
    assert len(second) == 1


def test_a_damaged_file_is_no_state_to_go_on_from(tmp_path: Path):
    first = DiskVault(tmp_path / "first")
    first[1] = vector(1)
    first.file(1).write_bytes(b"nothing")
    second = DiskVault(tmp_path / "second", earlier=tmp_path / "first")
    with pytest.raises(ValueError, match=r"1-1\.safetensors is missing or damaged"):
        second.restore(first.state())
    assert not second
    assert not second.folder.exists()


def test_where_no_folder_can_be_made_a_client_has_what_it_had(tmp_path: Path):
    (tmp_path / "bank").write_text("in the way")
    kept = DiskVault(tmp_path / "bank")
    with pytest.raises(WriteError, match="bank cannot be written"):
        kept[1] = vector(1)
    assert not kept


def full_disk(file: Path, *args: object) -> None:
    raise WriteError(f"{file} cannot be written: the disk is full")


def test_on_a_full_disk_a_client_has_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = DiskVault(tmp_path)
    kept[1] = vector(1)
    monkeypatch.setattr(vault, "save_state", full_disk)
    for client in (1, 2):
        with pytest.raises(WriteError):
            kept[client] = vector(9)
    assert dict(kept).keys() == {1}
    assert torch.equal(kept[1], vector(1))


# The aggregator


def uploads() -> Tensor:
    """Three groups, client i in group i % 3, with a little noise."""
    centres = torch.randn(3, DIM, generator=make_generator(1))
    noise = torch.randn(CLIENTS, DIM, generator=make_generator(2))
    return centres[torch.arange(CLIENTS) % 3] + 0.1 * noise


def fitted(kept: Vault, rounds: int = 2, **settings: object) -> GenerativeAggregator:
    """Half of the clients in round 1, the others in round 2, and so on, with six members."""
    config = DiffusionConfig(
        **{"train_steps": 5, "max_members": 6, "min_contributors": 1} | settings
    )
    aggregator = GenerativeAggregator(torch.zeros(DIM), config, seed=1, archived=kept)
    for server_round in range(1, rounds + 1):
        observe(aggregator, server_round)
    return aggregator


def observe(aggregator: GenerativeAggregator, server_round: int) -> None:
    first = 6 * ((server_round + 1) % 2)
    for client in range(first, first + 6):
        aggregator.observe(client, uploads()[client])
        halves = uploads()[client] + 0.1 * torch.randn(2, DIM, generator=make_generator(client))
        aggregator.compare(client, torch.stack([sketched(half) for half in halves]))
    aggregator.fit(server_round)


def test_members_are_those_heard_of_last(kept: Vault):
    aggregator = fitted(kept)
    assert sorted(aggregator.bank.members) == [6, 7, 8, 9, 10, 11]
    assert sorted(aggregator.bank.archived) == [0, 1, 2, 3, 4, 5]
    observe(aggregator, 3)
    assert sorted(aggregator.bank.members) == [0, 1, 2, 3, 4, 5]
    assert sorted(aggregator.bank.archived) == [6, 7, 8, 9, 10, 11]


def test_what_a_client_is_to_the_others_changes_with_its_uploads(kept: Vault):
    aggregator = fitted(kept)
    aggregator.onboard(20, uploads()[0], uploads()[1])
    aggregator.observe(0, uploads()[0], is_outlier=True)
    aggregator.observe(1, uploads()[1])
    assert aggregator.bank.of(0).standing is Standing.ARCHIVED  # until the round is taken in
    aggregator.fit(3)
    standings = {client: aggregator.bank.of(client).standing for client in (0, 1, 2, 6, 20)}
    assert standings == {
        0: Standing.QUARANTINED,
        1: Standing.MEMBER,
        2: Standing.ARCHIVED,
        6: Standing.MEMBER,
        20: Standing.NEWCOMER,
    }
    assert aggregator.bank.of(11).standing is Standing.ARCHIVED  # one of seven, and six have room


def test_everyone_of_a_round_is_a_member(kept: Vault):
    aggregator = fitted(kept, max_members=2)
    assert sorted(aggregator.bank.members) == [6, 7, 8, 9, 10, 11]


def test_who_is_retired_is_given_what_its_like_are_given(kept: Vault):
    aggregator = fitted(kept)
    for client in range(6):
        (like, _) = (
            aggregator.personalize(other) for other in range(6, 12) if other % 3 == client % 3
        )
        torch.testing.assert_close(aggregator.personalize(client), like, rtol=0, atol=0.2)
        assert not torch.equal(aggregator.personalize(client), uploads()[client])


def test_who_is_retired_and_like_nobody_has_its_own(kept: Vault):
    aggregator = fitted(kept)
    other = torch.randn(DIM, generator=make_generator(9))
    for client in range(12):
        wish = uploads()[client] if client else other
        aggregator.compare(client, torch.stack([sketched(wish)] * 2))
    aggregator.fit(3)
    assert torch.equal(aggregator.personalize(0), uploads()[0])
    by_uploads = fitted(MemoryVault(), sharing="affinity")
    assert torch.equal(by_uploads.personalize(0), uploads()[0])


def test_a_damaged_file_costs_its_client_what_is_in_it(tmp_path: Path):
    aggregator = fitted(DiskVault(tmp_path), sharing="affinity")
    for client in range(6):
        aggregator.bank.archived.file(client).write_bytes(b"nothing")
    expected = aggregator.default_model()
    assert torch.equal(aggregator.personalize(0), expected)
    observe(aggregator, 3)  # all of them are back
    assert sorted(aggregator.bank.members) == [0, 1, 2, 3, 4, 5]


def test_newcomers_retire_as_well(kept: Vault):
    aggregator = fitted(kept, rounds=1)
    for server_round in (2, 3):
        observe(aggregator, server_round)
        for client in range(100 * server_round, 100 * server_round + 4):
            aggregator.onboard(client, uploads()[0], uploads()[1])
    aggregator.fit(4)
    assert sorted(aggregator.bank.non_members) == [200, 201, 300, 301, 302, 303]
    assert {202, 203} <= set(aggregator.bank.archived)


def test_on_a_full_disk_nobody_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vault, "save_state", full_disk)
    aggregator = fitted(DiskVault(tmp_path))
    assert sorted(aggregator.bank.members) == list(range(12))
    monkeypatch.undo()
    observe(aggregator, 3)
    assert sorted(aggregator.bank.members) == [0, 1, 2, 3, 4, 5]
    assert sorted(aggregator.bank.archived) == [6, 7, 8, 9, 10, 11]


def test_memory_and_disk_give_the_same_and_go_on_as_without_a_break(tmp_path: Path):
    memory, disk = fitted(MemoryVault()), fitted(DiskVault(tmp_path / "first"))
    save_state(tmp_path / "memory.safetensors", "state", memory.state())
    save_state(tmp_path / "disk.safetensors", "state", disk.state())
    assert (tmp_path / "disk.safetensors").stat().st_size < (
        tmp_path / "memory.safetensors"
    ).stat().st_size
    resumed = []
    for name in ("memory", "disk"):
        on_disk = DiskVault(tmp_path / "second", earlier=tmp_path / "first")
        kept = on_disk if name == "disk" else MemoryVault()
        aggregator = GenerativeAggregator(torch.zeros(DIM), memory.config, seed=1, archived=kept)
        aggregator.restore(load_state(tmp_path / f"{name}.safetensors", "state")[0])
        resumed.append(aggregator)
    for server_round in (3, 4):
        for aggregator in (memory, disk, *resumed):
            observe(aggregator, server_round)
        for client in range(CLIENTS):
            expected = memory.personalize(client)
            assert all(torch.equal(one.personalize(client), expected) for one in (disk, *resumed))


@pytest.mark.parametrize("sharing", ["measured", "affinity"])
def test_models_made_in_one_pass_are_those_made_one_by_one(
    kept: Vault, monkeypatch: pytest.MonkeyPatch, sharing: str
):
    aggregator = fitted(kept, sharing=sharing)
    current = torch.randn(DIM, generator=make_generator(4))
    aggregator.onboard(20, current, current + 0.1)
    clients = [7, 0, 20, 11, 3, 6, 8]
    alone = [aggregator.personalize(client) for client in clients]
    for together in (2, 3, 32):
        monkeypatch.setattr(aggregation, "MODELS_PER_PASS", together)
        models = list(aggregator.personalize_each(clients))
        assert len(models) == len(clients)
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(model, expected)
    assert not torch.equal(alone[0], alone[3])
    with pytest.raises(KeyError):
        list(aggregator.personalize_each([7, 99]))


def test_the_members_are_looked_up_once_for_all_who_are_retired(monkeypatch: pytest.MonkeyPatch):
    aggregator = fitted(MemoryVault())
    looked_up = []
    models = Bank._models

    def look_up(self: Bank, *, of_members: bool) -> dict[int, Tensor]:
        looked_up.append(of_members)
        return models(self, of_members=of_members)

    monkeypatch.setattr(Bank, "_models", look_up)
    numbers = []
    for clients in ([0, 1], [0, 1, 2, 3, 4, 5]):
        list(aggregator.personalize_each(clients))
        numbers.append(len(looked_up))
        looked_up.clear()
    assert numbers[0] == numbers[1]
