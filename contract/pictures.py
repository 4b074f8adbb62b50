"""How files of known picture formats begin, and what a file is called."""

PREFIX = "img_"

_SIGNATURES = (
    b"\x89PNG",
    b"\xff\xd8\xff",  # JPEG
    b"GIF8",
    b"BM",
    b"II*\x00",  # TIFF
    b"MM\x00*",
    b"II+\x00",  # BigTIFF
    b"MM\x00+",
    b"RIFF",  # WebP
)


def is_picture(head: bytes | bytearray | memoryview) -> bool:
    """Whether the first 8 bytes are those of a picture format."""
    head = bytes(head[:8])
    return head.startswith(_SIGNATURES) or head[4:] == b"ftyp"  # HEIC, AVIF


def name_of(digest: bytes) -> str:
    """Names a file whose bytes have this SHA-256: no two files have one name."""
    return PREFIX + digest.hex()[:40]
