"""Exit codes of all commands of the project."""

EXIT_OK = 0
"""The work was completed."""

EXIT_FAILED = 1
"""The work failed; the message says why."""

EXIT_USAGE = 2
"""Usage error, for instance an unknown option, a missing file or an invalid config."""

EXIT_SKIPPED = 3
"""The work was completed, but some inputs were skipped; the report lists them with reasons."""
