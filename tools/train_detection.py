"""python tools/train_detection.py --cfg FILE [--resume | --overwrite] [KEY VALUE …]: see deepkd_plugin/detection."""

import sys

from deepkd_plugin.terminal import run_script

sys.exit(run_script("deepkd_plugin.detection.launch"))
