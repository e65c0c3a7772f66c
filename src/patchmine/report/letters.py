"""Letters on contact sheets: their sizes, their colours, and where a line ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]
INK, SOFT, PAPER = (27, 29, 32), (99, 103, 110), (255, 255, 255)


class Letters:
    """A size of letters, the colour in which they are written, and how they are set."""

    def __init__(self, size: int, ink: Colour) -> None:
        self.size, self.ink = size, ink
        self.line = round(size * 1.25)  # pixels from one line to the next

    @cached_property
    def font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """PIL's own font, loaded when something is written."""
        return ImageFont.load_default(self.size)

    def width(self, text: str) -> float:
        """Pixels that a text takes."""
        return float(self.font.getlength(text))

    def write(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str]) -> None:
        """Lines below each other, the first with its upper left corner at ``at``, x first."""
        for i, text in enumerate(lines):
            draw.text((at[0], at[1] + i * self.line), text, fill=self.ink, font=self.font)

    def wrap(self, text: str, width: float) -> list[str]:
        """The whole text in lines of at most ``width`` pixels; a word that is too long is cut."""
        lines = [""]
        for word in text.split():
            if lines[-1] and self.width(f"{lines[-1]} {word}") > width:
                lines.append("")
            elif lines[-1]:
                lines[-1] += " "
            if lines[-1] or self.width(word) <= width:
                lines[-1] += word
                continue
            for letter in word:
                if lines[-1] and self.width(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
        return lines
