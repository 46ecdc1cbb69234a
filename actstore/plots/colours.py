"""One sequential scale for all pictures: from near white to dark blue, in even steps of perceived lightness.

Lightness falls evenly from end to end, so that the scale reads the same in grey and to readers who are colour-blind;
the hue, from sand through green to blue, only helps. Made in OKLCh (B. Ottosson, "A perceptual color space for image
processing", 2020), where lightness is one coordinate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["INK", "css_colour", "dark_text_on", "lightness"]

LIGHTEST, DARKEST = 0.970, 0.29  # OKLab lightness at 0 and at 1
FIRST_HUE, LAST_HUE = 95.0, 275.0  # degrees
CHROMA = 0.078  # in the middle; sRGB holds it all along

_TO_CONE = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_LINEAR = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

Values = npt.NDArray[np.float64]


def _scale(n_steps: int = 256) -> Values:
    """Return the scale: sRGB in 0 … 1, (step, 3)."""
    share = np.linspace(0, 1, n_steps)
    light = LIGHTEST + (DARKEST - LIGHTEST) * share
    hue = np.deg2rad(FIRST_HUE + (LAST_HUE - FIRST_HUE) * share**0.85)
    chroma = 0.015 + CHROMA * np.sin(np.pi * (0.05 + 0.72 * share))
    lab = np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    linear = (lab @ _TO_CONE.T) ** 3 @ _TO_LINEAR.T
    curved: Values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)
    return np.clip(curved, 0, 1)


INK = _scale()


def css_colour(share: float) -> str:
    """Return the colour of a share of the scale, 0 … 1, as `#rrggbb`."""
    red, green, blue = np.rint(_at(share) * 255).astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def dark_text_on(share: float) -> bool:
    """Return whether dark text reads better than white text on this share of the scale."""
    luminance = lightness(_at(share))
    return (luminance + 0.05) ** 2 > 0.05 * 1.05  # the contrasts of WCAG 2 with black and with white


def lightness(colour: Values) -> float:
    """Return the relative luminance, 0 … 1, of an sRGB colour: what is left of it in grey."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def _at(share: float) -> Values:
    known = 0.0 if share != share else min(1.0, max(0.0, share))
    colour: Values = INK[round(known * (len(INK) - 1))]
    return colour
