"""`python -m cli`: the same as `mesh`, for where the script is not on the path."""

from cli.main import app

app(prog_name="mesh")
