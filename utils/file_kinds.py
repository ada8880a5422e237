"""What a file is by its first bytes, where it is none of the kind that its name says."""

BEGINNING = 512  # bytes that tell
BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, and blanks
KINDS = (  # from which byte on it reads how; what it then is, and what to do
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file: `git lfs pull` gets it"),
    (0, b"<", "a web page saved under this name: download the file itself"),
    (0, b"\xff\xfe", "text in UTF-16, as Excel's Unicode text: save it as UTF-8"),
    (0, b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
    (0, b"\x1f\x8b", "packed by gzip: unpack it first"),
    (0, b"7z\xbc\xaf", "packed by 7-Zip: unpack it first"),
    (0, b"Rar!", "packed by RAR: unpack it first"),
    (0, b"PK\3\4", "an Excel workbook or a zip: save its sheet as CSV UTF-8, or unpack it first"),
    (257, b"ustar", "packed by tar: unpack it first"),
    (0, b"\x89HDF", "TensorFlow's file (HDF5): take the one of PyTorch or safetensors"),
    (0, b"GGUF", "llama.cpp's file (GGUF): take the one of PyTorch or safetensors"),
    (0, b"\x93NUMPY", "one array of NumPy, not a model's weights"),
    (4, b"ftyp", "HEIC or a film, whatever its name says: export it as JPEG first"),
    (0, bytes(64), "damaged, it begins with zeros: its machine or disk failed while it was written"),
)


def kind_of(begin):
    """What a file with this BEGINNING is, in words; None where that is none of KINDS."""
    if not begin:
        return "empty: its saving or its download did not end"
    kinds = (what for place, sign, what in KINDS if begin[place:].lstrip(BEFORE_TEXT).startswith(sign))
    return next(kinds, None)
