"""python tools/train_detection.py --cfg FILE [--resume | --overwrite] [KEY VALUE …]: see deepkd_plugin/detection."""

import sys

from deepkd_plugin.detection.launch import main

sys.exit(main())
