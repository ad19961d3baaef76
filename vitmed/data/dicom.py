"""DICOM: a file, or a folder that holds one series, becomes an image in the units that its rescaling says (of CT, Hounsfield units).

Slices are sorted by where they lie along the normal of their plane, never by file name; a volume is turned to RAS as volumes.py says.
"""

import io
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from vitmed.data import volumes

IRREGULAR = 0.05  # of the usual distance between slices: more than this apart, a slice is missing or the series is not one volume
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # what it finds odd and reads all the same is no news to a user
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_dicom(path: pathlib.Path) -> bool:
    """Whether a file is DICOM by its name or, where the name tells nothing, by its preamble."""
    kind = volumes.suffix(path)
    if kind in volumes.DICOMS:
        return True
    if kind and not kind[1:].isdigit():  # parts of a UID look like suffixes
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def in_folder(path: pathlib.Path) -> list[pathlib.Path]:
    """The DICOM files that lie directly in a folder, by name."""
    return [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".") and is_dicom(file)]


def is_slice(path: pathlib.Path) -> bool:
    """Whether a file is one slice of a volume: it has a single frame. A broken file counts as one, and is named when it is read."""
    pydicom = volumes.required("pydicom")
    try:
        header = pydicom.dcmread(_bytes(path), stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return int(header.get("NumberOfFrames") or 1) == 1
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError):
        return True


def read(path: pathlib.Path, rank: int) -> volumes.Image:
    """The image of a file or of a folder with one series."""
    if path.is_dir():
        files = in_folder(path)
        if not files:
            raise volumes.Unreadable(f"{path}: no DICOM files in this folder")
        if rank == 2 and len(files) > 1:
            raise volumes.Unreadable(f"{path}: {len(files)} DICOM files; in 2D every file is an image: name the files")
    else:
        files = [path]
    slices = [_read(file) for file in files]
    if len(slices) > 1:
        return _series(path, slices)
    only = slices[0]
    frames = int(getattr(only, "NumberOfFrames", 1) or 1)
    if frames > 1 or rank == 3:
        return _frames(path, only, rank)
    volumes.require_rank(path, (int(only.Rows), int(only.Columns)), rank)
    spacing = getattr(only, "PixelSpacing", None) or getattr(only, "ImagerPixelSpacing", None)
    return volumes.Image(_values(only), spacing=tuple(map(float, spacing)) if spacing else None)


def _bytes(path: pathlib.Path) -> BinaryIO:
    """The file in memory: of one on a disk, Python would make room for as many bytes as a damaged header says an element has."""
    return io.BytesIO(path.read_bytes())


def _read(path: pathlib.Path) -> Any:
    pydicom = volumes.required("pydicom")
    try:
        found = pydicom.dcmread(_bytes(path))
    except (pydicom.errors.InvalidDicomError, OSError, EOFError) as error:
        raise volumes.Unreadable(f"{path}: not a whole DICOM file ({type(error).__name__})") from error
    if "PixelData" not in found and "FloatPixelData" not in found:
        raise volumes.Unreadable(f"{path}: it holds no pixels")
    return found


def _values(header: Any) -> np.ndarray:
    """[(frames,) H, W, C], rescaled to the file's own units; MONOCHROME1, where the smallest value is white, turned to dark."""
    pixels = volumes.required("pydicom").pixels
    values = pixels.pixel_array(header)  # colours come as RGB
    if int(getattr(header, "SamplesPerPixel", 1)) > 1:
        return values
    slope, intercept = float(getattr(header, "RescaleSlope", 1) or 1), float(getattr(header, "RescaleIntercept", 0) or 0)
    if (slope, intercept) != (1.0, 0.0):
        values = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if header.PhotometricInterpretation == "MONOCHROME1":
        values = values.max() + values.min() - values if values.dtype.kind == "f" else values.max() - (values - values.min())
    return values[..., None]


def _frame_groups(header: Any, frame: int, name: str) -> Any:
    """A sequence of an enhanced file: that of the frame, else the one that all frames share; None where there is neither."""
    per_frame = getattr(header, "PerFrameFunctionalGroupsSequence", None)
    shared = getattr(header, "SharedFunctionalGroupsSequence", None)
    for group in (per_frame[frame] if per_frame else None, shared[0] if shared else None):
        if group is not None and name in group and len(group[name].value):
            return group[name].value[0]
    return None


def _frames(path: pathlib.Path, header: Any, rank: int) -> volumes.Image:
    """A file of several frames, which are the slices."""
    frames = int(getattr(header, "NumberOfFrames", 1) or 1)
    volumes.require_rank(path, (frames, int(header.Rows), int(header.Columns)), rank)
    values = _values(header).reshape(frames, int(header.Rows), int(header.Columns), -1)
    places = [_frame_groups(header, frame, "PlanePositionSequence") for frame in range(frames)]
    turns = _frame_groups(header, 0, "PlaneOrientationSequence")
    measures = _frame_groups(header, 0, "PixelMeasuresSequence") or header
    spacing = getattr(measures, "PixelSpacing", None) or (1.0, 1.0)
    step = float(getattr(measures, "SpacingBetweenSlices", 0) or getattr(measures, "SliceThickness", 0) or 1.0)
    if all(places) and turns is not None:
        positions = [place.ImagePositionPatient for place in places]
        return _placed(path, values, positions, turns.ImageOrientationPatient, spacing, step)
    if getattr(header, "ImagePositionPatient", None) and getattr(header, "ImageOrientationPatient", None):
        first, normal = np.array(header.ImagePositionPatient, float), _normal(header.ImageOrientationPatient)
        positions = [first + index * step * normal for index in range(frames)]
        return _placed(path, values, positions, header.ImageOrientationPatient, spacing, step)
    return volumes.Image(values, spacing=(step, *map(float, spacing)))  # in their order: the file does not say where they lie


def _series(path: pathlib.Path, slices: Sequence[Any]) -> volumes.Image:
    """A folder's files, which must be of one series and of one shape."""
    series = {str(getattr(one, "SeriesInstanceUID", "")) for one in slices}
    if len(series) > 1:
        raise volumes.Unreadable(f"{path}: {len(series)} DICOM series in one folder; give each a folder of its own")
    shapes = sorted({(int(one.Rows), int(one.Columns), int(getattr(one, "NumberOfFrames", 1) or 1)) for one in slices})
    if len(shapes) > 1 or shapes[0][2] > 1:
        raise volumes.Unreadable(f"{path}: the files of a series have shapes {shapes}; they must be slices of one shape")
    volumes.require_rank(path, (len(slices), *shapes[0][:2]), 3)
    if all(getattr(one, "ImagePositionPatient", None) and getattr(one, "ImageOrientationPatient", None) for one in slices):
        orientations = np.array([one.ImageOrientationPatient for one in slices], float)
        if np.abs(orientations - orientations[0]).max() > 1e-3:
            raise volumes.Unreadable(f"{path}: its slices lie in different planes (a localiser among them?); take those out")
        values = np.stack([_values(one) for one in slices])
        positions = [one.ImagePositionPatient for one in slices]
        return _placed(path, values, positions, slices[0].ImageOrientationPatient, slices[0].PixelSpacing, 1.0)
    if not all(getattr(one, "InstanceNumber", None) is not None for one in slices):
        raise volumes.Unreadable(f"{path}: its slices have neither positions nor numbers, so their order is unknown")
    slices = sorted(slices, key=lambda one: int(one.InstanceNumber))
    step = float(getattr(slices[0], "SpacingBetweenSlices", 0) or getattr(slices[0], "SliceThickness", 0) or 1.0)
    spacing = getattr(slices[0], "PixelSpacing", None) or (1.0, 1.0)
    return volumes.Image(np.stack([_values(one) for one in slices]), spacing=(step, *map(float, spacing)))


def _normal(orientation: Sequence[float]) -> np.ndarray:
    """The direction [3] that is perpendicular to rows and columns."""
    turned = np.array(orientation, float)
    return np.cross(turned[:3], turned[3:])


def _placed(
    path: pathlib.Path, values: np.ndarray, positions: Sequence[Any], orientation: Any, spacing: Sequence[float], step: float
) -> volumes.Image:
    """Slices [D, H, W, C] sorted along their normal and turned to RAS; Unreadable where they do not fill a volume evenly.

    DICOM's coordinates run to the left, posterior and superior (PS3.3, C.7.6.2): the first two are turned for RAS.
    """
    nibabel = volumes.required("nibabel")
    places, normal = np.array(positions, float), _normal(orientation)
    along = places @ normal
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    if len(gaps):
        step = float(np.median(gaps))
        if gaps.min() < 1e-3:
            raise volumes.Unreadable(f"{path}: several slices at one place: a series of volumes (4D); take one volume out of it")
        if np.abs(gaps - step).max() > IRREGULAR * step:
            raise volumes.Unreadable(
                f"{path}: its slices are from {gaps.min():g} to {gaps.max():g} mm apart; slices are missing, or it is not one volume"
            )
    rows, columns = float(spacing[0]), float(spacing[1])
    affine = np.eye(4)
    affine[:3, 0] = np.array(orientation[:3], float) * columns
    affine[:3, 1] = np.array(orientation[3:], float) * rows
    affine[:3, 2] = normal * step
    affine[:3, 3] = places[order[0]]
    turned = nibabel.orientations.io_orientation(LPS_TO_RAS @ affine)
    whd = values[order].transpose(2, 1, 0, 3)
    canonical = nibabel.orientations.apply_orientation(whd, turned)
    affine = LPS_TO_RAS @ affine @ nibabel.orientations.inv_ornt_aff(turned, whd.shape[:3])
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    return volumes.Image(np.ascontiguousarray(canonical.transpose(2, 1, 0, 3)), spacing=tuple(steps[::-1].tolist()), affine=affine)
