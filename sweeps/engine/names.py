"""What the sweeper calls what it leaves for others: attributes of a study, files of a sweep."""

# Attributes of a study: what it is for, by which a sweep is told that it is the same, and the
# command that worked on it last, as it was typed.
DESCRIPTION, COMMAND = "sweep", "sweep:command"

# Files in a sweep's directory.
CONFIGURATION_FILE = "multirun.yaml"
JOURNAL_FILE = "journal.log"
