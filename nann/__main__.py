"""``python -m nann``: the same as the ``nann`` command."""

from __future__ import annotations

from nann.cli.main import main

if __name__ == "__main__":
    main()
