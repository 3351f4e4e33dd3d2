"""Names under which a sweep is stored: its files, and attributes of its study and its trials.

They are a file format: a sweep of an earlier version is resumed and reported by these names.
"""

# Files in the directory of a sweep. WORKER_LOGS is a directory.
CONFIGURATION_FILE = "multirun.yaml"
JOURNAL_FILE = "journal.log"
RESULTS_FILE = "optimization_results.yaml"
WORKER_LOGS = "workers"

# Files in the directory of a trial.
OUTCOME_FILE = "outcome.json"
PROCESS_LOG = "process.log"

# User attributes of a study: what must not change between two commands, the latest command as
# typed, and the process that is enqueuing the trials.
DESCRIPTION = "sweep"
COMMAND = "sweep:command"
FILLER = "sweep:filler"

# System attributes of a trial: its slot, the process that runs it, the count of its heartbeats, and
# whether that process runs other trials at the same time.
SLOT = "sweep:slot"
WORKER = "sweep:worker"
BEAT = "sweep:beat"
IN_BATCH = "sweep:in_batch"

# User attributes of a trial that the sweeper sets: the path of its directory, its duration in
# seconds, the end of its traceback; and whether it was interrupted, cannot succeed if it is
# repeated, or was closed because an earlier trial has the same slot.
DIRECTORY = "directory"
SECONDS = "seconds"
ERROR = "error"
INTERRUPTED = "interrupted"
HOPELESS = "hopeless"
DUPLICATE = "duplicate"

# User attribute of a trial that a task may return: training diverged.
DIVERGED = "diverged"

# What a task tells whoever started the sweep: a sentence, shown once however many trials have it.
NOTICE = "notice"
