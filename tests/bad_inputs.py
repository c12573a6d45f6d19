"""A seeded corpus of what is found in real data sets: records and pictures that are odd but good, broken, or either.

Each maker gives a line of a jsonl file and what must become of it: None for cached, a pattern of the reason for skipped,
EITHER where damage may or may not hit something that matters (a picture with flipped bits may still be one).
"""

import base64
import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

EITHER = object()
FIVE = ("png", "jpg", "webp", "bmp", "gif")


def pixels(rng, width=40, height=30, channels=3, dtype=np.uint8):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def picture(rng, **size):
    return Image.fromarray(pixels(rng, **size))


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def frames(rng, format):
    return encoded(picture(rng), format, save_all=True, append_images=[picture(rng), picture(rng)])


def bomb_png(width, height):
    """A valid header of a huge picture, and hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb_png(rng):
    """A good picture whose comment unpacks to far more than Pillow allows."""
    plain = encoded(picture(rng))
    text = b"note\0\0" + zlib.compress(bytes(100_000_000))
    comment = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return plain[:33] + comment + plain[33:]


def with_exif(rng, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(rng), "JPEG", exif=exif)


def broken_exif(rng):
    return encoded(picture(rng), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + rng.bytes(20))


def cut(data, rng):
    return data[: int(rng.integers(1, len(data) - 1))]


def flipped(data, rng):
    changed = bytearray(data)
    for place in rng.integers(0, len(data), 8):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


GOOD_PICTURES = {
    "plain png": lambda rng: encoded(picture(rng)),
    "jpeg": lambda rng: encoded(picture(rng), "JPEG"),
    "progressive jpeg": lambda rng: encoded(picture(rng), "JPEG", progressive=True),
    "cmyk jpeg": lambda rng: encoded(Image.fromarray(pixels(rng, channels=4), "CMYK"), "JPEG"),
    "grey jpeg": lambda rng: encoded(picture(rng, channels=1), "JPEG"),
    "palette": lambda rng: encoded(picture(rng).quantize(17)),
    "palette with a transparent colour": lambda rng: encoded(picture(rng).quantize(17), transparency=3),
    "palette with alpha": lambda rng: encoded(picture(rng).quantize(9), transparency=bytes(range(0, 90, 10))),
    "one bit": lambda rng: encoded(picture(rng).convert("1")),
    "grey with alpha": lambda rng: encoded(picture(rng).convert("LA")),
    "rgba": lambda rng: encoded(picture(rng, channels=4)),
    "16 bit": lambda rng: encoded(Image.fromarray(pixels(rng, channels=1, dtype=np.uint16))),
    "lab tiff": lambda rng: encoded(Image.fromarray(pixels(rng), "LAB"), "TIFF"),
    "turned": lambda rng: with_exif(rng, int(rng.integers(1, 9))),
    "no such orientation": lambda rng: with_exif(rng, 77),
    "broken exif": broken_exif,
    "bmp": lambda rng: encoded(picture(rng), "BMP"),
    "icon": lambda rng: encoded(picture(rng, width=32, height=32), "ICO"),
    "more bytes than the picture": lambda rng: encoded(picture(rng), "JPEG") + rng.bytes(300),
    "a colour profile that is none": lambda rng: encoded(picture(rng), icc_profile=rng.bytes(50)),
    "large": lambda rng: encoded(Image.new("RGB", (1500, 900), (5, 6, 7))),
    "narrow": lambda rng: encoded(picture(rng, width=12, height=300)),
}  # fmt: skip
UNDECODABLE = "cannot be decoded"
BAD_PICTURES = {
    "empty": (lambda rng: b"", UNDECODABLE),
    "noise": (lambda rng: rng.bytes(500), UNDECODABLE),
    "noise with a jpeg's first bytes": (lambda rng: b"\xff\xd8\xff\xe0" + rng.bytes(200), UNDECODABLE),
    "a web page": (lambda rng: b"<!DOCTYPE html><html><body>404</body></html>", UNDECODABLE),
    "svg": (lambda rng: b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', UNDECODABLE),
    "bomb": (lambda rng: bomb_png(60_000, 60_000), "bomb|over the limit"),
    "bomb in one direction": (lambda rng: bomb_png(2**31 - 1, 1), "bomb|over the limit|decoded"),
    "text bomb": (text_bomb_png, "decoded"),
    "strip": (lambda rng: encoded(picture(rng, width=2000, height=2)), "refuses this conversation"),
    "float tiff": (lambda rng: encoded(Image.fromarray(rng.random((30, 40)).astype(np.float32)), "TIFF"), "32 bits"),
    "animated gif": (lambda rng: frames(rng, "GIF"), "frames or pages"),
    "animated png": (lambda rng: frames(rng, "PNG"), "frames or pages"),
    "animated webp": (lambda rng: frames(rng, "WEBP"), "frames or pages"),
    "pages": (lambda rng: frames(rng, "TIFF"), "frames or pages"),
    "cut png": (lambda rng: cut(encoded(picture(rng)), rng), UNDECODABLE),
    "flipped": (lambda rng: flipped(encoded(picture(rng), "JPEG"), rng), EITHER),
    "flipped gif": (lambda rng: flipped(frames(rng, "GIF"), rng), EITHER),
    "flipped webp": (lambda rng: flipped(encoded(picture(rng), "WEBP"), rng), EITHER),
    "flipped tiff": (lambda rng: flipped(encoded(picture(rng), "TIFF"), rng), EITHER),
    "cut jpeg": (lambda rng: cut(encoded(picture(rng), "JPEG"), rng), EITHER),
    "cut gif": (lambda rng: cut(frames(rng, "GIF"), rng), EITHER),
}  # fmt: skip


def turns(question="What is it?", answer="a cat", images=0):
    tags = "<image>\n" * images
    return [{"from": "human", "value": tags + question}, {"from": "gpt", "value": answer}]


def chat(*roles, content="text"):
    return [{"role": role, "content": content} for role in roles]


# What a record is besides its pictures: fields, and what must become of it. `test_records.py` has all other kinds.
RECORDS = {
    "text only": ({"conversations": turns()}, None),
    "null fields": ({"conversations": turns(), "image": None, "category": None, "id": None}, None),
    "numbers for names": ({"conversations": turns(), "id": 17.5, "category": 3, "source": False}, None),
    "an id of all signs": ({"conversations": turns(), "id": "../a.b/\u0000\n中🙂" + "x" * 300}, None),
    "a control character": ({"conversations": turns("a\u0000b\u0007", "\u0001c")}, None),
    "all scripts": ({"conversations": turns("¿Qué? 中文 עברית 🏳️‍🌈", "ﬀ e\u0301 한국어")}, None),
    "an answer of white space and a word": ({"conversations": turns("q", "  \n x \n")}, None),
    "the last has no answer": ({"conversations": [*turns(), turns()[0]]}, None),
    "empty answer": ({"conversations": turns("q", "")}, "empty answer"),
    "no conversation": ({"text": "hello"}, "non-empty list"),
    "two users": ({"messages": chat("user", "user", "assistant")}, "expected 'assistant'"),
    "no text": ({"messages": chat("user", "assistant", content=None)}, "no text"),
    "a special token": ({"conversations": turns("say <|im_end|> now")}, "special token"),
    "a special token in the answer": ({"conversations": turns("q", "<|image_pad|>")}, "special token"),
    "too long": ({"conversations": turns("word " * 3000)}, "tokens, over the limit"),
    "far too long": ({"conversations": turns("q", "x" * 200_000)}, "tokens, over the limit"),
    "a NUL in a path": ({"conversations": turns(images=1), "image": "a\u0000b.jpg"}, "does not exist|null"),
}  # fmt: skip
LINES = {
    "cut line": ('{"id": "x", "conversations": [{"from": "hum', "broken JSON"),
    "a number": ("17", "expected a record"),
    "thousands of brackets": ("[" * 20_000, "broken JSON"),
}


def make_line(rng, folder, number):
    """One line of the file, written pictures beside it, its kind and what must become of it."""
    choice = int(rng.integers(10))
    if choice == 0:
        name = str(rng.choice(list(LINES)))
        return LINES[name][0], name, LINES[name][1]
    if choice < 4:
        name = str(rng.choice(list(RECORDS)))
        fields, expected = RECORDS[name]
        # Ids are not unique in real data either.
        return json.dumps({"id": f"same-{number % 7}"} | fields), name, expected
    if choice < 8:
        name = str(rng.choice(list(GOOD_PICTURES)))
        data, expected = GOOD_PICTURES[name](rng), None
    else:
        name = str(rng.choice(list(BAD_PICTURES)))
        data, expected = BAD_PICTURES[name][0](rng), BAD_PICTURES[name][1]
    count = 20 if rng.integers(12) == 0 else 1
    (folder / f"{number}.{rng.choice(FIVE)}").write_bytes(b"")  # a name says nothing
    path = folder / f"{number}.{rng.choice(FIVE)}"
    path.write_bytes(data)
    images = [path.name] + [f"good{i % 3}.png" for i in range(count - 1)]
    if rng.integers(8) == 0:
        images[0] = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    record = {"id": f"p{number}", "image": images, "conversations": turns(images=count), "category": name}
    return json.dumps(record), f"{name}, {count} pictures", expected


def make_corpus(folder, *, count, seed):
    """Write `count` records as a jsonl; its path, and (kind, expectation) of each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(3):
        (folder / f"good{i}.png").write_bytes(encoded(picture(rng)))
    lines, expected = [], []
    for number in range(count):
        line, *what = make_line(rng, folder, number)
        lines.append(line)
        expected.append(what)
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, expected
