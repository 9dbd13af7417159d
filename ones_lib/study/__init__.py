"""The study: parameters, training loop, records, entries and tables, dry run, sweeps, and the command behind ``run_all.sh``.

Imports the core, models, data and checkpoints. ``python -m ones_lib.study --help`` is the command.
"""

from ones_lib.study.progress import show_in_outputs

show_in_outputs()
