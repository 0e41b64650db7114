"""Letters drawn from the fonts that come with matplotlib: many classes, no digits among them.

DejaVu, STIX and Computer Modern, upright, slanted and bold; each image is turned, sheared, scaled and shifted.
Letters that look like a digit (O, I, l, o and the Cyrillic ze) are left out, so that handwritten digits stay new.
"""

import functools
from pathlib import Path

import numpy as np

from .sources import DataError

_LATIN = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghijmnqrtuy"
_GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψω"
_CYRILLIC = "БДЖИЛЦЧШЩЫЭЮЯ"
LETTERS = _LATIN + _GREEK + _CYRILLIC

_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),  # Latin only
)
_CANVAS = 64


@functools.lru_cache(maxsize=8)
def glyphs(side: int = 8, per_class: int = 200, distortion: float = 1.0, seed: int = 0) -> np.ndarray:
    """Draw every letter ``per_class`` times.

    Args:
        side: the images' side.
        per_class: images of each letter, each in a font drawn anew.
        distortion: factor of the random turns (15 degrees at 1), shears, scales and shifts.
        seed: of fonts and distortions.

    Returns:
        uint8 ``[len(LETTERS), per_class, side, side]``, ink bright; shared, read-only.

    Raises:
        DataError: matplotlib or pillow is not installed, or matplotlib comes without its fonts.

    Example:
        >>> glyphs(8, per_class=2).shape
        (79, 2, 8, 8)
    """
    try:
        import matplotlib  # these two are in the extra `train`
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise DataError(f"drawing glyphs needs {error.name!r}: pip install 'learned-opt[train]'") from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(seed)

    @functools.cache
    def upright(letter: str, font: str) -> Image.Image:
        """The letter, centred, 40 pixels in its larger extent."""
        try:
            big = ImageFont.truetype(folder / f"{font}.ttf", 60)
        except OSError:
            raise DataError(f"{folder} holds no font {font}.ttf: is matplotlib installed whole?") from None
        left, top, right, bottom = big.getbbox(letter)
        scaled = big.font_variant(size=60 * 40 / max(right - left, bottom - top))
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        left, top, right, bottom = scaled.getbbox(letter)
        at = (_CANVAS / 2 - (left + right) / 2, _CANVAS / 2 - (top + bottom) / 2)
        ImageDraw.Draw(canvas).text(at, letter, fill=255, font=scaled)
        return canvas

    out = np.empty((len(LETTERS), per_class, side, side), np.uint8)
    for i, letter in enumerate(LETTERS):
        fonts = _FONTS if letter in _LATIN else _FONTS[:-4]
        for j in range(per_class):
            image = upright(letter, fonts[rng.integers(len(fonts))])
            image = image.transform(
                image.size, Image.Transform.AFFINE, _affine(rng, distortion), Image.Resampling.BILINEAR
            )
            out[i, j] = np.asarray(image.resize((side, side), Image.Resampling.BOX))
    out.setflags(write=False)
    return out


def _affine(rng: np.random.Generator, distortion: float) -> tuple[float, ...]:
    """Six numbers, from the new image's coordinates to the old one's."""
    angle, shear = distortion * rng.uniform(-0.26, 0.26), distortion * rng.uniform(-0.25, 0.25)
    scale = np.exp(distortion * rng.uniform(-0.2, 0.2, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]]) / scale
    centre = np.full(2, _CANVAS / 2)
    offset = centre - matrix @ (centre + distortion * rng.uniform(-4, 4, 2))
    (a, b), (d, e) = matrix
    return (a, b, offset[0], d, e, offset[1])
