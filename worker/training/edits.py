"""Edits that copies of pictures go through, one small function each: RGB image in, RGB image out.

The attack suite applies them with fixed strengths, the augmentation with random ones.
Sizes are shares of the image, so an edit looks the same at every resolution.
"""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)
BLACK: RGB = (0, 0, 0)
BENT_CELLS = 8  # a side, each of which `bend` moves as one piece


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Compress as JPEG and decode again."""
    return _recoded(image, "JPEG", quality)


def webp(image: Image.Image, quality: int) -> Image.Image:
    """Compress as WebP (fastest method) and decode again."""
    return _recoded(image, "WEBP", quality, method=0)


def scale(image: Image.Image, factor: float) -> Image.Image:
    """Resize both sides by a factor, never under 8 pixels."""
    size = (max(8, round(image.width * factor)), max(8, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def thumbnail(image: Image.Image, long_side: int) -> Image.Image:
    """Fit into a square of `long_side` pixels, as a preview does."""
    return scale(image, min(1.0, long_side / max(image.size)))


def stretch(image: Image.Image, factor: float) -> Image.Image:
    """Change the width alone."""
    return image.resize((max(8, round(image.width * factor)), image.height))


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiply the light; 1 changes nothing."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Spread values around the mean; 1 changes nothing."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Spread colours around grey; 1 changes nothing."""
    return ImageEnhance.Color(image).enhance(factor)


def sharpen(image: Image.Image, factor: float) -> Image.Image:
    """Sharpen above 1, soften below."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def gamma(image: Image.Image, red: float, green: float, blue: float) -> Image.Image:
    """Apply an exponent to each channel: light curves and colour casts."""
    ramp = np.arange(256) / 255
    table = np.concatenate([ramp**red, ramp**green, ramp**blue]) * 255
    return image.point(table.round().astype(int).tolist())


def hue(image: Image.Image, shift: int) -> Image.Image:
    """Turn the colour circle by shift/256."""
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(shift % 256)
    return Image.fromarray(hsv, "HSV").convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """Drop the colour."""
    return image.convert("L").convert("RGB")


def blur(image: Image.Image, share: float) -> Image.Image:
    """Gaussian blur with a radius of a share of the short side."""
    return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))


def noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Add Gaussian noise of `sigma` levels out of 255."""
    values = np.asarray(image, np.float32)
    values = values + sigma * rng.standard_normal(values.shape, np.float32)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def crop(image: Image.Image, area: float, aspect: float, left: float, top: float) -> Image.Image:
    """Keep a share of the area; `aspect` skews the window, left and top in 0..1 place it."""
    width = min(1.0, (area * aspect) ** 0.5)
    height = min(1.0, area / width)
    x, y = left * (1 - width) * image.width, top * (1 - height) * image.height
    right = max(x + 8, x + width * image.width)
    bottom = max(y + 8, y + height * image.height)
    return image.crop((round(x), round(y), round(right), round(bottom)))


def mirror(image: Image.Image) -> Image.Image:
    """Swap left and right."""
    return ImageOps.mirror(image)


def quarter_turn(image: Image.Image, turns: int) -> Image.Image:
    """Turn by 90 degrees, one to three times."""
    steps = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(steps[turns - 1])


def turn(image: Image.Image, degrees: float, fill: RGB) -> Image.Image:
    """Turn by any angle; the corners show the fill."""
    return image.rotate(degrees, Image.Resampling.BILINEAR, expand=True, fillcolor=fill)


def bend(
    image: Image.Image, across: NDArray[np.float32], along: NDArray[np.float32]
) -> Image.Image:
    """Move what is seen smoothly, as another point of view does: no crop and no turn undoes it.

    (n, n) shifts of n x n points spread evenly, in shares of the width and of the height. Of an
    image with fewer pixels than cells, some cells hold none, which Pillow cannot bend.
    """
    edges = np.linspace(0, 1, BENT_CELLS + 1)
    columns, rows = np.rint(edges * image.width), np.rint(edges * image.height)
    x = _inside(columns[None] + _smooth(across) * image.width, image.width)
    y = _inside(rows[:, None] + _smooth(along) * image.height, image.height)
    corners = ((0, 0), (1, 0), (1, 1), (0, 1))  # row and column; Pillow goes down first
    mesh = [
        (
            tuple(int(at) for at in (columns[c], rows[r], columns[c + 1], rows[r + 1])),
            tuple(float(side[r + i, c + j]) for i, j in corners for side in (x, y)),
        )
        for r in range(BENT_CELLS)
        for c in range(BENT_CELLS)
        if rows[r] < rows[r + 1] and columns[c] < columns[c + 1]
    ]
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _smooth(shifts: NDArray[np.float32]) -> NDArray[np.float32]:
    side = (BENT_CELLS + 1, BENT_CELLS + 1)
    return np.asarray(Image.fromarray(shifts).resize(side, Image.Resampling.BICUBIC))


def _inside(places: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Pillow shows black from the far edge on."""
    return np.clip(places, 0, size - 1e-3)


def border(image: Image.Image, share: float, colour: RGB) -> Image.Image:
    """Frame on all sides, each a share of the short side wide."""
    return ImageOps.expand(image, max(1, round(share * min(image.size))), colour)


def pad(image: Image.Image, aspect: float, colour: RGB) -> Image.Image:
    """Centre on a plain canvas of the wanted width / height that just holds the image."""
    width = max(image.width, round(image.height * aspect))
    height = max(image.height, round(width / aspect))
    return paste(Image.new("RGB", (width, height), colour), image, 0.5, 0.5)


def paste(canvas: Image.Image, image: Image.Image, left: float, top: float) -> Image.Image:
    """Put an image on a copy of the canvas; left and top in 0..1 place it within the free room."""
    canvas = canvas.copy()
    x, y = left * (canvas.width - image.width), top * (canvas.height - image.height)
    canvas.paste(image, (round(x), round(y)))
    return canvas


def inset(
    image: Image.Image, other: Image.Image, share: float, left: float, top: float
) -> Image.Image:
    """Picture in picture: lay another one on top, its longer side a share of the short side."""
    return paste(image, thumbnail(other, max(8, round(share * min(image.size)))), left, top)


def caption(
    image: Image.Image, text: str, share: float, top: float, *, colour: RGB, bar: RGB | None = None
) -> Image.Image:
    """Write one line across, `share` of the height tall, on a bar of its own colour if given."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    height = max(6, round(share * image.height))
    y = round(top * (image.height - 1.4 * height))
    if bar is not None:
        draw.rectangle((0, y, image.width, y + round(1.4 * height)), fill=bar)
    at = (image.width / 2, y + 0.7 * height)
    draw.text(at, text, font=_font(height), fill=colour, anchor="mm")
    return image


def watermark(image: Image.Image, text: str, share: float, opacity: float) -> Image.Image:
    """Tile a text over the image, letting it through."""
    height = max(6, round(share * image.height))
    mask = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(mask)
    step = round(height * (1 + 0.6 * len(text)))
    for row, y in enumerate(range(0, image.height, 3 * height)):
        for x in range(-(row % 2) * step // 2, image.width, step):
            draw.text((x, y), text, font=_font(height), fill=round(255 * opacity))
    return Image.composite(Image.new("RGB", image.size, WHITE), image, mask)


def sticker(
    image: Image.Image, share: float, left: float, top: float, *, colour: RGB, glyph: str
) -> Image.Image:
    """Cover a disc with a glyph on it; its diameter is a share of the short side."""
    image = image.copy()
    size = max(8, round(share * min(image.size)))
    x, y = round(left * (image.width - size)), round(top * (image.height - size))
    draw = ImageDraw.Draw(image)
    draw.ellipse((x, y, x + size, y + size), fill=colour)
    at = (x + size / 2, y + size / 2)
    draw.text(at, glyph, font=_font(size // 2), fill=BLACK, anchor="mm")
    return image


def screenshot(
    image: Image.Image,
    *,
    aspect: float,
    margin: float,
    top: float,
    dark: bool,
    lines: list[str],
) -> Image.Image:
    """Show the image on a phone: `aspect` is the screen's height / width, bars and text around.

    `margin` is the free share of the width beside the picture, `top` places it in 0..1 of the
    room between the bars, `lines` fill what is left above and below.
    """
    paper, ink = ((18, 18, 20), (225, 225, 230)) if dark else ((250, 250, 250), (30, 30, 34))
    width = round(image.width * (1 + margin))
    height = max(round(width * aspect), round(image.height * 1.25))
    canvas = Image.new("RGB", (width, height), paper)
    bar = round(0.045 * height)
    y = bar * 2 + round(top * (height - image.height - 4 * bar))
    canvas.paste(image, ((width - image.width) // 2, y))
    _phone_bars(canvas, bar, ink)
    draw = ImageDraw.Draw(canvas)
    step = max(7, round(0.03 * height))
    free = [*range(2 * bar, y - step, step), *range(y + image.height, height - 3 * bar, step)]
    for row, line in zip(free, lines, strict=False):
        draw.text((0.04 * width, row), line, font=_font(round(step * 0.75)), fill=ink)
    return canvas


def _phone_bars(canvas: Image.Image, bar: int, ink: RGB) -> None:
    """Status bar, title bar and a row of buttons, in place."""
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    font = _font(max(6, round(0.6 * bar)))
    draw.text((0.04 * width, 0.2 * bar), "12:47", font=font, fill=ink)
    draw.rectangle((0.86 * width, 0.3 * bar, 0.95 * width, 0.75 * bar), fill=ink)
    draw.ellipse(
        (0.03 * width, 1.1 * bar, 0.03 * width + 0.8 * bar, 1.9 * bar), fill=(90, 130, 210)
    )
    draw.line((0, 2 * bar, width, 2 * bar), fill=(128, 128, 128))
    for button in range(4):
        x = (button + 0.5) * width / 4
        box = (x - 0.3 * bar, height - 1.5 * bar, x + 0.3 * bar, height - 0.9 * bar)
        draw.rectangle(box, outline=ink)


def _recoded(image: Image.Image, kind: str, quality: int, **options: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality, **options)
    return Image.open(stream).convert("RGB")


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(5, size))
