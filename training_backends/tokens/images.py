"""Count the tokens of inline images.

Mistral's models encode an image as a grid of patches, with one extra token at the end of each grid
row (mistral-common 1.13, `tokens/tokenizers/image.py`). Only the size of the image matters.
"""

from base64 import b64decode
from collections.abc import Callable
from io import BytesIO

import msgspec

from training_backends.datasets.rows import ChatRow, ContentPart, ImageURL, TextRow
from training_backends.tokens.counts import Uncountable, has_images

__all__ = ["ImageConfig", "ImageCount", "image_count", "refuse_distant_images", "refuse_images"]

ImageCount = Callable[[ContentPart], int]


class ImageConfig(msgspec.Struct, frozen=True):
    """Image patching of a tokenizer; sizes in pixels."""

    image_patch_size: int
    max_image_size: int
    spatial_merge_size: int = 1


def refuse_images(row: ChatRow | TextRow) -> None:
    """Reject a row with images.

    Raises:
        Uncountable: The row has images.
    """
    if has_images(row):
        raise Uncountable("images cannot be counted for this model")


def refuse_distant_images(row: ChatRow | TextRow) -> None:
    """Reject a row with images that are not inline.

    Raises:
        Uncountable: An image would have to be downloaded, which mistral-common does by default.
    """
    if isinstance(row, ChatRow) and has_images(row):
        for message in row.messages:
            for part in message.content if isinstance(message.content, list) else ():
                if part.type != "text" and not _address(part).startswith("data:"):
                    raise Uncountable("only inline images (data: URLs) can be counted")


def image_count(config: ImageConfig) -> ImageCount:
    """Return a function that counts the tokens of an image; it raises `ValueError` for bad data."""

    def count(part: ContentPart) -> int:
        header, _, data = _address(part).partition(",")
        if part.type != "image_url" or not header.endswith(";base64"):
            raise ValueError("not an image")
        width, height = _size(data)
        ratio = max(width, height) / config.max_image_size
        if ratio > 1:
            width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
        patch = config.image_patch_size * config.spatial_merge_size
        columns, rows = (width - 1) // patch + 1, (height - 1) // patch + 1
        return (columns + 1) * rows

    return count


def _address(part: ContentPart) -> str:
    url = part.image_url
    return url.url if isinstance(url, ImageURL) else url or ""


def _size(data: str) -> tuple[int, int]:
    from PIL import Image  # noqa: PLC0415  # comes with mistral-common

    try:
        with Image.open(BytesIO(b64decode(data))) as image:
            return image.size
    except Exception as error:  # image decoders raise arbitrary exceptions
        raise ValueError("not an image") from error
