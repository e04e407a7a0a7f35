"""What the page has of a run, and of several."""

import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from statistics import fmean
from typing import TypeVar

from pfedgpa_app.config import SITES, Config
from pfedgpa_app.cross_site import read_matrix
from pfedgpa_app.page import figures, html, method
from pfedgpa_app.page.holdings import Holdings
from pfedgpa_app.page.html import Panel, numbers, sections, slider, table, table_of
from pfedgpa_app.protocol import RECALL
from pfedgpa_app.report import BASELINES, Run, baselines_of
from pfedgpa_app.rounds import (
    EVALUATED,
    SCORES,
    STANDARD_ERROR,
    Row,
    failures_in,
    has_failed,
    mean_and_spread,
    names_in,
    value_of,
)
from pfedgpa_app.runs import field_of
from pfedgpa_app.section import Scalar
from pfedgpa_app.sharing import alone_in
from pfedgpa_app.strategies import STRATEGY_INFO

Of = TypeVar("Of")

# Clients that a figure shows.
_MAX_CLIENTS = 300
# So many failures are on a page, and so many letters of each reason.
_MAX_FAILURES = 200
_MAX_REASON = 300
_MEANS = (
    "Means over the clients, each on its own test set. The axis shows the range of the second half "
    "of the rounds; a double click shows all."
)
_SEEDS = "Where runs differ in the seed alone, the line is their mean and the band their range."


def page_of(runs: Sequence[Run]) -> str:
    """Return the HTML of a page of one run, or of several with a comparison on top."""
    parts = sections([(run.name, _run(run, number)) for number, run in enumerate(runs)])
    if len(runs) == 1:
        run = runs[0]
        title = f"Run {run.name}: {run.config.strategy} on {run.config.data.dataset}"
        return html.whole(title, f"<h1>{escape(title)}</h1>{parts}")
    title = f"{len(runs)} runs"
    body = f"<section>{_comparison(runs)}</section><h2>Run by run</h2>{parts}"
    return html.whole(title, f"<h1>{title}</h1>{body}")


def compared(groups: Mapping[str, Sequence[Sequence[Row]]]) -> str:
    """Return accuracies over rounds, personalized and after local training; one round has none.

    ``groups`` has the rounds of runs that differ in the seed alone, by the name of their curve.
    """
    shown = []
    for name, title in list(figures.ACCURACIES.items())[:2]:
        curves = {label: figures.curve_of(runs, name) for label, runs in groups.items()}
        if any(len(curve) > 1 for curve in curves.values()):
            drawn = figures.lines(curves)
            shown.append(Panel(f"Accuracy, {title}", f"{_MEANS} {_SEEDS}", drawn, is_wide=True))
    return html.figures(shown) if shown else ""


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs that differ in the seed alone, by what sets them apart from the others."""
    groups: dict[tuple[tuple[str, Scalar], ...], list[Run]] = {}
    for run in runs:
        settings = {**run.config.decisive, "num-server-rounds": run.config.num_server_rounds}
        settings.pop("seed", None)
        groups.setdefault(tuple(settings.items()), []).append(run)
    firsts = list(map(dict, groups))
    # Settings of other strategies are no difference.
    values = {key: {of[key] for of in firsts if key in of} for of in firsts for key in of}
    # What differs most comes first.
    differing = sorted(
        (key for key in values if key != "strategy" and len(values[key]) > 1),
        key=lambda key: -len(values[key]),
    )
    named = {}
    for settings, each in zip(firsts, groups.values(), strict=True):
        parts = [f"{key}={settings[key]}" for key in differing if key in settings]
        named[", ".join([str(settings["strategy"]), *parts])] = each
    return named


def _comparison(runs: Sequence[Run]) -> str:
    groups = grouped(runs)
    curves = compared({label: [r.metrics for r in each] for label, each in groups.items()})
    lines = []
    for label, each in groups.items():
        cells = [label, ", ".join(str(run.config.seed) for run in each)]
        cells.append(", ".join(str(len(run.metrics)) for run in each))
        for name in (EVALUATED, f"{EVALUATED}-worst", "finetuned-accuracy"):
            values = [value for run in each if (value := run.last(name)) is not None]
            cells.append(_score(each[0], name) if len(each) == 1 else mean_and_spread(values))
        lines.append(cells)
    head = ("settings", "seeds", "rounds", "personalized", "worst client", "after local training")
    note = (
        "Accuracy in the last round, mean ± standard deviation over the seeds; of one run, ± is "
        "the 95 % interval of the mean over its clients."
    )
    return f'{curves}<h2>Last round</h2><p class="quiet">{note}</p>{table(head, lines)}'


def _run(run: Run, number: int) -> str:
    clients, learned = run.clients, run.method
    rows = method.thinned(learned)
    holdings = Holdings.of(run)
    baselines = baselines_of(run.config, run.path.parent, run.num_nodes)
    notes = (run.error, run.ended, *run.warnings, alone_in(run.metrics, run.config.diffusion))
    body = _head(run, clients, baselines, holdings)
    body += "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)
    if run.metrics:
        body += html.figures(_accuracies(run, clients, holdings, baselines))
    if not holdings.counts:
        missing = escape(holdings.missing)
        body += f'<p class="quiet">Classes of clients are left out: {missing}.</p>'
    if rows:
        found = html.figures(_method(rows, holdings, len(rows) < len(learned)))
        bar = slider([row["round"] for row in rows], f"rounds-{number}")
        body += f'<h2>What the server found</h2><div class="moved">{bar}{found}</div>'
    if run.metrics:
        costs = html.figures(
            [
                Panel(
                    "Seconds of each round",
                    "Wall-clock time on the server, from the first message to the last reply of "
                    "the clients' training, then learning from it, then the rest.",
                    figures.seconds(run.metrics),
                ),
                Panel(
                    "Megabytes of each round",
                    "Parameters of all clients together; models sent for evaluation count as down.",
                    figures.megabytes(run.metrics),
                ),
            ]
        )
        body += f"<h2>What it cost</h2>{costs}"
    body += f"<h2>Failures</h2>{_failures(clients)}"
    return f"{body}<h2>Settings</h2>{_settings_table(run.config)}"


def _head(
    run: Run, clients: Sequence[Row], baselines: Mapping[str, Run], holdings: Holdings
) -> str:
    """Return what the run is, the command that repeats it, and its main numbers."""
    config = run.config
    scores = {what: _score(run, name) for name, what in SCORES.items()}
    if config.data.info.num_classes == 2:  # of which one may be rare
        scores["accuracy"] = scores.pop("accuracy")
    tests = [row for row in clients if "num-test-examples" in row]
    last = [row["num-test-examples"] for row in tests if row["round"] == tests[-1]["round"]]
    seconds, up, down = (
        sum(value_of(row, name) for row in run.metrics)
        for name in ("seconds-round", "bytes-up", "bytes-down")
    )
    shown = [
        *((what, score) for what, score in scores.items() if score != "-" or what == "accuracy"),
        *((f"accuracy, {name}", _score(each, EVALUATED)) for name, each in baselines.items()),
        *holdings.floor,
        ("accuracy, worst client", _score(run, f"{EVALUATED}-worst")),
        ("test examples", f"{sum(last):,}" if last else "-"),
        ("rounds", f"{len(run.metrics)} of {config.num_server_rounds}"),
        ("clients", str(run.num_nodes)),
        ("failures", str(sum(map(has_failed, clients)))),
        ("time", f"{seconds:.0f} s"),
        ("sent and received", f"{(up + down) / 1e6:.1f} MB"),
    ]
    is_of_sites = config.data.dataset == SITES
    partition = "" if is_of_sites else f", {config.data.partition}"
    about = (
        f"{config.strategy} on {config.data.dataset}{partition}, seed {config.seed}; "
        f"pfedgpa {field_of(run.path, 'version')}".strip()
        + ". The same run: "
    )
    pairs = [
        ("-c", f"{key}={json.dumps(value, ensure_ascii=False)}")
        for key, value in config.changed.items()
        if key not in ("output-dir", "resume-from")
    ]
    options = [each for pair in pairs for each in pair]
    where = ["--superlink", "NAME"] if is_of_sites else ["--clients", str(run.num_nodes)]
    command = shlex.join(["pfedgpa", "run", *options, *where])
    missing = [name for name in BASELINES if name not in {config.strategy, *baselines}]
    compared = (
        f" No run of {' or '.join(missing)} to compare with: the command above with "
        "--with-baselines does them, and its page has them."
    ) * bool(missing)
    return (
        f'<p class="quiet">{escape(about)}<code>{escape(command)}</code></p>'
        f'{numbers(shown)}<p class="quiet">Means over the clients\' personalized models, each on '
        "its own test set, in the last round that evaluated them; ± is the 95 % interval of that "
        f"mean, given the sizes of the test sets, and no deviation over seeds.{compared}</p>"
    )


def _score(run: Run, name: str) -> str:
    """Write the last value of a score, of the accuracy with its interval."""
    value, error = run.last(name), run.last(STANDARD_ERROR) if name == EVALUATED else None
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {1.96 * error:.4f}"


def _accuracies(
    run: Run, clients: Sequence[Row], holdings: Holdings, baselines: Mapping[str, Run]
) -> list[Panel]:
    strategy = run.config.strategy
    names = {name: f"{strategy}, {what}" for name, what in figures.ACCURACIES.items()}
    names[EVALUATED] = strategy
    if run.config.server.evaluate_every == 1:
        del names["received-accuracy"]  # what was evaluated in the round before
    curves = {what: figures.curve_of([run.metrics], name) for name, what in names.items()}
    curves |= {
        what: figures.curve_of([each.metrics], EVALUATED) for what, each in baselines.items()
    }
    others = ", ".join(f"{name} is {each.name}" for name, each in baselines.items())
    caption = _MEANS + f" With the same settings: {others}." * bool(others)
    shown = [Panel("Accuracy over rounds", caption, figures.lines(curves))]
    if accuracies := figures.last_accuracies(clients):
        caption = (
            "Filled: each client's personalized model on its own test set, as last evaluated, with "
            "the 95 % interval of a test set of that size. Open: after local training."
        )
        mean = fmean(personalized for personalized, _ in accuracies.values())
        tests = {
            row["client"]: row.get("num-test-examples", 0) for row in clients if EVALUATED in row
        }
        drawn = figures.clients(_first(accuracies), mean, tests, names_in(clients))
        shown.append(Panel("Accuracy of each client", caption + _left_out(accuracies), drawn))
    scores = {
        what: figures.curve_of([run.metrics], name)
        for name, what in SCORES.items()
        if name != EVALUATED and run.last(name) is not None
    }
    if scores:
        caption = (
            "Means over the clients for which they are defined: there is no AUROC of a test set "
            "with one class. Of the calibration error the lowest is the best."
        )
        panel = Panel("Scores over rounds", caption, figures.lines(scores, "score"))
        shown.insert(0 if "AUROC" in scores else len(shown), panel)
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
            "a group stand together." + _left_out(holdings.counts)
        )
        counts = {client: each.tolist() for client, each in _first(holdings.counts).items()}
        drawn = figures.classes(counts, classes)
        shown.append(Panel("Classes of each client", caption, drawn, is_wide=True))
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


def _method(rows: Sequence[Row], holdings: Holdings, is_thinned: bool) -> list[Panel]:
    thin = " The slider has some of the rounds, since all would be too much for a page."
    caption = (
        "Filled: a client's upload; open: the model generated from it, along the first two "
        "principal axes of the uploads, from their mean. Each round is turned onto the round "
        "before. Colour and shape are the group of the settings, or the most frequent class."
    ) + (thin if is_thinned else "")
    shown = [Panel("Uploads and generated models", caption, method.plane(rows, holdings.groups))]
    if (drawn := method.mixing_weights(rows, holdings.groups)) is not None:
        caption = (
            "A row is the model that a client receives: the part of each client's upload in it, "
            "which may be negative. The scale ends at the largest part of another client's. "
            "Clients of a group, or those that share most, stand together. A client without a row "
            "was no member of the bank in that round."
        )
        shown.append(Panel("Mixing weights: whose uploads a model is made of", caption, drawn))
    size = max((row.get("parameters", 0) for row in rows), default=0)
    caption = (
        "Variance of the uploads along each principal axis. On axes above the floor clients "
        "differ; the diffusion model denoises some, after noise of the dotted line's variance. "
        f"Below, how much of each axis all clients keep. Of {size:,} parameters."
    )
    drawn = method.spectrum(rows)
    return [*shown, Panel("Spectrum, floor and noise", caption, drawn, is_wide=True)]


def _failures(clients: Sequence[Row]) -> str:
    """Return who sent no usable reply, or was quarantined, and why; most rounds first."""
    failures = failures_in(clients)
    if not failures:
        return "<p>None: every training message got a usable reply.</p>"
    lines = []
    for each in failures[:_MAX_FAILURES]:
        named = f" ({', '.join(each['names'])})" if each["names"] else ""
        who, when = _ranges(each["clients"]) + named, _ranges(each["rounds"])
        lines.append((who, when, each["reason"][:_MAX_REASON]))
    left_out = len(failures) - _MAX_FAILURES
    note = f'<p class="quiet">{left_out} more are in clients.jsonl.</p>' if left_out > 0 else ""
    return table(("clients", "rounds", "reason"), lines) + note


def _ranges(numbers: Iterable[int]) -> str:
    """Write ``[1, 2, 3, 7]`` as ``1-3, 7``."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges)


def _settings_table(config: Config) -> str:
    defaults, flat, changed = Config().to_flat(), config.to_flat(), config.changed
    # Those of other strategies are of no use here.
    unused = STRATEGY_INFO.keys() - {config.strategy}
    if config.strategy != "pfedgpa":
        unused |= {"pfedgpa", "diffusion", "onboarding"}
    marked, rest = [], []
    for key, value in flat.items():
        cells = f"<td><code>{escape(key)}</code></td><td>{escape(repr(value))}</td>"
        if key in changed:
            default = escape(repr(defaults[key]))
            marked.append(f'<tr class="marked">{cells}<td>default: {default}</td></tr>')
        elif key.partition(".")[0] not in unused:
            rest.append(f"<tr>{cells}<td></td></tr>")
    head = ("setting", "value", "")
    differ = "1 differs" if len(marked) == 1 else f"{len(marked)} differ"
    return (
        f"<p>{differ} from the defaults.</p>{table_of(head, marked) if marked else ''}"
        f"<details><summary>{len(rest)} settings with their defaults</summary>"
        f"{table_of(head, rest)}</details>"
    )
