"""DICOM files of given pixels, for tests; the one place that knows which elements a file needs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np


def dicom(pixels: np.ndarray, *, frames: int = 1, syntax: str = "", **elements: Any) -> bytes:
    """The file of grey (H, W), colour (H, W, 3) or, of several frames, (frames, H, W).

    Args:
        pixels: of 8, 16 or 32 bits.
        frames: that it has.
        syntax: the name in pydicom.uid of how it is compressed; "" for not at all.
        elements: more of them, or others than follow from the pixels.
    """
    import pydicom
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset

    is_colour = pixels.shape[-1] == 3
    data, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = uid.ExplicitVRLittleEndian, "1.2.3.4"
    meta.MediaStorageSOPClassUID = uid.CTImageStorage
    data.file_meta, data.SOPClassUID, data.SOPInstanceUID = meta, uid.CTImageStorage, "1.2.3.4"
    data.Rows, data.Columns = pixels.shape[-3:-1] if is_colour else pixels.shape[-2:]
    data.SamplesPerPixel = 3 if is_colour else 1
    if is_colour:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    if frames > 1:
        data.NumberOfFrames = frames
    for name, value in elements.items():
        setattr(data, name, value)
    data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    data["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    if syntax:
        data.compress(getattr(uid, syntax), generate_instance_uid=False)
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()
