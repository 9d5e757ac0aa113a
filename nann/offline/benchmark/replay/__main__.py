"""`python -m nann.offline.benchmark.replay`: prepare what is replayed, then print the tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from nann.offline.benchmark.replay.experiments import EXPERIMENTS, RECALLS, Lab, markdown
from nann.offline.benchmark.replay.measure import Users


def main(arguments: list[str] | None = None) -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(prog="python -m nann.offline.benchmark.replay")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "report"):
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, required=True, help="a run directory with its index")
        command.add_argument("--work", type=Path, required=True, help="where what is replayed lies")
        if name == "prepare":
            command.add_argument("--validation-users", type=int, default=150)
            command.add_argument("--test-users", type=int, default=1000)
            command.add_argument("--seed", type=int, default=0)
        else:
            command.add_argument("--split", choices=("validation", "test"), default="validation")
            command.add_argument("--users", type=int, default=None, help="the first so many only")
            command.add_argument(
                "--experiment",
                action="append",
                choices=list(EXPERIMENTS),
                help="one of them; all if not given",
            )
    options = parser.parse_args(arguments)
    if options.command == "prepare":
        # TensorFlow is loaded for this alone.
        from nann.offline.benchmark.replay.prepare import prepare

        prepare(
            options.run,
            options.work,
            n_validation=options.validation_users,
            n_test=options.test_users,
            seed=options.seed,
        )
        return
    other = "test" if options.split == "validation" else "validation"
    users = Users.load(options.work / options.split, options.users)
    lab = Lab(options.run, options.work, users, Users.load(options.work / other))
    for name in options.experiment or EXPERIMENTS:
        print(f"\n## {name}: {len(lab.users)} {options.split} users\n")
        print("| search | " + " | ".join(map(str, RECALLS)) + " |")
        print("|---" * (1 + len(RECALLS)) + "|")
        for sweep in EXPERIMENTS[name](lab):
            print(markdown(sweep), flush=True)


if __name__ == "__main__":
    main()
