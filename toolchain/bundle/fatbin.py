"""Which GPUs a library has machine code for, read from the fat binaries that nvcc puts into it.

The form is NVIDIA's: `fatbinary_section.h` of the toolkit has the header; that of an entry is not documented, and was
held against `cuobjdump --list-elf`.
"""

import struct
from pathlib import Path

from elftools.elf.elffile import ELFFile

_SECTION = ".nv_fatbin"
_MAGIC = 0xBA55ED50
_HEADER = struct.Struct("<IHHQ")
"""Magic, version, bytes of this header, bytes of the entries that follow."""
_ENTRY = struct.Struct("<HHIQ8xHHI")
"""Kind, version, bytes of this header, bytes of the payload, …, minor, major, architecture."""
_MACHINE_CODE = 2
_LISTING = 1


def code_in(path: Path) -> set[str]:
    """What the ELF file at `path` holds: "sm_87" for machine code, "compute_75" for PTX. Empty when there is none."""
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(_SECTION)
        return set() if section is None else codes(section.data())


def codes(data: bytes) -> set[str]:
    """The same of a section's bytes: fat binaries one after the other, padding between them."""
    found: set[str] = set()
    at = 0
    while at + _HEADER.size <= len(data):
        magic, _, header, size = _HEADER.unpack_from(data, at)
        if magic != _MAGIC or header < _HEADER.size:
            at += 8
            continue
        entry, end = at + header, min(at + header + size, len(data))
        while entry + _ENTRY.size <= end:
            kind, _, entry_header, payload, _, _, architecture = _ENTRY.unpack_from(data, entry)
            if entry_header < _ENTRY.size:
                break
            if kind in (_MACHINE_CODE, _LISTING):
                found.add(f"{'sm' if kind == _MACHINE_CODE else 'compute'}_{architecture}")
            entry += entry_header + payload
        at = end
    return found
