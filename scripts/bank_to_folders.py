"""Write a bank as pictures in class folders, for torchvision's `ImageFolder` and Hugging Face's `imagefolder`.

OUT/<class>/<item>.png, and OUT/metadata.csv with file_name and the columns of the bank's manifest. Folders begin with
the label, so that both libraries number classes as the bank does, where each of them has an image.

    python scripts/bank_to_folders.py BANK OUT [--all]
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

from PIL import Image
from rich.progress import track

from datamodules.images.bank import read_bank
from leanlight.contracts import BANK_COLUMNS, UserError, atomic_path


def write_folders(folder: Path, out: Path, everything: bool = False) -> int:
    """Write the images of a bank; return how many.

    Args:
        folder: of the bank.
        out: new folder.
        everything: also what did not pass the filter.

    Raises:
        UserError: no whole bank, images that are neither grey nor of three colours, or a folder that holds something.
    """
    bank = read_bank(folder)
    if bank.images.shape[1] not in (1, 3):
        raise UserError(f"BANK: expected images of 1 or 3 channels, {folder} has {bank.images.shape[1]}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"OUT: expected a new folder, {out} holds something")
    names = folder_names(bank.record["classes"])
    chosen = [item for item in range(len(bank)) if everything or bank.columns["kept"][item]]
    rows = []
    for item in track(chosen, "pictures"):
        row = {column: bank.columns[column][item] for column in BANK_COLUMNS}
        file = Path(names[row["label"]]) / f"{item:0{len(str(len(bank)))}}.png"
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        pixels = bank.images[item].movedim(0, -1).numpy()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(out / file)
        rows.append({"file_name": file.as_posix(), **row})
    # Last, so that it lists what is there.
    with atomic_path(out / "metadata.csv") as part, open(part, "w", newline="") as lines:
        table = csv.DictWriter(lines, ["file_name", *BANK_COLUMNS])
        table.writeheader()
        table.writerows(rows)
    return len(rows)


def folder_names(classes: list[str]) -> list[str]:
    """A name a class that is safe in any file system, and sorts by label."""
    width = len(str(len(classes) - 1))
    plain = [re.sub("[^A-Za-z0-9.-]+", "-", name) for name in classes]
    return [f"{label:0{width}}" + (f"_{name}" if name != str(label) else "") for label, name in enumerate(plain)]


def main() -> None:
    """Write one bank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", metavar="BANK", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--all", action="store_true", help="also variations that did not pass the filter")
    arguments = parser.parse_args()
    print(f"{arguments.out}: {write_folders(arguments.bank, arguments.out, arguments.all):,} pictures")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
