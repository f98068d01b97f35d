"""python tools/eval.py -m MODEL -c FILE [-d DATASET]: accuracy of a student file, see deepkd_plugin/evaluate.py."""

import sys

from deepkd_plugin.evaluate import main

sys.exit(main())
