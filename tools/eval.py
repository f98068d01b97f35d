"""python tools/eval.py RUN, or -m MODEL -c FILE [-d DATASET]: `deepkd eval`, see deepkd_plugin/commands."""

import sys

from deepkd_plugin.commands.eval import main

sys.exit(main(tool="tools/eval.py"))
