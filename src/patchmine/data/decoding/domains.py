"""Files of medicine and science: a line for each format, and what is alike among them.

A library that an extra installs reads each of them.  One file may hold many images (frames, slices,
planes): `Part` is one of these, and `sources.parts` makes items of them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from patchmine.data.decoding import astronomy, dicom, hdf5, nifti, zarrs
from patchmine.data.decoding.bounds import DecodeError, missing
from patchmine.data.decoding.reading import Facts, Piece, Reader, open_regular


class Domain(NamedTuple):
    """A format.

    Attributes:
        name: for messages.
        suffixes: endings (in any case) of such files.
        magic: where in a file what bytes stand.
        module: that must be installed, by ``extra``.
        reader: what reads it.
    """

    name: str
    suffixes: tuple[str, ...]
    magic: tuple[tuple[int, bytes], ...]
    module: str
    extra: str
    reader: Reader

    def fits(self, data: bytes) -> bool:
        """Whether a file that begins so is one."""
        return any(data.startswith(magic, place) for place, magic in self.magic)

    @property
    def installed(self) -> bool:
        """Whether it can be read here."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def command(self) -> str:
        """That installs what is missing."""
        return f"pip install 'patchmine[{self.extra}]'"

    def need(self) -> None:
        """DecodeError where the package is missing."""
        if not self.installed:
            raise missing(self.name, self.module, self.command)


DOMAINS = (
    Domain("a DICOM file", dicom.SUFFIXES, dicom.MAGIC, "pydicom", "dicom", dicom.READER),
    Domain("a NIfTI file", nifti.SUFFIXES, nifti.MAGIC, "nibabel", "nifti", nifti.READER),
    Domain("a FITS file", astronomy.SUFFIXES, astronomy.MAGIC, "astropy", "fits", astronomy.READER),
    Domain("an HDF5 file", hdf5.SUFFIXES, hdf5.MAGIC, "h5py", "hdf5", hdf5.READER),
    Domain("a zarr folder", zarrs.SUFFIXES, zarrs.MAGIC, "zarr", "zarr", zarrs.READER),
)
_HEAD = max(place + len(magic) for domain in DOMAINS for place, magic in domain.magic)


@dataclass(frozen=True)
class Part(Piece):
    """An image that lies with others in the file ``path``: a frame, a slice, a plane."""

    path: str
    number: int

    def read(self, channels: int, max_pixels: int) -> tuple[np.ndarray, bool]:
        reader = _domain_of(self.path).reader
        return reader.read(self.path, self.number, channels, max_pixels), False

    def probe(self) -> Facts:
        return _domain_of(self.path).reader.probe(self.path, self.number)


def domain_named(name: str) -> Domain | None:
    """By the ending of a name in small letters."""
    return next((domain for domain in DOMAINS if name.endswith(domain.suffixes)), None)


def domain_of_head(path: str) -> Domain | None:
    """By the first bytes of a file.  OSError as of `open_regular`."""
    with open_regular(path) as handle:
        head = handle.read(_HEAD)
    return next((domain for domain in DOMAINS if domain.fits(head)), None)


def read_only(domain: Domain, data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """(C, H, W) of the contents of a file with one image; raises DecodeError."""
    _refuse_many(domain, data)
    return domain.reader.read(data, 0, channels, max_pixels)


def probe_only(domain: Domain, data: bytes) -> Facts:
    """Facts of it; raises DecodeError."""
    _refuse_many(domain, data)
    return domain.reader.probe(data, 0)


def _domain_of(path: str) -> Domain:
    domain = domain_named(path.lower()) or domain_of_head(path)
    if domain is None:
        raise DecodeError("has changed since it was listed: it is of another format")
    domain.need()
    return domain


def _refuse_many(domain: Domain, data: bytes) -> None:
    domain.need()
    count = domain.reader.count(data)
    if count > 1:
        where = "data= a folder or a list of such files makes an item of each"
        raise DecodeError(f"is {domain.name} of {count} images where one is needed; with {where}")
