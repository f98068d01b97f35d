"""python tools/train.py --cfg FILE [--resume | --overwrite] [KEY VALUE …]: see deepkd_plugin/launch.py."""

import sys

from deepkd_plugin.launch import main

sys.exit(main())
