"""The training program: train_network.py for all families, sdxl_train_network.py for one."""

from __future__ import annotations

import sys
import time
from functools import partial

from library.console import is_main_process, quiet_unless_main, set_up_console
from library.errors import UserError
from library.imports import garbage_collection_paused
from library.openmp import let_waiting_threads_sleep
from library.parallel import in_background


def main(family: str | None = None) -> int:
    """Read the options, then import what training needs: --help and a misspelt option answer at once.

    family: the one family of models to accept, by its name.
    """
    quiet_unless_main()
    from library.training.checks.launcher import check_launcher
    from library.training.options import all_defaults, parse_options
    from library.training.outputs.base_model import all_model_facts

    try:
        options = parse_options(sys.argv[1:])
        check_launcher()
    except UserError as error:
        if is_main_process():
            raise
        # The launcher ends all processes when one ends. The main one reads the same options, in 0.2 s, and shows the error first.
        time.sleep(2)
        return error.exit_code
    if options.logs.output_config:
        from library.training.outputs.config_output import write_config

        print(f"the options are in {write_config(options, options.logs.config_file)}")
        return 0
    if options.metadata.from_metadata:
        from library.training.outputs.from_metadata import print_from_metadata

        return print_from_metadata(options.metadata.from_metadata, all_defaults())

    set_up_console(options.logs.console_log_level, options.logs.console_log_file, options.logs.console_log_simple)
    print("loading libraries ...", flush=True)  # takes seconds, in which nothing else would be printed
    let_waiting_threads_sleep()
    # Hashing a model takes a second for 1.5 GB. Imports leave all cores but one idle, steps leave none.
    model_facts = None if options.data.debug_dataset else in_background(partial(all_model_facts, options.model))
    with garbage_collection_paused():
        from library.training.entry import train

    return train(options, family=family, model_facts=model_facts)
