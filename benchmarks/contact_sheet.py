"""The picture of glyphs100 in the docs: three training images of each class, 20 classes to a row.

python benchmarks/contact_sheet.py docs/glyphs100.png
"""

import sys

import numpy as np
from PIL import Image

from deepkd_plugin.data.glyphs import NUM_CLASSES, render_glyphs


def main(picture: str) -> None:
    images, labels = render_glyphs("train", per_class=3)
    samples = np.stack([images[labels == i] for i in range(NUM_CLASSES)])
    rows = samples.reshape(-1, 20, 3, 32, 32, 3).transpose(0, 2, 3, 1, 4, 5).reshape(-1, 20 * 32, 3)
    sheet = Image.fromarray(np.ascontiguousarray(rows)).quantize(256)
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
