"""What a site demands of the privacy of a run, and what it never reports."""

import pytest
from digits_client import SETTINGS, context, message
from flwr.app import Context, Message, MessageType, RecordDict
from simulated_grid import Answer, SimulatedGrid, received, site, start, weights

from client_app.floor import Floor
from client_app.messages import evaluate_message, train_message
from client_app.node import NodeError
from pfedgpa_app.config import ClientConfig, PrivacyConfig
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.privacy import Ledger, cost_of_round
from pfedgpa_app.rounds import BELOW_FLOOR, has_failed
from server_app import app
from server_app.strategies import ClientwiseFedAvg


def at(floor: str, **settings) -> Context:
    node = context()
    config = {**SETTINGS, "client.local-epochs": 1, **settings}
    return Context(1, 0, {**node.node_config, "privacy-floor": floor}, RecordDict(), config)


def lacks(floor: str, rounds: int = 0, **privacy) -> str:
    """Say what another round lacks after some, of a client with 30 examples."""
    settings, client = PrivacyConfig(**privacy), ClientConfig()
    ledger = Ledger()
    for _ in range(rounds):
        ledger = ledger.after(*cost_of_round(settings, client, 30))
    return Floor.of(at(floor)).shortfall(settings, client, ledger, 30)


def test_a_mode_is_the_least_that_a_site_accepts():
    assert lacks("") == lacks("no-metrics") == ""
    assert lacks("example") == 'privacy.mode = "none"'
    assert lacks("update", mode="example") == 'privacy.mode = "example"'
    assert lacks("example", mode="example") == ""
    assert lacks("example", mode="update", epsilon=50.0) == ""
    seeded = lacks("example", mode="example", seeded_noise=True)
    assert seeded == "privacy.seeded-noise = true"


def test_what_a_site_spends_stays_below_its_epsilon_for_its_own_delta():
    noisy = {"mode": "example", "noise_multiplier": 3.0}
    spent = Ledger().after(*cost_of_round(PrivacyConfig(**noisy), ClientConfig(), 30))
    epsilon = spent.epsilon(1e-5)
    floor = f"example epsilon={epsilon + 0.01}"
    assert lacks(floor, **noisy) == ""
    assert lacks(floor, rounds=1, **noisy).startswith("epsilon would be ")
    # A delta of the run near 1 makes any epsilon small, and is not that of the site.
    assert lacks(f"example epsilon={epsilon - 0.01}", delta=0.9, **noisy)
    assert not lacks(f"example epsilon={epsilon - 0.01} delta=0.01", **noisy)


@pytest.mark.parametrize(
    "floor",
    ["exmple", "example update", "epsilon=3", "example epsilon=x", "example epsilon=nan",
     "example epsilon=0", "example epsilon=3 epsilon=9", "example delta=1", "none", "example mu=1"],
)  # fmt: skip
def test_a_floor_that_is_not_understood_is_refused(floor: str):
    with pytest.raises(NodeError, match='right would be, for example, "example epsilon=3"'):
        Floor.of(at(floor))


def test_a_site_does_not_train_below_its_floor_and_is_evaluated(caplog):
    reply = train_message(message(MessageType.TRAIN, 2), at("example epsilon=3")).content
    assert {name: dict(record) for name, record in reply.items()} == {
        "config": {"below-privacy-floor": "example epsilon=3 delta=1e-05"}
    }
    assert (
        "This site does not train in round 2: the run's privacy is less than its privacy-floor "
        '(privacy.mode = "none")' in caplog.text
    )
    evaluated = evaluate_message(message(MessageType.EVALUATE), at("example epsilon=3")).content
    assert {"num-examples", "accuracy", "loss"} <= evaluated["metrics"].keys()
    # They would say which classes it has.
    assert not any(name.startswith("recall") for name in evaluated["metrics"])


def test_a_site_keeps_its_metrics_and_its_normalization():
    node = at("no-metrics no-normalization")
    metrics = train_message(message(MessageType.TRAIN), node).content["metrics"]
    assert metrics.keys() == {"num-examples", "seconds", "partition"}
    evaluated = evaluate_message(message(MessageType.EVALUATE), node).content["metrics"]
    assert evaluated.keys() == {"num-examples"}


def test_a_run_goes_on_without_a_site_that_demands_more(caplog):
    caplog.set_level("INFO")
    silent = train_message(message(MessageType.TRAIN), at("example")).content
    plain = site(1.0)

    def demanding(sent: Message) -> RecordDict:
        return silent if sent.metadata.message_type == MessageType.TRAIN else plain(sent)

    grid = SimulatedGrid({1: plain, 2: site(3.0), 3: demanding})
    strategy = ClientwiseFedAvg()
    start(strategy, grid)
    row = strategy.record.clients[2]
    assert (row["status"], has_failed(row)) == (f"{BELOW_FLOOR}: example", False)
    assert row["personalized-accuracy"] == 0.5
    assert set(received(grid, MessageType.EVALUATE)[1].values()) == {2.0}
    assert f"Client 2 does not train: {BELOW_FLOOR}: example" in caplog.text


@pytest.mark.parametrize(
    ("floors", "settings", "right"),
    [
        (["example", "example epsilon=3"], {}, 'has privacy.mode = "none"; right would be '
         'privacy.mode = "example"'),
        (["example epsilon=3", "update"], {"mode": "example"}, 'has privacy.mode = "example"; '
         'right would be privacy.mode = "update"'),
        (["example epsilon=0.1"], {"mode": "example"}, "privacy.noise-multiplier = 1; right would "
         "be a larger privacy.noise-multiplier"),
        (["update epsilon=0.1"], {"mode": "update", "epsilon": 1.0}, "privacy.epsilon = 1; right "
         "would be a smaller privacy.epsilon"),
        (["example"], {"mode": "example", "seeded-noise": True}, "has privacy.seeded-noise = true; "
         "right would be false"),
    ],
)  # fmt: skip
def test_a_run_that_no_site_trains_in_says_what_they_demand_and_what_it_has(
    tmp_path, monkeypatch, floors: list[str], settings: dict, right: str
):
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    given = {f"privacy.{key}": value for key, value in settings.items()}

    def refusing(floor: str) -> Answer:
        return lambda _: train_message(message(MessageType.TRAIN), at(floor, **given)).content

    grid = SimulatedGrid(dict(enumerate(map(refusing, floors))))
    flat = {**given, "output-dir": str(tmp_path), "server.min-available-nodes": 1}
    with pytest.raises(app.RunError, match="No client trained in the first round:") as caught:
        app.main(grid, Context(1, 1, {}, RecordDict(), flat))
    assert str(caught.value).endswith(right)
    for floor in floors:
        assert f"1 client: {BELOW_FLOOR}: {floor}" in str(caught.value)
