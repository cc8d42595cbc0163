"""The cache of compiled programs on disk, each with its checksum.

JAX's own cache (0.10.2) reads whatever its files hold. One that is damaged can pass decompression, and LLVM then aborts
the process; one that was cut short when a process was killed is read with a warning and never replaced.
"""

import hashlib
import os
from pathlib import Path

import jax
from jax._src import compilation_cache as jax_cache
from jax._src.lru_cache import LRUCache

_DIGEST_BYTES = hashlib.sha256().digest_size


class CheckedCache(LRUCache):
    """JAX's cache in a folder, with the SHA-256 of each entry before it. A damaged entry is removed, and then compiled
    again."""

    def get(self, key: str) -> bytes | None:
        stored = super().get(key)
        if stored is None:
            return None
        digest, value = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(value).digest() != digest:
            self._file(key).unlink(missing_ok=True)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        # Written beside and renamed: several processes compile the same program, and any may be killed.
        temporary = self._file(key).with_name(f".{key}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(hashlib.sha256(value).digest() + value)
            temporary.replace(self._file(key))
        finally:
            temporary.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return Path(str(self.path)) / f"{key}-cache"


def keep_compiled_programs(folder: Path) -> None:
    """Have JAX keep compiled programs in `folder`; called before it compiles the first. Raises OSError if the folder
    can't be made."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A run's many small programs take as long to compile as its step does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX has no setting for the kind of cache; this is the function by which it makes one (0.10.2).
    jax_cache.get_file_cache = lambda path: (CheckedCache(path, max_size=-1), path)
