"""Batch scripts ready to submit: those of `slurm/`, with their header completed and their arguments fixed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jmvae_dist.errors import ConfigError

# By option of sbatch: its value; None for an option without one.
Directives = dict[str, str | None]

SHORT_OPTIONS = {
    "A": "account",
    "a": "array",
    "C": "constraint",
    "c": "cpus-per-task",
    "D": "chdir",
    "d": "dependency",
    "e": "error",
    "G": "gpus",
    "J": "job-name",
    "L": "licenses",
    "M": "clusters",
    "m": "distribution",
    "N": "nodes",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
    "w": "nodelist",
    "x": "exclude",
}
# Where the option is not the variable's name with other letters.
_RENAMED = {
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_CPU_FREQ_REQ": "cpu-freq",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_BURST_BUFFER": "bb",
    "SBATCH_REQ_SWITCH": "switches",
    "SBATCH_TIMELIMIT": "time",
}
# Variables that sbatch knows and that say something about jobs (`man sbatch`, INPUT ENVIRONMENT VARIABLES).
_VARIABLES = {
    *_RENAMED,
    *("SBATCH_ACCOUNT", "SBATCH_ACCTG_FREQ", "SBATCH_BATCH", "SBATCH_CLUSTER_CONSTRAINT", "SBATCH_CLUSTERS"),
    *("SBATCH_CONSTRAINT", "SBATCH_CONTAINER", "SBATCH_CORE_SPEC", "SBATCH_CPUS_PER_GPU", "SBATCH_DELAY_BOOT"),
    *("SBATCH_DISTRIBUTION", "SBATCH_ERROR", "SBATCH_EXCLUSIVE", "SBATCH_EXPORT", "SBATCH_GET_USER_ENV"),
    *("SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_SOCKET", "SBATCH_GPUS_PER_TASK", "SBATCH_GPU_BIND"),
    *("SBATCH_GPU_FREQ", "SBATCH_GRES", "SBATCH_GRES_FLAGS", "SBATCH_HINT", "SBATCH_INPUT", "SBATCH_JOB_NAME"),
    *("SBATCH_MEM_BIND", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU", "SBATCH_NETWORK", "SBATCH_NO_KILL"),
    *("SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_OVERCOMMIT", "SBATCH_PARTITION"),
    *("SBATCH_POWER", "SBATCH_PROFILE", "SBATCH_QOS", "SBATCH_REQUEUE", "SBATCH_RESERVATION", "SBATCH_SIGNAL"),
    *("SBATCH_SPREAD_JOB", "SBATCH_THREADS_PER_CORE", "SBATCH_THREAD_SPEC", "SBATCH_USE_MIN_NODES"),
    *("SBATCH_WAIT_ALL_NODES", "SBATCH_WCKEY"),
}
# These say something about a call of sbatch rather than about the job.
_OF_THE_CALL = {"SBATCH_DEBUG", "SBATCH_WAIT", "SBATCH_WAIT4SWITCH", "SBATCH_IGNORE_PBS"}
_DIRECTIVE = re.compile(r"#SBATCH --([\w-]+)(?:=(.*))?")


@dataclass(frozen=True)
class BatchScript:
    """A script of `slurm/` for one job.

    Attributes:
        template: The script.
        directives: Options for its header: new ones, and in place of its own.
        variables: Exported before anything else.
        arguments: In place of those of the command line.
    """

    template: Path
    directives: Directives
    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)

    def render(self) -> str:
        """The text: the template's own, but for the header and the lines after it."""
        shebang, *lines = self.template.read_text(encoding="utf-8").splitlines()
        end = next(place for place, line in enumerate(lines) if not line.startswith("#"))
        header, body = lines[:end], lines[end:]
        missing = dict(self.directives)
        for place, line in enumerate(header):
            if (match := _DIRECTIVE.fullmatch(line)) and match[1] in missing:
                header[place] = format_directive(match[1], missing.pop(match[1]))
        made_by = (
            f"# Made by `jmvae-dist slurm` from slurm/{self.template.name}; submit it with sbatch, from anywhere"
        )
        fixed = [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]
        fixed.append(f"set -- {shlex.join(self.arguments)}")
        added = [format_directive(name, value) for name, value in missing.items()]
        return "\n".join([shebang, made_by, "#", *header, *added, *fixed, *body, ""])


def read_directives(template: Path) -> Directives:
    """The options in a script's header."""
    lines = template.read_text(encoding="utf-8").splitlines()
    return {match[1]: match[2] for line in lines if (match := _DIRECTIVE.fullmatch(line))}


def format_directive(option: str, value: str | None) -> str:
    """A line of a header.

    Raises:
        ConfigError: The value has a line break, which would end it.
    """
    if value is None:
        return f"#SBATCH --{option}"
    if "\n" in value or "\r" in value:
        raise ConfigError(f"--{option}: {value!r} has a line break")
    if not re.search(r"[\s\"'\\#]", value) and value:
        return f"#SBATCH --{option}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'


def parse_sbatch_options(arguments: Sequence[str]) -> Directives:
    """Options as sbatch takes them: `--time=1:00:00`, `--time 1:00:00`, `-t 1:00:00`, `-t1:00:00`, `--exclusive`.

    Raises:
        ConfigError: Something is not an option, or one is given twice with different values.
    """
    directives: Directives = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, separator, value = _split_option(argument)
        given: str | None = value if separator else None
        if not separator and rest and not rest[0].startswith("-"):
            given = rest.pop(0)
        if directives.get(option, given) != given:
            raise ConfigError(f"--{option}: given twice, {directives[option]!r} and {given!r}")
        directives[option] = given
    return directives


def _split_option(argument: str) -> tuple[str, str, str]:
    if match := re.fullmatch(r"--([A-Za-z][\w-]*)(=?)(.*)", argument, re.DOTALL):
        if match[2] or not match[3]:
            return match[1], match[2], match[3]
    elif (match := re.fullmatch(r"-([A-Za-z])(.*)", argument, re.DOTALL)) and match[1] in SHORT_OPTIONS:
        value = match[2].removeprefix("=")
        return SHORT_OPTIONS[match[1]], "=" if value else "", value
    raise ConfigError(
        f"{argument!r} is not an option of sbatch; options of the training come after --, as in "
        "`jmvae-dist slurm submit --nodes 4 -- --config configs/x.yaml`"
    )


def directives_of_variables(variables: Mapping[str, str]) -> tuple[Directives, list[str]]:
    """Options that `SBATCH_*` variables stand for; and the variables that sbatch does not know."""
    directives: Directives = {}
    unknown = []
    for name, value in sorted(variables.items()):
        if name in _VARIABLES:
            option = _RENAMED.get(name, name.removeprefix("SBATCH_").lower().replace("_", "-"))
            # For options without a value the variable only has to be there.
            is_flag = name in ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_OVERCOMMIT", "SBATCH_SPREAD_JOB")
            is_flag = is_flag or name == "SBATCH_USE_MIN_NODES" or not value
            directives[option] = None if is_flag else value
        elif name not in _OF_THE_CALL:
            unknown.append(name)
    return directives, unknown


def closest_variable(name: str) -> str | None:
    """The variable of sbatch that a misspelled one most resembles."""
    import difflib

    return next(iter(difflib.get_close_matches(name, _VARIABLES, n=1)), None)


def escape_file_name(path: Path) -> str:
    """A path as sbatch takes it in `--output`, where % begins a pattern."""
    return str(path).replace("%", "%%")
