"""``python -m nann.cli.reliability``."""

from nann.cli.reliability.commands import app
from nann.engine.scoring.native_log import quiet_native_log

quiet_native_log()
app(prog_name="python -m nann.cli.reliability")
