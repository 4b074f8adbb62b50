"""Which EXIF tags a reply keeps, and as what: whatever is in none of these tables is left out.

A kind says which TIFF types a tag may have. Only text has any length: every other tag has at most `count` values, so
that no tag can hide a picture.
"""

from typing import NamedTuple

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SRATIONAL, UTF8 = 1, 2, 3, 4, 5, 7, 10, 129

_KINDS = {
    "text": {ASCII, UTF8},
    "comment": {ASCII, UNDEFINED, UTF8},  # behind 8 bytes that name its encoding
    "utf16": {BYTE, UNDEFINED},
    "whole": {BYTE, SHORT, LONG},
    "rational": {RATIONAL, SRATIONAL},
    "code": {ASCII, BYTE, UNDEFINED},
}


class Kept(NamedTuple):
    """types: which of TIFF's a value may have. at_most: so many values; None for text."""

    name: str
    types: set[int]
    at_most: int | None


def _table(lines: str) -> dict[int, Kept]:
    kept = {}
    for line in lines.strip().splitlines():
        tag, name, kind, *count = line.split()
        kept[int(tag, 16)] = Kept(name, _KINDS[kind], int(count[0]) if count else None)
    return kept


# Who made the picture, with what, when, under which rights; its resolution.
IMAGE = _table("""
010d DocumentName text
010e ImageDescription text
010f Make text
0110 Model text
011a XResolution rational 1
011b YResolution rational 1
0128 ResolutionUnit whole 1
0131 Software text
0132 DateTime text
013b Artist text
013c HostComputer text
4746 Rating whole 1
4749 RatingPercent whole 1
8298 Copyright text
9c9b XPTitle utf16
9c9c XPComment utf16
9c9d XPAuthor utf16
9c9e XPKeywords utf16
9c9f XPSubject utf16
""")

# How it was taken.
PHOTO = _table("""
829a ExposureTime rational 1
829d FNumber rational 1
8822 ExposureProgram whole 1
8824 SpectralSensitivity text
8827 ISOSpeedRatings whole 3
882a TimeZoneOffset whole 2
882b SelfTimerMode whole 1
8830 SensitivityType whole 1
8831 StandardOutputSensitivity whole 1
8832 RecommendedExposureIndex whole 1
8833 ISOSpeed whole 1
8834 ISOSpeedLatitudeyyy whole 1
8835 ISOSpeedLatitudezzz whole 1
9000 ExifVersion code 4
9003 DateTimeOriginal text
9004 DateTimeDigitized text
9010 OffsetTime text
9011 OffsetTimeOriginal text
9012 OffsetTimeDigitized text
9102 CompressedBitsPerPixel rational 1
9201 ShutterSpeedValue rational 1
9202 ApertureValue rational 1
9203 BrightnessValue rational 1
9204 ExposureBiasValue rational 1
9205 MaxApertureValue rational 1
9206 SubjectDistance rational 1
9207 MeteringMode whole 1
9208 LightSource whole 1
9209 Flash whole 1
920a FocalLength rational 1
9286 UserComment comment
9290 SubsecTime text
9291 SubsecTimeOriginal text
9292 SubsecTimeDigitized text
9400 AmbientTemperature rational 1
9401 Humidity rational 1
9402 Pressure rational 1
9403 WaterDepth rational 1
9404 Acceleration rational 1
9405 CameraElevationAngle rational 1
a000 FlashPixVersion code 4
a001 ColorSpace whole 1
a004 RelatedSoundFile text
a20b FlashEnergy rational 1
a20e FocalPlaneXResolution rational 1
a20f FocalPlaneYResolution rational 1
a210 FocalPlaneResolutionUnit whole 1
a215 ExposureIndex rational 1
a217 SensingMethod whole 1
a300 FileSource code 1
a301 SceneType code 1
a401 CustomRendered whole 1
a402 ExposureMode whole 1
a403 WhiteBalance whole 1
a404 DigitalZoomRatio rational 1
a405 FocalLengthIn35mmFilm whole 1
a406 SceneCaptureType whole 1
a407 GainControl whole 1
a408 Contrast whole 1
a409 Saturation whole 1
a40a Sharpness whole 1
a40c SubjectDistanceRange whole 1
a420 ImageUniqueID text
a430 CameraOwnerName text
a431 BodySerialNumber text
a432 LensSpecification rational 4
a433 LensMake text
a434 LensModel text
a435 LensSerialNumber text
a436 ImageTitle text
a437 Photographer text
a438 ImageEditor text
a439 CameraFirmware text
a43a RAWDevelopingSoftware text
a43b ImageEditingSoftware text
a43c MetadataEditingSoftware text
a460 CompositeImage whole 1
a461 CompositeImageCount whole 2
a500 Gamma rational 1
""")

# Where.
GPS = _table("""
0000 GPSVersionID code 4
0001 GPSLatitudeRef text
0002 GPSLatitude rational 3
0003 GPSLongitudeRef text
0004 GPSLongitude rational 3
0005 GPSAltitudeRef whole 1
0006 GPSAltitude rational 1
0007 GPSTimeStamp rational 3
0008 GPSSatellites text
0009 GPSStatus text
000a GPSMeasureMode text
000b GPSDOP rational 1
000c GPSSpeedRef text
000d GPSSpeed rational 1
000e GPSTrackRef text
000f GPSTrack rational 1
0010 GPSImgDirectionRef text
0011 GPSImgDirection rational 1
0012 GPSMapDatum text
0013 GPSDestLatitudeRef text
0014 GPSDestLatitude rational 3
0015 GPSDestLongitudeRef text
0016 GPSDestLongitude rational 3
0017 GPSDestBearingRef text
0018 GPSDestBearing rational 1
0019 GPSDestDistanceRef text
001a GPSDestDistance rational 1
001b GPSProcessingMethod comment
001c GPSAreaInformation comment
001d GPSDateStamp text
001e GPSDifferential whole 1
001f GPSHPositioningError rational 1
""")

# Which file format rules its colours follow.
INTEROP = _table("""
0001 InteropIndex text
0002 InteropVersion code 4
""")

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x011A, 0x011B, 0x0128
PHOTO_AT, GPS_AT, INTEROP_AT = 0x8769, 0x8825, 0xA005
XMP, ICC = 0x02BC, 0x8773

# Left out without a word: they describe how the pixels were stored, and these are written anew.
STRUCTURE = {
    0xFE, 0xFF, 0x100, 0x101, 0x102, 0x103, 0x106, 0x107, 0x108, 0x109, 0x10A, 0x111, 0x115, 0x116, 0x117, 0x118, 0x119,
    0x11C, 0x122, 0x123, 0x124, 0x125, 0x12D, 0x13D, 0x13E, 0x13F, 0x140, 0x141, 0x142, 0x143, 0x144, 0x145, 0x152,
    0x153, 0x154, 0x155, 0x15B, 0x200, 0x211, 0x212, 0x213, 0x214, 0x9101, 0xA002, 0xA003,
}  # fmt: skip
