"""Reading files compressed by gzip or zstd."""

import gzip
import io
from typing import Any, BinaryIO

from gpt2_core.data.extras import import_extra

COMPRESSED = (".gz", ".zst")
_BLOCK = 1 << 18  # bytes


def decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    """The decompressed content of an open file whose name ends in `suffix`; closing it closes the file. Reading a
    damaged or truncated file raises OSError, EOFError or zlib.error."""
    if suffix == ".gz":
        return _ClosingBoth(gzip.GzipFile(fileobj=file), file)
    if suffix == ".zst":
        return _ClosingBoth(_Zstd(file), file)
    return file


class _ClosingBoth(io.BufferedIOBase):
    """A decompressing reader that closes the file below it too."""

    def __init__(self, stream: Any, file: BinaryIO) -> None:
        self._stream, self._below = io.BufferedReader(stream), file

    def read(self, size: int = -1, /) -> bytes:
        return self._stream.read(size)

    def readline(self, size: int = -1, /) -> bytes:
        return self._stream.readline(size)

    def close(self) -> None:
        self._stream.close()
        self._below.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Decompresses frame after frame. A file that ends inside a frame is an error, which zstandard's reader hides."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._zstandard = file, import_extra("zstandard", "zstd files")
        self._frame, self._ready, self._compressed = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._compressed or self._file.read(_BLOCK)
            if not content:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(content)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
