"""What the page has of a run, and of several."""

import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from statistics import fmean
from typing import TypeVar

from pfedgpa_app.config import Config
from pfedgpa_app.cross_site import read_matrix
from pfedgpa_app.page import figures, method
from pfedgpa_app.page.holdings import Holdings
from pfedgpa_app.page.html import Page, Panel, numbers, slider, table, table_of, tabs
from pfedgpa_app.protocol import RECALL
from pfedgpa_app.report import Run, baselines_of
from pfedgpa_app.rounds import (
    EVALUATED,
    SCORES,
    STANDARD_ERROR,
    Row,
    has_failed,
    mean_and_spread,
    names_in,
    value_of,
)
from pfedgpa_app.runs import version_of
from pfedgpa_app.sharing import alone_in
from pfedgpa_app.strategies import STRATEGY_INFO

Of = TypeVar("Of")

# Letters of the names of curves up to which two figures have a place side by side.
_MAX_BESIDE = 24
# Clients that a figure shows.
_MAX_CLIENTS = 300
# Of failures a page has so many, and so much of what a client says.
_MAX_FAILURES = 200
_MAX_REASON = 300


def page_of(runs: Sequence[Run]) -> str:
    """Return the HTML of a page of one run, or of several with a comparison on top."""
    page = Page()
    panels = [(run.name, _run(page, run, number)) for number, run in enumerate(runs)]
    if len(runs) == 1:
        run = runs[0]
        title = f"Run {run.name}: {run.config.strategy} on {run.config.data.dataset}"
        body = f"<h1>{escape(title)}</h1>{tabs(panels, 'runs')}"
    else:
        title = f"{len(runs)} runs"
        compared = f"<section>{_comparison(page, runs)}</section>"
        body = f"<h1>{title}</h1>{compared}<h2>Run by run</h2>{tabs(panels, 'runs')}"
    return page.whole(title, body)


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs that differ in the seed alone, by what sets them apart from the others."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(_settings(run).items()), []).append(run)
    firsts = [_settings(each[0]) for each in groups.values()]
    # Settings of other strategies are no difference.
    values = {key: {of[key] for of in firsts if key in of} for of in firsts for key in of}
    # Of a long name the beginning is shown: what tells most apart comes first.
    differing = sorted(
        (key for key in values if key != "strategy" and len(values[key]) > 1),
        key=lambda key: -len(values[key]),
    )
    named = {}
    for settings, each in zip(firsts, groups.values(), strict=True):
        parts = [f"{key}={settings[key]}" for key in differing if key in settings]
        named[", ".join([str(settings["strategy"]), *parts])] = each
    return named


def _settings(run: Run) -> Row:
    settings = {**run.config.decisive, "num-server-rounds": run.config.num_server_rounds}
    settings.pop("seed", None)
    return settings


def _comparison(page: Page, runs: Sequence[Run]) -> str:
    groups = grouped(runs)
    shown = []
    for name, title in list(figures.ACCURACIES.items())[:2]:
        curves = {
            label: figures.curve_of([run.metrics for run in each], name)
            for label, each in groups.items()
        }
        if any(curves.values()):
            is_wide = max(map(len, curves)) > _MAX_BESIDE
            drawn = figures.accuracy(curves)
            shown.append(Panel(f"Accuracy, {title}", _ACCURACY, drawn, is_wide, has_zoom=True))
    lines = []
    for label, each in groups.items():
        cells = [label, ", ".join(str(run.config.seed) for run in each)]
        cells.append(", ".join(str(len(run.metrics)) for run in each))
        for name in ("personalized-accuracy", "personalized-accuracy-worst", "finetuned-accuracy"):
            values = [run.last(name) for run in each]
            spread = mean_and_spread([value for value in values if value is not None])
            cells.append(_score(each[0], name) if len(each) == 1 else spread)
        lines.append(cells)
    head = ("settings", "seeds", "rounds", "personalized", "worst client", "after local training")
    note = (
        "Accuracy in the last round, mean ± standard deviation over the seeds; of one run, ± is "
        "the 95 % interval of the mean over its clients."
    )
    return (
        f'{page.figures(shown)}<h2>Last round</h2><p class="quiet">{note}</p>{table(head, lines)}'
    )


_ACCURACY = (
    "Mean over the clients, each on its own test set. Where runs differ in the seed alone, the "
    "line is their mean and the band their range. The axis shows the range of the second half of "
    "the rounds."
)


def _run(page: Page, run: Run, number: int) -> str:
    clients, learned = run.clients, run.method
    rows = method.thinned(learned)
    holdings = Holdings.of(run)
    notes = [
        note
        for note in (
            run.error,
            run.ended,
            *run.warnings,
            alone_in(run.metrics, run.config.diffusion),
        )
        if note
    ]
    baselines = baselines_of(run.config, run.path.parent, run.num_nodes)
    parts = [
        _facts(run, clients, baselines),
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
    ]
    if run.metrics:
        parts.append(page.figures(_accuracies(run, clients, holdings, baselines)))
    if not holdings.counts:
        parts.append(
            f'<p class="quiet">Classes of clients are left out: {escape(holdings.missing)}.</p>'
        )
    if rows:
        parts.append("<h2>What the server found</h2>")
        *moved, levels = _method(rows, holdings, len(rows) < len(learned))
        bar = slider([row["round"] for row in rows], f"rounds-{number}")
        parts.append(f'<div class="moved">{bar}{page.figures(moved)}</div>{page.figures([levels])}')
    if run.metrics:
        parts.append("<h2>What it cost</h2>")
        parts.append(page.figures(_costs(run)))
    parts.append(f"<h2>Failures</h2>{_failures(clients)}")
    parts.append(f"<h2>Settings</h2>{_settings_table(run.config)}")
    return "".join(parts)


def _facts(run: Run, clients: Sequence[Row], baselines: Mapping[str, Run]) -> str:
    def total(name: str) -> float:
        return sum(value_of(row, name) for row in run.metrics)

    config = run.config
    scores = {what: _score(run, name) for name, what in SCORES.items()}
    if config.data.info.num_classes == 2:  # of which one may be rare
        scores["accuracy"] = scores.pop("accuracy")
    version = f"pfedgpa {version_of(run.path)}".strip()
    about = (
        f"{config.strategy} on {config.data.dataset}, {config.data.partition}, seed "
        f"{config.seed}; {version}. The same run: "
    )
    tests = [row for row in clients if "num-test-examples" in row]
    last = [row["num-test-examples"] for row in tests if row["round"] == tests[-1]["round"]]
    shown = [
        *((what, score) for what, score in scores.items() if score != "-" or what == "accuracy"),
        *((f"accuracy, {name}", _score(each, EVALUATED)) for name, each in baselines.items()),
        ("accuracy, worst client", _score(run, "personalized-accuracy-worst")),
        ("test examples", f"{sum(last):,}" if last else "-"),
        ("rounds", f"{len(run.metrics)} of {config.num_server_rounds}"),
        ("clients", str(run.num_nodes)),
        ("failures", str(sum(map(has_failed, clients)))),
        ("time", f"{total('seconds-round'):.0f} s"),
        ("sent and received", f"{(total('bytes-up') + total('bytes-down')) / 1e6:.1f} MB"),
    ]
    return (
        f'<p class="quiet">{escape(about)}<code>{escape(_command(run))}</code></p>'
        f'{numbers(shown)}<p class="quiet">Means over the clients\' personalized models, each on '
        "its own test set, in the last round that evaluated them; ± is the 95 % interval of the "
        "mean.</p>"
    )


def _score(run: Run, name: str) -> str:
    """Write the last value of a score, of the accuracy with its interval."""
    value, error = run.last(name), run.last(STANDARD_ERROR) if name == EVALUATED else None
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {1.96 * error:.4f}"


def _command(run: Run) -> str:
    """Return what does the run again."""
    pairs = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in run.config.changed.items()
        if key not in ("output-dir", "resume-from")
    ]
    options = [each for pair in pairs for each in ("-c", pair)]
    return shlex.join(["pfedgpa", "run", *options, "--clients", str(run.num_nodes)])


def _accuracies(
    run: Run, clients: Sequence[Row], holdings: Holdings, baselines: Mapping[str, Run]
) -> list[Panel]:
    names, strategy = dict(figures.ACCURACIES), run.config.strategy
    if run.config.server.evaluate_every == 1:
        del names["received-accuracy"]  # what was evaluated in the round before
    curves = {
        strategy if name == EVALUATED else f"{strategy}, {label}": figures.curve_of(
            [run.metrics], name
        )
        for name, label in names.items()
    }
    curves |= {
        name: figures.curve_of([each.metrics], EVALUATED) for name, each in baselines.items()
    }
    compared = ", ".join(f"{name} is {each.name}" for name, each in baselines.items())
    caption = (
        f"{_OWN_ACCURACY} With the same settings: {compared}."
        if baselines
        else f"{_OWN_ACCURACY} pfedgpa run --with-baselines adds others to compare with."
    )
    drawn = figures.accuracy(curves)
    shown = [Panel("Accuracy over rounds", caption, drawn, has_zoom=True)]
    if accuracies := figures.last_accuracies(clients):
        caption = (
            "On its own test set. Filled: each client's personalized model, as last evaluated, "
            "with the 95 % interval that a test set of its size leaves. "
            "Open: what the client made of the model it received, by local training."
        )
        mean = fmean(personalized for personalized, _ in accuracies.values())
        tests = {
            row["client"]: row.get("num-test-examples", 0) for row in clients if EVALUATED in row
        }
        drawn = figures.clients(_first(accuracies), mean, tests, names_in(clients))
        shown.append(Panel("Accuracy of each client", caption + _left_out(accuracies), drawn))
    others = {
        what: figures.curve_of([run.metrics], name)
        for name, what in SCORES.items()
        if name != EVALUATED and run.last(name) is not None
    }
    if others:
        caption = (
            "Means over the clients for which they are defined: there is no AUROC of a test set "
            "with one class. Of the calibration error the lowest is the best."
        )
        drawn = figures.accuracy(others, "score")
        shown.insert(
            0 if "AUROC" in others else len(shown),
            Panel("Scores over rounds", caption, drawn, has_zoom=True),
        )
    classes = run.config.data.classes
    if recalls := _recalls(clients, len(classes)):
        caption = (
            "The part of a client's test images of each class that its personalized model gets "
            "right, as last evaluated; empty where it has none." + _left_out(recalls)
        )
        drawn = figures.classes(_first(recalls), classes, "recall")
        shown.append(Panel("Recall of each class", caption, drawn, is_wide=True))
    if holdings.counts:
        caption = (
            "Training images of each class, counted from the run's settings and seed. Clients of "
            "a group stand together."
        )
        counts = {client: each.tolist() for client, each in _first(holdings.by_group).items()}
        caption += _left_out(holdings.counts)
        shown.append(
            Panel("Classes of each client", caption, figures.classes(counts, classes), is_wide=True)
        )
    if matrix := read_matrix(run.path):
        caption = (
            "Accuracy of each personalized model, a row, on the test set of each site that "
            "consented, a column, after the last round. Also in cross-site.csv."
        )
        drawn = figures.cross_site(matrix, names_in(clients))
        shown.append(Panel("Each model at each site", caption, drawn, is_wide=True))
    return shown


def _recalls(clients: Sequence[Row], num_classes: int) -> dict[int, list[float | None]]:
    """Return each client's last recall of each class, None of those that its test set lacks."""
    names = [f"personalized-{RECALL}{number}" for number in range(num_classes)]
    found = {
        row["client"]: [row.get(name) for name in names]
        for row in clients
        if any(name in row for name in names)
    }
    return dict(sorted(found.items()))


def _first(clients: Mapping[int, Of]) -> dict[int, Of]:
    """Return those that have a place in a figure."""
    return dict(islice(clients.items(), _MAX_CLIENTS))


def _left_out(clients: Collection[int]) -> str:
    more = len(clients) > _MAX_CLIENTS
    return f" Of {len(clients)} clients, the first {_MAX_CLIENTS}." if more else ""


_OWN_ACCURACY = (
    "Means over the clients, each on its own test set, and the worst client's. The axis shows the "
    "range of the second half of the rounds."
)


def _method(rows: Sequence[Row], holdings: Holdings, is_thinned: bool) -> list[Panel]:
    thin = " The slider has some of the rounds, since all would be too much for a page."
    shown = [
        Panel(
            "Uploads and generated models",
            "Filled: a client's upload, open: the model generated from it, joined by a line, along "
            "the two directions in which the uploads of the round differ most. Each round is "
            "turned onto the round before, so that points can be followed; the middle is the mean. "
            "Colour and shape are the group that the settings give, or the most frequent class."
            + (thin if is_thinned else ""),
            method.plane(rows, holdings.groups),
        )
    ]
    if (heat := method.mixing_weights(rows, holdings.groups)) is not None:
        caption = (
            "A row is the model that a client receives: the part of each client's upload in it. "
            "Parts may be negative. The scale ends at the largest part of another client's. "
            "Clients of a group stand together, or those that share most. A client without a row "
            "was no member of the bank in that round."
        )
        shown.append(Panel("Mixing weights: whose uploads a model is made of", caption, heat))
    caption = (
        "Variance of the uploads along each principal axis. Axes above the floor tell clients "
        "apart; in the denoised ones the diffusion model works, after noise of the dotted line's "
        "variance. Below, how much of each axis everyone keeps."
    )
    size = max((row.get("parameters", 0) for row in rows), default=0)
    shown.append(Panel("Spectrum", f"{caption} Of {size:,} parameters.", method.spectrum(rows)))
    caption = (
        "The strongest axis, the floor (the median axis) and the noise that was chosen, round by "
        "round. No point where nothing is denoised."
    )
    shown.append(Panel("Floor and noise over rounds", caption, method.levels(rows)))
    return shown


def _costs(run: Run) -> list[Panel]:
    return [
        Panel(
            "Seconds of each round",
            "Wall-clock time on the server, from the first message to the last reply of the "
            "clients' training, then learning from it, then the rest.",
            figures.seconds(run.metrics),
        ),
        Panel(
            "Megabytes of each round",
            "Parameters of all clients together; models sent for evaluation count as down.",
            figures.megabytes(run.metrics),
        ),
    ]


def _failures(clients: Sequence[Row]) -> str:
    """Return who sent no usable reply, or was kept apart, and why; most rounds first."""
    rounds: dict[tuple[int, str], list[int]] = {}
    names = names_in(clients)
    for row in clients:
        status = row.get("status", "ok")
        reasons = [] if status == "ok" else [status]
        if "unusual" in row:
            reasons.append(f"others did not learn from it: {row['unusual']}")
        if "not-evaluated" in row:
            reasons.append(f"its evaluation cannot be used: {row['not-evaluated']}")
        for reason in reasons:
            rounds.setdefault((row["client"], str(reason)[:_MAX_REASON]), []).append(row["round"])
    if not rounds:
        return "<p>None: every client that was asked gave an upload that could be used.</p>"
    # Those that failed alike stand in a line.
    alike: dict[tuple[str, str], list[int]] = {}
    most = Counter({key: len(each) for key, each in rounds.items()}).most_common()
    for (client, why), _ in most:
        alike.setdefault((_ranges(rounds[client, why]), why), []).append(client)
    lines = [(_who(clients, names), when, why) for (when, why), clients in alike.items()]
    left_out = len(lines) - _MAX_FAILURES
    note = f'<p class="quiet">{left_out} more are in clients.jsonl.</p>' if left_out > 0 else ""
    return table(("clients", "rounds", "reason"), lines[:_MAX_FAILURES]) + note


def _who(clients: Sequence[int], names: Mapping[int, str]) -> str:
    """Return numbers of clients, and the names of those that have one."""
    named = ", ".join(names[client] for client in sorted(clients) if client in names)
    return f"{_ranges(clients)} ({named})" if named else _ranges(clients)


def _ranges(numbers: Sequence[int]) -> str:
    """Write ``[1, 2, 3, 7]`` as ``1-3, 7``."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{low}-{high}" if low < high else str(low) for low, high in ranges)


def _settings_table(config: Config) -> str:
    defaults, flat, changed = Config().to_flat(), config.to_flat(), config.changed
    # Those of other strategies are of no use here.
    unused = STRATEGY_INFO.keys() - {config.strategy}
    if config.strategy != "pfedgpa":
        unused |= {"pfedgpa", "diffusion", "onboarding"}

    mark = ' class="marked"'

    def lines(keys: Iterable[str]) -> list[str]:
        return [
            f"<tr{mark if key in changed else ''}><td><code>{escape(key)}</code></td>"
            f"<td>{escape(repr(flat[key]))}</td>"
            f"<td>{f'default: {escape(repr(defaults[key]))}' if key in changed else ''}</td></tr>"
            for key in keys
        ]

    rest = [key for key in flat if key not in changed and key.partition(".")[0] not in unused]
    head = ("setting", "value", "")
    first = table_of(head, lines(changed)) if changed else ""
    differ = "1 differs" if len(changed) == 1 else f"{len(changed)} differ"
    return (
        f"<p>{differ} from the defaults.</p>{first}"
        f"<details><summary>{len(rest)} settings with their defaults</summary>"
        f"{table_of(head, lines(rest))}</details>"
    )
