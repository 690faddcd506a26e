"""Records of a benchmark's file, tables of VLMEvalKit and MME's folders of texts among them."""

from __future__ import annotations

from pathlib import Path

from keepkv.tasks.base import TaskError
from keepkv.tasks.files.records import ENDINGS, FOLDER, Record, file_of, read
from keepkv.tasks.files.vlm.published import listed

_INDEX = 64  # letters: a picture that has no more names the row that has it, or a file


def load(path: str, part: str) -> list[Record]:
    """The records of a file, each with the folder that it lies in. Raises ``TaskError``."""
    place = Path(path).expanduser()
    if part == "mme" and place.suffix == ".txt":
        found = _asked(place, ("image", "question", "answer"))
    elif part == "mme" and place.is_dir() and not any((place / f"mme{ending}").is_file() for ending in ENDINGS):
        found = _folder(place)
    else:
        place = file_of(path, part)
        found = _table(place) if place.suffix == ".tsv" else read(place)
    return [{**record, FOLDER: str(place.parent)} for record in found]


def _table(place: Path) -> list[Record]:
    """Rows with what is in their cells: pictures in base64, or the index of a row that has them, and lists as text."""
    rows = read(place)
    held: dict[str, str] = {row.get("index", ""): row.get("image", "") for row in rows}
    found = []
    for number, row in enumerate(rows, 1):
        image = str(row.get("image", ""))
        try:
            found.append(_row(row, held.get(image, image) if len(image) <= _INDEX else image))
        except ValueError as error:
            raise TaskError(f"record {number} of {str(place)!r}: {error}") from error
    return found


def _row(given: Record, image: str) -> Record:
    row = {field: cell for field, cell in given.items() if cell and field != "image"}
    if image.startswith("["):
        row["images"] = [{"base64": one} for one in listed(image)]
    elif image:
        row["image"] = {"base64": image} if len(image) > _INDEX else image
    if row.get("answer", "").startswith(("['", '["')):
        row["answers"] = listed(row["answer"])
    return row


def _folder(place: Path) -> list[Record]:
    """MME as it is published: CATEGORY/NAME.txt beside NAME.jpg, or CATEGORY/questions_answers_YN/NAME.txt with
    CATEGORY/images/NAME.jpg, of a category or of all; two lines each, a question and its answer."""
    found = []
    for text in sorted(place.rglob("*.txt")):
        near = text.parent.parent / "images" if text.parent.name == "questions_answers_YN" else text.parent
        images = [near / f"{text.stem}{ending}" for ending in (".jpg", ".png")]
        if not (there := [image for image in images if image.is_file()]):
            raise TaskError(f"{str(text)!r} asks about an image that is not there: {str(images[0])!r} or .png")
        found += [{"image": str(there[0].resolve()), **asked} for asked in _asked(text, ("question", "answer"))]
    if not found:
        raise TaskError(f"{str(place)!r} holds no texts of MME: give the folder of a category, or of all of them")
    return found


def _asked(text: Path, fields: tuple[str, ...]) -> list[Record]:
    """Lines with a field between tabs each. ``eval_tool/Your_Results/CATEGORY.txt`` has the image too."""
    try:
        lines = text.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {str(text)!r}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    found = []
    for number, line in enumerate(lines, 1):
        cells = line.strip().split("\t")
        if len(cells) == len(fields):
            found.append(dict(zip(fields, cells, strict=True)))
        elif line.strip():
            raise TaskError(f"{str(text)!r}, line {number}, has {len(cells)} fields in place of {', '.join(fields)}")
    return found
