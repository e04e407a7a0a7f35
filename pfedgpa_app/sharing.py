"""Messages about clients that receive nothing of others, for the others' privacy.

A client that knows its own part of a mixture of two models knows the other one. So with fewer than
``diffusion.min-contributors`` participants, or similar ones, each client keeps its own model.
"""

from collections.abc import Sequence

from pfedgpa_app.files import count_of
from pfedgpa_app.rounds import Row, called, has_failed, value_of
from pfedgpa_app.sections import DiffusionConfig

# Failed clients that a message lists.
_MAX_SHOWN = 20


def too_few(num_clients: int, diffusion: DiffusionConfig) -> str:
    """Return a warning of too few clients; "" if they are enough."""
    if num_clients >= diffusion.min_contributors:
        return ""
    share = "shares" if num_clients == 1 else "share"
    fewest = diffusion.min_contributors
    return (
        f"{count_of(num_clients, 'client')} {share} nothing (diffusion.min-contributors = "
        f"{fewest}): until at least {fewest} have taken part, {_alone(diffusion)}. Right "
        f"would be {fewest} clients or more. {_WITH_TWO}"
    )


def alone_now(num_alone: int, num_clients: int, diffusion: DiffusionConfig) -> str:
    """Return a message with the number of a round's clients that receive nothing of others."""
    return (
        f"{num_alone} of this round's {count_of(num_clients, 'client')} got nothing of the "
        f"others: between fewer than {diffusion.min_contributors} that took part, or are alike, "
        "nothing is shared (diffusion.min-contributors)"
    )


def unshared_now(clients: Sequence[Row]) -> str:
    """Return who failed in a round in which at most one client trained; "" of other rounds."""
    trained = [called(row) for row in clients if row.get("status") == "ok"]
    failed = [f"{called(row)}: {row['status']}" for row in clients if has_failed(row)]
    if not failed or len(trained) > 1:
        return ""
    shown = "; ".join(failed[:_MAX_SHOWN]) + "; ..." * (len(failed) > _MAX_SHOWN)
    who = f"only {trained[0]} trained" if trained else "no client trained"
    return f"Nothing was shared in round {clients[0]['round']}: {who}. Failed: {shown}"


def unshared_in(rows: Sequence[Row]) -> str:
    """Return a message with the number of rounds as in `unshared_now`; "" if there are none."""
    unshared = [
        row for row in rows if value_of(row, "num-failures") and value_of(row, "num-clients") <= 1
    ]
    if not unshared:
        return ""
    return (
        f"In {len(unshared)} of {count_of(len(rows), 'round')} nothing was shared: at most one "
        "client trained, and others failed. pfedgpa runs show lists which failed, and why."
    )


def alone_in(rows: Sequence[Row], diffusion: DiffusionConfig) -> str:
    """Return messages about rounds in which clients received nothing of others; "" if none."""
    failures = unshared_in(rows)
    alone = [row for row in rows if value_of(row, "num-alone")]
    whole = [row for row in alone if value_of(row, "num-alone") >= value_of(row, "num-clients")]
    if not alone:
        return failures
    who = "no client got anything" if whole else "some clients got nothing"
    found = (
        f"In {len(whole or alone)} of {count_of(len(rows), 'round')} {who} of the others: then "
        f"{_alone(diffusion)}. Between fewer than {diffusion.min_contributors} that took part, "
        f"or are alike, nothing is shared (diffusion.min-contributors). {_WITH_TWO}."
    )
    return f"{failures} {found}".strip()


_WITH_TWO = (
    "With diffusion.min-contributors=2 two share; then each can work out the other's model from "
    "what it receives, which reveals something of the data that the other trained on"
)


def _alone(diffusion: DiffusionConfig) -> str:
    if diffusion.patterns == ("*",):
        return "each trains on its own data alone, as if there were no others"
    return "each keeps its own of the layers that are generated, and the rest is averaged"
