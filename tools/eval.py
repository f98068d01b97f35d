"""python tools/eval.py -m MODEL -c FILE [-d DATASET]: accuracy of a student file, see deepkd_plugin/commands."""

import sys

from deepkd_plugin.commands.evaluate import main

sys.exit(main())
