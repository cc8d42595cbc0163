"""Resizing images, and sampling them at given places."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax.scipy.ndimage import map_coordinates

from .frameworks import data
from .pooling import adaptive
from .rows import Pair, Row

FAMILY = "interpolation"
TITLE = "Interpolation"

SIZES = {"twice as large": (10, 14), "larger": (8, 9), "smaller": (3, 4)}  # of an image of 5 x 7


def _image() -> np.ndarray:
    return data(2, 3, 5, 7)


def _resize(mode: str, method: str, size: str, torch_arguments: dict | None = None, **arguments) -> Pair:
    x, shape = _image(), SIZES[size]
    reference = F.interpolate(torch.from_numpy(x), shape, mode=mode, **(torch_arguments or {}))
    return reference, jax.image.resize(jnp.asarray(x), (2, 3, *shape), method, **arguments)


def _nearest_by_hand(size: str) -> Pair:
    x, (height, width) = _image(), SIZES[size]
    rows, columns = np.arange(height) * 5 // height, np.arange(width) * 7 // width
    reference = F.interpolate(torch.from_numpy(x), (height, width), mode="nearest")
    return reference, jnp.asarray(x)[:, :, rows][..., columns]


def _area_by_hand(size: str) -> Pair:
    x, shape = _image(), SIZES[size]
    return F.interpolate(torch.from_numpy(x), shape, mode="area"), adaptive(jnp.mean, jnp.asarray(x), shape)


def _aligned(mode: str, method: str, size: str, aligned: bool = True) -> Pair:
    x, shape = _image(), SIZES[size]
    reference = F.interpolate(torch.from_numpy(x), shape, mode=mode, align_corners=True)
    if not aligned:
        return reference, jax.image.resize(jnp.asarray(x), (2, 3, *shape), method, antialias=False)
    scale = np.array([(n - 1) / (m - 1) for n, m in zip(shape, (5, 7), strict=True)])
    return reference, jax.image.scale_and_translate(
        jnp.asarray(x),
        (2, 3, *shape),
        (2, 3),
        jnp.asarray(scale),
        jnp.asarray(0.5 * (1 - scale)),
        method,
        antialias=False,
    )


def _scale_factor(given: bool) -> Pair:
    """With the change: once with the scale given to JAX, once with the scale recomputed by PyTorch."""
    x, factor = _image(), 1.7
    reference = F.interpolate(torch.from_numpy(x), scale_factor=factor, mode="bilinear")
    shape = tuple(reference.shape)
    resized = jax.image.resize(jnp.asarray(x), shape, "bilinear")
    if not given:
        return reference, resized
    scaled = jax.image.scale_and_translate(jnp.asarray(x), shape, (2, 3), jnp.full(2, factor), jnp.zeros(2), "linear")
    recomputed = F.interpolate(torch.from_numpy(x), scale_factor=factor, mode="bilinear", recompute_scale_factor=True)
    return (reference, recomputed), (scaled, resized)


def _grid_sample(align_corners: bool, aligned_pixels: bool) -> Pair:
    """Zeros beyond the image; both interpolate linearly."""
    x, grid = _image(), data(2, 4, 4, 2, seed=3) * 0.6
    arguments = {"align_corners": align_corners}
    reference = F.grid_sample(torch.from_numpy(x), torch.from_numpy(grid), **arguments)
    if aligned_pixels:
        columns, rows = (grid[..., 0] + 1) / 2 * 6, (grid[..., 1] + 1) / 2 * 4
    else:
        columns, rows = ((grid[..., 0] + 1) * 7 - 1) / 2, ((grid[..., 1] + 1) * 5 - 1) / 2

    def sample(plane, rows, columns):
        return map_coordinates(plane, (rows, columns), order=1, mode="constant", cval=0.0)

    sample = jax.vmap(jax.vmap(sample, (0, None, None)))
    return reference, sample(jnp.asarray(x), jnp.asarray(rows), jnp.asarray(columns))


def _pad(mode: str, jax_mode: str) -> Pair:
    return F.pad(torch.from_numpy(_image()), (1, 2, 0, 1), mode=mode), jnp.pad(
        jnp.asarray(_image()), ((0, 0), (0, 0), (0, 1), (1, 2)), mode=jax_mode
    )


def _row(
    mode: str, method: str, size: str, arguments: dict, change: dict | None = None, note: str = "", **theirs
) -> Row:
    spelled = "".join(f", {name}={value!r}" for name, value in theirs.items())
    changed = "" if change is None else ", ".join(f"{name}={value!r}" for name, value in change.items())

    def run(**more) -> Pair:
        options = {"method": method} | arguments | more
        return _resize(mode, options.pop("method"), size, theirs, **options)

    return Row(
        FAMILY,
        f'`F.interpolate(x, size, mode="{mode}"{spelled})`, {size}',
        f'jax.image.resize(x, shape, "{method}"{"".join(f", {k}={v!r}" for k, v in arguments.items())})',
        "jax.image",
        run,
        None if change is None else lambda: run(**change),
        f"`{changed}`".replace("'", '"') if changed else "",
        note,
        claim="equal" if change is None else "after",
    )


NO_FILTER = {"antialias": False}

ROWS = [
    _row("nearest", "nearest", "twice as large", {}),
    *(
        Row(
            FAMILY,
            f'`F.interpolate(x, size, mode="nearest")`, {size}',
            'jax.image.resize(x, shape, "nearest")',
            "jax.image",
            lambda size=size: _resize("nearest", "nearest", size),
            lambda size=size: _nearest_by_hand(size),
            "`x[:, :, np.arange(out) * in // out]`, both axes",
            claim="after",
        )
        for size in ("larger", "smaller")
    ),
    _row("nearest-exact", "nearest", "larger", {}),
    _row("nearest-exact", "nearest", "smaller", {}),
    _row("bilinear", "bilinear", "larger", {}),
    _row("bilinear", "bilinear", "smaller", {}, NO_FILTER),
    _row("bilinear", "bilinear", "smaller", {}, antialias=True),
    *(
        Row(
            FAMILY,
            f'`F.interpolate(x, size, mode="bilinear", align_corners=True)`, {size}',
            'jax.image.resize(x, shape, "bilinear", antialias=False)',
            "jax.image",
            lambda size=size: _aligned("bilinear", "linear", size, aligned=False),
            lambda size=size: _aligned("bilinear", "linear", size),
            "`scale_and_translate` (above), `antialias=False`",
            claim="after",
        )
        for size in ("larger", "smaller")
    ),
    _row("bicubic", "bicubic", "larger", {}, {"method": "cubic-pytorch"} | NO_FILTER),
    _row("bicubic", "bicubic", "smaller", {}, {"method": "cubic-pytorch"} | NO_FILTER),
    _row("bicubic", "bicubic", "larger", {}, antialias=True),
    _row("bicubic", "bicubic", "smaller", {}, antialias=True),
    Row(
        FAMILY,
        '`F.interpolate(x, size, mode="bicubic", align_corners=True)`, larger',
        'jax.image.resize(x, shape, "cubic-pytorch", antialias=False)',
        "jax.image",
        lambda: _aligned("bicubic", "cubic-pytorch", "larger", aligned=False),
        lambda: _aligned("bicubic", "cubic-pytorch", "larger"),
        "`scale_and_translate` (above), `antialias=False`",
        claim="after",
    ),
    _row("area", "area", "twice as large", {}),
    Row(
        FAMILY,
        '`F.interpolate(x, size, mode="area")`, smaller',
        'jax.image.resize(x, shape, "area")',
        "jax.image",
        lambda: _resize("area", "area", "smaller"),
        lambda: _area_by_hand("smaller"),
        "adaptive average pooling (above)",
        "PyTorch's windows are whole pixels, JAX weighs parts of pixels",
        claim="after",
    ),
    Row(
        FAMILY,
        'F.interpolate(x, scale_factor=1.7, mode="bilinear")',
        'jax.image.resize(x, shape, "bilinear")',
        "jax.image",
        lambda: _scale_factor(given=False),
        lambda: _scale_factor(given=True),
        "`scale_and_translate(.., scale=[1.7, 1.7], translation=[0, 0])`, or `recompute_scale_factor=True` in PyTorch",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.grid_sample(x, grid)",
        "map_coordinates(x, ((y + 1) / 2 * (h - 1), ..), order=1)",
        "jax.scipy",
        lambda: _grid_sample(align_corners=False, aligned_pixels=True),
        lambda: _grid_sample(align_corners=False, aligned_pixels=False),
        "`((y + 1) * h - 1) / 2`",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.grid_sample(x, grid, align_corners=True)",
        "map_coordinates(x, ((y + 1) / 2 * (h - 1), ..), order=1)",
        "jax.scipy",
        lambda: _grid_sample(align_corners=True, aligned_pixels=True),
    ),
    *(
        Row(
            FAMILY,
            f'F.pad(x, (1, 2, 0, 1), mode="{mode}")',
            f'jnp.pad(x, ((0, 0), (0, 0), (0, 1), (1, 2)), mode="{jax_mode}")',
            "jax.numpy",
            lambda mode=mode, jax_mode=jax_mode: _pad(mode, jax_mode),
            note="PyTorch's pairs go from the last axis to the first" if mode == "constant" else "",
        )
        for mode, jax_mode in (
            ("constant", "constant"),
            ("reflect", "reflect"),
            ("replicate", "edge"),
            ("circular", "wrap"),
        )
    ),
]
