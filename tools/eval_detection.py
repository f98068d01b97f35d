"""python tools/eval_detection.py --cfg FILE --ckpt FILE [--model NAME] [KEY VALUE …]: see deepkd_plugin/detection."""

import sys

from deepkd_plugin.detection.evaluate import main

sys.exit(main())
