"""python tools/eval_detection.py --cfg FILE --ckpt FILE [--model NAME] [KEY VALUE …]: see deepkd_plugin/detection."""

import sys

from deepkd_plugin.terminal import run_script

sys.exit(run_script("deepkd_plugin.detection.evaluate"))
