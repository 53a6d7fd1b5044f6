"""Contact sheets: images in a labelled grid, as one image."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

WHITE = (255, 255, 255)
TITLE_COLOUR = (24, 24, 27)
LABEL_COLOUR = (63, 63, 70)
EDGE_COLOUR = (225, 225, 229)  # a thin line, which shows the edge of a white image
EMPTY_COLOUR = (246, 246, 248)

SMALLEST_CELL = 192  # a 64 px image is shown at 192 px
LARGEST_CELL = 512
LARGEST_SHEET = 80_000_000  # pixels; Pillow warns of a "decompression bomb" when it opens 89 million
MIN_LABEL_LINES = 3
MOST_LETTERS = 2_000  # of a label; a caption may be a book

# Fonts for labels that Pillow's own (Latin) font cannot write; Pillow searches the system's font folders.
FALLBACK_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc"),  # Linux
    *("segoeui.ttf", "msyh.ttc", "YuGothM.ttc", "meiryo.ttc", "malgun.ttf"),  # Windows
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),  # macOS
)


def contact_sheet(
    rows: list[list[Image.Image | None]],
    row_labels: list[str],
    column_labels: list[str],
    title: str | None = None,
    cell: int | None = None,
) -> Image.Image:
    """Images in a grid on white, with a label before each row and above each column.

    Every image is scaled to fit a square of `cell` pixels and keeps its proportions; None, or a row that ends early, leaves an
    empty place. Without `cell` the images keep their size, within 192 to 512 pixels, or less if the sheet would exceed 80
    megapixels. `row_labels` and `column_labels` may be empty lists: then there are no such labels. Row labels that do not fit
    beside their images end in "…".
    """
    columns = max([len(column_labels), *map(len, rows)], default=0)
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"{len(rows)} rows but {len(row_labels)} row labels")
    if column_labels and len(column_labels) != columns:
        raise ValueError(f"{columns} columns but {len(column_labels)} column labels")
    cell = cell or _natural_cell(rows, columns)
    images = [[_fit(image, cell) for image in row] + [None] * (columns - len(row)) for row in rows]
    return _Layout(images, list(row_labels), list(column_labels), title or "", cell, columns).draw()


class _Layout:
    """The layout of one sheet. All lengths are in pixels; distances are proportional to `cell`."""

    def __init__(
        self, images: list[list[Image.Image | None]], row_labels: list[str], column_labels: list[str], title: str, cell: int,
        columns: int,
    ):  # fmt: skip
        self.images, self.columns = images, columns
        self.row_labels, self.column_labels, self.title = row_labels, column_labels, title
        self.text_size = min(max(cell // 16, 13), 26)
        self.line = round(self.text_size * 1.4)
        self.gap = max(cell // 24, 4)
        self.margin = max(cell // 10, 16)
        present = [image for row in images for image in row if image]
        smallest = min(cell, self.text_size * 4)  # an empty place, or a very narrow image, still has room for its label
        self.column_width = max([smallest, *(image.width for image in present)])
        typical_height = max([smallest, *(image.height for image in present)])
        self.label_width = self._label_width(limit=max(cell, 12 * self.text_size))
        self.row_heights = [
            max([MIN_LABEL_LINES * self.line if row_labels else smallest, *(image.height for image in row if image)])
            if any(row) else typical_height
            for row in images
        ]  # fmt: skip

    def _label_width(self, limit: int) -> int:
        """Room for the row labels: as wide as the longest, at most `limit`."""
        widths = [_font(text, self.text_size).getlength(_plain(text)) for text in self.row_labels]
        return min(limit, int(max(widths, default=0)) + 2)

    def draw(self) -> Image.Image:
        """Measure the headings, then draw from top to bottom."""
        left = self.margin + (self.label_width + 2 * self.gap if self.label_width else 0)
        grid_width = self.columns * self.column_width + max(self.columns - 1, 0) * self.gap
        width = max(left + grid_width, self.margin + 16 * self.text_size if self.title else 0) + self.margin

        title_size = round(self.text_size * 1.4)
        title_lines = _wrap(self.title, title_size, width - 2 * self.margin)
        headings = [_wrap(text, self.text_size, self.column_width) for text in self.column_labels]
        title_height = round(len(title_lines) * title_size * 1.4) + (2 * self.gap if title_lines else 0)
        heading_lines = max(map(len, headings), default=0)
        heading_height = heading_lines * self.line + (self.gap if heading_lines else 0)
        grid_height = sum(self.row_heights) + max(len(self.row_heights) - 1, 0) * self.gap

        sheet = Image.new("RGB", (width, 2 * self.margin + title_height + heading_height + grid_height), WHITE)
        pen = ImageDraw.Draw(sheet)
        _write(pen, title_lines, title_size, (self.margin, self.margin), TITLE_COLOUR)
        top = self.margin + title_height
        for column, lines in enumerate(headings):
            centre = left + column * (self.column_width + self.gap) + self.column_width // 2
            first_line = top + (heading_lines - len(lines)) * self.line  # headings stand on the images
            _write(pen, lines, self.text_size, (centre, first_line), LABEL_COLOUR, centred=True)
        self._draw_rows(sheet, pen, left, top + heading_height)
        return sheet

    def _draw_rows(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
        for index, (row, height) in enumerate(zip(self.images, self.row_heights, strict=True)):
            if self.row_labels:
                lines = _wrap(self.row_labels[index], self.text_size, self.label_width, max_lines=height // self.line)
                middle = top + (height - len(lines) * self.line) // 2
                _write(pen, lines, self.text_size, (self.margin, middle), LABEL_COLOUR)
            for column, image in enumerate(row):
                x = left + column * (self.column_width + self.gap)
                box = (x, top, x + self.column_width, top + height)
                if image is None:
                    pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=EMPTY_COLOUR)
                else:
                    _paste(sheet, pen, image, box)
            top += height + self.gap


def _natural_cell(rows: list[list[Image.Image | None]], columns: int) -> int:
    """A cell in which these images are easy to see; small ones are enlarged by a whole number."""
    largest = max((max(image.size) for row in rows for image in row if image), default=SMALLEST_CELL)
    if largest < SMALLEST_CELL:
        largest *= -(-SMALLEST_CELL // largest)
    cells = max(len(rows), 1) * (columns + 1)  # the labels are about one more column
    return max(16, min(largest, LARGEST_CELL, int((LARGEST_SHEET / cells) ** 0.5)))


def _fit(image: Image.Image | None, cell: int) -> Image.Image | None:
    """The image as RGB on white, its longer side `cell`."""
    if image is None:
        return None
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, (*WHITE, 255))
        image = Image.alpha_composite(on_white, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Paste `image` in the middle of `box`, with a hairline around it."""
    x = (box[0] + box[2] - image.width) // 2
    y = (box[1] + box[3] - image.height) // 2
    pen.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=EDGE_COLOUR)
    sheet.paste(image, (x, y))


def _write(
    pen: ImageDraw.ImageDraw,
    lines: list[str],
    size: int,
    at: tuple[int, int],
    colour: tuple[int, int, int],
    centred: bool = False,
) -> None:
    """Write lines of text; `at` is the top left, or the top of the middle axis if `centred`."""
    spacing = round(size * 1.4)
    font = _font("".join(lines), size)  # one font a label
    for number, line in enumerate(lines):
        middle_of_line = (at[0], at[1] + number * spacing + spacing // 2)
        pen.text(middle_of_line, line, font=font, fill=colour, anchor="mm" if centred else "lm")


def _wrap(text: str, size: int, width: int, max_lines: int | None = None) -> list[str]:
    """Lines of `text` not wider than `width`: broken at spaces, and inside words that are too long (or are Chinese)."""
    text = _plain(text)
    text = text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
    font = _font(text, size)
    lines, line = [], ""
    for word in text.split(" ") if text else []:
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > width:
            cut = _fitting(word, font, width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines += [line] if line else []
    if max_lines is not None and len(lines) > max_lines:
        last = lines[max_lines - 1]
        lines = [*lines[: max_lines - 1], last[: _fitting(f"{last}…", font, width, ending="…")].rstrip(" ,;") + "…"]
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int, ending: str = "") -> int:
    """How many characters of `text`, at least one, fit into `width` together with `ending`."""
    count = 1
    while count < len(text) and font.getlength(text[: count + 1] + ending) <= width:
        count += 1
    return count


def _plain(text: str) -> str:
    """One line without control characters or halves of surrogate pairs (which file names may hold)."""
    text = " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")
    return "".join(character for character in text if character.isprintable())


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has a glyph for every character of `text`, or else the one with the most of them."""
    default = ImageFont.load_default(size=size)
    assert isinstance(default, ImageFont.FreeTypeFont)  # as in all of Pillow's own builds
    characters = {character for character in text if not character.isascii() and character.isprintable()}
    best, fewest = default, _count_missing(default, characters)
    for font in fallback_fonts(size) if fewest else ():
        missing = _count_missing(font, characters)
        if missing < fewest:
            best, fewest = font, missing
        if not fewest:
            break
    return best


def _count_missing(font: ImageFont.FreeTypeFont, characters: Iterable[str]) -> int:
    """How many characters the font would draw as its 'no such glyph' box."""
    box = bytes(font.getmask("\uffff"))
    return sum(bytes(font.getmask(character)) == box for character in characters)


@lru_cache(maxsize=8)
def fallback_fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """Those of FALLBACK_FONTS that this machine has."""
    fonts = []
    for name in FALLBACK_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(fonts)
