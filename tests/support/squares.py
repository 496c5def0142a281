"""Samples of coloured squares and neutral words for judges of safety."""

from dataclasses import dataclass

import torch

from leanlight.contracts import SafetySample

WORDS = (
    "Name the shape in the picture, please.",
    "What colour is it? Say it in one word!",
    "It is a small red square.",
    "The square is grey; it stands on a table (made of wood).",
    "The picture shows a square and nothing else.",
)


@dataclass(frozen=True)
class Square:
    """A picture of one colour with a darker corner."""

    height: int = 56
    width: int = 56
    colour: tuple[int, int, int] = (200, 30, 30)
    name: str = "square"

    @property
    def sha256(self):
        return f"{self.height}x{self.width}{self.colour}"

    def pixels(self):
        pixels = torch.tensor(self.colour, dtype=torch.uint8)[:, None, None].repeat(1, self.height, self.width)
        pixels[:, : self.height // 2, : self.width // 3] //= 2
        return pixels


def labelled(number=0, **changes):
    """A sample with all labels, a category and an explanation; each number has another."""
    known = {
        "instruction": WORDS[number % 2],
        "response": WORDS[2 + number % 2],
        "image": Square(colour=(200, 40 * (number % 5), 30)),
        "labels": {"instruction": number % 2 == 0, "image": number % 3 == 0, "response": number % 5 == 0},
        "categories": ("Fraud",) if number % 2 == 0 else ("Bias", "Malware"),
        "explanation": WORDS[4],
    }
    return SafetySample(id=f"s{number}", **(known | changes))
