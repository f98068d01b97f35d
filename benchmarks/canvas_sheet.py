"""The picture of glyph_canvas in the docs: the first 24 training canvases with their boxes, classes below.

python benchmarks/canvas_sheet.py docs/glyph_canvas.png
"""

import sys
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from deepkd_plugin.detection.data.canvas import CLASSES, SIZE, render_glyph_canvas

COLUMNS, ROWS, SCALE = 6, 4, 2


def main(picture: str) -> None:
    canvases = zip(*render_glyph_canvas("train", count=COLUMNS * ROWS))
    side = SIZE * SCALE
    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(font_file, 13, layout_engine=ImageFont.Layout.BASIC)
    sheet = Image.new("RGB", (COLUMNS * side, ROWS * side))
    for place, (pixels, boxes, labels) in enumerate(canvases):
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(tile)
        for box, label in zip(boxes * SCALE, labels):
            draw.rectangle(box.tolist(), outline=(255, 230, 0))
            corner = float(box[0]), min(float(box[3]), side - 17.0)
            draw.text(corner, CLASSES[label - 1], (255, 230, 0), font, stroke_width=1, stroke_fill=(0, 0, 0))
        sheet.paste(tile, (place % COLUMNS * side, place // COLUMNS * side))
    sheet.quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
