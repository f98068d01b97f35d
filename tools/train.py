"""python tools/train.py --cfg FILE [--resume | --overwrite] [KEY VALUE …]: see deepkd_plugin/launch.py."""

import sys

from deepkd_plugin.terminal import run_script

sys.exit(run_script("deepkd_plugin.launch"))
