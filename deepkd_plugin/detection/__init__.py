"""DeepKD for object detectors: one core, two hosts.

losses.py is the core: it turns the class logits of sampled proposals into losses by stream. The torchvision host
trains torchvision's Faster R-CNNs (tools/train_detection.py). It consists of keys.py, data/, networks.py,
distillers.py, trainer.py, average_precision.py and launch.py; evaluate.py tests a saved detector. The package
detectron2/ is the other host, inside mdistiller's detection branch; its merge.py makes the file that its runs start
from. queries.py has the same terms for DETR-like heads, which no host trains.
"""
