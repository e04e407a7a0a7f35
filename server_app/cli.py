"""The command ``pfedgpa``: the commands of pfedgpa_app and those that run the app."""

from pfedgpa_app.cli import app
from server_app import commands_bench as commands_bench
from server_app import commands_run as commands_run
from server_app.commands_config import config_app
from server_app.commands_data import data_app

app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
