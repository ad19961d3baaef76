"""Files as a user has them: NIfTI, DICOM and pictures, written from arrays whose values say where they lie."""

import pathlib

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom import uid


def landmarks(size=(5, 6, 7)):
    """int16 [D, H, W] in RAS: 100 d + 10 h + w, so that every flip, swap and shift shows."""
    d, h, w = np.indices(size)
    return (100 * d + 10 * h + w).astype(np.int16)


def write_nifti(path, values, *, orientation="RAS", spacing=(1.0, 1.0, 1.0), dtype=None):
    """Store [D, H, W] (RAS, slowest first) turned to an orientation such as LPI; spacing (mm) of D, H, W."""
    affine = np.diag([*spacing[::-1], 1.0])
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(orientation))
    whd = np.transpose(values, (2, 1, 0))
    stored = nibabel.orientations.apply_orientation(whd, turn)
    affine = affine @ nibabel.orientations.inv_ornt_aff(turn, whd.shape)
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(stored, dtype or values.dtype), affine), path)


def write_picture(path, values):
    """Any picture format by the name's suffix: uint8 or uint16 [H, W], uint8 [H, W, 3]."""
    Image.fromarray(values).save(path)


def write_dicom(path, pixels, *, series="1.2.3", position=None, number=1, spacing=(1.0, 1.0), **fields):
    """One file: pixels uint16 or int16 [H, W], or [frames, H, W]."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = uid.CTImageStorage, uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = uid.generate_uid(entropy_srcs=[str(path)])
    header = pydicom.Dataset()
    header.file_meta = meta
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.SeriesInstanceUID, header.InstanceNumber = series, number
    header.Rows, header.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        header.NumberOfFrames = len(pixels)
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelSpacing = list(spacing)
    if position is not None:
        header.ImagePositionPatient, header.ImageOrientationPatient = list(position), [1, 0, 0, 0, 1, 0]
    for name, value in fields.items():
        setattr(header, name, value)
    header.PixelData = np.ascontiguousarray(pixels).astype("<u2" if pixels.dtype.kind == "u" else "<i2").tobytes()
    header.save_as(path, enforce_file_format=True)


def write_series(folder, values, *, spacing=(2.0, 1.0, 0.5), order=None, intercept=0, **fields):
    """A series whose RAS volume is `values` [D, H, W]: axial slices, rows to posterior and columns to the left as DICOM has them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    depth, height, width = values.shape
    lps = values[:, ::-1, ::-1]
    corner = ((1 - width) * spacing[2], (1 - height) * spacing[1])  # so that the RAS corner is the origin
    order = order or range(depth)
    for name, d in zip(order, range(depth), strict=True):
        place = (*corner, d * spacing[0])
        extra = {"RescaleSlope": 1, "RescaleIntercept": intercept} if intercept else {}
        pixels = (lps[d] - intercept).astype(np.int16)
        write_dicom(folder / f"{name:03d}.dcm", pixels, position=place, number=d, spacing=spacing[1:], **extra, **fields)
    return folder
