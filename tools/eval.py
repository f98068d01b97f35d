"""python tools/eval.py RUN, or -m MODEL -c FILE [-d DATASET]: `deepkd eval`, see deepkd_plugin/commands."""

import sys

from deepkd_plugin.terminal import run_script

sys.exit(run_script("deepkd_plugin.commands.eval", tool="tools/eval.py"))
