"""Exit codes that every command of the project returns."""

EXIT_OK = 0
"""Everything was done."""

EXIT_FAILED = 1
"""The work failed; the message says why."""

EXIT_USAGE = 2
"""The command was used wrongly: an unknown option, a missing file, a config that does not parse."""

EXIT_SKIPPED = 3
"""The work was done, but some items were skipped; the report says which and why."""
