"""DeepKD for object detectors: one core, two hosts.

losses.py is the core: class logits of sampled proposals in, losses by stream out. The torchvision host trains
torchvision's Faster R-CNNs (tools/train_detection.py): keys.py, data/, networks.py, distillers.py, trainer.py,
average_precision.py, launch.py; evaluate.py tests a saved one. The package detectron2/ is the other host, inside
mdistiller's detection branch, and merge.py makes the file that its runs start from.
"""
