"""`jmvae-dist report`: one self-contained HTML page about a run."""

from __future__ import annotations

from pathlib import Path

from jmvae_dist.commands.cli import make_parser


def main(argv: list[str]) -> int:
    """Write the report; print what was learned and where to look.

    Raises:
        ConfigError: RUN is not a run directory, or the report cannot be written.
    """
    parser = make_parser("jmvae-dist report", "Write a run's self-contained HTML report.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory (output_dir of the training)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write (default: RUN/report.html)")
    arguments = parser.parse_args(argv)

    from jmvae_dist.tracking.report import headline, write_report

    path = write_report(arguments.run, arguments.out)
    for line in headline(arguments.run):
        print(line)
    print(f"report: {path}")
    return 0
