"""Draw what one or more runs of saeception.py measured: silhouette of h, silhouette of z and
accuracy over the cycles, a line for each arm: the mean over the seeds, and ± the standard deviation
as a band.

    python .github/experiments/curves.py runs/NAME/results.json --out .github/curves.png

Several files serve as one, as from runs with different seeds or arms. It needs Pillow alone.
"""

import argparse
import json
import math
import statistics
import sys

from PIL import Image, ImageDraw, ImageFont

PANELS = [  # key of a row, title, digits of the numbers at the axis, least height of the axis
    ("h_silhouette", "silhouette of h (layer)", 2, 0.1),
    ("silhouette", "silhouette of z (SAE)", 2, 0.1),
    ("accuracy", "accuracy", 3, 0.02),  # else the noise of one image in 2000 fills the panel
]
COLOURS = {  # told apart by colour-blind people too (Okabe and Ito 2008)
    "sae-ception": (0, 114, 178), "control": (110, 110, 110),
    "unsharpened": (213, 94, 0), "class-mean": (0, 158, 115),
}  # fmt: skip
MORE_COLOURS = [(204, 121, 167), (86, 180, 233), (230, 159, 0), (0, 0, 0)]  # of other arms
SCALE = 4  # drawn four times as large as 900 pixels, saved at half of that: smooth lines
WIDTH, HEIGHT, TOP, BOTTOM, SIDE, GAP = 900, 350, 78, 52, 52, 20  # of the picture, in pixels


def read_rows(paths):
    """The rows of the files. ValueError, of one line, for what is no results.json or has too
    little, or the same measurement twice."""
    rows = {}
    for path in paths:
        try:
            with open(path) as file:
                of_file = json.load(file)["rows"]
            keys = [(row["arm"], row["cycle"], row["seed"]) for row in of_file]
            values = [[float(row[key]) for key, *_ in PANELS] for row in of_file]
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no results.json of saeception.py ({reason})") from error
        for key, value in zip(keys, values, strict=True):
            if rows.setdefault(key, value) != value:
                arm, cycle, seed = key
                raise ValueError(f"{arm}, cycle {cycle}, seed {seed} is there twice and differs")
    if not any(cycle > 0 for _, cycle, _ in rows):
        raise ValueError("no cycles: there is nothing to draw")
    return rows


def curves(rows, panel):
    """arm: list of (cycle, mean, mean - deviation, mean + deviation), from the baseline on. The
    deviation of one seed is 0, and what the panel shows is never above 1."""
    by_arm = {}
    for (arm, cycle, _), values in sorted(rows.items(), key=lambda item: item[0][1]):
        by_arm.setdefault(arm, {}).setdefault(cycle, []).append(values[panel])
    baseline = by_arm.pop("baseline", {})
    result = {}
    for arm, by_cycle in by_arm.items():
        result[arm] = []
        for cycle, values in (baseline | by_cycle).items():
            mean, deviation = statistics.mean(values), 0.0
            if len(values) > 1:
                deviation = statistics.stdev(values)
            result[arm].append((cycle, mean, mean - deviation, min(1.0, mean + deviation)))
    return result


def ticks(low, high):
    """Some four to eight round numbers from low to high."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_panel(image, box, title, digits, least, lines, colours):
    """One panel into box (left, top, right, bottom), in pixels of the large image."""
    left, top, right, bottom = box
    font, title_font = (ImageFont.load_default(size * SCALE) for size in (13, 15))
    points = [point for line in lines.values() for point in line]
    low, high = min(point[2] for point in points), max(point[3] for point in points)
    low = min(low, high - least)
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin
    cycles = sorted({point[0] for point in points})

    def place(cycle, value):
        x = left + (cycle - cycles[0]) / (cycles[-1] - cycles[0]) * (right - left)
        return x, bottom - (value - low) / (high - low) * (bottom - top)

    draw = ImageDraw.Draw(image)
    draw.text((left, top - 12 * SCALE), title, "black", title_font, anchor="ls")
    for value in ticks(low, high):
        x, y = place(cycles[0], value)
        draw.line((x, y, right, y), fill=(225, 225, 225), width=SCALE)
        draw.text((x - 6 * SCALE, y), f"{value:.{digits}f}", "black", font, anchor="rm")
    for cycle in cycles:
        x, y = place(cycle, low)
        draw.line((x, y, x, y + 5 * SCALE), fill="black", width=SCALE)
        draw.text((x, y + 8 * SCALE), str(cycle), "black", font, anchor="mt")
    draw.line((left, top, left, bottom, right, bottom), fill="black", width=SCALE)
    draw.text(((left + right) / 2, bottom + 26 * SCALE), "cycle", "black", font, anchor="mt")
    for arm, line in lines.items():
        lower = [place(cycle, below) for cycle, _, below, _ in line]
        upper = [place(cycle, above) for cycle, _, _, above in line]
        band = Image.new("RGBA", image.size)
        ImageDraw.Draw(band).polygon(upper + lower[::-1], fill=(*colours[arm], 50))
        image.alpha_composite(band)
    draw = ImageDraw.Draw(image)
    for arm, line in lines.items():
        points = [place(cycle, mean) for cycle, mean, _, _ in line]
        draw.line(points, fill=colours[arm], width=2 * SCALE, joint="curve")
        for x, y in points:
            radius = 3.5 * SCALE
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colours[arm])


def draw_picture(rows, path):
    arms = list(curves(rows, 0))
    more = [arm for arm in arms if arm not in COLOURS]
    colours = COLOURS | dict(zip(more, MORE_COLOURS * len(more), strict=False))
    image = Image.new("RGBA", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15 * SCALE)
    x, y = SIDE * SCALE, 22 * SCALE
    for arm in arms:
        draw.line((x, y, x + 26 * SCALE, y), fill=colours[arm], width=4 * SCALE)
        x += 33 * SCALE
        draw.text((x, y), arm, "black", font, anchor="lm")
        x += draw.textlength(arm, font) + 22 * SCALE
    n_seeds = len({seed for _, _, seed in rows})
    if n_seeds > 1:
        text, small = f"mean ± std, {n_seeds} seeds", ImageFont.load_default(13 * SCALE)
        draw.text(((WIDTH - 12) * SCALE, y), text, "black", small, anchor="rm")
    width = (WIDTH - GAP) // len(PANELS)
    for i, (_, title, digits, least) in enumerate(PANELS):
        left = i * width + SIDE
        box = (left, TOP, (i + 1) * width, HEIGHT - BOTTOM)
        box = [SCALE * pixels for pixels in box]
        draw_panel(image, box, title, digits, least, curves(rows, i), colours)
    image.reduce(2).convert("RGB").save(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="+", help="results.json of a run, or of several")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    try:
        draw_picture(read_rows(args.results), args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"curves.py: error: {error}")


if __name__ == "__main__":
    main()
