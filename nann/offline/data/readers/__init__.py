"""One file per input format; each returns `Interactions` and counts its bad rows."""
