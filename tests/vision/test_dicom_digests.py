"""Real files decode to the pixels that they decoded to before imagecodecs took the place of pydicom's decoders.

The digests were taken with pylibjpeg, pylibjpeg-libjpeg, pylibjpeg-openjpeg, Pillow and pydicom's own RLE decoder, of
files that were looked at then. One file differs on purpose, by one grey level: JPGExtended.dcm, 12-bit JPEG, whose
inverse cosine transform is libjpeg-turbo's now.
"""

import hashlib

import numpy as np
import pytest

from echovlm_ray.vision.dicom import decode_dicom
from tests.vision.dicom_samples import REAL, real

DIGESTS = {
    "examples_ybr_color.dcm": "af53dd4a24bc3767",
    "examples_rgb_color.dcm": "a64f021b9093684b",
    "examples_jpeg2k.dcm": "e16892020c73095e",
    "examples_palette.dcm": "322156a65198e9be",
    "ExplVR_BigEnd.dcm": "1583c4339dd36e91",
    "color3d_jpeg_baseline.dcm": "d968f5157b6d9a39",
    "JPGLosslessP14SV1_1s_1f_8b.dcm": "c9e3dd1102067229",
    "gdcm-US-ALOKA-16.dcm": "97697b719ccd7c15",
    "OBXXXX1A.dcm": "f27736ea1acb75cb",
    "OBXXXX1A_2frame.dcm": "7b43b70eef940616",
    "OBXXXX1A_expb.dcm": "f27736ea1acb75cb",
    "OBXXXX1A_expb_2frame.dcm": "7b43b70eef940616",
    "OBXXXX1A_rle.dcm": "f27736ea1acb75cb",
    "OBXXXX1A_rle_2frame.dcm": "7b43b70eef940616",
    "US1_J2KI.dcm": "2138e755d364de89",
    "US1_J2KR.dcm": "e16892020c73095e",
    "US1_UNCI.dcm": "2138e755d364de89",
    "US1_UNCR.dcm": "e16892020c73095e",
    "SC_rgb_jls_lossy_line.dcm": "bd5344c0a46bc6c0",
    "SC_rgb_gdcm_KY.dcm": "169e619557b12114",
    "SC_rgb_rle_16bit.dcm": "169e619557b12114",
    "SC_rgb_rle_32bit.dcm": "169e619557b12114",
    "SC_rgb_jpeg_gdcm.dcm": "169e619557b12114",
    "SC_rgb_dcmtk_+eb+cr.dcm": "e414aaca68669516",
    "SC_rgb_dcmtk_+eb+cy+s4.dcm": "ddb100d8f45a7fbf",
    "SC_jpeg_no_color_transform.dcm": "be7aa556b206ac44",
    "SC_jpeg_no_color_transform_2.dcm": "334275c10bc60e80",
    "SC_rgb_jpeg_app14_dcmd.dcm": "334275c10bc60e80",
    "SC_ybr_full_422_uncompressed.dcm": "ddb100d8f45a7fbf",
    "JPEG-LL.dcm": "2a295efa788649f7",
    "JPEGLSNearLossless_16.dcm": "1b20e6ab5094d2c9",
    "emri_small_jpeg_ls_lossless.dcm": "0748481488ebfd5e",
    "emri_small_jpeg_2k_lossless.dcm": "0748481488ebfd5e",
    "emri_small_RLE.dcm": "0748481488ebfd5e",
    "emri_small_big_endian.dcm": "0748481488ebfd5e",
    "J2K_pixelrep_mismatch.dcm": "61293a1eff3669e7",
    "MR_small_RLE.dcm": "14a6bdecaf0d9a69",
    "color-pl.dcm": "4631a14e915f1a7f",
    "color-px.dcm": "4631a14e915f1a7f",
    "mlut_18.dcm": "ed3fded796c8e79c",
    "vlut_04.dcm": "8601042f87f51710",
    "liver.dcm": "6031333627d3240a",
    "rtdose_rle.dcm": "05ef3e90cb254801",
    "explicit_VR-UN.dcm": "a79b3a8eaa3f231b",
    "gdcm-US-ALOKA-16_big.dcm": "97697b719ccd7c15",
    "RG1_J2KR.dcm": "29e8bf02f45e3cdb",
    "SC_rgb_small_odd_big_endian.dcm": "ef2df252ba3cd066",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_pixels_are_the_same_as_before(name: str) -> None:
    found = decode_dicom(real(name), max_pixels=40_000_000, max_frames=8, crop_to_regions=False)
    assert hashlib.sha256(np.stack(found.frames).tobytes()).hexdigest()[:16] == DIGESTS[name]


def test_all_real_ultrasound_is_covered() -> None:
    assert set(REAL) <= set(DIGESTS)
