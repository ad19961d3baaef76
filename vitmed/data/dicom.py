"""DICOM: a file, or a folder that holds one series, becomes an image in the units that its rescaling says (of CT, Hounsfield units).

Slices are sorted by where they lie along the normal of their plane, never by file name; a volume is turned to RAS as volumes.py says.
"""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitmed.data import stored

IRREGULAR = 0.05  # of the usual distance between slices: more than this apart, a slice is missing or the series is not one volume
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # what it finds odd and reads all the same is no news to a user
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_dicom(path: pathlib.Path) -> bool:
    """Whether a file is DICOM by its name or, where the name tells nothing, by its preamble."""
    kind = stored.suffix(path)
    if kind in stored.DICOMS:
        return True
    if kind and not kind[1:].isdigit():  # parts of a UID look like suffixes
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def in_folder(path: pathlib.Path) -> list[pathlib.Path]:
    """The DICOM files that lie directly in a folder, by name; a link to nothing is one too, and is named when it is read."""
    return [file for file in sorted(path.iterdir()) if not file.is_dir() and not file.name.startswith(".") and is_dicom(file)]


def is_slice(path: pathlib.Path) -> bool:
    """Whether a file is one slice of a volume: it has a single frame. A broken file counts as one, and is named when it is read."""
    with stored.installed(path):
        pydicom = stored.required("pydicom")
    try:
        header = pydicom.dcmread(stored.opened(path), stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return int(header.get("NumberOfFrames") or 1) == 1
    except Exception:  # noqa: BLE001 - as in volumes.read
        return True


def read(path: pathlib.Path, rank: int) -> stored.Image:
    """The image of a file or of a folder with one series."""
    if path.is_dir():
        return _folder(path, rank)
    only = _read(path)
    if _num_frames(only) > 1:
        return _frames(path, only, rank)
    if rank == 3:
        raise stored.Unreadable(f"{path}: a single slice; name the folder that holds the series")
    stored.require_rank(path, (int(only.Rows), int(only.Columns)), rank)
    return stored.Image(_values(only), spacing=_pixel_spacing(only))


def _folder(path: pathlib.Path, rank: int) -> stored.Image:
    files = in_folder(path)
    if not files:
        raise stored.Unreadable(f"{path}: no DICOM files in this folder")
    if rank == 2 and len(files) > 1:
        raise stored.Unreadable(f"{path}: {len(files)} DICOM files; in 2D every file is an image: name the files")
    # Among files that are named as DICOM is without a suffix, one that is none may be a slice that is lost.
    odd = [file for file in sorted(path.iterdir()) if _may_be_dicom(file) and file not in set(files)]
    if odd and any(_may_be_dicom(file) for file in files):
        raise stored.Unreadable(f"{path}: {odd[0].name} is no DICOM file, as the others are ({len(odd)} such); mend or remove it")
    slices = [_read(file) for file in files]
    return _series(path, slices) if len(slices) > 1 else read(files[0], rank)


def _may_be_dicom(path: pathlib.Path) -> bool:
    """Whether a name tells nothing: no suffix, or a part of a UID that looks like one."""
    kind = stored.suffix(path)
    named = not path.name.startswith(".") and path.name != "DICOMDIR"
    return named and not path.is_dir() and (not kind or kind[1:].isdigit())


def _read(path: pathlib.Path) -> Any:
    pydicom = stored.required("pydicom")
    try:
        found = pydicom.dcmread(stored.opened(path))
    except OSError as error:
        raise stored.Unreadable(f"{path}: cannot be read ({error.strerror or error})") from error
    except (pydicom.errors.InvalidDicomError, EOFError) as error:
        raise stored.Unreadable(f"{path}: not a whole DICOM file ({type(error).__name__})") from error
    if "PixelData" not in found and "FloatPixelData" not in found:
        raise stored.Unreadable(f"{path}: it holds no pixels")
    return found


def _num_frames(header: Any) -> int:
    return int(getattr(header, "NumberOfFrames", 1) or 1)


def _pixel_spacing(header: Any) -> tuple[float, ...] | None:
    """mm between rows and between columns; None where the file does not tell."""
    spacing = getattr(header, "PixelSpacing", None) or getattr(header, "ImagerPixelSpacing", None)
    return tuple(map(float, spacing)) if spacing else None


def _values(header: Any) -> np.ndarray:
    """[(frames,) H, W, C], rescaled to the file's own units; MONOCHROME1, where the smallest value is white, turned to dark before that."""
    pydicom = stored.required("pydicom")
    try:
        values = pydicom.pixels.pixel_array(header)  # colours come as RGB
    except RuntimeError as error:  # a compression that no installed package decodes
        syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
        name = getattr(syntax, "name", syntax)
        raise stored.Unreadable(f"pixels are stored as {name}, which cannot be decoded here; pip install pylibjpeg[all]") from error
    if header.PhotometricInterpretation == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(values, header)[..., :3]
        return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)
    if int(getattr(header, "SamplesPerPixel", 1)) > 1:
        return values
    if header.PhotometricInterpretation == "MONOCHROME1":  # by what can be stored, so that all slices are turned alike
        signed = int(getattr(header, "PixelRepresentation", 0))
        values = -1 - values if signed else ((1 << int(header.BitsStored)) - 1 - values.astype(np.int64)).astype(values.dtype)
    frames = _num_frames(header)
    scales = [_frame_groups(header, frame, "PixelValueTransformationSequence") or header for frame in range(frames)]
    slopes = np.array([getattr(scale, "RescaleSlope", 1) or 1 for scale in scales], np.float32)
    intercepts = np.array([getattr(scale, "RescaleIntercept", 0) or 0 for scale in scales], np.float32)
    if (slopes != 1).any() or intercepts.any():
        shape = (frames, 1, 1) if values.ndim == 3 else ()
        values = values.astype(np.float32) * slopes.reshape(shape) + intercepts.reshape(shape)
    return values[..., None]


def _frame_groups(header: Any, frame: int, name: str) -> Any:
    """A sequence of an enhanced file: that of the frame, else the one that all frames share; None where there is neither."""
    per_frame = getattr(header, "PerFrameFunctionalGroupsSequence", None)
    shared = getattr(header, "SharedFunctionalGroupsSequence", None)
    for group in (per_frame[frame] if per_frame else None, shared[0] if shared else None):
        if group is not None and name in group and len(group[name].value):
            return group[name].value[0]
    return None


def _frames(path: pathlib.Path, header: Any, rank: int) -> stored.Image:
    """A file of several frames, which are the slices."""
    frames = _num_frames(header)
    stored.require_rank(path, (frames, int(header.Rows), int(header.Columns)), rank)
    values = _values(header).reshape(frames, int(header.Rows), int(header.Columns), -1)
    places = [_frame_groups(header, frame, "PlanePositionSequence") for frame in range(frames)]
    turns = [_frame_groups(header, frame, "PlaneOrientationSequence") for frame in range(frames)]
    spacing = [_pixel_spacing(_frame_groups(header, frame, "PixelMeasuresSequence") or header) for frame in range(frames)]
    if all(places) and all(turns):
        positions = [place.ImagePositionPatient for place in places]
        return _placed(path, values, positions, [turn.ImageOrientationPatient for turn in turns], spacing)
    offsets, step = getattr(header, "GridFrameOffsetVector", None), _slice_spacing(header)
    if getattr(header, "ImagePositionPatient", None) and getattr(header, "ImageOrientationPatient", None) and (offsets or step):
        first, normal = np.array(header.ImagePositionPatient, float), _normal(header.ImageOrientationPatient)
        along = np.array(offsets, float) - offsets[0] if offsets else np.arange(frames) * step
        return _placed(path, values, [first + each * normal for each in along], [header.ImageOrientationPatient] * frames, spacing)
    known = (step, *spacing[0]) if step and spacing[0] else None
    return stored.Image(values, spacing=known)  # in their order: the file does not say where they lie


def _slice_spacing(header: Any) -> float | None:
    """mm between the middles of neighbouring slices as a header says it; None where it does not."""
    measures = _frame_groups(header, 0, "PixelMeasuresSequence") or header
    return float(getattr(measures, "SpacingBetweenSlices", 0) or getattr(measures, "SliceThickness", 0) or 0) or None


def _series(path: pathlib.Path, slices: Sequence[Any]) -> stored.Image:
    """A folder's files, which must be of one series and of one shape."""
    series = {str(getattr(one, "SeriesInstanceUID", "")) for one in slices}
    if len(series) > 1:
        raise stored.Unreadable(f"{path}: {len(series)} DICOM series in one folder; give each a folder of its own")
    shapes = sorted({(int(one.Rows), int(one.Columns), _num_frames(one)) for one in slices})
    if len(shapes) > 1 or shapes[0][2] > 1:
        raise stored.Unreadable(f"{path}: the files of a series have shapes {shapes}; they must be slices of one shape")
    stored.require_rank(path, (len(slices), *shapes[0][:2]), 3)
    placed = [bool(getattr(one, "ImagePositionPatient", None) and getattr(one, "ImageOrientationPatient", None)) for one in slices]
    spacing = [_pixel_spacing(one) for one in slices]
    if all(placed):
        positions, turns = ([getattr(one, name) for one in slices] for name in ("ImagePositionPatient", "ImageOrientationPatient"))
        return _placed(path, np.stack([_values(one) for one in slices]), positions, turns, spacing)
    if any(placed):
        raise stored.Unreadable(f"{path}: {placed.count(False)} of its {len(slices)} slices do not say where they lie; mend their headers")
    numbers = [getattr(one, "InstanceNumber", None) for one in slices]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise stored.Unreadable(f"{path}: its slices have neither positions nor numbers that differ, so their order is unknown")
    slices = sorted(slices, key=lambda one: int(one.InstanceNumber))
    step = _slice_spacing(slices[0])
    known = (step, *spacing[0]) if step and spacing[0] else None
    return stored.Image(np.stack([_values(one) for one in slices]), spacing=known)


def _normal(orientation: Sequence[float]) -> np.ndarray:
    """The direction [3] that is perpendicular to rows and columns."""
    turned = np.array(orientation, float)
    return np.cross(turned[:3], turned[3:])


def _placed(
    path: pathlib.Path, values: np.ndarray, positions: Sequence[Any], orientations: Sequence[Any], spacings: Sequence[Any]
) -> stored.Image:
    """Slices [D, H, W, C] sorted along their normal and turned to RAS; Unreadable where they do not fill a volume evenly.

    DICOM's coordinates run to the left, posterior and superior (PS3.3, C.7.6.2): the first two are turned for RAS.
    """
    nibabel = stored.required("nibabel")
    orientation, spacing = orientations[0], spacings[0]
    if np.abs(np.array(orientations, float) - np.array(orientation, float)).max() > 1e-3:
        raise stored.Unreadable(f"{path}: its slices lie in different planes (a localiser among them?); take those out")
    if None in spacings or np.ptp(np.array(spacings, float), axis=0).max() > 1e-3:
        raise stored.Unreadable(f"{path}: its slices do not have one and the same pixel spacing; mend their headers")
    places, normal = np.array(positions, float), _normal(orientation)
    along = places @ normal
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    step = float(np.median(gaps)) if len(gaps) else 1.0
    if len(gaps) and gaps.min() < 1e-3:
        raise stored.Unreadable(f"{path}: several slices at one place: a series of volumes (4D); take one volume out of it")
    if len(gaps) and np.abs(gaps - step).max() > IRREGULAR * step:
        raise stored.Unreadable(
            f"{path}: its slices are from {gaps.min():g} to {gaps.max():g} mm apart; slices are missing, or it is not one volume"
        )
    rows, columns = map(float, spacing)
    if np.ptp(places - np.outer(along, normal), axis=0).max() > max(rows, columns):
        raise stored.Unreadable(f"{path}: its slices are shifted against each other (a tilted gantry?); resample them to a straight one")
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
    return stored.Image(np.ascontiguousarray(canonical.transpose(2, 1, 0, 3)), spacing=tuple(steps[::-1].tolist()), affine=affine)
